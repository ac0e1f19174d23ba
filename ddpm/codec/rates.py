"""Rates and distortions of a diffusion model as a codec: closed forms for Gaussian data, a model's
ideal curve, and the choice of the times at which to code.

A sender who holds x_0 gives the receiver a sample x_t of q(x_t | x_0), and refines it from t to
s < t at the price of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) bits. With the posterior's variance v
both means differ by x_0 as predicted alone, and p of variance v (1 + g e) is the best, where e is
the squared error and g = SNR_s - SNR_t the gain: the step costs log2(1 + g e) / 2 bits/dim
(`matched_kl`). If p is the true reverse process, all steps down to t together cost I(X_0; X_t), in
whatever number they are. A single variance for all dimensions is the true one for white data
alone: others gain from one for each frequency (`frequency_errors`).

Rates are bits/dim, errors and distortions means over dimensions.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.bound_terms import BITS_PER_NAT
from ddpm.diffusion.gaussian import fixed_large, q_sample
from ddpm.diffusion.likelihood import bits_per_dim
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import keys_per_example, normal
from ddpm.diffusion.variances import ReverseVariance

# --- Gaussian data, whose covariance has the given eigenvalues


class Distortions(NamedTuple):
    """Mean squared errors of three ways to decode x_t: E[x_0 | x_t]; a sample of p(x_0 | x_t), by
    an ancestral chain; and the end of the probability flow from x_t."""

    posterior_mean: np.ndarray
    ancestral: np.ndarray
    probability_flow: np.ndarray


def gaussian_information(eigenvalues: np.ndarray, snr: np.typing.ArrayLike) -> np.ndarray:
    """Returns I(X_0; X_t) in bits/dim, float64 in the shape of snr = alpha_bar / (1 - alpha_bar)
    at t."""
    return (np.log1p(_products(eigenvalues, snr)) / 2).mean(axis=-1) * BITS_PER_NAT


def gaussian_distortions(eigenvalues: np.ndarray, snr: np.typing.ArrayLike) -> Distortions:
    """Returns the distortions at t, float64 in the shape of snr."""
    products = _products(eigenvalues, snr)
    least = np.asarray(eigenvalues, np.float64) / (1 + products)
    # 2 l (1 - sqrt(ls / (1 + ls))), without the cancellation where ls is large.
    flow = 2 * least / (1 + np.sqrt(products / (1 + products)))
    return Distortions(*(x.mean(axis=-1) for x in (least, 2 * least, flow)))


def gaussian_rate(eigenvalues: np.ndarray, distortion: float) -> float:
    """Returns R(D), the least rate in bits/dim at which any codec has this distortion.

    By reverse water-filling (Cover & Thomas 2006, Theorem 10.3.3). Raises ValueError unless D > 0.
    """
    if not distortion > 0:
        raise ValueError(f"distortion = {distortion}: must be a number > 0")
    rising = np.sort(np.asarray(eigenvalues, np.float64))
    n = len(rising)
    # The distortion with water as high as each eigenvalue: those below it are not coded at all.
    flooded = np.concatenate([[0.0], np.cumsum(rising)])
    k = int(np.searchsorted(flooded[:-1] + rising * np.arange(n, 0, -1), n * distortion))
    if k == n:
        return 0.0
    level = (n * distortion - flooded[k]) / (n - k)
    return float(np.log2(rising[k:] / level).sum() / (2 * n))


def _products(eigenvalues: np.ndarray, snr: np.typing.ArrayLike) -> np.ndarray:
    return np.asarray(snr, np.float64)[..., None] * np.asarray(eigenvalues, np.float64)


# --- A model


class Curve(NamedTuple):
    """The rates and distortions of examples at the codec's times, which fall: int[K].

    rate: bits/dim down to each time, [B, K]; the first has the KL of the prior alone.
    squared_error: that of x_0 as predicted there, [B, K].
    """

    times: np.ndarray
    rate: jax.Array
    squared_error: jax.Array


def matched_kl(gain: jax.Array, error: jax.Array) -> jax.Array:
    """Returns log2(1 + g e) / 2: the bits/dim of a step with the variance that its error asks for.

    gain: SNR_s - SNR_t. error: E |x_0 - x_0 predicted at t|^2 per dimension, of all the dimensions
    that share a variance.
    """
    return jnp.log1p(gain * error) * (BITS_PER_NAT / 2)


def ideal_curve(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    key: jax.Array,
    times: np.ndarray,
    *,
    variance: ReverseVariance | None = None,
) -> Curve:
    """Returns the rates of an ideal coder at these times, in whatever order they are given.

    One denoiser call for each time, at an x_t drawn from q(x_t | x_0) by the key, as in
    `bits_per_dim`, whose errors are raised.

    Args:
      x_0: scaled data, [B, ...].
      variance: of the reverse steps, where the denoiser does not learn it. If left out, it is
        matched at each time to the mean error of these examples, whatever the denoiser learned.
    """
    times = np.sort(times)
    found = bits_per_dim(
        schedule, denoiser, x_0, key, times=times, variance=variance or fixed_large
    )
    steps = found.steps
    if variance is None:
        gain, error = _gains(schedule, times), found.squared_error[:, 1:]
        mean = error.mean(axis=0)
        # An example whose error is not the mean has another rate at the common variance.
        excess = (error - mean) * gain / (1 + gain * mean) * (BITS_PER_NAT / 2)
        steps = matched_kl(gain, mean) + excess
    downward = jnp.concatenate([found.prior[:, None], steps[:, ::-1]], axis=1)
    return Curve(times[::-1], jnp.cumsum(downward, axis=1), found.squared_error[:, ::-1])


def frequency_errors(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    key: jax.Array,
    times: np.ndarray,
) -> jax.Array:
    """Returns the squared errors of each frequency of x_0 as predicted, a mean over the images:
    float32[K, H, W, C] of x_0 [B, H, W, C] at K times.

    Frequencies are those of the orthonormal DCT of type II. As it is orthonormal, the step's KL in
    the coefficients is that in the pixels, but they may have a variance each: `matched_kl` of these
    errors, a mean over frequencies. This is no `ReverseVariance`, which is one number for a step.
    """
    keys = keys_per_example(key, len(x_0))

    def at(t: jax.Array) -> jax.Array:
        x_t = q_sample(schedule, x_0, t, normal(keys, t, x_0.shape[1:]))
        error = x_0 - predict(denoiser, x_t, t).x_0
        return (jax.scipy.fft.dctn(error, axes=(1, 2), norm="ortho") ** 2).mean(axis=0)

    return jax.lax.map(at, jnp.asarray(times))


def _gains(schedule: NoiseSchedule, rising: np.ndarray) -> jax.Array:
    """Returns SNR_s - SNR_t of the steps between neighbours."""
    step = schedule.between(jnp.asarray(rising[:-1]), jnp.asarray(rising[1:]))
    return jnp.exp(step.s.high) * step.snr_loss


# --- The choice of times


def step_costs(schedule: NoiseSchedule, times: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Returns the bits/dim of a step from times[i] to times[j] in row i, float64[N, N]; infinite
    unless times[j] < times[i], and into the data.

    errors: the squared errors measured at the times, [N] or [N, ...]: of what has a variance each,
    such as examples or `frequency_errors`; costs are means over them. Raises ValueError for another
    number of errors.
    """
    times, errors = np.asarray(times), np.asarray(errors, np.float64)
    if errors.shape[:1] != times.shape:
        raise ValueError(f"errors {errors.shape} of times {times.shape}: must be [N, ...] of [N]")
    level = schedule.at(times)
    snr = np.exp(np.asarray(level.high, np.float64) + np.asarray(level.low, np.float64))
    costs = np.full((len(times), len(times)), math.inf)
    errors = errors.reshape(len(times), -1)
    for i, row in enumerate(costs):
        there = (times < times[i]) & (times > 0)
        bits = np.log1p((snr[there] - snr[i])[:, None] * errors[i])
        row[there] = bits.mean(axis=1) * (BITS_PER_NAT / 2)
    return costs


