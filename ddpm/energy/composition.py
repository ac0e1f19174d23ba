"""Composition of diffusion models: products, mixtures and negations of their densities.

    both = composition.product(schedule, [denoiser_1, denoiser_2])  # p_1 p_2
    less = composition.product(schedule, [denoiser_1, denoiser_2], [1.0, -0.5])  # p_1 / p_2^0.5

**A sum of scores does not sample the product** by reverse diffusion: noise added to a product is
not the product of the noised densities. Of all t, prod_i q_t^i(x)^a_i is a path of densities that
ends, at t = 0, in the product (Du et al. 2023); chains follow it if MCMC corrects them at each
level, `ddpm.predictor_corrector(kernel=..)`, or weights do, `feynman_kac`. A mixture, on the other
hand, is right as it is: noise added to a mixture is the mixture of the noised densities.

A **log-density** here is a function (x_t [B, ...], t [B]) -> log q_t(x_t) [B] in nats, up to a
function of t: minus the energy. A model with a denoiser alone has scores, for products and
`feynman_kac`; MALA, HMC and mixtures need log-densities.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion import score
from ddpm.diffusion.gaussian import expand_like
from ddpm.diffusion.predictions import Denoiser, Prediction, predict
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import keys_per_example, normal
from ddpm.sampling import mcmc
from ddpm.sampling.langevin import LogDensity

Exponents = Sequence[jax.typing.ArrayLike]


def of_log_density(schedule: NoiseSchedule, log_density: LogDensity) -> Denoiser:
    """Returns the denoiser of a log-density, whose gradient is the score (Tweedie's formula).

    Raises ValueError for a schedule without signal at t = T.
    """

    def gradient(x_t: jax.Array, t: jax.Array) -> jax.Array:
        return mcmc.target(lambda x: log_density(x, t))(x_t)[1]

    return score.denoiser(schedule, gradient)


def product(
    schedule: NoiseSchedule, denoisers: Sequence[Denoiser], exponents: Exponents | None = None
) -> Denoiser:
    """Returns the denoiser of prod_i q_t^i(x_t)^a_i: eps = sum_i a_i eps_i.

    See the module on why its reverse diffusion is not the product's. With exponents (w, 1 - w) it
    is `classifier_free` of the scale w; (1, -g) is a negation, p / q^g, a density only where that
    can be integrated. A learned variance is left out.

    Args:
      exponents: a_i, all 1 if left out; each a number, or [B], one for each example.

    Raises ValueError for another number of exponents than denoisers, or none.
    """
    weights = _weights(len(denoisers), exponents, "denoisers")

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        found = [predict(denoiser, x_t, t) for denoiser in denoisers]
        total = expand_like(sum(weights, jnp.zeros(())), x_t)
        a = [expand_like(weight, x_t) for weight in weights]
        eps = sum((a_i * f.eps for a_i, f in zip(a, found, strict=True)), jnp.zeros_like(x_t))
        x_0 = sum((a_i * f.x_0 for a_i, f in zip(a, found, strict=True)), jnp.zeros_like(x_t))
        # Of x_t = alpha x_0 + sigma eps; where the exponents' sum is 1, also without signal.
        rest = (1 - total) / expand_like(schedule.at(t).alpha, x_t) * x_t
        return Prediction(x_0 + jnp.where(total == 1, 0.0, rest), eps)

    return denoise


def mixture(
    schedule: NoiseSchedule,
    log_densities: Sequence[LogDensity],
    weights: Exponents | None = None,
) -> Denoiser:
    """Returns the denoiser of sum_i w_i q_t^i(x_t), `of_log_density` of `log_mixture`."""
    return of_log_density(schedule, log_mixture(log_densities, weights))


def log_product(
    log_densities: Sequence[LogDensity], exponents: Exponents | None = None
) -> LogDensity:
    """Returns sum_i a_i log q_t^i(x_t), for MCMC. Arguments and errors are those of `product`."""
    weights = _weights(len(log_densities), exponents, "log-densities")

    def log_density(x_t: jax.Array, t: jax.Array) -> jax.Array:
        parts = zip(weights, log_densities, strict=True)
        return sum((a * log_q(x_t, t) for a, log_q in parts), jnp.zeros(len(x_t)))

    return log_density


def log_mixture(
    log_densities: Sequence[LogDensity], weights: Exponents | None = None
) -> LogDensity:
    """Returns log sum_i w_i q_t^i(x_t); weights need not sum to 1, and are 1 if left out.

    The log-densities must be normalised alike. Known only up to constants c_i(t), as an energy is
    that was learned by scores, the mixture has the weights w_i exp(c_i(t)): whatever they are, and
    other ones at each t. Raises ValueError for another number of weights than log-densities.
    """
    factors = _weights(len(log_densities), weights, "log-densities")

    def log_density(x_t: jax.Array, t: jax.Array) -> jax.Array:
        parts = zip(factors, log_densities, strict=True)
        return jax.nn.logsumexp(jnp.stack([jnp.log(w) + log_q(x_t, t) for w, log_q in parts]), 0)

    return log_density


def start(
    key: jax.Array, schedule: NoiseSchedule, shape: Sequence[int], exponents: Exponents
) -> jax.Array:
    """Draws x_T of a product, [B, ...]: at t = T each q_t^i is about N(0, I), so the product is
    N(0, I / sum_i a_i), not the N(0, I) that `sample` begins with if it is given no x_t.

    key: one, or B. Raises ValueError unless the sum is above 0, without which there is no density.
    """
    total = sum(exponents[1:], exponents[0])
    if not isinstance(total, jax.core.Tracer) and not (least := np.asarray(total).min()) > 0:
        raise ValueError(
            f"the exponents' sum is {least:g}: must be above 0, or there is no density at t = T"
        )
    noise = normal(keys_per_example(key, shape[0]), schedule.num_steps, tuple(shape)[1:])
    return noise / expand_like(jnp.sqrt(jnp.asarray(total, jnp.float32)), noise)


def _weights(n: int, given: Exponents | None, of: str) -> list[jax.Array]:
    if given is None:
        given = [1.0] * n
    if not n or len(given) != n:
        raise ValueError(f"{len(given)} numbers for {n} {of}: must be one for each, at least one")
    return [jnp.asarray(a, jnp.float32) for a in given]
