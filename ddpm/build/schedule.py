"""Config -> noise schedule."""

from typing import Any

from ml_collections import ConfigDict

from ddpm.build.parts import (
    CLOSELY_SPACED,
    CONTINUOUS,
    IS_LEARNED,
    NO_SIGNAL,
    ONE_LEVEL,
    RESCALED,
    SEES_LOG_SNR,
    Blame,
    Part,
)
from ddpm.diffusion import continuous, schedules
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import InputError


def _learned(d: Any) -> NoiseSchedule:
    """Returns the schedule as it begins; what was learned is known once there are weights."""
    begin = continuous.init_learned(d.log_snr_0, d.log_snr_1)
    return continuous.table(continuous.learned(begin), d.num_steps)


# make(config.diffusion) -> NoiseSchedule
SCHEDULES: dict[str, Part] = {
    "linear": Part(lambda d: schedules.linear(d.num_steps, d.beta_start, d.beta_end)),
    "quadratic": Part(lambda d: schedules.quadratic(d.num_steps, d.beta_start, d.beta_end)),
    "constant": Part(lambda d: schedules.constant(d.num_steps, d.beta_end)),
    "jsd": Part(lambda d: schedules.jsd(d.num_steps)),
    "warmup10": Part(lambda d: schedules.warmup10(d.num_steps, d.beta_start, d.beta_end)),
    "warmup50": Part(lambda d: schedules.warmup50(d.num_steps, d.beta_start, d.beta_end)),
    "cosine": Part(lambda d: schedules.cosine(d.num_steps)),
    "sigmoid": Part(lambda d: schedules.sigmoid(d.num_steps)),
    "linear_log_snr": Part(
        lambda d: continuous.table(continuous.linear(d.log_snr_0, d.log_snr_1), d.num_steps),
        facts={CLOSELY_SPACED},
    ),
    "geometric": Part(
        lambda d: schedules.geometric(d.num_steps, d.sigma_min, d.sigma_max),
        facts={CLOSELY_SPACED},
    ),
    "edm": Part(lambda d: continuous.table(continuous.edm(), d.num_steps), facts={CLOSELY_SPACED}),
    "learned": Part(
        _learned,
        facts={CLOSELY_SPACED, IS_LEARNED},
        needs={
            SEES_LOG_SNR: Blame(
                "model.noise_input",
                "t means another noise as the schedule is learned: take 'log_snr'",
            ),
            CONTINUOUS: Blame(
                "training.loss",
                "a schedule is learned by the continuous bound alone, which knows it by its end "
                "points: take 'continuous_bound'",
            ),
        },
        excludes={
            RESCALED: "it is learned, and neither rescaled nor shifted: set diffusion.log_snr_0 "
            "and .log_snr_1, where it begins",
        },
    ),
    "betas": Part(lambda d: schedules.from_betas(d.betas)),
}


def noise_schedule(
    config: ConfigDict, image_shape: tuple[int, int, int] | None = None
) -> NoiseSchedule:
    """Returns the schedule of config.diffusion, rescaled where it says so and, with the images'
    shape, shifted. Raises InputError for numbers that make none."""
    d = config.diffusion
    try:
        schedule = SCHEDULES[d.schedule].make(d)
        if d.reference_resolution and image_shape:
            side = min(image_shape[:2])
            schedule = schedules.shifted(schedule, side, reference=d.reference_resolution)
        return schedules.zero_terminal_snr(schedule) if d.zero_terminal_snr else schedule
    except (ValueError, MemoryError) as error:
        raise InputError(f"config.diffusion: {error}") from error


def schedule_facts(config: ConfigDict, schedule: NoiseSchedule) -> dict[str, str]:
    """Returns the facts that the schedule's numbers and settings bring, for `parts.check`."""
    d = config.diffusion
    holds = {
        NO_SIGNAL: schedule.ends_without_signal(),
        ONE_LEVEL: schedule.num_steps < 2,
        RESCALED: d.zero_terminal_snr or bool(d.reference_resolution),
    }
    return {fact: "" for fact, held in holds.items() if held}
