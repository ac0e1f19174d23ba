"""The variational bound L = L_T + sum_{t > 1} L_{t-1} + L_0 (Eq. 5), in bits/dim.

    L_T      KL(q(x_T | x_0) || N(0, I))                          prior
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        one per step t > 1
    L_0      -log p(x_0 | x_1), the discretised decoder of Eq. 13

Each is a mean over dimensions, divided by ln 2.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import (
    decoder_log_likelihood,
    fixed_large,
    fixed_small,
    lift,
    normal_kl,
    posterior_coefficients,
    q_sample,
    same_shape,
)
from ddpm.diffusion.losses import per_example_mean
from ddpm.diffusion.predictions import Denoiser, Prediction, to_posterior_mean
from ddpm.diffusion.schedules import NoiseSchedule

BITS_PER_NAT = 1 / np.log(2)


class ReverseVariance(Protocol):
    """`fixed_small`, `fixed_large` or the like: the log-variance of p(x_s | x_t) by (t, s)."""

    def __call__(
        self, schedule: NoiseSchedule, t: jax.Array, *, s: jax.Array | None = None
    ) -> jax.Array: ...


class Bound(NamedTuple):
    """The terms of the bound in bits/dim, each per example [B]; `steps` is [B, K - 1] for K times.

    steps[:, i] is the term of the (i + 2)-th time: L_1, L_2, .. in the paper's numbering.
    """

    prior: jax.Array
    steps: jax.Array
    decoder: jax.Array

    @property
    def total(self) -> jax.Array:
        """L, float32[B]."""
        return self.prior + self.steps.sum(axis=-1) + self.decoder


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
      key: a typed key; the noise at t is drawn from fold_in(key, t).
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
    if not jnp.issubdtype(x_0.dtype, jnp.floating):
        raise ValueError(f"x_0 is of {x_0.dtype}: must be scaled to [-1, 1], k/127.5 - 1")
    x_0 = x_0.astype(jnp.float32)

    def noised(t: jax.Array) -> tuple[jax.Array, Prediction]:
        eps = jax.random.normal(jax.random.fold_in(key, t), x_0.shape, x_0.dtype)
        x_t = q_sample(schedule, x_0, t, eps)
        return x_t, denoiser(x_t, jnp.broadcast_to(t, x_0.shape[:1]))

    def step(t_and_s: tuple[jax.Array, jax.Array]) -> jax.Array:
        t, s = t_and_s
        _, prediction = noised(t)
        return step_kl(schedule, x_0, t, prediction, s=s, variance=variance)

    first = jnp.asarray(times[0])
    x_t, prediction = noised(first)
    return Bound(
        prior=prior_kl(schedule, x_0, t=times[-1]),
        steps=jax.lax.map(step, (jnp.asarray(times[1:]), jnp.asarray(times[:-1]))).T,
        decoder=decoder_nll(schedule, x_0, x_t, first, prediction, variance=variance, floor=floor),
    )


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
        _log_variance(schedule, prediction, t, s, variance),
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
    log_variance = _log_variance(schedule, prediction, t, s, variance)
    return (
        -per_example_mean(decoder_log_likelihood(x_0, mean, log_variance, floor=floor))
        * BITS_PER_NAT
    )


def _log_variance(
    schedule: NoiseSchedule,
    prediction: Prediction,
    t: jax.Array,
    s: jax.Array,
    variance: ReverseVariance,
) -> jax.Array:
    if prediction.log_variance is not None:
        return prediction.log_variance
    return lift(variance(schedule, t, s=s), prediction.x_0)
