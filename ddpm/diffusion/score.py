"""Scores, grad log q, of the noised data: a denoiser's, and the losses that fit them.

A **score** is a function (x [B, ...], t [B]) -> [B, ...] in units of 1/x. There are two views of
the data at a noise level. Variance preserving: x_t = alpha_t x_0 + sigma_t eps, the paper's.
Variance exploding: y = x_t / alpha_t = x_0 + s eps with s = sigma_t / alpha_t, that of Song & Ermon
(2019).

    s = ddpm.score.of(schedule, denoiser)
    loss = ddpm.score.denoising(schedule, s, x_0, t, eps).mean()

The denoising losses take `weight`, the function lambda of the noise's standard deviation in the
view. Arguments x_0, t and eps are as in `losses`; results float32[B], the mean over dimensions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import expand_like, per_example_mean, q_sample, same_shape
from ddpm.diffusion.predictions import Denoiser, Prediction, from_score, predict, to_score
from ddpm.diffusion.schedules import Schedule, require_signal

Score = Callable[[jax.Array, jax.Array], jax.Array]
Weight = Callable[[jax.Array], jax.Array]  # lambda of the standard deviation of the noise

NO_SIGNAL = "where x_t / alpha_t is infinite: the score of x_t itself is finite"


def of(schedule: Schedule, denoiser: Denoiser) -> Score:
    """Returns the score of x_t that a denoiser stands for, -eps / sigma_t (Ho et al. 2020, Section
    3.2); not finite at t = 0."""

    def score(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return to_score(schedule, t, predict(denoiser, x_t, t))

    return score


def denoiser(schedule: Schedule, score: Score) -> Denoiser:
    """Returns the denoiser that a score of x_t stands for: x_0 = (x_t + sigma_t^2 score) / alpha_t,
    Tweedie's formula (Efron 2011).

    Raises ValueError for a schedule without signal at t = T, where x_0 is not determined.
    """
    require_signal(schedule, "where a score does not tell x_0")

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        return from_score(schedule, x_t, t, score(x_t, t))

    return denoise


def exploding(schedule: Schedule, score: Score) -> Score:
    """Returns the score of y = x_t / alpha_t from that of x_t: alpha_t score(alpha_t y).

    Raises ValueError for a schedule without signal at t = T.
    """
    require_signal(schedule, NO_SIGNAL)

    def of_y(y: jax.Array, t: jax.Array) -> jax.Array:
        alpha = expand_like(schedule.at(t).alpha, y)
        return alpha * score(alpha * y, t)

    return of_y


def preserving(schedule: Schedule, score: Score) -> Score:
    """Returns the score of x_t from that of y = x_t / alpha_t, the inverse of `exploding`."""
    require_signal(schedule, NO_SIGNAL)

    def of_x_t(x_t: jax.Array, t: jax.Array) -> jax.Array:
        alpha = expand_like(schedule.at(t).alpha, x_t)
        return score(x_t / alpha, t) / alpha

    return of_x_t


def denoising(
    schedule: Schedule,
    score: Score,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    weight: Weight = jnp.square,
) -> jax.Array:
    """Returns lambda(sigma_t) |score(x_t) + eps / sigma_t|^2: denoising score matching (Vincent
    2011).

    With the default lambda = sigma^2 it is L_simple of eps_hat = -sigma_t score exactly. Its mean
    differs from `explicit`'s by what no score changes: see `explicit`.
    """
    x_t, sigma = q_sample(schedule, x_0, t, eps), schedule.at(t).sigma
    return _weighted_error(score, x_t, t, sigma, eps, weight)


def denoising_exploding(
    schedule: Schedule,
    score: Score,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    weight: Weight = jnp.square,
) -> jax.Array:
    """Returns lambda(s) |score(y) + eps / s|^2 of y = x_0 + s eps, s = sigma_t / alpha_t: NCSN's
    loss (Song & Ermon 2019, Eq. 5 without the half), `score` being that of y.

    With the default lambda = s^2 it is L_simple too: both views weight the error of eps alike.
    """
    level = schedule.at(t)
    s = level.sigma / level.alpha
    y = x_0 + expand_like(s, x_0) * eps
    return _weighted_error(score, y, t, s, eps, weight)


def _weighted_error(
    score: Score, x: jax.Array, t: jax.Array, std: jax.Array, eps: jax.Array, weight: Weight
) -> jax.Array:
    """Returns lambda(std) |score(x) + eps / std|^2, of x with noise std eps in it."""
    found = score(x, jnp.broadcast_to(t, x.shape[:1]))
    same_shape(x_0=x, score=found)
    # std times the error: finite, and free of cancellation, where std is small.
    error = per_example_mean((expand_like(std, x) * found + eps) ** 2)
    return weight(std) / std**2 * error


def explicit(score: Score, exact: Score, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns |score - exact|^2 at x_t [B, ...], the Fisher divergence where x_t is drawn from q.

    E denoising (of lambda = 1) = E explicit + 1 / sigma_t^2 - E |exact|^2, each the mean over
    dimensions (Vincent 2011, Eq. 11): they have one minimum, and the constant is what a perfect
    score still pays for not knowing eps.
    """
    return per_example_mean((score(x_t, t) - exact(x_t, t)) ** 2)


def implicit(score: Score, x: jax.Array, t: jax.Array) -> jax.Array:
    """Returns |score|^2 + 2 div score, exactly (Hyvärinen 2005, Theorem 1, times 2): `explicit` up
    to a constant, without the exact score.

    It takes D Jacobian-vector products for D dimensions: a reference for small data.
    """

    def at(x: jax.Array, t: jax.Array) -> jax.Array:
        flat = lambda z: score(z.reshape(1, *x.shape), t[None]).ravel()  # noqa: E731
        divergence = jnp.trace(jax.jacfwd(flat)(x.ravel()))
        return jnp.mean(flat(x.ravel()) ** 2) + 2 * divergence / x.size

    return jax.vmap(at)(x, jnp.broadcast_to(t, x.shape[:1]))


def sliced(score: Score, x: jax.Array, t: jax.Array, direction: jax.Array) -> jax.Array:
    """Returns |score|^2 + 2 v . grad (v . score), over D: sliced score matching with its variance
    reduced (Song et al. 2019, Eq. 8, times 2).

    Its mean over directions v of mean zero and covariance I, normal or random signs in the shape of
    x, is `implicit`'s; it takes one Jacobian-vector product.
    """
    same_shape(x=x, direction=direction)
    t = jnp.broadcast_to(t, x.shape[:1])
    found, along = jax.jvp(lambda x: score(x, t), (x,), (direction,))
    return per_example_mean(found**2) + 2 * per_example_mean(direction * along)
