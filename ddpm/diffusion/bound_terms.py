"""The terms of the variational bound (Eq. 5), one of each kind, in bits/dim.

    L_T      KL(q(x_T | x_0) || N(0, I))                          prior_kl
    L_{t-1}  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))        step_kl
    L_0      -log p(x_0 | x_1), the discretised decoder of Eq. 13 decoder_nll

Each is a mean over dimensions, divided by ln 2: float32[B].
"""

import math

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import (
    decoder_log_likelihood,
    expand_like,
    fixed_large,
    fixed_small,
    normal_kl,
    per_example_mean,
    posterior_coefficients,
    same_shape,
)
from ddpm.diffusion.predictions import Prediction, to_posterior_mean
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.times import as_times, step_times
from ddpm.diffusion.variances import ReverseVariance, reverse_log_variance

BITS_PER_NAT = 1 / math.log(2)  # a Python float: NumPy's would make float64 of float32


def prior_kl(schedule: NoiseSchedule, x_0: jax.Array, *, t: int | None = None) -> jax.Array:
    """Returns L_T in bits/dim, float32[B]: KL(q(x_T | x_0) || N(0, I)). No parameters in it."""
    level = schedule.at(schedule.num_steps if t is None else t)
    kl = normal_kl(level.alpha * x_0, level.log_sigma_squared, 0.0, 0.0)
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
    """Returns L_{t-1} in bits/dim, float32[B]: KL(q(x_s | x_t, x_0) || p(x_s | x_t)) for s >= 1.

    The two means differ by their x_0 alone; subtracting the means themselves would lose all digits
    at large t, where both are nearly x_t.
    """
    same_shape(x_0=x_0, prediction=prediction.x_0)
    t, s = step_times(schedule.ends, t, s)
    of_x_0, _ = posterior_coefficients(schedule.between(s, t))
    kl = normal_kl(
        expand_like(of_x_0, x_0) * (x_0 - prediction.x_0),
        expand_like(fixed_small(schedule, t, s=s), x_0),
        0.0,
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
    """Returns L_0 in bits/dim, float32[B]: -log p(x_0 | x_t) at the first time t, usually 1."""
    same_shape(x_0=x_0, x_t=x_t, prediction=prediction.x_0)
    t = as_times(schedule.ends, t, noisy=True)
    s = jnp.zeros_like(t)
    mean = to_posterior_mean(schedule, x_t, t, prediction, s=s)
    log_variance = reverse_log_variance(schedule, prediction, t, s, variance)
    return (
        -per_example_mean(decoder_log_likelihood(x_0, mean, log_variance, floor=floor))
        * BITS_PER_NAT
    )
