"""Noise schedules in continuous time: log-SNR as a function of t in [0, 1], fixed or learned.

t = 0 is the least noise, t = 1 the most. What takes a schedule at given times (`q_sample`, the
readings of a network, `losses`) takes one of these as it takes a table; samplers and the bound,
which go from step to step, take `table(schedule, num_steps)`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.schedules import (
    LogSNR,
    NoiseSchedule,
    Transition,
    from_log_snr,
    resolution_shift,
)
from ddpm.diffusion.times import as_times, whole_number


class ContinuousSchedule(NamedTuple):
    """A schedule of log_snr(t), of any shape, falling over [0, 1]. NumPy in, NumPy float64 out."""

    log_snr: Callable[[Any], Any]

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last time."""
        return 0.0, 1.0

    def at(self, t: jax.typing.ArrayLike) -> LogSNR:
        """Returns the log-SNR at times t, in the shape of t.

        Raises ValueError for a time outside [0, 1], but not under tracing.
        """
        high = self.log_snr(jnp.asarray(as_times(self.ends, t), jnp.float32))
        return LogSNR(high, jnp.zeros_like(high))

    def between(self, s: jax.typing.ArrayLike, t: jax.typing.ArrayLike) -> Transition:
        """Returns the forward transition for times s < t."""
        return Transition(self.at(s), self.at(t))

    def slope(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Returns d log_snr / dt < 0, in the shape of t."""
        t = jnp.asarray(as_times(self.ends, t), jnp.float32)
        return jax.jvp(self.log_snr, (t,), (jnp.ones_like(t),))[1]

    def time_of(self, log_snr: jax.typing.ArrayLike) -> jax.Array:
        """Returns the time of a log-SNR: `at` inverted, by bisection. Beyond, the nearer end."""
        log_snr = jnp.asarray(log_snr, jnp.float32)

        def halve(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle = (low + high) / 2
            before = self.log_snr(middle) > log_snr
            return jnp.where(before, middle, low), jnp.where(before, high, middle)

        ends = jnp.zeros_like(log_snr), jnp.ones_like(log_snr)
        low, high = jax.lax.fori_loop(0, 30, halve, ends)
        return (low + high) / 2

    def ends_without_signal(self) -> bool:
        """Returns whether alpha at t = 1 is 0 in float32; False under tracing."""
        last = self.log_snr(np.ones(()))
        if isinstance(last, jax.core.Tracer):
            return False
        return bool(np.exp(np.float64(last) / 2) < np.finfo(np.float32).tiny)


def linear(log_snr_0: float = 13.3, log_snr_1: float = -5.0) -> ContinuousSchedule:
    """Returns log-SNR that falls linearly, by default between the ends that VDM starts from (Kingma
    et al. 2021).

    Raises ValueError unless it falls.
    """
    _falls(log_snr_0, log_snr_1)
    return ContinuousSchedule(lambda t: log_snr_0 + (log_snr_1 - log_snr_0) * t)


def linear_beta(beta_0: float = 0.1, beta_1: float = 20.0) -> ContinuousSchedule:
    """Returns the schedule whose beta(t) rises linearly: the variance-preserving SDE of Song et al.
    (2021), the paper's limit.

    -log alpha_bar = beta_0 t + (beta_1 - beta_0) t^2/2, so that log_snr is +inf at t = 0.
    """

    def log_snr(t: Any) -> Any:
        xp = _numpy_of(t)
        return -xp.log(xp.expm1(beta_0 * t + (beta_1 - beta_0) * t**2 / 2))

    return ContinuousSchedule(log_snr)


def cosine(log_snr_0: float = 15.0, log_snr_1: float = -15.0) -> ContinuousSchedule:
    """Returns the schedule with alpha = cos of an angle that grows linearly: log_snr = -2 log tan(a
    + (b - a) t).

    The cosine cut off at both ends (Hoogeboom et al. 2023). Raises ValueError unless it falls.
    """
    _falls(log_snr_0, log_snr_1)
    a, b = np.arctan(np.exp(-0.5 * np.array([log_snr_0, log_snr_1]))).tolist()

    def log_snr(t: Any) -> Any:
        xp = _numpy_of(t)
        # The smaller of the angle and its complement, whose tangent keeps its digits.
        angle = a * (1 - t) + b * t
        rest = (np.pi / 2 - a) * (1 - t) + (np.pi / 2 - b) * t
        near = angle < rest
        value = 2 * xp.log(xp.tan(xp.where(near, angle, rest)))
        return xp.where(near, -value, value)

    return ContinuousSchedule(log_snr)


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> ContinuousSchedule:
    """Returns the schedule whose sigma/alpha grows as its rho-th root does, linearly (Karras et al.
    2022, Eq. 5).

    Raises ValueError unless 0 < sigma_min < sigma_max and rho > 0.
    """
    if not (0 < sigma_min < sigma_max and rho > 0):
        raise ValueError(
            f"sigma from {sigma_min} to {sigma_max}, rho = {rho}: must be > 0, and sigma must rise"
        )
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return ContinuousSchedule(lambda t: -2 * rho * _numpy_of(t).log(low + (high - low) * t))


def shifted(
    schedule: ContinuousSchedule, resolution: int, *, reference: int = 64
) -> ContinuousSchedule:
    """Returns the schedule for images of another resolution, by `schedules.resolution_shift`."""
    shift = resolution_shift(resolution, reference)
    return ContinuousSchedule(lambda t: schedule.log_snr(t) + shift)


def table(schedule: ContinuousSchedule, num_steps: int) -> NoiseSchedule:
    """Returns the schedule as a table of T = num_steps >= 2 noise levels, evenly spread in time.

    From t = 0, where the log-SNR is finite there; else from 1/T. To t = 1 in any case.
    """
    num_steps = whole_number("num_steps", num_steps, 2)
    with np.errstate(divide="ignore"):
        whole = np.isfinite(schedule.log_snr(np.zeros(1))).all()
    return from_log_snr(schedule.log_snr(np.linspace(0 if whole else 1 / num_steps, 1, num_steps)))


class MonotoneLogSNR(NamedTuple):
    """Parameters of a learned log-SNR: its end points, scalars, and the shape between, float32[K].

    The shape is a sum of K sigmoids, each of a positive height and sharpness, and of a straight
    line: VDM's monotone network (Kingma et al. 2021) with its end points taken out.
    """

    log_snr_0: jax.Array
    log_snr_1: jax.Array
    height: jax.Array
    sharpness: jax.Array
    place: jax.Array


def init_learned(
    log_snr_0: float = 13.3, log_snr_1: float = -5.0, *, num_units: int = 64
) -> MonotoneLogSNR:
    """Returns parameters to start from, nearly linear between the ends. Raises ValueError unless it
    falls."""
    _falls(log_snr_0, log_snr_1)
    # Types are named: of a weak type, it would not be what comes out of a training step, and the
    # second step would be compiled anew.
    return MonotoneLogSNR(
        jnp.float32(log_snr_0),
        jnp.float32(log_snr_1),
        height=jnp.full(num_units, -3.0, jnp.float32),
        sharpness=jnp.full(num_units, num_units / 4, jnp.float32),
        place=(jnp.arange(num_units, dtype=jnp.float32) + 0.5) / num_units,
    )


def learned(parameters: MonotoneLogSNR) -> ContinuousSchedule:
    """Returns the schedule of these parameters, through which gradients flow.

    It falls whatever the shape is, as long as log_snr_0 > log_snr_1: the ends are not held apart.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in parameters)

    def log_snr(t: Any) -> Any:
        xp = jnp if traced else _numpy_of(t)
        real = xp.float64 if xp is np else xp.float32
        p = MonotoneLogSNR(*(xp.asarray(x, real) for x in parameters))
        height, half = (xp.logaddexp(x, 0.0) / 2 for x in (p.height, p.sharpness))

        def rise(t: Any) -> Any:
            """Returns the rise from 0 at t = 0, unit by unit, so that units that do not change in
            0..1 cost no digits."""
            units = xp.tanh(half * (t[..., None] - p.place)) + xp.tanh(half * p.place)
            return t + (height * units).sum(axis=-1)

        part = rise(xp.asarray(t, real)) / rise(xp.ones((), real))
        return p.log_snr_0 * (1 - part) + p.log_snr_1 * part

    return ContinuousSchedule(log_snr)


