"""The variational bound L = L_T + sum_{t > 1} L_{t-1} + L_0 (Eq. 5), in bits/dim.

    L_T      KL(q(x_T | x_0) || N(0, I))                          prior
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        one per step t > 1
    L_0      -log p(x_0 | x_1), the discretised decoder of Eq. 13

Each is a mean over dimensions, divided by ln 2 (`bound_terms`). `bits_per_dim` computes every
term, `sampled_bits_per_dim` an unbiased estimate from a few, `bound` that of another process.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion import streams
from ddpm.diffusion.bound_terms import decoder_nll, prior_kl, step_kl
from ddpm.diffusion.gaussian import fixed_large
from ddpm.diffusion.pixels import check_scaled
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.process import GaussianDiffusion, Process
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import keys_per_example
from ddpm.diffusion.variances import ReverseVariance

__all__ = [
    "Bound",
    "SampledBound",
    "bits_per_dim",
    "bound",
    "decoder_nll",
    "prior_kl",
    "sampled_bits_per_dim",
    "step_kl",
]


class Bound(NamedTuple):
    """The terms of the bound in bits/dim, each per example [B]; `steps` is [B, K - 1] for K times.

    steps[:, i] is the term of the (i + 2)-th time: L_1, L_2, .. in the paper's numbering.
    squared_error, [B, K], is that of x_0 as predicted at each time, a mean over dimensions.
    """

    prior: jax.Array
    steps: jax.Array
    decoder: jax.Array
    squared_error: jax.Array

    @property
    def total(self) -> jax.Array:
        """L, float32[B]."""
        return self.prior + self.steps.sum(axis=-1) + self.decoder


class SampledBound(NamedTuple):
    """The prior and decoder terms [B] in bits/dim, and K of the steps' terms, drawn: [B, K].

    steps[b, k] is L_{t-1} at t[b, k], one of 2..T; the sum of weight * steps over k has the
    expectation of the sum of all terms. squared_error, [B, 1 + K], is that of x_0 as predicted at
    time 1 and at each t.
    """

    prior: jax.Array
    decoder: jax.Array
    t: jax.Array
    weight: jax.Array
    steps: jax.Array
    squared_error: jax.Array

    @property
    def total(self) -> jax.Array:
        """An unbiased estimate of L, float32[B]."""
        return self.prior + (self.weight * self.steps).sum(axis=-1) + self.decoder


def bits_per_dim(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    key: jax.Array,
    *,
    variance: ReverseVariance = fixed_large,
    times: np.ndarray | None = None,
    floor: float = 1e-12,
) -> Bound:
    """Returns every term of the bound, each at its own noised x_t: a denoiser call for each time.

    Args:
      x_0: 8-bit data as k/127.5 - 1, [B, ...].
      key: a typed key, split into one per example by its number, or B keys (`sample_keys`); the
        noise at t is drawn from fold_in(key of the example, t).
      variance: of the reverse steps, where the denoiser does not learn it.
      times: rising, 1..T if left out; a shorter list gives the bound of the chain over those.
      floor: the decoder's least probability (`decoder_log_likelihood`).

    Raises ValueError for other times, for x_0 that is not scaled (of integers), or for a
    prediction that is not in the shape of x_0.
    """
    process = GaussianDiffusion(schedule, variance, floor=floor)
    return bound(process, denoiser, jnp.float32(check_scaled(x_0)), key, times=times)


def bound(
    process: Process,
    denoiser: Callable[[jax.Array, jax.Array], Any],
    x_0: jax.Array,
    key: jax.Array,
    *,
    times: np.ndarray | None = None,
) -> Bound:
    """Returns every term of the bound of any process, Gaussian or discrete; as `bits_per_dim`."""
    last = process.num_steps
    times = np.arange(1, last + 1) if times is None else np.asarray(times)
    whole = times.ndim == 1 and times.size and np.issubdtype(times.dtype, np.integer)
    if not whole or (np.diff([0, *times, last + 1]) < 1).any():
        raise ValueError(f"times {times.tolist()}: must be integers that rise within 1..T = {last}")
    keys = keys_per_example(key, len(x_0))

    def step(t_and_s: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, s = t_and_s
        x_t, prediction = _noised(process, denoiser, x_0, keys, t)
        term = process.step_term(x_0, x_t, t, s, prediction)
        return term, process.distortion(x_0, prediction)

    times = times.astype(np.int32)
    first = jnp.asarray(times[0])
    x_t, prediction = _noised(process, denoiser, x_0, keys, first)
    steps, errors = jax.lax.map(step, (jnp.asarray(times[1:]), jnp.asarray(times[:-1])))
    nearest = process.distortion(x_0, prediction)
    return Bound(
        prior=process.prior_term(x_0, times[-1]),
        steps=steps.T,
        decoder=process.decoder_term(x_0, x_t, first, prediction),
        squared_error=jnp.concatenate([nearest[:, None], errors.T], axis=1),
    )


def sampled_bits_per_dim(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    key: jax.Array,
    *,
    num_times: int,
    variance: ReverseVariance = fixed_large,
    floor: float = 1e-12,
) -> SampledBound:
    """Estimates the bound over 1..T by `num_times` of its steps for each example, not all T - 1.

    The times are drawn with a probability that falls as 1/t, as most bits are at small t, and
    evenly spread in it (one random offset for each example). The rest is as in `bits_per_dim`.
    Raises ValueError for num_times < 1 too, or T < 2.
    """
    last = schedule.num_steps
    if num_times < 1 or last < 2:
        raise ValueError(f"{num_times} of T - 1 = {last - 1} terms: at least one needed")
    process = GaussianDiffusion(schedule, variance, floor=floor)
    x_0, keys = jnp.float32(check_scaled(x_0)), keys_per_example(key, len(x_0))
    probability = 1 / np.arange(2, last + 1)
    probability /= probability.sum()
    of_offsets = jax.vmap(jax.random.fold_in, (0, None))(keys, streams.OFFSET)
    offset = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(of_offsets)
    place = (offset[:, None] + jnp.arange(num_times, dtype=jnp.float32)) / num_times
    edges = jnp.asarray(probability.cumsum()[:-1], jnp.float32)
    t = 2 + jnp.searchsorted(edges, place, side="right").astype(jnp.int32)
    weight = 1 / (num_times * jnp.asarray(probability, jnp.float32)[t - 2])

    def step(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        x_t, prediction = _noised(process, denoiser, x_0, keys, t)
        term = process.step_term(x_0, x_t, t, t - 1, prediction)
        return term, process.distortion(x_0, prediction)

    first = jnp.ones((), jnp.int32)
    x_1, prediction = _noised(process, denoiser, x_0, keys, first)
    steps, errors = jax.lax.map(step, t.T)
    nearest = process.distortion(x_0, prediction)
    return SampledBound(
        prior=process.prior_term(x_0, last),
        decoder=process.decoder_term(x_0, x_1, first, prediction),
        t=t,
        weight=weight,
        steps=steps.T,
        squared_error=jnp.concatenate([nearest[:, None], errors.T], axis=1),
    )


def _noised(
    process: Process, denoiser: Any, x_0: jax.Array, keys: jax.Array, t: jax.Array
) -> tuple[jax.Array, Any]:
    """Draws x_t ~ q(x_t | x_0) for t a scalar or [B], and returns it with its prediction."""
    x_t = process.forward(x_0, t, process.noise(keys, t, x_0.shape[1:]))
    return x_t, predict(denoiser, x_t, t)
