"""Noise schedules: log-SNR over time, from which everything else follows.

With q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I) and alpha_t^2 + sigma_t^2 = 1, the log-SNR is
log_snr[t] = log(alpha_t^2 / sigma_t^2) and

    alpha_bar_t = alpha_t^2 = sigmoid(log_snr),    1 - alpha_bar_t = sigma_t^2 = sigmoid(-log_snr).

Time has the paper's index: t = 1..T are noise levels and t = 0 is the data, so tables have T + 1
entries: log_snr[0] = +inf, alpha_bar[0] = 1, beta[0] = 0.

`log_snr` in float32 is exact enough for every function of one time, but the per-step beta_t is a
difference of neighbouring entries: alone, a float32 table loses three of its seven digits there.
So what rounding cut off is kept in a second float32, `log_snr_low`, and differences use both.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.times import as_times, whole_number


class LogSNR(NamedTuple):
    """A log-SNR as the unevaluated sum of two float32, high + low (low < half an ulp of high)."""

    high: jax.Array
    low: jax.Array

    @property
    def alpha(self) -> jax.Array:
        """sqrt(alpha_bar), the signal's coefficient."""
        # Not the root of alpha_bar, which underflows in float32 while its root is 1e-19.
        return jnp.exp(-0.5 * jax.nn.softplus(-self.high))

    @property
    def sigma(self) -> jax.Array:
        """sqrt(1 - alpha_bar), the noise's standard deviation."""
        return jnp.sqrt(self.sigma_squared)

    @property
    def sigma_squared(self) -> jax.Array:
        """1 - alpha_bar, the noise's variance."""
        return jax.nn.sigmoid(-self.high)

    @property
    def log_sigma_squared(self) -> jax.Array:
        """log(1 - alpha_bar); -inf at t = 0."""
        return -jax.nn.softplus(self.high)


class NoiseSchedule(NamedTuple):
    """A table of log-SNR over t = 0..T: float32[T + 1], falling from +inf (see the module)."""

    log_snr: jax.Array
    log_snr_low: jax.Array

    @property
    def num_steps(self) -> int:
        """T."""
        return self.log_snr.shape[0] - 1

    @property
    def alpha_bar(self) -> jax.Array:
        """prod_{s <= t} (1 - beta_s), float32[T + 1]; 1 at t = 0."""
        return jax.nn.sigmoid(self.log_snr)

    @property
    def beta(self) -> jax.Array:
        """Variance of the noise added by step t, float32[T + 1]; 0 at t = 0."""
        t = jnp.arange(1, self.num_steps + 1, dtype=jnp.int32)
        later = self.between(t - 1, t).beta
        return jnp.concatenate([jnp.zeros(1, later.dtype), later])

    def ends_without_signal(self) -> bool:
        """Returns whether alpha_T = 0 in float32; False under tracing."""
        if isinstance(self.log_snr, jax.core.Tracer):
            return False
        last = np.asarray(self.log_snr)[-1]  # by NumPy: known while others are traced
        return bool(np.exp(np.float64(last) / 2) < np.finfo(np.float32).tiny)

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last noise level in time: 1, T."""
        return 1.0, float(self.num_steps)

    def at(self, t: jax.typing.ArrayLike) -> LogSNR:
        """Returns the log-SNR at times t in 0..T, in the shape of t.

        Integers are looked up. At floats, which an ODE's solver asks for, the log-SNR is linear
        between two times. Raises ValueError for a time outside, or between 0, where the log-SNR is
        infinite, and 1; under tracing, where nobody knows, it is NaN there.
        """

        def look_up(table: jax.Array, t: jax.Array) -> jax.Array:
            # JAX's defaults, to clamp and to wrap, would hide a time off by one.
            return table.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

        t = as_times(self.ends, t)
        if jnp.issubdtype(t.dtype, jnp.integer):
            return LogSNR(look_up(self.log_snr, t), look_up(self.log_snr_low, t))
        before = jnp.floor(t).astype(jnp.int32)
        part, after = t - before, jnp.ceil(t).astype(jnp.int32)

        def between(table: jax.Array) -> jax.Array:
            low, high = look_up(table, before), look_up(table, after)
            return jnp.where(part == 0, low, low + part * (high - low))

        return LogSNR(between(self.log_snr), between(self.log_snr_low))

    def time_of(self, log_snr: jax.typing.ArrayLike) -> jax.Array:
        """Returns the fractional time in [1, T] of a log-SNR: `at` inverted. Beyond, the nearer
        end."""
        t = jnp.arange(1, self.num_steps + 1, dtype=jnp.float32)
        return jnp.interp(-jnp.asarray(log_snr, jnp.float32), -self.log_snr[1:], t)

    def between(self, s: jax.Array, t: jax.Array) -> "Transition":
        """Returns the forward transition q(x_t | x_s) for times s < t."""
        return Transition(self.at(s), self.at(t))

    def slope(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Returns d log_snr / dt < 0 at times in [1, T]: that of the step the time is in (at whole
        times, of the step up to it; at 1 of the one after)."""
        t = as_times(self.ends, t, noisy=True)
        after = jnp.maximum(jnp.ceil(t).astype(jnp.int32), 2)
        return -self.between(after - 1, after).log_snr_drop


