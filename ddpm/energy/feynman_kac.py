"""Feynman-Kac correctors: sequential Monte Carlo that makes compositions right by scores alone.

    population = feynman_kac.sample(key, schedule, [denoiser_1, denoiser_2], [1.0, 1.0], (2000, 2))

The path pi_t = prod_i (q_t^i)^a_i / Z_t from t = T to the product at t = 0 (see `composition`) is
followed by weighted samples (Skreta et al. 2025). Each moves by the reverse SDE with the sum of
scores s = sum_i a_i s_i, in reverse time tau with g^2 = beta:

    dx = (beta x / 2 + beta s) d tau + sqrt(beta) dW.

Every q^i solves the Fokker-Planck equation of the forward process, pi_t does not. What the SDE's
own equation lacks of d log pi_t / d tau is, after the divergences of the scores have cancelled,

    d log w / d tau = beta / 2 (|s|^2 - sum_i a_i |s_i|^2)

up to a function of t: the rate at which the samples' weights change. For two densities it is
beta s_1 . s_2, for guidance (w, 1 - w) it is beta / 2 w (w - 1) |s_1 - s_2|^2, for one density to
the power a it is beta / 2 a (a - 1) |s_1|^2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import fixed_large
from ddpm.diffusion.predictions import Denoiser, predict, to_score
from ddpm.diffusion.process import ancestral_draw
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import RESAMPLING, draw, keys_per_example, noise_streams, normal
from ddpm.energy import composition
from ddpm.sampling import samplers
from ddpm.sampling.sample import check_times

Carry = tuple[jax.Array, jax.Array, jax.Array]  # x, log-weights, half the integral of beta


class Population(NamedTuple):
    """Samples x_0 [B, ...], equally weighted, and the effective sample size at each of the N steps,
    [N], 1 to B, before the samples were chosen anew."""

    x_0: jax.Array
    effective_sizes: jax.Array


def sample(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoisers: Sequence[Denoiser],
    exponents: Sequence[float],
    shape: Sequence[int],
    *,
    times: Sequence[float] | np.ndarray | None = None,
    x_t: jax.Array | None = None,
    churn: float = 0.0,
    threshold: float = 0.5,
) -> Population:
    """Draws x_0 of `shape` [B, ...] from prod_i p_i^a_i by weighted ancestral chains.

    Samples depend on the whole population, by nature: two may descend from one ancestor, so that B
    of them say less than B independent ones, which the effective sample sizes do not show. The path
    is followed exactly in the limit of short steps alone.

    Args:
      key: one typed key.
      times: falling, as `ddpm.sample` takes them.
      x_t: where to begin; `composition.start` if left out.
      churn: variance of added Langevin noise, relative to the SDE's own. Langevin dynamics leaves
        pi_t as it is, so weights have no part in it; samples stay nearer to pi_t, and forget their
        ancestors. On a product of two Gaussians 400 samples were worth 350 independent ones with
        8, and 140 with 0, the paper's; larger values need shorter steps.
      threshold: chosen anew, by systematic resampling, where the effective sample size is below
        this part of B.

    Raises ValueError for exponents whose sum is not above 0 or of another number than denoisers,
    times that do not fall within T..0, a negative churn, or a threshold outside [0, 1].
    """
    if not churn >= 0:
        raise ValueError(f"churn = {churn}: must be a number >= 0")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold = {threshold}: must be in [0, 1]")
    shape, product = tuple(shape), composition.product(schedule, denoisers, exponents)
    if times is None:
        times = samplers.times(schedule.num_steps)
    falling = check_times(times, schedule.num_steps)
    streams = noise_streams(falling, schedule.num_steps)
    keys, chooser = keys_per_example(key, shape[0]), draw(key, RESAMPLING)
    x = composition.start(key, schedule, shape, exponents) if x_t is None else x_t
    a = [float(exponent) for exponent in exponents]

    def step(carry: Carry, inputs: tuple[jax.Array, ...]) -> tuple[Carry, jax.Array]:
        x, log_weights, half = carry
        t, s, stream = inputs
        scores = [to_score(schedule, t, predict(d, x, t)) for d in denoisers]
        rate = weight_rate(scores, a)
        log_weights += half * rate  # the second half of the trapezoid over the step before
        size = effective_size(log_weights)
        few = size < threshold * shape[0]
        chosen = resampled(jax.random.fold_in(chooser, stream), log_weights)
        chosen = jnp.where(few, chosen, jnp.arange(shape[0]))
        log_weights = jnp.where(few, 0.0, log_weights)
        x, rate = x[chosen], rate[chosen]
        half = -jnp.log1p(-schedule.between(s, t).beta) / 2  # of the integral of beta
        log_weights += half * rate
        prediction = predict(product, x, t)
        # Its noise and that of Langevin dynamics, of variance churn beta, are drawn as one.
        ratio = jnp.where(s > 0, churn, 0.0)
        noise = jnp.sqrt(1 + ratio) * normal(keys, stream, shape[1:])
        moved = ancestral_draw(schedule, prediction, x, t, s, noise, fixed_large)
        moved += ratio * half * to_score(schedule, t, prediction)
        return (moved, log_weights, half), size

    inputs = tuple(jnp.asarray(z) for z in (falling[:-1], falling[1:], streams[1:]))
    begun = x, jnp.zeros(shape[0], x.dtype), jnp.zeros((), jnp.float32)
    (x_0, log_weights, _), sizes = jax.lax.scan(step, begun, inputs)
    last, shuffle = jax.random.split(chooser)
    # In random order: neighbours are relatives.
    chosen = jax.random.permutation(shuffle, resampled(last, log_weights))
    return Population(x_0[chosen], sizes)


def weight_rate(scores: Sequence[jax.Array], exponents: Sequence[float]) -> jax.Array:
    """Returns (|s|^2 - sum_i a_i |s_i|^2) / 2 with s = sum_i a_i s_i, [B], of scores [B, ...]: the
    change of a log-weight for each unit of the integral of beta."""
    parts = list(zip(exponents, scores, strict=True))
    whole = sum((a * s for a, s in parts), jnp.zeros_like(scores[0]))
    return (_squared(whole) - sum(a * _squared(s) for a, s in parts)) / 2


def effective_size(log_weights: jax.Array) -> jax.Array:
    """Returns (sum w)^2 / sum w^2 of log-weights [B], between 1 and B (Kong 1992)."""
    return 1 / (jax.nn.softmax(log_weights) ** 2).sum()


def resampled(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Returns the numbers int[B] of samples chosen in proportion to their weights, by systematic
    resampling: of weight w_i, normalised, floor(B w_i) or one more (Douc & Cappe 2005)."""
    n = len(log_weights)
    places = (jnp.arange(n) + jax.random.uniform(key)) / n
    found = jnp.searchsorted(jnp.cumsum(jax.nn.softmax(log_weights)), places)
    return jnp.minimum(found, n - 1)  # where rounding leaves the sum below 1


def _squared(x: jax.Array) -> jax.Array:
    return (x**2).sum(axis=range(1, x.ndim))