def choose_times(
    costs: np.ndarray, num_steps: int | None = None, *, overhead: float = 0.0
) -> np.ndarray:
    """Returns which candidates to visit from the first to the last at least cost, int[K + 1].

    Dynamic programming, as Watson et al. (2021) choose the times of a sampler by terms of its
    bound; here the terms are rates.

    Args:
      costs: of a step from candidate i to j in row i, float[N, N]; infinite where there is none.
      num_steps: K; if left out, as many as are best.
      overhead: what each step costs more, in the unit of the costs.

    Raises ValueError for costs that are NaN or not square, for num_steps outside 1..N - 1, or
    where no way leads to the last in so many.
    """
    costs = np.asarray(costs, np.float64)
    n = len(costs)
    if costs.shape != (n, n) or n < 2 or np.isnan(costs).any():
        raise ValueError(f"costs {costs.shape}: must be [N, N], N >= 2, without NaN")
    if num_steps is not None and not 1 <= num_steps < n:
        raise ValueError(f"num_steps = {num_steps}: must be in 1..N - 1 = {n - 1}")
    least = np.where(np.arange(n) == 0, 0.0, math.inf)
    totals, before = [], []
    for _ in range(num_steps or n - 1):
        through = least[:, None] + costs + overhead
        before.append(through.argmin(axis=0))
        least = through.min(axis=0)
        totals.append(least[-1])
    steps = num_steps or 1 + int(np.argmin(totals))
    if not math.isfinite(totals[steps - 1]):
        raise ValueError(f"no way from the first to the last candidate in {steps} steps")
    chosen = [n - 1]
    for row in reversed(before[:steps]):
        chosen.append(int(row[chosen[-1]]))
    return np.asarray(chosen[::-1])