class Levels(NamedTuple):
    """A schedule at one batch of times only: whatever is asked, log_snr [B] and its slope [B].

    A loss of it depends on a schedule by these two, as `learned_gradients` wants.
    """

    log_snr: jax.Array
    rate: jax.Array

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last time."""
        return 0.0, 1.0

    def at(self, t: jax.typing.ArrayLike) -> LogSNR:
        """Returns the log-SNR at the times."""
        return LogSNR(self.log_snr, jnp.zeros_like(self.log_snr))

    def slope(self, t: jax.typing.ArrayLike) -> jax.Array:
        """Returns d log_snr / dt at the times."""
        return self.rate

    def ends_without_signal(self) -> bool:
        """Returns False: the levels of one batch do not tell."""
        return False


class LearnedGradients(NamedTuple):
    """Losses [B], and gradients in the shapes of the network's and the schedule's parameters."""

    losses: jax.Array
    network: Any
    schedule: MonotoneLogSNR


def learned_gradients(
    loss: Callable[[Any, jax.Array, jax.Array], jax.Array],
    network: Any,
    parameters: MonotoneLogSNR,
    t: jax.Array,
) -> LearnedGradients:
    """Returns the gradients that learn a schedule together with the network (Kingma et al. 2021).

    The network and the end points descend the mean loss. The shape between, on which its
    expectation does not depend, descends its variance, that is the mean of the squared loss:
    its gradient is that of each loss, twice the loss times, in the same backward pass.

    Args:
      loss: (network's parameters, log_snr [B], its slope [B]) -> [B], at the times t [B]. The
        schedule may come into it by these two alone.
    """

    def levels(parameters: MonotoneLogSNR) -> tuple[jax.Array, jax.Array]:
        schedule = learned(parameters)
        return schedule.log_snr(t), schedule.slope(t)

    (log_snr, slope), to_parameters = jax.vjp(levels, parameters)
    losses, to_inputs = jax.vjp(loss, network, log_snr, slope)
    of_network, *of_levels = to_inputs(jnp.full_like(losses, 1 / losses.size))
    (of_mean,) = to_parameters(tuple(of_levels))
    (of_square,) = to_parameters(tuple(2 * losses * g for g in of_levels))
    ends = {"log_snr_0": of_mean.log_snr_0, "log_snr_1": of_mean.log_snr_1}
    return LearnedGradients(losses, of_network, of_square._replace(**ends))


def _falls(log_snr_0: float, log_snr_1: float) -> None:
    if not log_snr_0 > log_snr_1:
        raise ValueError(f"log-SNR from {log_snr_0} to {log_snr_1}: must fall")


def _numpy_of(t: Any) -> Any:
    return jnp if isinstance(t, jax.Array) else np
