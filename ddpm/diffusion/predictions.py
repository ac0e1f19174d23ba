"""The meaning of a network's output: eps, x_0, v, score or posterior mean; each gives the others.

All follow from x_t = alpha_t x_0 + sigma_t eps (Eq. 4). A **denoiser** is what joins a network to
the mathematics: a function (x_t [B, ...], t int[B]) -> Prediction. Samplers, losses and
likelihoods take denoisers, so they run as well on an exact, closed-form one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import expand_like, posterior_coefficients, same_shape
from ddpm.diffusion.schedules import Schedule, require_signal
from ddpm.diffusion.times import as_times, step_times

NOT_TOLD = "where eps and the score do not tell x_0: let the network predict x_0 or v"


class Prediction(NamedTuple):
    """The expected x_0 and eps given x_t, two views of one thing: a denoiser's output.

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
LearnedVariance = Callable[[Prediction, jax.Array], Prediction]


def predict(denoise: Denoiser, x_t: jax.Array, t: jax.Array) -> Prediction:
    """Returns the denoiser's prediction at x_t [B, ...] and t, [B] or one for the whole batch.

    Raises TypeError for what is no prediction, ValueError for one not in the shape of x_t. It
    comes in the type of x_t, so that no denoiser changes the type of a chain.
    """
    found = denoise(x_t, jnp.broadcast_to(t, x_t.shape[:1]))
    if not hasattr(found, "x_0"):
        raise TypeError(
            f"the denoiser returns {type(found).__name__}, not a Prediction: make it of a network "
            "by ddpm.denoiser(schedule, network), or return ddpm.Prediction(x_0, eps)"
        )
    same_shape(x_t=x_t, predicted_x_0=found.x_0)
    return jax.tree.map(lambda x: _in_type_of(x_t, x), found)


def _in_type_of(x_t: jax.Array, x: jax.Array) -> jax.Array:
    floats = all(jnp.issubdtype(jnp.result_type(a), jnp.floating) for a in (x_t, x))
    return jnp.asarray(x, jnp.result_type(x_t)) if floats else x


class Parameterization:
    """The meaning of a network's output, (schedule, x_t, t, output) -> Prediction, and what it
    needs.

    needs_signal: it does not tell x_0 where the schedule leaves no signal.
    whole_times: it is of the step from t to t - 1, and so of whole times alone.
    """

    def __init__(
        self,
        read: Callable[..., Prediction],
        *,
        needs_signal: bool = False,
        whole_times: bool = False,
    ) -> None:
        functools.update_wrapper(self, read)
        self.read, self.needs_signal, self.whole_times = read, needs_signal, whole_times

    def __call__(
        self, schedule: Schedule, x_t: jax.Array, t: jax.Array, output: jax.Array, **options: Any
    ) -> Prediction:
        """Returns the prediction that the output stands for."""
        return self.read(schedule, x_t, t, output, **options)


def parameterization(
    *, needs_signal: bool = False, whole_times: bool = False
) -> Callable[[Callable[..., Prediction]], Parameterization]:
    """Returns the decorator that makes a `Parameterization` of a function."""
    return functools.partial(Parameterization, needs_signal=needs_signal, whole_times=whole_times)


def denoiser(
    schedule: Schedule,
    network: Network,
    parameterization: Parameterization | None = None,
    *,
    learned: LearnedVariance | None = None,
) -> Denoiser:
    """Returns the denoiser of a network (x_t, t) -> array of x_t's shape, its parameters closed
    over.

    `parameterization` says what the array means: `from_eps` (the paper's, and the default),
    `from_x_0`, ...
    With `learned`, such as `variances.learned_range`, it has twice the channels: the second half is
    the reverse variance. Raises ValueError where x_0 is not determined, for eps or the score with
    no signal at t = T; or for an odd number of channels that should be halved; TypeError for what
    is no parameterization, such as its name.
    """
    read = parameterization or from_eps
    if not isinstance(read, Parameterization):
        raise TypeError(
            f"parameterization is {read!r}: pass one of ddpm.predictions, such as from_v"
        )
    if read.needs_signal:
        require_signal(schedule, NOT_TOLD)

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        output = network(x_t, t)
        if learned is None:
            return read(schedule, x_t, t, output)
        output, raw = jnp.split(output, 2, axis=-1)
        return learned(read(schedule, x_t, t, output), raw)

    return denoise