class Transition(NamedTuple):
    """The forward transition q(x_t | x_s) = N(alpha_{t|s} x_s, beta_{t|s} I) for times s < t.

    A chain over fewer steps has these in the place of sqrt(1 - beta_t) and beta_t.
    """

    s: LogSNR
    t: LogSNR

    @property
    def log_snr_drop(self) -> jax.Array:
        """log_snr_s - log_snr_t >= 0; +inf for s = 0, NaN for s > t."""
        # The difference of the high parts is exact for neighbours, so the low parts must join last.
        drop = (self.s.high - self.t.high) + (self.s.low - self.t.low)
        return jnp.where(drop >= 0, drop, jnp.nan)

    @property
    def snr_loss(self) -> jax.Array:
        """1 - SNR_t / SNR_s, the share of the signal-to-noise ratio lost: 1 for s = 0."""
        return -jnp.expm1(-self.log_snr_drop)

    @property
    def log_snr_loss(self) -> jax.Array:
        """log(1 - SNR_t / SNR_s), precise where nearly all is lost too: 0 for s = 0."""
        drop = self.log_snr_drop
        little = drop < 0.7
        # Each form at a harmless place where the other is taken: no NaN in either's gradient.
        near, far = jnp.where(little, drop, 1.0), jnp.where(little, 1.0, drop)
        return jnp.where(little, jnp.log(-jnp.expm1(-near)), jnp.log1p(-jnp.exp(-far)))

    @property
    def alpha(self) -> jax.Array:
        """alpha_{t|s} = sqrt(alpha_bar_t / alpha_bar_s), the signal's coefficient."""
        return self.t.alpha / self.s.alpha

    @property
    def beta(self) -> jax.Array:
        """beta_{t|s} = 1 - alpha_bar_t / alpha_bar_s, the transition's variance."""
        return self.t.sigma_squared * self.snr_loss

    @property
    def log_beta(self) -> jax.Array:
        """log beta_{t|s}, precise where that is small."""
        return self.t.log_sigma_squared + self.log_snr_loss

    @property
    def posterior_variance(self) -> jax.Array:
        """Variance of q(x_s | x_t, x_0), Eq. 7 for any s < t; 0 for s = 0."""
        return self.s.sigma_squared * self.snr_loss


class Schedule(Protocol):
    """The interface of a schedule at given times, for tables and for continuous time."""

    @property
    def ends(self) -> tuple[float, float]: ...
    def at(self, t: jax.typing.ArrayLike) -> LogSNR: ...
    def between(self, s: jax.Array, t: jax.Array) -> Transition: ...
    def slope(self, t: jax.typing.ArrayLike) -> jax.Array: ...
    def time_of(self, log_snr: jax.typing.ArrayLike) -> jax.Array: ...
    def ends_without_signal(self) -> bool: ...


