"""Averages of the weights over training, and averages made afterwards.

    ema <- ema + rate(step) (params - ema)        step = 1 for the first update; rate = 1 - decay

The average starts from the weights before the first step. `constant`, `warm_up`, `half_life` and
`power` are rates; `reconstruct` makes the average of any length after training, out of snapshots
of power-function averages (Karras et al. 2024).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# 1 - decay and not the decay, which float32 keeps few digits of so near 1.
Rate = Callable[[jax.Array], jax.typing.ArrayLike]


def update(average: Any, params: Any, rate: jax.typing.ArrayLike) -> Any:
    """Returns the average, a tree as the params, after one more step; see the module.

    By the difference: in rate params + (1 - rate) ema, as optax.incremental_update has it, 1 - rate
    is rounded, and the average shrinks (by 2e-4 in 20,000 steps at a decay of 0.99999).
    """
    return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)


def constant(decay: float) -> Rate:
    """Returns the rate 1 - decay at every step. Raises ValueError unless 0 <= decay < 1."""
    _check_decay(decay)
    return lambda step: 1 - decay


def warm_up(decay: float) -> Rate:
    """Returns the rate of decay min(decay, (1 + step)/(10 + step)): short at first, to forget the
    first weights."""
    _check_decay(decay)
    return lambda step: jnp.maximum(1 - decay, 9.0 / (10.0 + jnp.float32(step)))


def half_life(images: float, batch_size: int, *, ramp_up: float | None = 0.05) -> Rate:
    """Returns the rate by which half of the average is of the last `images` images, whatever the
    batch (Karras et al. 2022).

    With `ramp_up`, of no more than this part of the images seen so far. Raises ValueError unless
    all are > 0.
    """
    if not (images > 0 and batch_size > 0 and (ramp_up is None or ramp_up > 0)):
        raise ValueError(f"half-life {images}, batch {batch_size}, ramp-up {ramp_up}: must be > 0")

    def rate(step: jax.Array) -> jax.Array:
        batches = jnp.float32(images / batch_size)
        if ramp_up is not None:
            batches = jnp.minimum(batches, ramp_up * jnp.float32(step))
        return -jnp.expm1(-math.log(2) / batches)

    return rate


def power(relative_std: float) -> Rate:
    """Returns the rate of decay (1 - 1/step)^(gamma + 1), by which weights count as step^gamma
    (Karras et al. 2024).

    The average's width is always the same part of the training so far, relative_std: there 0.05
    or 0.10. The first step's decay is 0: the weights before it are forgotten.
    """
    exponent = power_of(relative_std) + 1
    return lambda step: -jnp.expm1(exponent * jnp.log1p(-1.0 / jnp.float32(step)))


def power_of(relative_std: float) -> float:
    """Returns gamma > 0 of a profile t^gamma on [0, 1] with this standard deviation (Karras et al.
    2024).

    std = sqrt(gamma + 1)/((gamma + 2) sqrt(gamma + 3)). Raises ValueError outside (0, 0.288), where
    there is none.
    """
    if not 0 < relative_std < 12**-0.5:
        raise ValueError(f"relative_std = {relative_std}: must be in (0, {12**-0.5:.3f})")
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1)/std^2, of whose roots one is > 0.
    inverse = relative_std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


class Profile(NamedTuple):
    """The weight at each moment tau in [0, time] of an average: as tau^gamma."""

    time: float
    gamma: float


def reconstruction(snapshots: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Returns float64[len(snapshots)], the factors whose sum of the snapshots' profiles is nearest
    to it.

    By least squares over time (Karras et al. 2024, Algorithm 3). Raises ValueError for no
    snapshots, or for a time later than all of theirs.
    """
    if not snapshots or wanted.time > max(s.time for s in snapshots):
        raise ValueError(f"no snapshot of the time {wanted.time:g}, or after it")
    gram = np.array([[_inner(a, b) for b in snapshots] for a in snapshots])
    # Scaled to ones on the diagonal, else late snapshots have all the say in the rank.
    scale = np.sqrt(gram.diagonal())
    right = np.array([_inner(a, wanted) for a in snapshots]) / scale
    return np.linalg.lstsq(gram / np.outer(scale, scale), right, rcond=1e-13)[0] / scale


def misfit(snapshots: Sequence[Profile], wanted: Profile, factors: np.ndarray) -> float:
    """Returns the relative L2 error of the sum of the snapshots' profiles: 0 is exact, 1 is no
    better than zero.

    The norm of the difference over time by that of the wanted: 0, it is that; 1, no better than 0.
    """
    gram = np.array([[_inner(a, b) for b in snapshots] for a in snapshots])
    across = np.array([_inner(a, wanted) for a in snapshots])
    square = 1 + (factors @ gram @ factors - 2 * factors @ across) / _inner(wanted, wanted)
    return float(np.sqrt(max(square, 0.0)))


def reconstruct(
    averages: Iterable[Any], snapshots: Sequence[Profile], time: float, relative_std: float
) -> Any:
    """Returns the average with this width at this time, out of snapshots: trees of arrays of
    weights.

    `averages` are the trees that `power` had made by the times of `snapshots` (gamma of each:
    `power_of`), taken one by one and summed in float64. A tree of NumPy arrays of their dtypes.
    Raises ValueError as `reconstruction`, or for unequal numbers.
    """
    factors = reconstruction(snapshots, Profile(time, power_of(relative_std)))
    total: Any = None
    dtypes: Any = None
    for factor, average in zip(factors, averages, strict=True):
        if total is None:
            dtypes = jax.tree.map(lambda x: np.asarray(x).dtype, average)
            total = jax.tree.map(lambda x: np.zeros(np.shape(x)), average)
        part = jax.tree.map(lambda x, f=factor: f * np.asarray(x, np.float64), average)
        total = jax.tree.map(np.add, total, part)
    return jax.tree.map(lambda x, dtype: np.asarray(x).astype(dtype), total, dtypes)


def _inner(a: Profile, b: Profile) -> float:
    """Returns the integral of the product of two profiles, each of integral 1."""
    if min(a.time, b.time) <= 0:
        raise ValueError("a profile's time must be > 0")
    end = min(a.time, b.time)
    size = (a.gamma + 1) * (b.gamma + 1) / (a.gamma + b.gamma + 1) / max(a.time, b.time)
    return size * (end / a.time) ** a.gamma * (end / b.time) ** b.gamma


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay = {decay}: must be in [0, 1)")
