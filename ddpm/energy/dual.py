"""Normalised energies by dual score matching (Guth, Kadkhodaie & Simoncelli 2025).

An **energy** is a function (x_t [B, ...], log_snr [B]) -> [B], in nats, which is to be -log q(x_t)
at the noise level of that log-SNR. Denoising score matching fits its gradient in x, and so leaves a
constant open at every noise level. Dual score matching fits its derivative in the noise level too,
so that one constant is left, and that is known where the data are hidden:

    loss = dual.loss(schedule, energy, x_0, t, eps).mean()             # to train by
    energy = dual.normalized(schedule, energy, x_0.shape[1:], key)     # once, after training
    nats = dual.log_density(schedule, energy, x_1)                     # one evaluation for each x_1

The derivation. y = x_t / alpha_t = x_0 + s eps is the exploding view, s = sigma_t / alpha_t, and
lambda = -2 log s the log-SNR. Of D dimensions, -log q(y | x_0) = D log s + |y - x_0|^2 / (2 s^2) +
const. Differentiated at a fixed x_0 and y, by y and by lambda, it is

    s grad_y  -> eps,        d/d lambda -> (|eps|^2 - D) / 2,                                (1)

and the derivatives of E(y, lambda) = -log q(y) are their expectations given y: as q(y) is the mean
of q(y | x_0) over x_0, d log q(y) = E[d log q(y | x_0) | y] for either derivative (Vincent 2011;
Choi et al. 2022 for time). So both are fitted by regression on (1), which asks no exact score. The
second is the paper's: t d/dt of their noise variance t = s^2 = exp(-lambda) is -d/d lambda, and
their weights t / D and (t / D)^2 make of it the squared errors per dimension,

    |s grad_y E - eps|^2 / D   and   (d/d lambda E - (|eps|^2 - D) / 2)^2 / D^2,             (2)

neither of which depends on the unit of the data nor grows as the noise vanishes. The first is
L_simple. What a perfect energy still pays is E Var[eps | y] / D <= 1 and
E Var[|eps|^2 / 2 | y] / D^2 <= 1 / (2 D).

Networks see x_t, whose energy is U(x, lambda) = E(x / alpha, lambda) + D log alpha. Then

    s grad_y E = sigma grad_x U,
    d/d lambda E = d/d lambda U + sigma^2 / 2 (x . grad_x U - D),                            (3)

as d log alpha / d lambda = sigma^2 / 2: one backward pass gives both. No derivative of the schedule
comes in: tables, whose t are whole, serve as well as continuous time. The two conditions are
not independent: by the diffusion equation, of which the time s^2 is,

    d/d lambda E = s^2 / 2 (|grad_y E|^2 - div_y grad_y E).                                  (4)

The regression on lambda knows it without a second derivative.

The constant. At t = T the energy is near that of N(0, I), to KL(q_T || N(0, I)) <= L_T nats
(`likelihood.prior_kl`). That is not taken for equal: log Z of exp(-U(x, T)) is measured by samples
of N(0, I), so that only those moments of q_T that the energy itself has learned come in, and the
error is that of a mean of close to equal numbers (`log_normalizer` gives it). At t = 1 what is left
is the integral of the error of d/d lambda E over the log-SNR between: the density sums to 1 there
as far as the second regression was learned.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.bound_terms import BITS_PER_NAT
from ddpm.diffusion.flow import dequantised
from ddpm.diffusion.gaussian import expand_like, per_example_mean, q_sample, same_shape
from ddpm.diffusion.pixels import HALF_BIN, check_scaled
from ddpm.diffusion.predictions import Denoiser, Prediction, from_eps
from ddpm.diffusion.schedules import LogSNR, NoiseSchedule, Schedule, require_signal
from ddpm.diffusion.streams import keys_per_example, normal, sample_keys
from ddpm.diffusion.times import as_times

Energy = Callable[[jax.Array, jax.Array], jax.Array]


class Derivatives(NamedTuple):
    """The energy U in nats, [B]; sigma grad_x U, which is eps expected, [B, ...]; and dE/d lambda
    of the exploding view (Eq. 3), [B]."""

    energy: jax.Array
    eps: jax.Array
    rate: jax.Array


class DualLoss(NamedTuple):
    """The squared errors of the gradient in x and of the derivative in log-SNR, (2): each [B]."""

    space: jax.Array
    time: jax.Array


class Estimate(NamedTuple):
    """A mean over random numbers, and its standard error: scalars."""

    value: jax.Array
    standard_error: jax.Array


def derivatives(energy: Energy, x_t: jax.Array, log_snr: jax.Array) -> Derivatives:
    """Returns the energy at x_t [B, ...] and log_snr [B] with both its derivatives, by one backward
    pass.

    Raises ValueError for an energy that is not [B].
    """
    value, pull = jax.vjp(energy, x_t, log_snr)
    same_shape(energy=value, log_snr=log_snr)
    gradient, slope = pull(jnp.ones_like(value))
    level = LogSNR(log_snr, jnp.zeros_like(log_snr))
    along = (x_t * gradient).sum(axis=range(1, x_t.ndim))
    rate = slope + level.sigma_squared / 2 * (along - x_t[0].size)
    return Derivatives(value, expand_like(level.sigma, x_t) * gradient, rate)


def errors(
    schedule: Schedule, energy: Energy, x_0: jax.Array, t: jax.Array, eps: jax.Array
) -> DualLoss:
    """Returns both squared errors (2) at x_t, per dimension; arguments as in `losses`.

    No second derivative in x is taken, but training differentiates them once more.
    """
    x_t = q_sample(schedule, x_0, as_times(schedule.ends, t, noisy=True), eps)
    log_snr = jnp.broadcast_to(schedule.at(t).high, x_0.shape[:1])
    found = derivatives(energy, x_t, log_snr)
    # Per dimension before the difference: |eps|^2 and D are large and nearly equal.
    target = per_example_mean(eps**2 - 1) / 2
    time = (found.rate / x_t[0].size - target) ** 2
    return DualLoss(per_example_mean((found.eps - eps) ** 2), time)


def loss(
    schedule: Schedule,
    energy: Energy,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    time_weight: float = 1.0,
) -> jax.Array:
    """Returns the error of the gradient plus `time_weight` times that of the derivative in log-SNR,
    [B]: with 1 the paper's (Guth et al. 2025), with 0 denoising score matching, L_simple.

    Raises ValueError for a negative weight.
    """
    if not time_weight >= 0:
        raise ValueError(f"time_weight = {time_weight}: must be >= 0")
    found = errors(schedule, energy, x_0, t, eps)
    return found.space + time_weight * found.time


def gaussian(variance: float = 1.0) -> Energy:
    """Returns the exact energy of data N(0, variance I): a base to which a network's correction is
    added, whose scale in x and in nats is right from the start."""

    def energy(x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
        level = LogSNR(log_snr, jnp.zeros_like(log_snr))
        total = level.alpha**2 * variance + level.sigma_squared
        squares = (x_t**2).sum(axis=range(1, x_t.ndim))
        return (squares / total + x_t[0].size * jnp.log(2 * math.pi * total)) / 2

    return energy


def of_gradient(energy: Energy, rates: jax.Array, ends: tuple[float, float]) -> Energy:
    """Returns U(x, lambda) = E(x, lambda) / sigma + c(lambda) of an energy E whose gradient by x is
    eps, as `models.energy` has it, and of learned `rates`, float32[K].

    c(lambda) / D = log(2 pi) / 2 + the integral of the rates from the last log-SNR to lambda: each
    is the slope of c over one of K equal parts of the log-SNR between the schedule's `ends` (first,
    last), and its own regression, a mean of rates. Without c the network would have to move all of
    its output to change one number, by up to D / 2 for each unit of log-SNR: where x_t is close to
    the data the slope is -D / 2, and 0 in pure noise, where all rates begin. From E = |x|^2 / 2, an
    energy of form `denoising` at its start, U is that of N(0, I) at t = T then.
    """
    first, last = ends
    edges = jnp.linspace(last, first, len(rates) + 1)
    width = (first - last) / len(rates)

    def of_x(x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
        level = LogSNR(log_snr, jnp.zeros_like(log_snr))
        passed = jnp.clip(log_snr[:, None] - edges[:-1], 0.0, width)
        offset = 0.5 * math.log(2 * math.pi) + (rates * passed).sum(axis=-1)
        return energy(x_t, log_snr) / level.sigma + x_t[0].size * offset

    return of_x


def log_normalizer(
    schedule: Schedule,
    energy: Energy,
    shape: Sequence[int],
    key: jax.Array,
    *,
    num_samples: int = 1024,
) -> Estimate:
    """Returns log Z of exp(-U(x, T)) at the last time, by importance sampling from N(0, I).

    Examples have this `shape`. The standard error is that of the logarithm, to first order.
    """
    x = normal(sample_keys(key, jnp.arange(num_samples)), 0, shape)
    log_snr = jnp.broadcast_to(schedule.at(schedule.ends[1]).high, (num_samples,))
    log_ratio = -energy(x, log_snr) - _log_normal(x)
    largest = log_ratio.max()
    ratio = jnp.exp(log_ratio - largest)
    mean = ratio.mean()
    return Estimate(largest + jnp.log(mean), ratio.std() / mean / math.sqrt(num_samples))


def normalized(
    schedule: Schedule,
    energy: Energy,
    shape: Sequence[int],
    key: jax.Array,
    *,
    num_samples: int = 1024,
) -> Energy:
    """Returns the energy plus its `log_normalizer`, one number for all noise levels, so that
    exp(-energy) sums to 1 at t = T."""
    log_z = log_normalizer(schedule, energy, shape, key, num_samples=num_samples).value
    return lambda x_t, log_snr: energy(x_t, log_snr) + log_z


def log_density(schedule: Schedule, energy: Energy, x_1: jax.Array) -> jax.Array:
    """Returns log p(x_1) in nats [B] of a normalised energy, x_1 at the first noise level: one
    evaluation, where `flow.log_density` solves an ODE."""
    x_1 = check_scaled(x_1, "x_1")
    first = schedule.at(schedule.ends[0]).high
    return -energy(x_1, jnp.broadcast_to(first, x_1.shape[:1]))


def dequantised_bits_per_dim(
    schedule: NoiseSchedule, energy: Energy, x_0: jax.Array, key: jax.Array
) -> jax.Array:
    """Returns bits/dim [B] of a normalised energy, with uniform noise in the 8-bit bins: the bound
    of `flow.dequantised_bits_per_dim`, at the same draws of the same key.

    Args:
      x_0: 8-bit data as k/127.5 - 1, [B, ...].
      key: one key or B; draws the noise.
    """
    x_0 = check_scaled(x_0)
    x_1, log_alpha = dequantised(schedule, x_0, keys_per_example(key, len(x_0)))
    nats = -log_density(schedule, energy, x_1) / x_0[0].size - log_alpha - jnp.log(2 * HALF_BIN)
    return nats * BITS_PER_NAT


def denoiser(schedule: Schedule, energy: Energy) -> Denoiser:
    """Returns the denoiser that samplers, bounds and flows take, eps = sigma grad_x U.

    Raises ValueError for a schedule without signal at t = T.
    """
    require_signal(schedule, "where an energy does not tell x_0")

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        log_snr = jnp.broadcast_to(schedule.at(t).high, x_t.shape[:1])
        return from_eps(schedule, x_t, t, derivatives(energy, x_t, log_snr).eps)

    return denoise


def _log_normal(x: jax.Array) -> jax.Array:
    """Returns log N(x; 0, I), [B]."""
    return -((x**2).sum(axis=range(1, x.ndim)) + x[0].size * math.log(2 * math.pi)) / 2