def require_signal(schedule: Schedule, why: str) -> None:
    """Raises ValueError, with what follows in `why`, for a schedule that ends without signal."""
    if schedule.ends_without_signal():
        raise ValueError(
            f"the schedule leaves no signal at t = T = {schedule.ends[1]:g} (alpha_T = 0), {why}"
        )


def from_betas(betas: Sequence[float] | np.ndarray) -> NoiseSchedule:
    """Returns the schedule of any list of betas: betas[0] is beta_1, in (0, 1); the last one may be
    1.

    Raises ValueError for a beta outside, naming its step.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.size == 0:
        raise ValueError(f"betas must be a non-empty list, got shape {betas.shape}")
    allowed = (betas > 0) & (
        (betas < 1) | ((betas == 1) & (np.arange(1, betas.size + 1) == betas.size))
    )
    if not allowed.all():
        t = int(np.argmin(allowed)) + 1
        raise ValueError(
            f"beta_{t} = {betas[t - 1]:g} (of {betas.size} steps): every beta must lie in (0, 1); "
            "only the last may be 1"
        )
    with np.errstate(divide="ignore"):  # log 0 = -inf is meant, where the last beta is 1
        log_alpha_bar = np.cumsum(np.log1p(-betas))
        return from_log_snr(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def from_log_snr(log_snr: Sequence[float] | np.ndarray) -> NoiseSchedule:
    """Returns the schedule whose log-SNR at t = 1..T is given (float64 is kept to 48 bits),
    falling."""
    log_snr = np.concatenate([[np.inf], np.asarray(log_snr, np.float64)])
    if not np.all(log_snr[1:] < log_snr[:-1]):
        raise ValueError("log-SNR must fall at every step")
    high = log_snr.astype(np.float32)
    low = np.where(np.isfinite(high), log_snr - np.where(np.isfinite(high), high, 0), 0)
    return NoiseSchedule(jnp.asarray(high), jnp.asarray(low, jnp.float32))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Returns the schedule with alpha shifted and scaled so that alpha_T = 0 and alpha_1 stays.

    alpha_t <- (alpha_t - alpha_T) alpha_1 / (alpha_1 - alpha_T) (Lin et al. 2024, Algorithm 1). The
    network must predict x_0 or v. Raises ValueError for a single step.
    """
    if schedule.num_steps < 2:
        raise ValueError("a schedule of one step cannot be rescaled to end without signal")
    high, low = (np.asarray(x, np.float64)[1:] for x in schedule)
    log_snr = high + low
    alpha = np.exp(-0.5 * np.logaddexp(0, -log_snr))
    rescaled = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    with np.errstate(divide="ignore"):  # of the last, where it is meant
        new = 2 * np.log(rescaled) - np.log1p(-(rescaled**2))
    return from_log_snr(np.concatenate([log_snr[:1], new[1:]]))


def shifted(schedule: NoiseSchedule, resolution: int, *, reference: int = 64) -> NoiseSchedule:
    """Returns the schedule for images of another resolution, by `resolution_shift`."""
    high, low = (np.asarray(x, np.float64)[1:] for x in schedule)
    return from_log_snr(high + low + resolution_shift(resolution, reference))


def resolution_shift(resolution: int, reference: int) -> float:
    """Returns the change of log-SNR at every time, 2 log(reference/resolution) (Hoogeboom et al.
    2023).

    Pixels of a larger image say the same more often: averaged down to the reference resolution it
    is then as noisy as one of that resolution. Raises ValueError unless both are >= 1.
    """
    if resolution < 1 or reference < 1:
        raise ValueError(f"resolution {resolution}, reference {reference}: must be >= 1")
    return float(2 * np.log(reference / resolution))


def linear(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Returns the paper's schedule, whose beta_t rises linearly from beta_start to beta_end
    (Section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, whole_number("num_steps", num_steps)))


