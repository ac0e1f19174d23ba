"""Guidance: functions that wrap denoisers, to draw from a class, or away from one.

In every result x_0 and eps belong to the same x_t = alpha_t x_0 + sigma_t eps, so that any sampler
takes it. Clip (`clipped`, `thresholded`) after guiding, not before.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import expand_like
from ddpm.diffusion.predictions import Denoiser, Prediction, from_x_0, predict
from ddpm.diffusion.schedules import NoiseSchedule, require_signal

CLASSIFIER_SILENT = "where a classifier has nothing to say of x_0"

LogProbability = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free(
    schedule: NoiseSchedule,
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: jax.typing.ArrayLike,
    *,
    interval: tuple[float, float] | None = None,
    rescale: float = 0.0,
) -> Denoiser:
    """Returns the denoiser with eps = eps_u + w (eps_c - eps_u), w the scale (Ho & Salimans 2022,
    who call it 1 + w).

    Args:
      unconditional: what is led away from. A negative prompt is another conditional denoiser here.
      scale: a number, or [B], one for each sample: 1 is the conditional, 0 the unconditional,
        above 1 guided, below 0 away from the condition.
      interval: (lo, hi): guided only where lo < sigma_t / alpha_t <= hi, else the conditional
        (Kynkäänniemi et al. 2024), and the unconditional is not computed there.
      rescale: phi in [0, 1] of Lin et al. 2024, Eqs. 15-16: x_0 is multiplied by what gives it the
        standard deviation, over all axes but the first, of the conditional x_0, mixed with 1. (In
        the paper it acts on the network's output v, which is -x_0 where there is no signal.)

    A learned variance is that of the conditional. Raises ValueError for an interval that is none,
    or phi beyond its range.
    """
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"interval = {interval}: must be (lo, hi) with 0 <= lo < hi")
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale = {rescale}: must be between 0 (off) and 1")

    def guided(x_t: jax.Array, t: jax.Array, by: jax.Array, towards: Prediction) -> Prediction:
        away = predict(unconditional, x_t, t)
        w = expand_like(by, x_t)
        # So x_0 and eps are combined alike, and it is exact at w = 0 and 1; both stay those of
        # x_t, also where alpha_t = 0 and eps would not tell x_0.
        x_0, eps = (
            (1 - w) * u + w * c for u, c in ((away.x_0, towards.x_0), (away.eps, towards.eps))
        )
        found = Prediction(x_0, eps)
        if rescale:
            factor = _std(towards.x_0) / jnp.maximum(_std(x_0), jnp.finfo(x_0.dtype).tiny)
            factor = jnp.where(_std(x_0) > 0, factor, 1.0)  # of one pixel, say
            x_0 = expand_like(rescale * factor + (1 - rescale), x_t) * x_0
            found = from_x_0(schedule, x_t, t, x_0)
        return towards._replace(x_0=found.x_0, eps=found.eps)

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        towards = predict(conditional, x_t, t)
        if interval is None:
            return guided(x_t, t, jnp.asarray(scale, jnp.float32), towards)
        noise_to_signal = jnp.exp(-0.5 * schedule.at(t).high)
        inside = (noise_to_signal > interval[0]) & (noise_to_signal <= interval[1])
        by = jnp.where(inside, jnp.asarray(scale, jnp.float32), 1.0)
        return jax.lax.cond(inside.any(), lambda: guided(x_t, t, by, towards), lambda: towards)

    return denoise


def classifier_guided(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    log_probability: LogProbability,
    scale: jax.typing.ArrayLike,
) -> Denoiser:
    """Returns the denoiser with eps - w sigma_t grad log p(y | x_t), w the scale (Dhariwal & Nichol
    2021, Algorithm 2).

    log_probability(x_t, t) -> [B], nats, each of its own sample alone: by a classifier of noisy
    data, or `of_x_0`. With the exact one and w = 1 it is the denoiser of the class (Bayes' rule).
    `scale` is a number, or [B]. Raises ValueError for a schedule without signal at t = T, where the
    gradient vanishes and its part in x_0 is 0/0.
    """
    require_signal(schedule, CLASSIFIER_SILENT)

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        prediction = predict(denoiser, x_t, t)
        gradient = jax.grad(lambda x: log_probability(x, t).sum())(x_t)
        level = schedule.at(t)
        w = expand_like(jnp.asarray(scale, jnp.float32), x_t)
        step = w * expand_like(level.sigma, x_t) * gradient
        return prediction._replace(
            x_0=prediction.x_0 + expand_like(jnp.exp(-0.5 * level.high), x_t) * step,
            eps=prediction.eps - step,
        )

    return denoise


def of_x_0(
    denoiser: Denoiser, log_probability_of_x_0: Callable[[jax.Array], jax.Array]
) -> LogProbability:
    """Returns log p(y | x_t) as a classifier of clean data, x_0 -> [B], judges the predicted x_0.

    For `classifier_guided`, which differentiates through the denoiser: give it one that is not
    clipped, for a clipped pixel has no gradient. It is an approximation, of E[p(y | x_0) | x_t] by
    p(y | E[x_0 | x_t]) (as Chung et al. 2023 do for inverse problems).
    """
    return lambda x_t, t: log_probability_of_x_0(predict(denoiser, x_t, t).x_0)


def _std(x: jax.Array) -> jax.Array:
    """Returns the standard deviation of each sample, [B]."""
    return x.reshape(x.shape[0], -1).std(axis=1)
