"""Time grids: which times a chain of N steps visits, falling from T, or near it, to 0.

Each is a function (schedule, steps) -> float or int [steps + 1], for `sample(times=...)`.
'leading', 'trailing' and 'linspace' are named as in `diffusers`, whose index is one less: t - 1.

The last step goes from the last noise level, where the denoiser is asked once more, to the data.
Times between whole ones are no trouble: the log-SNR is linear there, and the network's time
embedding is a function of any t.
"""

import numpy as np

from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling import samplers

# EDM's. Above, images are lost in noise: what a chain does there is wasted, or worse, where
# x_0 = (x_t - sigma eps) / alpha multiplies a network's error by sigma / alpha.
MOST_NOISE = 80.0


def uniform(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Returns times evenly spread from T to 0 and rounded: int[steps + 1]."""
    return samplers.times(schedule.num_steps, steps)


def trailing(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Returns the same as `uniform`, under the name that it has elsewhere: the last time T is
    visited."""
    return uniform(schedule, steps)


def leading(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Returns 1 + k floor(T / N) for k = N - 1..0: the first time 1 is visited, and T often not."""
    _check(schedule, steps)
    step_info = schedule.num_steps // steps
    return np.append(1 + step_info * np.arange(steps)[::-1], 0).astype(np.int32)


def linspace(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Returns times evenly spread from T to 1, both visited, and rounded; then 0."""
    _check(schedule, steps)
    return np.append(np.rint(np.linspace(schedule.num_steps, 1, steps)), 0).astype(np.int32)


def quadratic(schedule: NoiseSchedule, steps: int) -> np.ndarray:
    """Returns times with sqrt(t) evenly spread from sqrt(T) to 0 (as Song et al. 2021 do for
    CIFAR-10), rounded.

    Of the smallest times, which rounding would merge, each is visited once.
    """
    _check(schedule, steps)
    t = np.rint(schedule.num_steps * np.linspace(0, 1, steps + 1) ** 2)
    return np.maximum(t, np.arange(steps + 1))[::-1].astype(np.int32)


def log_snr(
    schedule: NoiseSchedule, steps: int, *, sigma_max: float | None = MOST_NOISE
) -> np.ndarray:
    """Returns fractional times with log-SNR evenly spread from sigma_max = sigma/alpha to that of t
    = 1; then 0.

    sigma_max: where the noise is more, the chain begins with that; None: at T.
    """
    _check(schedule, steps)
    first, last = _ends(schedule, sigma_max)
    return _at_log_snr(schedule, np.linspace(first, last, steps))


def karras(
    schedule: NoiseSchedule,
    steps: int,
    *,
    rho: float = 7.0,
    sigma_max: float | None = MOST_NOISE,
) -> np.ndarray:
    """Returns times with (sigma/alpha)^(1/rho) evenly spread (Karras et al. 2022, Eq. 5); ends as
    in `log_snr`.

    Raises ValueError unless rho > 0.
    """
    _check(schedule, steps)
    if not rho > 0:
        raise ValueError(f"rho = {rho}: must be a number > 0")
    # sigma/alpha = exp(-log_snr / 2)
    first, last = (np.exp(-end / 2 / rho) for end in _ends(schedule, sigma_max))
    return _at_log_snr(schedule, -2 * rho * np.log(np.linspace(first, last, steps)))


def _check(schedule: NoiseSchedule, steps: int) -> None:
    samplers.check_steps(schedule.num_steps, steps)


def _table(schedule: NoiseSchedule) -> np.ndarray:
    """Returns the log-SNR of t = 1..T in float64, without T where no signal is left."""
    high, low = (np.asarray(x, np.float64)[1:] for x in (schedule.log_snr, schedule.log_snr_low))
    return (high + low)[np.isfinite(high)]


def _ends(schedule: NoiseSchedule, sigma_max: float | None) -> tuple[float, float]:
    """Returns the log-SNR where a chain begins, and that of t = 1."""
    table = _table(schedule)
    if len(table) < 2:
        raise ValueError(
            "a grid over log-SNR is between two noise levels with signal left, of which there "
            f"are {len(table)}: take another grid"
        )
    last, first = table[[0, -1]]
    if sigma_max is not None:
        if not sigma_max > 0:
            raise ValueError(f"sigma_max = {sigma_max}: must be a number > 0")
        first = max(first, -2 * np.log(sigma_max))
    if first >= last:
        raise ValueError(f"sigma_max = {sigma_max:g}: less than t = 1 has, {np.exp(-last / 2):g}")
    return first, last


def _at_log_snr(schedule: NoiseSchedule, wanted: np.ndarray) -> np.ndarray:
    """Times float32[N + 1] of log-SNRs that rise, the ends exact, and 0."""
    table = _table(schedule)
    t = np.interp(-wanted, -table, np.arange(1.0, len(table) + 1))
    t = t.astype(np.float32)
    if (np.diff(t) >= 0).any():  # finer than float32 resolves
        raise ValueError(f"{len(t)} steps are too many for this grid")
    return np.append(t, np.float32(0))
