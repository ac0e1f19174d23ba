"""Every check of a config that needs no data: those of a run at start, and of a sweep's rows."""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from ddpm.build.data import BROKEN_IMAGES, ON_DEVICE
from ddpm.build.network import DTYPES, ENERGIES, NETWORKS, NOISE_INPUTS, TIME_FEATURES, UP_DOWN
from ddpm.build.objective import EMAS, LOSSES, PREDICTIONS, TIMES, WEIGHTS, check_objective
from ddpm.build.sampler import GRIDS, SAMPLERS, check_sampling
from ddpm.build.schedule import SCHEDULES, noise_schedule
from ddpm.build.variance import SAMPLING_VARIANCES, VARIANCES
from ddpm.config import DECODERS, TASKS, nearest, with_settings
from ddpm.config.combinations import check_keys, check_steering
from ddpm.config.rules import check_values
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import InputError
from ddpm.evaluation.inception import RESIZES
from ddpm.evaluation.shipped import SHIPPED
from ddpm.models.remat import REMAT

# The names that a key may have: the keys of the registry that makes something of them.
CHOICES: dict[str, Collection[str]] = {
    "data.broken_images": BROKEN_IMAGES,
    "data.on_device": ON_DEVICE,
    "model.name": NETWORKS,
    "model.energy": ENERGIES,
    "model.up_down": UP_DOWN,
    "model.time_features": TIME_FEATURES,
    "model.dtype": DTYPES,
    "model.remat": REMAT,
    "model.noise_input": NOISE_INPUTS,
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": PREDICTIONS,
    "diffusion.variance": VARIANCES,
    "training.loss": LOSSES,
    "training.loss_weight": WEIGHTS,
    "training.times": TIMES,
    "training.ema": EMAS,
    "training.moments_dtype": DTYPES,
    "sampling.sampler": SAMPLERS,
    "sampling.variance": SAMPLING_VARIANCES,
    "sampling.grid": GRIDS,
    "editing.task": TASKS,
    "codec.decoder": DECODERS,
    "evaluation.features": ("", *SHIPPED, "inception"),
    "evaluation.inception_resize": RESIZES,
}


def validate(config: Mapping[str, Any]) -> None:
    """Raises InputError at the first key or value that is not allowed, or keys that do not go
    together."""
    check_values(config, CHOICES)
    check_keys(config)
    check_objective(ConfigDict(config))


def check(config: ConfigDict, schedule: NoiseSchedule | None = None) -> None:
    """Raises InputError, with the reason, for a config that no run can have, whatever its data.

    `schedule` is the config's own if left out, not shifted to the images' size.
    """
    validate(config)
    check_steering(config)
    schedule = noise_schedule(config) if schedule is None else schedule
    check_objective(config, schedule)
    check_sampling(config, schedule)


def with_sampling(
    config: ConfigDict, settings: Mapping[str, Any], common: Collection[str] = ()
) -> ConfigDict:
    """Returns a copy with these settings of config.sampling: whole numbers also where others may
    stand, lists also for tuples. Raises InputError for a key that is none of it, or is one of
    `common`, which cannot differ here, and for a value that is not allowed."""
    known = {key: value for key, value in config.sampling.items() if key not in common}
    found = {}
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"{key!r} is no key of config.sampling{nearest(key, known)}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        float_key = isinstance(known[key], float) and whole
        found[key] = (
            float(value) if float_key else tuple(value) if isinstance(value, list) else value
        )
    new, _ = with_settings(config, sampling=found)
    validate(new)
    return new
