"""The forward process and its posterior in closed form, and the bound's two Gaussian formulas.

Shapes: x is [B, ...], t is int[B] (or a scalar for the whole batch). Time is the paper's: t = 1..T,
and t = 0 is the data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.pixels import HALF_BIN, check_scaled
from ddpm.diffusion.schedules import NoiseSchedule, Schedule, Transition
from ddpm.diffusion.times import step_times


class Gaussian(NamedTuple):
    """A diagonal Gaussian; the variances broadcast against the mean."""

    mean: jax.Array
    variance: jax.Array
    log_variance: jax.Array


def expand_like(coefficient: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes a per-example coefficient [B] to [B, 1, ...], to multiply x [B, ...]; a scalar stays
    one."""
    coefficient = jnp.asarray(coefficient)
    if coefficient.ndim > 1 or (coefficient.ndim and coefficient.shape[0] != x.shape[0]):
        raise ValueError(
            f"expected a scalar or {x.shape[0]} values, one per example, got {coefficient.shape}"
        )
    return coefficient.reshape(
        coefficient.shape + (1,) * (x.ndim - coefficient.ndim) * coefficient.ndim
    )


def same_shape(**arrays: jax.Array) -> None:
    """Raises ValueError unless all arrays, given by name, have one shape: no broadcasting."""
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "shapes must be equal: " + ", ".join(f"{n} {s}" for n, s in shapes.items())
        )


def per_example_mean(x: jax.Array) -> jax.Array:
    """Returns the mean over all axes but the first, in float32: [B, ...] -> [B]."""
    return jnp.mean(x, axis=range(1, x.ndim), dtype=jnp.float32)