def quadratic(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Returns the schedule whose sqrt(beta_t) rises linearly ('quad' in the authors' code)."""
    num_steps = whole_number("num_steps", num_steps)
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2)


def constant(num_steps: int = 1000, beta: float = 0.02) -> NoiseSchedule:
    """Returns the schedule with beta_t = beta at every step ('const' in the authors' code)."""
    return from_betas(np.full(whole_number("num_steps", num_steps), beta))


def geometric(
    num_steps: int = 232, sigma_min: float = 0.02, sigma_max: float = 100.0
) -> NoiseSchedule:
    """Returns the schedule whose sigma_t/alpha_t is geometric, from sigma_min at t = 1 to sigma_max
    at t = T: the noise levels of NCSN (Song & Ermon 2019), whose view is y = x_t/alpha_t.

    In units of the data: by default NCSNv2's for CIFAR-10, which has 0.01 and 50 for data in
    [0, 1] where these are in [-1, 1] (Song & Ermon 2020; `ncsn` has their rules for others).
    Raises ValueError unless num_steps >= 2 and 0 < sigma_min < sigma_max.
    """
    num_steps = whole_number("num_steps", num_steps, 2)
    if not 0 < sigma_min < sigma_max < np.inf:
        raise ValueError(f"sigma from {sigma_min} to {sigma_max}: must rise from above 0")
    return from_log_snr(-2 * np.linspace(np.log(sigma_min), np.log(sigma_max), num_steps))


def jsd(num_steps: int = 1000) -> NoiseSchedule:
    """Returns the schedule with beta_t = 1 / (T - t + 1), so alpha_bar_t = 1 - t/T (Sohl-Dickstein
    et al. 2015).

    No signal is left at t = T: log_snr[T] = -inf, and eps alone cannot tell x_0 there.
    """
    return from_betas(1 / np.arange(whole_number("num_steps", num_steps), 0, -1))


def warmup(
    fraction: float, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Returns the schedule that is linear over the first `fraction` of the steps, then beta_end.

    Raises ValueError for a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction = {fraction}: must be in [0, 1]")
    num_steps = whole_number("num_steps", num_steps)
    betas = np.full(num_steps, beta_end)
    rising = int(num_steps * fraction)
    betas[:rising] = np.linspace(beta_start, beta_end, rising)
    return from_betas(betas)


def warmup10(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Returns `warmup` over a tenth of the steps, as named in the authors' code."""
    return warmup(0.1, num_steps, beta_start, beta_end)


def warmup50(
    num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> NoiseSchedule:
    """Returns `warmup` over half of the steps, as named in the authors' code."""
    return warmup(0.5, num_steps, beta_start, beta_end)


def cosine(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Returns the schedule with alpha_bar_t ~ cos^2((t/T + offset)/(1 + offset) pi/2) (Nichol &
    Dhariwal 2021, Eq. 17)."""
    num_steps = whole_number("num_steps", num_steps)
    u = np.arange(num_steps + 1) / num_steps
    angle = (u + offset) / (1 + offset) * np.pi / 2
    # 1 - cos^2(b)/cos^2(a) = sin(b - a) sin(b + a)/cos^2(a): no digits lost to the subtraction.
    a, b = angle[:-1], angle[1:]
    return from_betas(np.minimum(np.sin(b - a) * np.sin(b + a) / np.cos(a) ** 2, max_beta))


def sigmoid(
    num_steps: int = 1000,
    start: float = -3.0,
    end: float = 3.0,
    temperature: float = 1.0,
    max_beta: float = 0.999,
) -> NoiseSchedule:
    """Returns the schedule whose alpha_bar_t falls from 1 to 0 as sigmoid(-z), z from start to end
    (Jabri et al. 2022).

    Rescaled so that alpha_bar_0 = 1; the last steps' beta is cut at max_beta.
    """

    def falling(u: np.ndarray | float) -> np.ndarray:
        return 1 / (1 + np.exp((u * (end - start) + start) / temperature))

    num_steps = whole_number("num_steps", num_steps)
    u = np.arange(num_steps + 1) / num_steps
    alpha_bar = (falling(u) - falling(1.0)) / (falling(0.0) - falling(1.0))
    return from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))
