"""The driver: any sampler over any denoiser as one `lax.scan`.

Noise is seeded per sample: what is added on the way into x_s comes from fold_in(key of the sample,
s), so a sample is the same in whatever batch, and on however many devices, it is drawn.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.flow import NO_END
from ddpm.diffusion.pixels import check_scaled
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.process import GaussianDiffusion, Noise, Process, Step, StepInfo, StepResult
from ddpm.diffusion.schedules import NoiseSchedule, require_signal
from ddpm.diffusion.streams import keys_per_example, noise_streams
from ddpm.sampling import samplers
from ddpm.sampling.samplers import Sampler, ancestral


class Chain(NamedTuple):
    """A reverse process with snapshots: x_0 [B, ...], and at each of the F times, [F, B, ...],
    x_t and the x_0 predicted there. `evaluations`, int32: how often the denoiser was called.
    `reports`: what the sampler reports of its N steps, [N, ...], if anything."""

    x_0: jax.Array
    times: np.ndarray
    x_t: jax.Array
    predicted_x_0: jax.Array
    evaluations: jax.Array
    reports: Any = ()


def sample(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    sampler: Sampler | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    x_t: jax.Array | None = None,
) -> jax.Array:
    """Draws x_0 of `shape` [B, ...] by `sampler` (by default `ancestral()`, Algorithm 2).

    Args:
      key: one typed key, split into one per sample by its number, or B keys (`sample_keys`).
      denoiser: wrap it in `clipped` to keep x_0 in the data's range, as the paper does.
      times: falling, in place of the sampler's own from T to 0 (see `grids`); whole or not, the
        last is where it ends.
      x_t: where to begin, at the first of the times; standard normal if left out.

    Raises ValueError for times that do not fall within 0..T, x_t of another shape, or steps longer
    than a `learned_diagonal` variance is of; TypeError for what is no sampler, denoiser or key.
    """
    return sample_chain(
        key, schedule, denoiser, shape, sampler=sampler, times=times, x_t=x_t, snapshots=0
    ).x_0


def sample_chain(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    sampler: Sampler | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    x_t: jax.Array | None = None,
    snapshots: int = 10,
) -> Chain:
    """Draws as `sample` does, keeping `snapshots` evenly spread moments of the chain, the start
    first."""
    sampler = ancestral() if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler is {sampler!r}: pass one as it is made, ddpm.ddim(steps=50)")
    if times is None:
        times = samplers.times(schedule.num_steps, sampler.steps)
    times = check_chain(schedule, sampler, times)
    step = _single_steps_alone(sampler) if (np.diff(times) < -1).any() else sampler.step
    process = GaussianDiffusion(schedule, step=step, make_memory=sampler.memory)
    start = None if x_t is None else check_scaled(x_t, "x_t")
    return run_chain(key, process, denoiser, shape, times, x_t=start, snapshots=snapshots)


def run_chain(
    key: jax.Array,
    process: Process,
    denoiser: Any,
    shape: Sequence[int],
    times: np.ndarray,
    *,
    x_t: jax.Array | None = None,
    snapshots: int = 0,
) -> Chain:
    """Runs the reverse steps of any process over `times` [N + 1], as one scan.

    The driver of `sample_chain`, which says what the arguments are. Raises ValueError for an x_t
    that is not of `shape`.
    """
    shape, t = tuple(shape), times
    keys = keys_per_example(key, shape[0])
    if x_t is not None and x_t.shape != shape:
        raise ValueError(f"x_t is of shape {x_t.shape}, the samples of {shape}")
    steps = len(t) - 1
    snapshots = min(snapshots, steps)
    moments = np.round(np.linspace(0, steps - 1, snapshots)).astype(np.int32)
    # Where step i's snapshot goes; the extra row absorbs the steps that are not kept.
    slots = np.full(steps, snapshots, np.int32)
    slots[moments] = np.arange(snapshots)
    streams = noise_streams(t, process.num_steps)

    def step(carry, inputs):
        x_t, memory, evaluations, kept = carry
        t_now, s, number, stream, slot = inputs

        folded = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)

        def draw(k: jax.typing.ArrayLike) -> jax.Array:
            if isinstance(k, int) and k == 0:
                return process.noise(keys, stream, shape[1:])
            return process.noise(folded, k, shape[1:])

        step_info = StepInfo(t_now, s, number, jnp.asarray(t))
        found = process.reverse(denoiser, x_t, step_info, Noise(draw, folded), memory)
        if snapshots:
            now = x_t, found.prediction.x_0
            kept = jax.tree.map(lambda k, x: k.at[slot].set(x), kept, now)
        return (found.x, found.memory, evaluations + found.evaluations, kept), found.report

    if x_t is None:
        x_t = process.prior(process.noise(keys, streams[0], shape[1:]))
    rows = snapshots + 1 if snapshots else 0
    empty = (jnp.zeros((rows, *shape), x_t.dtype), jnp.zeros((rows, *shape), jnp.float32))
    carry = x_t, process.memory(x_t), jnp.zeros((), jnp.int32), empty
    numbers = np.arange(steps, dtype=np.int32)
    inputs = [jnp.asarray(x) for x in (t[:-1], t[1:], numbers, streams[1:], slots)]
    (x_0, _, evaluations, kept), reports = jax.lax.scan(step, carry, inputs)
    x_kept, predicted = (k[:snapshots] for k in kept)
    return Chain(x_0, t[:-1][moments], x_kept, predicted, evaluations, reports)


def _single_steps_alone(sampler: Sampler) -> Step:
    """Returns the sampler's step, which raises ValueError where it would take a variance that was
    learned for steps from t to t - 1."""

    def step(*of: Any) -> StepResult:
        found = sampler.step(*of)
        if sampler.uses_variance and found.prediction.log_variance is not None:
            raise ValueError(
                "the learned variance is that of single steps from t to t - 1: take all T steps, "
                "or ddim, or train with learned_range"
            )
        return found

    return step


def check_chain(
    schedule: NoiseSchedule, sampler: Sampler, times: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Returns the times of a chain as `check_times` does.

    Raises ValueError for times that it refuses, or where the sampler needs a signal and begins
    without.
    """
    checked = check_times(times, schedule.num_steps, may_increase_t=sampler.may_increase_t)
    if sampler.needs_signal and (sampler.adaptive or checked[0] == schedule.num_steps):
        require_signal(schedule, NO_END if sampler.adaptive else samplers.INFINITE_SIGMA)
    return checked


def check_times(
    times: Sequence[float] | np.ndarray, num_steps: int, *, may_increase_t: bool = False
) -> np.ndarray:
    """Returns the times of a chain, int32 where all are whole, else float32.

    Raises ValueError unless they fall (with `may_increase_t`: move) within T..0, at least two, with
    none between 0, the data, and 1, the first noise level.
    """
    t = np.asarray(times, np.float64)
    shown = t.tolist() if t.size <= 12 else f"of {t.size} entries"
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"times {shown}: must be a list of at least two")
    moves = np.diff(t) != 0 if may_increase_t else np.diff(t) < 0
    within = (t <= num_steps) & ((t >= 1) | (t == 0))
    for i in np.flatnonzero(~within):
        raise ValueError(f"times {shown}: t = {t[i]:g} is not within T = {num_steps}..1, nor 0")
    for i in np.flatnonzero(~moves):
        raise ValueError(f"times {shown}: must fall, but after t = {t[i]:g} comes {t[i + 1]:g}")
    if (t[:-1] == 0).any():
        raise ValueError(f"times {shown}: must end at 0, the data, not pass it")
    return t.astype(np.int32 if (t == np.rint(t)).all() else np.float32)
