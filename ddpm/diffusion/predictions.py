"""What a network's output means: eps, x_0, v, score or posterior mean; each gives the others.

All follow from x_t = alpha_t x_0 + sigma_t eps (Eq. 4). A **denoiser** is what joins a network to
the mathematics: a function (x_t [B, ...], t int[B]) -> Prediction. Samplers, losses and
likelihoods take denoisers, so they run as well on an exact, closed-form one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import lift, posterior_coefficients, same_shape
from ddpm.diffusion.schedules import Schedule


class Prediction(NamedTuple):
    """What a denoiser says of x_t: the expected x_0 and eps, two views of one thing.

    Where the model learns the reverse variance, in the shape of x_0: `log_variance`, that of
    p(x_{t-1} | x_t) and of no longer step; or `variance_fraction`, between the two fixed ones at
    whatever step is taken (see `variances`).
    """

    x_0: jax.Array
    eps: jax.Array
    log_variance: jax.Array | None = None
    variance_fraction: jax.Array | None = None


Denoiser = Callable[[jax.Array, jax.Array], Prediction]
Network = Callable[[jax.Array, jax.Array], jax.Array]
Reading = Callable[[Schedule, jax.Array, jax.Array, jax.Array], Prediction]
LearnedVariance = Callable[[Prediction, jax.Array], Prediction]


def denoiser(
    schedule: Schedule,
    network: Network,
    reading: Reading | None = None,
    *,
    learned: LearnedVariance | None = None,
) -> Denoiser:
    """The denoiser of a network (x_t, t) -> array of x_t's shape, its parameters closed over.

    `reading` says what the array means: `from_eps` (the paper's, and the default), `from_x_0`, ...
    With `learned`, such as `variances.learned_range`, it has twice the channels: the second half
    tells the reverse variance. Raises ValueError where x_0 is not told: of eps or the score, with
    no signal at t = T; or for an odd number of channels that should be halved.
    """
    reading = reading or from_eps
    if reading in (from_eps, from_score) and schedule.ends_without_signal():
        raise ValueError(
            f"the schedule leaves no signal at t = T = {schedule.ends[1]:g} (alpha_T = 0), where "
            "eps and the score do not tell x_0: let the network predict x_0 or v"
        )

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        output = network(x_t, t)
        if learned is None:
            return reading(schedule, x_t, t, output)
        output, raw = jnp.split(output, 2, axis=-1)
        return learned(reading(schedule, x_t, t, output), raw)

    return denoise


def by_log_snr(schedule: Schedule, network: Network) -> Network:
    """The network told of the noise by its log-SNR in the place of t: 25 (20 - log_snr).

    That is in 0..1000 for a log-SNR from 20 to -20, and the nearer end beyond: on one scale for all
    schedules, also for one that is learned. `preconditioned` tells of it by itself.
    """

    def told(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return network(x_t, 25 * (20 - jnp.clip(schedule.at(t).high, -20, 20)))

    return told


def preconditioned(schedule: Schedule, network: Network, *, sigma_data: float = 0.5) -> Denoiser:
    """The denoiser of Karras et al. (2022), Eq. 7, from a network F(c_in x, c_noise).

    x_0 = c_skip x + c_out F with x = x_t/alpha_t, which is the data plus noise of standard
    deviation sigma = sigma_t/alpha_t; c_noise = log(sigma)/4 takes the place of the network's t.
    sigma_data is the data's standard deviation about 0. Raises ValueError with no signal at t = T.
    """
    if schedule.ends_without_signal():
        raise ValueError(
            f"the schedule leaves no signal at t = T = {schedule.ends[1]:g} (alpha_T = 0), where "
            "EDM's sigma is infinite"
        )

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        level = schedule.at(t)
        sigma, x = jnp.exp(-0.5 * level.high), x_t / lift(level.alpha, x_t)
        total = sigma**2 + sigma_data**2
        c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total**0.5, total**-0.5
        output = network(lift(c_in, x) * x, -level.high / 8)
        same_shape(x_t=x_t, output=output)
        return from_x_0(schedule, x_t, t, lift(c_skip, x) * x + lift(c_out, x) * output)

    return denoise


def clipped(
    schedule: Schedule, denoise: Denoiser, low: float = -1.0, high: float = 1.0
) -> Denoiser:
    """The denoiser with x_0 clipped to the data's range, and eps derived anew from it.

    The paper clips when sampling and when reporting bits/dim, never in the training loss.
    """

    def clip(x_t: jax.Array, t: jax.Array) -> Prediction:
        prediction = denoise(x_t, t)
        x_0, eps, *_ = from_x_0(schedule, x_t, t, jnp.clip(prediction.x_0, low, high))
        return prediction._replace(x_0=x_0, eps=eps)

    return clip


def thresholded(schedule: Schedule, denoise: Denoiser, percentile: float = 0.995) -> Denoiser:
    """Dynamic thresholding (Saharia et al. 2022, Section 2.3), in the place of `clipped`.

    Where s, the quantile of |x_0| in a sample, is above 1, x_0 is clipped to [-s, s] and divided by
    s; elsewhere to [-1, 1]. eps is derived anew. Raises ValueError unless 0 < percentile <= 1.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile = {percentile}: must be in (0, 1], 0.995 say")

    def threshold(x_t: jax.Array, t: jax.Array) -> Prediction:
        prediction = denoise(x_t, t)
        sizes = jnp.abs(prediction.x_0).reshape(x_t.shape[0], -1)
        s = lift(jnp.maximum(jnp.quantile(sizes, percentile, axis=1), 1.0), x_t)
        x_0, eps, *_ = from_x_0(schedule, x_t, t, jnp.clip(prediction.x_0, -s, s) / s)
        return prediction._replace(x_0=x_0, eps=eps)

    return threshold


def from_eps(schedule: Schedule, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> Prediction:
    """x_0 = (x_t - sigma_t eps) / alpha_t; not defined where alpha_t = 0."""
    same_shape(x_t=x_t, eps=eps)
    level = schedule.at(t)
    inverse_alpha, noise_to_signal = 1 / level.alpha, jnp.exp(-0.5 * level.high)
    return Prediction(lift(inverse_alpha, x_t) * x_t - lift(noise_to_signal, x_t) * eps, eps)


def from_x_0(schedule: Schedule, x_t: jax.Array, t: jax.Array, x_0: jax.Array) -> Prediction:
    """eps = (x_t - alpha_t x_0) / sigma_t."""
    same_shape(x_t=x_t, x_0=x_0)
    level = schedule.at(t)
    return Prediction(x_0, (x_t - lift(level.alpha, x_t) * x_0) / lift(level.sigma, x_t))


def from_v(schedule: Schedule, x_t: jax.Array, t: jax.Array, v: jax.Array) -> Prediction:
    """v = alpha_t eps - sigma_t x_0 (Salimans & Ho 2022), so x_0 = alpha_t x_t - sigma_t v."""
    same_shape(x_t=x_t, v=v)
    level = schedule.at(t)
    alpha, sigma = lift(level.alpha, x_t), lift(level.sigma, x_t)
    return Prediction(alpha * x_t - sigma * v, sigma * x_t + alpha * v)


def from_score(schedule: Schedule, x_t: jax.Array, t: jax.Array, score: jax.Array) -> Prediction:
    """score = grad log q(x_t) = -eps / sigma_t: denoising score matching (Section 3.2)."""
    same_shape(x_t=x_t, score=score)
    return from_eps(schedule, x_t, t, -lift(schedule.at(t).sigma, x_t) * score)


def from_posterior_mean(
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    mean: jax.Array,
    *,
    s: jax.Array | None = None,
) -> Prediction:
    """The mean of q(x_s | x_t, x_0), mu-tilde of Eq. 7, solved for x_0; s is t - 1 if left out."""
    same_shape(x_t=x_t, mean=mean)
    t = jnp.asarray(t)
    of_x_0, of_x_t = posterior_coefficients(schedule.between(t - 1 if s is None else s, t))
    return from_x_0(schedule, x_t, t, (mean - lift(of_x_t, x_t) * x_t) / lift(of_x_0, x_t))


def to_v(schedule: Schedule, t: jax.Array, prediction: Prediction) -> jax.Array:
    """v = alpha_t eps - sigma_t x_0."""
    level = schedule.at(t)
    x_0, eps = prediction.x_0, prediction.eps
    return lift(level.alpha, x_0) * eps - lift(level.sigma, x_0) * x_0


def to_score(schedule: Schedule, t: jax.Array, prediction: Prediction) -> jax.Array:
    """grad log q(x_t) = -eps / sigma_t."""
    return -prediction.eps / lift(schedule.at(t).sigma, prediction.eps)


def to_posterior_mean(
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    s: jax.Array | None = None,
) -> jax.Array:
    """The mean of q(x_s | x_t, x_0) at the predicted x_0 (Eqs. 7, 11); s is t - 1 if left out."""
    same_shape(x_t=x_t, x_0=prediction.x_0)
    t = jnp.asarray(t)
    of_x_0, of_x_t = posterior_coefficients(schedule.between(t - 1 if s is None else s, t))
    return lift(of_x_0, x_t) * prediction.x_0 + lift(of_x_t, x_t) * x_t
