"""The reverse variance, that of p(x_s | x_t): fixed, or learned with the mean.

A network that learns it has twice the data's channels; what the second half means:

    learned_diagonal   the log-variance itself (Ho et al. 2020, Table 2), of steps from t to t - 1
    learned_range      a place between the two fixed ones (Nichol & Dhariwal 2021, Eq. 15), of any
                       step, so that a chain may have fewer

`wide_decoder` is a fixed one for schedules whose levels are close from the first on.

Whoever needs the variance of a step asks `reverse_log_variance`.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import expand_like, fixed_small, same_shape
from ddpm.diffusion.predictions import Prediction
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.times import step_times


class ReverseVariance(Protocol):
    """The log-variance of p(x_s | x_t) by (t, s): `fixed_small`, `fixed_large` or the like."""

    __name__: str

    def __call__(
        self, schedule: NoiseSchedule, t: jax.Array, *, s: jax.Array | None = None
    ) -> jax.Array: ...


def wide_decoder(variance: ReverseVariance) -> ReverseVariance:
    """Returns `variance`, but sigma_t^2/alpha_t^2 at s = 0: how far x_t alone leaves x_0 open.

    That of VDM's decoder (Kingma et al. 2021), for a schedule with many levels close to the first
    (`continuous.table`): beta-tilde_2, which the fixed ones have there, is by the distance of the
    next level, and so near 0 whatever the noise of the first.
    """

    def wide(schedule: NoiseSchedule, t: jax.Array, *, s: jax.Array | None = None) -> jax.Array:
        t, s = step_times(schedule.ends, t, s)
        return jnp.where(s == 0, -schedule.at(t).high, variance(schedule, t, s=s))

    return wide


def learned_diagonal(prediction: Prediction, raw: jax.Array) -> Prediction:
    """Reads the output as the log-variance of p(x_{t-1} | x_t), in the shape of x_0."""
    same_shape(x_0=prediction.x_0, log_variance=raw)
    return prediction._replace(log_variance=raw)


def learned_range(prediction: Prediction, raw: jax.Array) -> Prediction:
    """Reads the output v as the fraction f = (v + 1)/2; nothing holds it in [0, 1], as in the
    paper."""
    same_shape(x_0=prediction.x_0, variance=raw)
    return prediction._replace(variance_fraction=(raw + 1) / 2)


def range_log_variance(
    schedule: NoiseSchedule, fraction: jax.Array, t: jax.Array, s: jax.Array
) -> jax.Array:
    """Returns f log beta_{t|s} + (1 - f) log beta-tilde (IDDPM, Eq. 15), in the shape of the
    fraction f.

    Beta-tilde at s = 0 is that of `fixed_small`; beta_{t|0}, which is finite, is itself.
    """
    large = expand_like(schedule.between(s, t).log_beta, fraction)
    small = expand_like(fixed_small(schedule, t, s=s), fraction)
    return fraction * large + (1 - fraction) * small


def reverse_log_variance(
    schedule: NoiseSchedule,
    prediction: Prediction,
    t: jax.Array,
    s: jax.Array,
    variance: ReverseVariance,
) -> jax.Array:
    """Returns the log-variance of p(x_s | x_t): the prediction's own, else that of `variance`.

    Broadcastable against x_0. Of a `learned_diagonal` it is only right for s = t - 1.
    """
    t, s = step_times(schedule.ends, t, s)
    if prediction.log_variance is not None:
        return prediction.log_variance
    if prediction.variance_fraction is not None:
        return range_log_variance(schedule, prediction.variance_fraction, t, s)
    return expand_like(variance(schedule, t, s=s), prediction.x_0)
