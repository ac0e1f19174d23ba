"""The variational bound L = L_T + sum_{t > 1} L_{t-1} + L_0 (Eq. 5), in bits/dim.

    L_T      KL(q(x_T | x_0) || N(0, I))                          prior
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        one per step t > 1
    L_0      -log p(x_0 | x_1), the discretised decoder of Eq. 13

Each is a mean over dimensions, divided by ln 2. `bits_per_dim` computes every term,
`sampled_bits_per_dim` an unbiased estimate from a few.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import (
    decoder_log_likelihood,
    fixed_large,
    fixed_small,
    lift,
    normal_kl,
    per_example_mean,
    posterior_coefficients,
    q_sample,
    same_shape,
)
from ddpm.diffusion.keys import normal, one_each
from ddpm.diffusion.predictions import Denoiser, Prediction, to_posterior_mean
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance, reverse_log_variance

BITS_PER_NAT = 1 / np.log(2)


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
    """Every term of the bound, each at its own noised x_t: as many denoiser calls as times.

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
    last = schedule.num_steps
    times = np.arange(1, last + 1) if times is None else np.asarray(times)
    whole = times.ndim == 1 and times.size and np.issubdtype(times.dtype, np.integer)
    if not whole or (np.diff([0, *times, last + 1]) < 1).any():
        raise ValueError(f"times {times.tolist()}: must be integers that rise within 1..T = {last}")
    x_0, keys = _scaled(x_0), one_each(key, len(x_0))

    def step(t_and_s: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, s = t_and_s
        _, prediction = _noised(schedule, denoiser, x_0, keys, t)
        kl = step_kl(schedule, x_0, t, prediction, s=s, variance=variance)
        return kl, per_example_mean((x_0 - prediction.x_0) ** 2)

    first = jnp.asarray(times[0])
    x_t, prediction = _noised(schedule, denoiser, x_0, keys, first)
    steps, errors = jax.lax.map(step, (jnp.asarray(times[1:]), jnp.asarray(times[:-1])))
    nearest = per_example_mean((x_0 - prediction.x_0) ** 2)
    return Bound(
        prior=prior_kl(schedule, x_0, t=times[-1]),
        steps=steps.T,
        decoder=decoder_nll(schedule, x_0, x_t, first, prediction, variance=variance, floor=floor),
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
    """The bound over 1..T by `num_times` of its steps for each example, instead of T - 1.

    The times are drawn with a probability that falls as 1/t, as most bits are at small t, and
    evenly spread in it (one random offset for each example). The rest is as in `bits_per_dim`.
    Raises ValueError for num_times < 1 too, or T < 2.
    """
    last = schedule.num_steps
    if num_times < 1 or last < 2:
        raise ValueError(f"{num_times} of T - 1 = {last - 1} terms: at least one needed")
    x_0, keys = _scaled(x_0), one_each(key, len(x_0))
    probability = 1 / np.arange(2, last + 1)
    probability /= probability.sum()
    offset = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0)))(keys)
    place = (offset[:, None] + jnp.arange(num_times)) / num_times
    edges = jnp.asarray(probability.cumsum()[:-1], jnp.float32)
    t = 2 + jnp.searchsorted(edges, place, side="right")
    weight = 1 / (num_times * jnp.asarray(probability, jnp.float32)[t - 2])

    def step(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, prediction = _noised(schedule, denoiser, x_0, keys, t)
        kl = step_kl(schedule, x_0, t, prediction, variance=variance)
        return kl, per_example_mean((x_0 - prediction.x_0) ** 2)

    first = jnp.ones((), int)
    x_1, prediction = _noised(schedule, denoiser, x_0, keys, first)
    steps, errors = jax.lax.map(step, t.T)
    nearest = per_example_mean((x_0 - prediction.x_0) ** 2)
    return SampledBound(
        prior=prior_kl(schedule, x_0),
        decoder=decoder_nll(schedule, x_0, x_1, first, prediction, variance=variance, floor=floor),
        t=t,
        weight=weight,
        steps=steps.T,
        squared_error=jnp.concatenate([nearest[:, None], errors.T], axis=1),
    )


def _scaled(x_0: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise ValueError(f"x_0 is of {x_0.dtype}: must be scaled to [-1, 1], k/127.5 - 1")
    return jnp.asarray(x_0, jnp.float32)


def _noised(
    schedule: NoiseSchedule, denoiser: Denoiser, x_0: jax.Array, keys: jax.Array, t: jax.Array
) -> tuple[jax.Array, Prediction]:
    """x_t ~ q(x_t | x_0) for t a scalar or [B], and what the denoiser makes of it."""
    x_t = q_sample(schedule, x_0, t, normal(keys, t, x_0.shape[1:]))
    return x_t, denoiser(x_t, jnp.broadcast_to(t, x_0.shape[:1]))


def prior_kl(schedule: NoiseSchedule, x_0: jax.Array, *, t: int | None = None) -> jax.Array:
    """L_T in bits/dim, float32[B]: KL(q(x_T | x_0) || N(0, I)). No parameters in it."""
    level = schedule.at(jnp.asarray(schedule.num_steps if t is None else t))
    kl = normal_kl(level.alpha * x_0, level.log_sigma_squared, jnp.zeros(()), jnp.zeros(()))
    return per_example_mean(kl) * BITS_PER_NAT


def step_kl(
    schedule: NoiseSchedule,
    x_0: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    s: jax.Array | None = None,
    variance: ReverseVariance = fixed_large,
) -> jax.Array:
    """L_{t-1} in bits/dim, float32[B]: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) for s >= 1.

    The two means differ by their x_0 alone; subtracting the means themselves would lose all digits
    at large t, where both are nearly x_t.
    """
    same_shape(x_0=x_0, prediction=prediction.x_0)
    t = jnp.asarray(t)
    s = t - 1 if s is None else s
    of_x_0, _ = posterior_coefficients(schedule.between(s, t))
    kl = normal_kl(
        lift(of_x_0, x_0) * (x_0 - prediction.x_0),
        lift(fixed_small(schedule, t, s=s), x_0),
        jnp.zeros(()),
        reverse_log_variance(schedule, prediction, t, s, variance),
    )
    return per_example_mean(kl) * BITS_PER_NAT


def decoder_nll(
    schedule: NoiseSchedule,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    variance: ReverseVariance = fixed_large,
    floor: float = 1e-12,
) -> jax.Array:
    """L_0 in bits/dim, float32[B]: -log p(x_0 | x_t) at the first time t, usually 1."""
    same_shape(x_0=x_0, x_t=x_t, prediction=prediction.x_0)
    t = jnp.asarray(t)
    s = jnp.zeros_like(t)
    mean = to_posterior_mean(schedule, x_t, t, prediction, s=s)
    log_variance = reverse_log_variance(schedule, prediction, t, s, variance)
    return (
        -per_example_mean(decoder_log_likelihood(x_0, mean, log_variance, floor=floor))
        * BITS_PER_NAT
    )