def q_sample(schedule: Schedule, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Eq. 4); x_0 at t = 0.

    Raises ValueError for x_0 that is not scaled (of integers).
    """
    same_shape(x_0=x_0, eps=eps)
    x_0 = check_scaled(x_0)
    level = schedule.at(t)
    return expand_like(level.alpha, x_0) * x_0 + expand_like(level.sigma, x_0) * eps


def q_step(
    schedule: NoiseSchedule,
    x_s: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    s: jax.Array | None = None,
) -> jax.Array:
    """Draws x_t ~ q(x_t | x_s), s < t: sqrt(1 - beta_{t|s}) x_s + sqrt(beta_{t|s}) eps (Eq. 2).

    s is t - 1 if left out; from s = 0 it is `q_sample`. NaN for s > t. Raises ValueError for x_s of
    integers.
    """
    same_shape(x_s=x_s, eps=eps)
    x_s = check_scaled(x_s, "x_s")
    t, s = step_times(schedule.ends, t, s)
    step = schedule.between(s, t)
    return expand_like(step.alpha, x_s) * x_s + expand_like(jnp.sqrt(step.beta), x_s) * eps


def posterior_coefficients(step: Transition) -> tuple[jax.Array, jax.Array]:
    """Returns the coefficients of x_0 and x_t in the mean of q(x_s | x_t, x_0) (Eq. 7, any s < t);
    (1, 0) for s = 0."""
    of_x_0 = step.s.alpha * step.snr_loss
    # sigma_s^2 alpha_{t|s} / sigma_t^2 without the alphas, of which one may be 0.
    of_x_t = step.s.sigma / step.t.sigma * jnp.exp(-step.log_snr_drop / 2)
    return of_x_0, of_x_t


def q_posterior(
    schedule: NoiseSchedule,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    *,
    s: jax.Array | None = None,
) -> Gaussian:
    """Returns q(x_s | x_t, x_0) for s < t; s is t - 1 if left out (Eqs. 6 and 7). NaN for s > t.

    At s = 0 the variance is 0 and the log-variance that of `fixed_small`, which is finite. Raises
    ValueError for x_0 or x_t of integers.
    """
    same_shape(x_0=x_0, x_t=x_t)
    x_0, x_t = check_scaled(x_0), check_scaled(x_t, "x_t")
    t, s = step_times(schedule.ends, t, s)
    step = schedule.between(s, t)
    of_x_0, of_x_t = posterior_coefficients(step)
    return Gaussian(
        mean=expand_like(of_x_0, x_0) * x_0 + expand_like(of_x_t, x_t) * x_t,
        variance=expand_like(step.posterior_variance, x_0),
        log_variance=expand_like(fixed_small(schedule, t, s=s), x_0),
    )


def fixed_small(schedule: NoiseSchedule, t: jax.Array, *, s: jax.Array | None = None) -> jax.Array:
    """Returns the log of the reverse variance beta-tilde, that of q(x_s | x_t, x_0); in the shape
    of t.

    Optimal for x_0 a single point (Section 3.2). At s = 0, where it would be log 0, it is the one
    of the step before in a chain of equal strides, from 2t to t (the authors clip so: at t = 1 it
    is log beta-tilde_2). A chain of a single step has none before: there it is log sigma_t^2.
    """
    t, s = step_times(schedule.ends, t, s)
    first = s == 0
    last = schedule.num_steps
    step = schedule.between(jnp.where(first, t, s), jnp.where(first, jnp.minimum(2 * t, last), t))
    alone = first & (t == last)
    return step.s.log_sigma_squared + jnp.where(alone, 0.0, step.log_snr_loss)


def fixed_large(schedule: NoiseSchedule, t: jax.Array, *, s: jax.Array | None = None) -> jax.Array:
    """Returns the log of the reverse variance beta_{t|s}, optimal for x_0 ~ N(0, I) (Section 3.2).

    In the shape of t. At s = 0 it is that of `fixed_small`, as in the authors' code.
    """
    t, s = step_times(schedule.ends, t, s)
    large = schedule.between(s, t).log_beta
    return jnp.where(s == 0, fixed_small(schedule, t, s=s), large)


def normal_kl(
    mean_1: jax.typing.ArrayLike,
    log_variance_1: jax.typing.ArrayLike,
    mean_2: jax.typing.ArrayLike,
    log_variance_2: jax.typing.ArrayLike,
) -> jax.Array:
    """Returns KL(N(mean_1, e^log_variance_1) || N(mean_2, e^log_variance_2)) in nats, elementwise
    >= 0."""
    d = jnp.subtract(log_variance_1, log_variance_2)
    return 0.5 * (
        _expm1_minus(d) + jnp.subtract(mean_1, mean_2) ** 2 * jnp.exp(jnp.negative(log_variance_2))
    )


def _expm1_minus(d: jax.Array) -> jax.Array:
    """Returns e^d - 1 - d, without the cancellation near 0 (where it is d^2/2)."""
    small = jnp.abs(d) < 0.5
    near = jnp.where(small, d, 0.0)
    series = jnp.ones_like(near)
    for n in range(9, 2, -1):
        series = 1 + near / n * series
    return jnp.where(small, near**2 / 2 * series, jnp.expm1(d) - d)


def decoder_log_likelihood(
    x_0: jax.Array, mean: jax.Array, log_variance: jax.Array, *, floor: float = 1e-12
) -> jax.Array:
    """Returns the log-probability of 8-bit data under N(mean, e^log_variance) cut into bins (Eq.
    13).

    Args:
      x_0: the data, k/127.5 - 1 for k in 0..255. Each bin is 2/255 wide, with the data point in its
        middle; the first reaches to -inf and the last to +inf.
      mean, log_variance: of the Gaussian, broadcastable against x_0.
      floor: the least probability counted; 1e-12 is the authors'. 0 for the exact value.

    Returns:
      Nats, elementwise, in the shape of x_0.

    Raises ValueError for x_0 of integers.
    """
    x_0, half = check_scaled(x_0), HALF_BIN
    inverse_std = jnp.exp(-0.5 * log_variance)
    centred = x_0 - mean
    upper = (centred + half) * inverse_std
    lower = (centred - half) * inverse_std
    width = 2 * half * inverse_std
    log_probability = jnp.where(
        x_0 < -1 + half,
        jax.scipy.special.log_ndtr(upper),
        jnp.where(
            x_0 > 1 - half,
            jax.scipy.special.log_ndtr(-lower),
            _log_ndtr_difference(centred * inverse_std, lower, upper, width),
        ),
    )
    return jnp.maximum(log_probability, jnp.log(floor)) if floor else log_probability


def _log_ndtr_difference(
    middle: jax.Array, lower: jax.Array, upper: jax.Array, width: jax.Array
) -> jax.Array:
    """Returns log(Phi(upper) - Phi(lower)), precise in both tails and for narrow bins."""
    # In the left tail, where log Phi is precise; the difference is symmetric.
    right = middle > 0
    high, low = jnp.where(right, -lower, upper), jnp.where(right, -upper, lower)
    log_high = jax.scipy.special.log_ndtr(high)
    gap = jax.scipy.special.log_ndtr(low) - log_high
    # A bin narrow against its Gaussian: the two CDFs nearly cancel, so integrate the density by
    # the midpoint rule with its next two corrections instead.
    narrow = width * jnp.maximum(1.0, jnp.abs(middle)) < 0.3
    gap = jnp.where(narrow, -1.0, gap)
    m2 = jnp.where(narrow, middle, 0.0) ** 2
    w2 = jnp.where(narrow, width, 0.0) ** 2
    correction = w2 / 24 * (m2 - 1) + w2**2 / 1920 * (m2**2 - 6 * m2 + 3)
    midpoint = jnp.log(width) - 0.5 * (m2 + jnp.log(2 * jnp.pi)) + jnp.log1p(correction)
    return jnp.where(narrow, midpoint, log_high + jnp.log1p(-jnp.exp(gap)))