def conditioned_on_log_snr(schedule: Schedule, network: Network) -> Network:
    """Conditions the network on the log-SNR in place of t, as 25 (20 - log_snr).

    On one scale for all schedules, also for one that is learned. `preconditioned` has its own.
    """

    def conditioned(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return network(x_t, log_snr_input(schedule.at(t).high))

    return conditioned


def noise_unconditional(schedule: Schedule, network: Network) -> Network:
    """Gives the network y = x_t/alpha_t, the data plus noise of standard deviation sigma_t/alpha_t,
    and 0 in the place of t: NCSNv2's (Song & Ermon 2020, Technique 3).

    Of eps it is the score of y as a function f(y) over sigma, eps = -f. Which noise is in y, the
    network sees by y alone, and so only in many dimensions. Raises ValueError with no signal at
    t = T.
    """
    require_signal(schedule, "where y = x_t / alpha_t is infinite")

    def unconditional(x_t: jax.Array, t: jax.Array) -> jax.Array:
        y = x_t / expand_like(schedule.at(t).alpha, x_t)
        return network(y, jnp.zeros_like(t))

    return unconditional


def log_snr_input(log_snr: jax.Array) -> jax.Array:
    """Returns what a network sees of a log-SNR in the place of t: 0..1000 for 20..-20, and the
    nearer end beyond."""
    return 25 * (20 - jnp.clip(log_snr, -20, 20))


def preconditioned(schedule: Schedule, network: Network, *, sigma_data: float = 0.5) -> Denoiser:
    """Returns the denoiser of Karras et al. (2022), Eq. 7, from a network F(c_in x, c_noise).

    x_0 = c_skip x + c_out F with x = x_t/alpha_t, which is the data plus noise of standard
    deviation sigma = sigma_t/alpha_t; c_noise = log(sigma)/4 takes the place of the network's t.
    sigma_data is the data's standard deviation about 0. Raises ValueError with no signal at t = T.
    """
    require_signal(schedule, "where EDM's sigma is infinite")

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        level = schedule.at(as_times(schedule.ends, t, noisy=True))
        sigma, x = jnp.exp(-0.5 * level.high), x_t / expand_like(level.alpha, x_t)
        total = sigma**2 + sigma_data**2
        c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total**0.5, total**-0.5
        output = network(expand_like(c_in, x) * x, -level.high / 8)
        same_shape(x_t=x_t, output=output)
        return from_x_0(
            schedule, x_t, t, expand_like(c_skip, x) * x + expand_like(c_out, x) * output
        )

    return denoise


def clipped(
    schedule: Schedule, denoise: Denoiser, low: float = -1.0, high: float = 1.0
) -> Denoiser:
    """Returns the denoiser with x_0 clipped to the data's range, and eps derived anew from it.

    The paper clips when sampling and when reporting bits/dim, never in the training loss.
    """

    def clip(x_t: jax.Array, t: jax.Array) -> Prediction:
        prediction = predict(denoise, x_t, t)
        x_0, eps, *_ = from_x_0(schedule, x_t, t, jnp.clip(prediction.x_0, low, high))
        return prediction._replace(x_0=x_0, eps=eps)

    return clip


def thresholded(schedule: Schedule, denoise: Denoiser, percentile: float = 0.995) -> Denoiser:
    """Applies dynamic thresholding (Saharia et al. 2022, Section 2.3), in place of `clipped`.

    Where s, the quantile of |x_0| in a sample, is above 1, x_0 is clipped to [-s, s] and divided by
    s; elsewhere to [-1, 1]. eps is derived anew. Raises ValueError unless 0 < percentile <= 1.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile = {percentile}: must be in (0, 1], 0.995 say")

    def threshold(x_t: jax.Array, t: jax.Array) -> Prediction:
        prediction = predict(denoise, x_t, t)
        sizes = jnp.abs(prediction.x_0).reshape(x_t.shape[0], -1)
        s = expand_like(jnp.maximum(jnp.quantile(sizes, percentile, axis=1), 1.0), x_t)
        x_0, eps, *_ = from_x_0(schedule, x_t, t, jnp.clip(prediction.x_0, -s, s) / s)
        return prediction._replace(x_0=x_0, eps=eps)

    return threshold


@parameterization(needs_signal=True)
def from_eps(schedule: Schedule, x_t: jax.Array, t: jax.Array, eps: jax.Array) -> Prediction:
    """Returns the prediction with x_0 = (x_t - sigma_t eps) / alpha_t; not defined where alpha_t =
    0."""
    same_shape(x_t=x_t, eps=eps)
    level = schedule.at(t)
    inverse_alpha, noise_to_signal = 1 / level.alpha, jnp.exp(-0.5 * level.high)
    return Prediction(
        expand_like(inverse_alpha, x_t) * x_t - expand_like(noise_to_signal, x_t) * eps, eps
    )


@parameterization()
def from_x_0(schedule: Schedule, x_t: jax.Array, t: jax.Array, x_0: jax.Array) -> Prediction:
    """Returns the prediction with eps = (x_t - alpha_t x_0) / sigma_t; not defined at t = 0."""
    same_shape(x_t=x_t, x_0=x_0)
    level = schedule.at(as_times(schedule.ends, t, noisy=True))
    return Prediction(
        x_0, (x_t - expand_like(level.alpha, x_t) * x_0) / expand_like(level.sigma, x_t)
    )


@parameterization()
def from_v(schedule: Schedule, x_t: jax.Array, t: jax.Array, v: jax.Array) -> Prediction:
    """Returns the prediction for v = alpha_t eps - sigma_t x_0 (Salimans & Ho 2022), so x_0 =
    alpha_t x_t - sigma_t v."""
    same_shape(x_t=x_t, v=v)
    level = schedule.at(t)
    alpha, sigma = expand_like(level.alpha, x_t), expand_like(level.sigma, x_t)
    return Prediction(alpha * x_t - sigma * v, sigma * x_t + alpha * v)


@parameterization(needs_signal=True)
def from_score(schedule: Schedule, x_t: jax.Array, t: jax.Array, score: jax.Array) -> Prediction:
    """Returns the prediction for score = grad log q(x_t) = -eps / sigma_t: denoising score matching
    (Section 3.2)."""
    same_shape(x_t=x_t, score=score)
    return from_eps(schedule, x_t, t, -expand_like(schedule.at(t).sigma, x_t) * score)


@parameterization(whole_times=True)
def from_posterior_mean(
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    mean: jax.Array,
    *,
    s: jax.Array | None = None,
) -> Prediction:
    """Returns the prediction for the mean of q(x_s | x_t, x_0), mu-tilde of Eq. 7, solved for x_0;
    s is t - 1 if left out: ValueError for fractional t, whose t - 1 is no step's end."""
    same_shape(x_t=x_t, mean=mean)
    single = s is None
    t, s = step_times(schedule.ends, t, s)
    if single and not _whole(t):
        raise ValueError(
            "the posterior mean is that of the step from t to t - 1, and t is fractional: take "
            "whole times, a sampler that asks at those alone, or another prediction"
        )
    of_x_0, of_x_t = posterior_coefficients(schedule.between(s, t))
    return from_x_0(
        schedule, x_t, t, (mean - expand_like(of_x_t, x_t) * x_t) / expand_like(of_x_0, x_t)
    )


def _whole(t: jax.Array) -> bool:
    if isinstance(t, jax.core.Tracer):
        return not jnp.issubdtype(t.dtype, jnp.floating)
    return bool((np.asarray(t) % 1 == 0).all())


def to_v(schedule: Schedule, t: jax.Array, prediction: Prediction) -> jax.Array:
    """Returns v = alpha_t eps - sigma_t x_0."""
    level = schedule.at(t)
    x_0, eps = prediction.x_0, prediction.eps
    return expand_like(level.alpha, x_0) * eps - expand_like(level.sigma, x_0) * x_0


def to_score(schedule: Schedule, t: jax.Array, prediction: Prediction) -> jax.Array:
    """Returns grad log q(x_t) = -eps / sigma_t; not defined at t = 0."""
    t = as_times(schedule.ends, t, noisy=True)
    return -prediction.eps / expand_like(schedule.at(t).sigma, prediction.eps)


def to_posterior_mean(
    schedule: Schedule,
    x_t: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    s: jax.Array | None = None,
) -> jax.Array:
    """Returns the mean of q(x_s | x_t, x_0) at the predicted x_0 (Eqs. 7, 11); s is t - 1 if left
    out."""
    same_shape(x_t=x_t, x_0=prediction.x_0)
    t, s = step_times(schedule.ends, t, s)
    of_x_0, of_x_t = posterior_coefficients(schedule.between(s, t))
    return expand_like(of_x_0, x_t) * prediction.x_0 + expand_like(of_x_t, x_t) * x_t
