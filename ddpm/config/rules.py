"""The types and ranges of a config's values, one rule a key."""

from collections.abc import Collection, Mapping
from typing import Any

from PIL import ImageColor

from ddpm.config.keys import PARTS, default
from ddpm.config.tree import flatten, nearest
from ddpm.errors import InputError


def check_values(config: Mapping[str, Any], choices: Mapping[str, Collection[str]]) -> None:
    """Raises InputError at the first unknown key or value that is not allowed.

    `choices` are the names that keys may have, those of the registries.
    """
    known, given = flatten(default()), flatten(config)
    for key in given:
        if key not in known:
            raise InputError(f"config.{key}: there is no such key{nearest(key, known)}")
    for key, example in known.items():
        if key not in given:
            raise InputError(f"config.{key} is missing: start from ddpm.config.default()")
        _check_type(key, given[key], example)
    for key, names in choices.items():
        if given[key] not in names:
            named = ", ".join(v or "''" for v in names)
            raise InputError(
                f"config.{key} = {given[key]!r}: must be one of {named}{nearest(given[key], names)}"
            )
    for key, (holds, rule) in _RULES.items():
        if not holds(given[key]):
            raise InputError(f"config.{key} = {given[key]!r}: must be {rule}")


def _check_type(key: str, value: Any, example: Any) -> None:
    allowed: Any = type(example)
    if allowed is float:
        allowed = (int, float)
    elif allowed is tuple:
        allowed = (tuple, list)
    if not isinstance(value, allowed) or (
        isinstance(value, bool) and not isinstance(example, bool)
    ):
        raise InputError(f"config.{key} = {value!r}: must be of type {type(example).__name__}")
    for number in value if isinstance(value, tuple | list) else (value,):
        if isinstance(number, int) and number.bit_length() > 63:  # Python may refuse to print it
            raise InputError(f"config.{key}: a number of {number.bit_length()} bits: at most 63")


# The largest numbers that are not refused at once: beyond them no memory holds what they ask for.
_MOST_COUNTED = 2**31 - 1  # by int32, as steps and samples are
_MOST_IN_BATCH = 2**20
_WIDEST = 2**14  # of one 3x3 convolution 10 GB, as of one side of an image
_DEEPEST = 1000  # layers, or visits of one place
_MOST_BLOCKS = 100  # of a level
_MOST_NOISE_LEVELS = 10**6
_LARGEST = 3.4e38  # in float32


def _whole(least: int, most: int = _MOST_COUNTED) -> tuple[Any, str]:
    return lambda v: least <= v <= most, f"a whole number >= {least}, at most {most}"


def _colour(v: str) -> bool:
    try:
        return len(ImageColor.getrgb(v)) == 3
    except ValueError:
        return False


def _sizes(v: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= _WIDEST for n in v)


def _counts(v: Any) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in v)
    return bool(v) and whole and all(0 < n <= _MOST_COUNTED for n in v)


def _exponents(v: Any) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 16 for n in v)
    return whole and len(set(v)) == len(v)


def _range(v: Any) -> bool:
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in v)
    return not v or (len(v) == 2 and numbers and 0 <= v[0] < v[1])


def _box(v: Any) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _WIDEST for n in v)
    return not v or (len(v) == 4 and whole and min(v[2:]) > 0)


def _fractions(v: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in v)
    return bool(v) and numbers and all(0 <= x <= 1 for x in v)


def _widths(v: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in v)
    return bool(v) and numbers and all(0 < x <= 0.28 for x in v) and len(set(v)) == len(v)


def _seeds(v: Any) -> bool:
    whole = all(isinstance(n, int) and 0 <= n < 2**32 for n in v)
    return bool(v) and whole and len(set(v)) == len(v)


def _interval(v: Any) -> bool:
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in v)
    return not v or (len(v) == 2 and numbers and 0 <= v[0] < v[1])


