"""The reverse variance that is optimal for a given denoiser (Analytic-DPM, Bao et al. 2022).

Given x_t, x_0 is not a point, so p(x_s | x_t) should be wider than q(x_s | x_t, x_0): by
of_x_0^2 Var[x_0 | x_t], where E Var[x_0 | x_t] = (sigma_t / alpha_t)^2 (1 - G_t) per dimension and
G_t = E |eps_hat(x_t, t)|^2 / D is measured once on data. G = 1 gives `fixed_small`.
"""

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import (
    fixed_small,
    per_example_mean,
    posterior_coefficients,
    q_sample,
)
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import keys_per_example, normal
from ddpm.diffusion.times import step_times
from ddpm.diffusion.variances import ReverseVariance


def second_moments(
    schedule: NoiseSchedule, denoiser: Denoiser, x_0: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns G_t of t = 0..T, float32[T + 1], a mean over the examples; 0 at t = 0, where it is
    not used.

    T calls of the denoiser, which must not be clipped. x_0 is [B, ...]; key: one, or B.
    """
    keys = keys_per_example(key, len(x_0))

    def at(t: jax.Array) -> jax.Array:
        x_t = q_sample(schedule, x_0, t, normal(keys, t, x_0.shape[1:]))
        eps = predict(denoiser, x_t, t).eps
        return per_example_mean(eps**2).mean()

    found = jax.lax.map(at, jnp.arange(1, schedule.num_steps + 1, dtype=jnp.int32))
    return jnp.concatenate([jnp.zeros(1, jnp.float32), found])


def analytic(moments: jax.Array, *, most: float = 1.0) -> ReverseVariance:
    """Returns the optimal variance by `second_moments`, as a log, for any s < t (their Eq. 8).

    E Var[x_0 | x_t] is cut at `most`, the greatest that data in [-1, 1] can have; at s = 0 it is
    that of `fixed_small`. Between whole times the moments are linear.
    """

    def variance(schedule: NoiseSchedule, t: jax.Array, *, s: jax.Array | None = None) -> jax.Array:
        t, s = step_times(schedule.ends, t, s)
        level = schedule.at(t)
        moment = jnp.interp(t, jnp.arange(len(moments), dtype=jnp.float32), moments)
        of_x_0, _ = posterior_coefficients(schedule.between(s, t))
        spread = jnp.clip(jnp.exp(-level.high) * (1 - moment), 0.0, most)
        small = fixed_small(schedule, t, s=s)
        wide = jnp.logaddexp(small, jnp.log(of_x_0**2 * spread))
        return jnp.where(s == 0, small, wide)

    return variance