_SIZES = f"whole numbers > 0, at most {_WIDEST}"
_FINITE = (lambda v: abs(v) <= _LARGEST, f"a finite number, at most {_LARGEST:g}")
_POSITIVE = (lambda v: 0 < v <= _LARGEST, f"a number > 0, at most {_LARGEST:g}")
_NOT_NEGATIVE = (lambda v: 0 <= v <= _LARGEST, f"a number >= 0, at most {_LARGEST:g}")
_FRACTION = (lambda v: 0 <= v < 1, "in [0, 1)")
_SEED = (lambda v: 0 <= v < 2**32, "a whole number in 0..2^32 - 1")
_RULES: dict[str, tuple[Any, str]] = {
    "seed": _SEED,
    "data.channels": (lambda v: v in (1, 3), "1 or 3"),
    "data.image_size": (
        lambda v: len(v) in (0, 2) and _sizes(v),
        f"() or (height, width), {_SIZES}",
    ),
    "data.background": (_colour, "a colour, such as 'white', 'black' or '#808080'"),
    "data.max_pixels": _whole(1),
    "model.channels": (
        lambda v: 4 <= v <= _WIDEST and v % 2 == 0,
        f"an even number >= 4, at most {_WIDEST}",
    ),
    "model.channel_multipliers": (lambda v: v and _sizes(v), f"a tuple of {_SIZES}"),
    "model.num_res_blocks": _whole(1, _MOST_BLOCKS),
    "model.attention_resolutions": (_sizes, f"a tuple of {_SIZES}"),
    "model.dropout": _FRACTION,
    "model.num_groups": _whole(1, _WIDEST),
    "model.norm_epsilon": _POSITIVE,
    "model.head_channels": _whole(0, _WIDEST),
    "model.frequency_shift": (lambda v: v in (0, 1), "0 or 1"),
    "model.num_classes": _whole(0, _MOST_IN_BATCH),
    "model.low_resolution": _whole(0, _WIDEST),
    "model.skip_scale": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "model.input_features": (_exponents, "a tuple of different whole numbers in 0..15"),
    "model.patch_size": _whole(1, _WIDEST),
    "model.depth": _whole(1, _DEEPEST),
    "diffusion.num_steps": _whole(1, _MOST_NOISE_LEVELS),
    "diffusion.beta_start": (lambda v: 0 < v < 1, "in (0, 1)"),
    "diffusion.beta_end": (lambda v: 0 < v < 1, "in (0, 1)"),
    "diffusion.sigma_data": _POSITIVE,
    "diffusion.log_snr_0": (lambda v: abs(v) <= 30, "in [-30, 30]"),
    "diffusion.log_snr_1": (lambda v: abs(v) <= 30, "in [-30, 30]"),
    "diffusion.sigma_min": (lambda v: 1e-6 <= v <= 1e6, "in [1e-6, 1e6]"),
    "diffusion.sigma_max": (lambda v: 1e-6 <= v <= 1e6, "in [1e-6, 1e6]"),
    "diffusion.reference_resolution": _whole(0, _WIDEST),
    "training.steps": _whole(1),
    "training.batch_size": _whole(1, _MOST_IN_BATCH),
    "training.steps_per_dispatch": _whole(0, 10_000),
    "training.accumulation": _whole(1, _MOST_IN_BATCH),
    "training.learning_rate": _POSITIVE,
    "training.warmup_steps": _whole(0),
    "training.adam_b2": _FRACTION,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.grad_clip": _NOT_NEGATIVE,
    "training.min_snr_gamma": _POSITIVE,
    "training.sigmoid_bias": _FINITE,
    "training.huber_delta": _POSITIVE,
    "training.time_weight": _NOT_NEGATIVE,
    "training.ema_decay": _FRACTION,
    "training.label_dropout": _FRACTION,
    "training.augmentation": (lambda v: 0 <= v <= 1, "a probability in [0, 1]"),
    "training.low_resolution_noise": _FRACTION,
    "training.ema_images": _whole(1),
    "training.ema_relative_stds": (_widths, "a tuple of different numbers in (0, 0.28]"),
    "training.ema_snapshot_every": _whole(0),
    "training.log_every": _whole(1),
    "training.sample_every": _whole(0),
    "training.checkpoint_every": _whole(1),
    "training.checkpoints_kept": _whole(1),
    "sampling.eta": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "sampling.steps": _whole(0),
    "sampling.analytic_images": _whole(1, _MOST_IN_BATCH),
    "sampling.order": (lambda v: v in (1, 2, 3), "1, 2 or 3"),
    "sampling.churn": _NOT_NEGATIVE,
    "sampling.churn_range": (_range, "() or (least, most) of sigma/alpha, 0 <= least < most"),
    "sampling.churn_noise": _POSITIVE,
    "sampling.tolerance": (lambda v: 1e-7 <= v < 1, "in [1e-7, 1)"),
    "sampling.langevin_steps": _whole(1),
    "sampling.langevin_step_size": (lambda v: 0 < v < 2, "in (0, 2)"),
    "sampling.corrector_steps": _whole(0),
    "sampling.corrector_snr": (lambda v: 0 < v < 1, "in (0, 1)"),
    "sampling.sigma_max": _NOT_NEGATIVE,
    "sampling.rho": _POSITIVE,
    "comparison.samplers": (
        lambda v: v and all(isinstance(n, str) for n in v),
        'a tuple of strings, such as "dpm_solver order=3 grid=karras"',
    ),
    "comparison.steps": (_counts, f"a tuple of whole numbers > 0, at most {_MOST_COUNTED}"),
    "comparison.num_samples": _whole(10),
    "comparison.seed": _SEED,
    "sampling.dynamic_threshold": (lambda v: 0 <= v <= 1, "0 or a quantile in (0, 1]"),
    "sampling.label": _whole(-1),
    "sampling.guidance_scale": _FINITE,
    "sampling.guidance_interval": (_interval, "() or (lo, hi) with 0 <= lo < hi, in sigma/alpha"),
    "sampling.guidance_rescale": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "sampling.classifier_scale": _FINITE,
    "sampling.ema_relative_std": (lambda v: 0 <= v <= 0.28, "0 or in (0, 0.28]"),
    "sampling.low_resolution_noise": _FRACTION,
    "sampling.num_samples": _whole(1),
    "sampling.batch_size": _whole(1, _MOST_IN_BATCH),
    "sampling.seed": _SEED,
    "codec.nu": _whole(3, 16),
    "codec.together": _whole(1, 2**16 - 1),
    "codec.seed": _SEED,
    "editing.t": _whole(0),
    "editing.num_variations": _whole(1, _MOST_IN_BATCH),
    "editing.box": (_box, f"() or (top, left, height, width), whole numbers, at most {_WIDEST}"),
    "editing.jump_length": _whole(1),
    "editing.resamplings": _whole(1, _DEEPEST),
    "editing.fractions": (_fractions, "a tuple of numbers in [0, 1]"),
    "editing.iterations": _whole(0),
    "evaluation.parts": (
        lambda v: v and set(v) <= set(PARTS),
        f"a tuple of some of {', '.join(PARTS)}",
    ),
    "evaluation.batch_size": _whole(1, _MOST_IN_BATCH),
    "evaluation.bound_times": _whole(0, _MOST_NOISE_LEVELS),
    "evaluation.bound_images": _whole(0),
    "evaluation.flow_images": _whole(1),
    "evaluation.flow_tolerance": (lambda v: 1e-7 <= v < 1, "in [1e-7, 1)"),
    "evaluation.num_samples": _whole(10),
    "evaluation.seeds": (_seeds, "a tuple of different whole numbers in 0..2^32 - 1"),
}
