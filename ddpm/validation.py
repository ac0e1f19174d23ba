"""What is allowed in a config: checked at start, before anything is computed."""

from collections.abc import Mapping
from typing import Any

from ddpm.config import PARTS, default, flatten, nearest
from ddpm.errors import InputError

CHOICES = {
    "model.name": ("unet", "dit"),
    "model.up_down": ("conv", "resblock"),
    "model.time_features": ("sinusoids", "fourier"),
    "model.dtype": ("float32", "bfloat16"),
    "model.noise_input": ("t", "log_snr"),
    "diffusion.schedule": (
        "linear",
        "quadratic",
        "constant",
        "jsd",
        "warmup10",
        "warmup50",
        "cosine",
        "sigmoid",
        "linear_log_snr",
        "edm",
        "learned",
        "betas",
    ),
    "diffusion.prediction": ("eps", "x_0", "v", "score", "posterior_mean", "edm"),
    "diffusion.variance": ("fixed_large", "fixed_small", "learned", "learned_range"),
    "training.loss": ("mse", "l1", "huber", "bound", "hybrid", "continuous_bound"),
    "training.loss_weight": (
        "none",
        "simple",
        "x_0",
        "v",
        "min_snr",
        "truncated_snr",
        "p2",
        "sigmoid",
        "edm",
        "likelihood",
    ),
    "training.times": (
        "uniform",
        "low_discrepancy",
        "importance",
        "log_normal",
        "logit_normal",
    ),
    "training.ema": ("constant", "warm_up", "half_life", "power"),
    "data.broken_images": ("error", "skip"),
    "editing.task": ("vary", "inpaint", "interpolate", "reconstruct"),
    "sampling.sampler": (
        "ancestral",
        "ddim",
        "euler",
        "dpm_solver",
        "unipc",
        "heun",
        "probability_flow",
        "langevin",
    ),
    "sampling.variance": ("fixed_large", "fixed_small", "analytic"),
    "sampling.grid": (
        "uniform",
        "leading",
        "trailing",
        "linspace",
        "quadratic",
        "log_snr",
        "karras",
    ),
    "evaluation.features": ("", "digits", "fashion_mnist", "inception"),
    "evaluation.inception_resize": ("half_pixel", "tf1"),
}


def validate(config: Mapping[str, Any]) -> None:
    """Raises InputError at the first unknown key or value that is not allowed."""
    known, given = flatten(default()), flatten(config)
    for key in given:
        if key not in known:
            raise InputError(f"config.{key}: there is no such key{nearest(key, known)}")
    for key, example in known.items():
        if key not in given:
            raise InputError(f"config.{key} is missing: start from ddpm.config.default()")
        _check_type(key, given[key], example)
    for key, allowed in CHOICES.items():
        if given[key] not in allowed:
            named = ", ".join(v or "''" for v in allowed)
            raise InputError(
                f"config.{key} = {given[key]!r}: must be one of {named}"
                f"{nearest(given[key], allowed)}"
            )
    for key, (holds, rule) in _RULES.items():
        if not holds(given[key]):
            raise InputError(f"config.{key} = {given[key]!r}: must be {rule}")
    d, s, t = config["diffusion"], config["sampling"], config["training"]
    if t["ema_snapshot_every"] and t["ema"] != "power":
        raise InputError(
            f"config.training.ema_snapshot_every = {t['ema_snapshot_every']}: goes with "
            "config.training.ema = 'power', of which any width can be made"
        )
    if s["ema_relative_std"] and not (s["ema"] and t["ema"] == "power"):
        raise InputError(
            f"config.sampling.ema_relative_std = {s['ema_relative_std']}: goes with "
            "config.sampling.ema = True and config.training.ema = 'power', with snapshots of it"
        )
    if (d["schedule"] == "betas") != bool(d["betas"]):
        raise InputError("config.diffusion.betas goes with schedule 'betas', and only with it")
    num_steps = len(d["betas"]) or d["num_steps"]
    if s["steps"] > num_steps:
        raise InputError(f"config.sampling.steps = {s['steps']}: must be at most T = {num_steps}")
    if s["times"] and (s["steps"] or s["grid"] != "uniform"):
        raise InputError("config.sampling.times goes without sampling.steps and sampling.grid")
    if config["editing"]["t"] > num_steps:
        t = config["editing"]["t"]
        raise InputError(f"config.editing.t = {t}: must be in 1..T = {num_steps}, or 0 for T / 2")
    _check_network(config)
    _check_conditioning(config)


def check_steering(config: Mapping[str, Any]) -> None:
    """Raises InputError for labels, or guidance, that the model of this config cannot have."""
    s, classes = config["sampling"], config["model"]["num_classes"]
    label, scale = s["label"], s["guidance_scale"]
    without = "the model has no labels (config.model.num_classes = 0)"
    if not classes and scale != 1:
        raise InputError(
            f"config.sampling.guidance_scale = {scale}: {without}: leave it at 1.0, or see "
            "config.sampling.classifier_scale"
        )
    if not classes and label >= 0 and not s["classifier_scale"]:
        raise InputError(
            f"config.sampling.label = {label}: {without}: leave it at -1, or set "
            "config.sampling.classifier_scale"
        )
    if classes and label >= classes:
        raise InputError(
            f"config.sampling.label = {label}: must be -1 or in 0..{classes - 1} "
            f"(config.model.num_classes = {classes})"
        )
    if scale != 1 and config["training"]["label_dropout"] == 0:
        raise InputError(
            f"config.sampling.guidance_scale = {scale}: config.training.label_dropout = 0, so the "
            "model never learns to do without a label; leave the scale at 1.0"
        )
    if s["classifier_scale"] and label < 0:
        raise InputError(
            f"config.sampling.classifier_scale = {s['classifier_scale']}: say towards which class, "
            "with config.sampling.label"
        )
    if s["dynamic_threshold"] and not s["clip"]:
        raise InputError(
            f"config.sampling.dynamic_threshold = {s['dynamic_threshold']}: goes with "
            "config.sampling.clip = True"
        )


def _check_network(config: Mapping[str, Any]) -> None:
    """InputError for what has no effect with another setting, so that nobody compares it."""
    m = config["model"]
    for key, plain, other, value in (
        ("symmetric_downsampling", False, "up_down", "resblock"),
        ("cosines_first", False, "time_features", "fourier"),
        ("frequency_shift", 1, "time_features", "fourier"),
    ):
        if m[other] == value and m[key] != plain:
            raise InputError(
                f"config.model.{key} = {m[key]!r}: has no effect with config.model.{other} = "
                f"{value!r}: leave it at {plain!r}"
            )


def _check_conditioning(config: Mapping[str, Any]) -> None:
    given, t = flatten(config), config["training"]
    enlarges = config["model"]["low_resolution"]
    for key in ("training.low_resolution_noise", "sampling.low_resolution_noise",
                "sampling.low_resolution_images"):  # fmt: skip
        if given[key] and not enlarges:
            raise InputError(
                f"config.{key} = {given[key]!r}: goes with config.model.low_resolution, the size "
                "of the images to enlarge"
            )
    noise, most = config["sampling"]["low_resolution_noise"], t["low_resolution_noise"]
    if noise > most:
        raise InputError(
            f"config.sampling.low_resolution_noise = {noise}: more than in training "
            f"(config.training.low_resolution_noise = {most}), which the model has not learned"
        )
    learned = config["diffusion"]["schedule"] == "learned"  # whose end points code the data too
    if t["augmentation"] and (learned or t["loss"] in ("bound", "hybrid")):
        raise InputError(
            f"config.training.augmentation = {t['augmentation']}: warped images are not the 8-bit "
            "data that the decoder "
            + (
                "of a learned schedule codes: take another config.diffusion.schedule"
                if learned
                else f"in config.training.loss = {t['loss']!r} codes: take 'mse'"
            )
        )


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


def _whole(least: int) -> tuple[Any, str]:
    return lambda v: v >= least, f"a whole number >= {least}"


def _sizes(v: Any) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in v)


def _exponents(v: Any) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 16 for n in v)
    return whole and len(set(v)) == len(v)


def _range(v: Any) -> bool:
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in v)
    return not v or (len(v) == 2 and numbers and 0 <= v[0] < v[1])


def _box(v: Any) -> bool:
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in v)
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


_FINITE = (lambda v: abs(v) < float("inf"), "a finite number")
_POSITIVE = (lambda v: 0 < v < float("inf"), "a number > 0")
_NOT_NEGATIVE = (lambda v: 0 <= v < float("inf"), "a number >= 0")
_FRACTION = (lambda v: 0 <= v < 1, "in [0, 1)")
_RULES: dict[str, tuple[Any, str]] = {
    "seed": (lambda v: 0 <= v < 2**32, "a whole number in 0..2^32 - 1"),
    "data.channels": (lambda v: v in (1, 3), "1 or 3"),
    "data.image_size": (
        lambda v: len(v) in (0, 2) and _sizes(v),
        "() or (height, width)",
    ),
    "model.channels": (lambda v: v >= 4 and v % 2 == 0, "an even number >= 4"),
    "model.channel_multipliers": (lambda v: v and _sizes(v), "a tuple of whole numbers > 0"),
    "model.num_res_blocks": _whole(1),
    "model.attention_resolutions": (_sizes, "a tuple of whole numbers > 0"),
    "model.dropout": _FRACTION,
    "model.num_groups": _whole(1),
    "model.norm_epsilon": _POSITIVE,
    "model.head_channels": _whole(0),
    "model.frequency_shift": (lambda v: v in (0, 1), "0 or 1"),
    "model.num_classes": _whole(0),
    "model.low_resolution": _whole(0),
    "model.skip_scale": (lambda v: 0 < v <= 1, "in (0, 1]"),
    "model.input_features": (_exponents, "a tuple of different whole numbers in 0..15"),
    "model.patch_size": _whole(1),
    "model.depth": _whole(1),
    "diffusion.num_steps": _whole(1),
    "diffusion.beta_start": (lambda v: 0 < v < 1, "in (0, 1)"),
    "diffusion.beta_end": (lambda v: 0 < v < 1, "in (0, 1)"),
    "diffusion.sigma_data": _POSITIVE,
    "diffusion.log_snr_0": (lambda v: abs(v) <= 30, "in [-30, 30]"),
    "diffusion.log_snr_1": (lambda v: abs(v) <= 30, "in [-30, 30]"),
    "diffusion.reference_resolution": _whole(0),
    "training.steps": _whole(1),
    "training.batch_size": _whole(1),
    "training.learning_rate": _POSITIVE,
    "training.warmup_steps": _whole(0),
    "training.adam_b2": _FRACTION,
    "training.weight_decay": _NOT_NEGATIVE,
    "training.grad_clip": _NOT_NEGATIVE,
    "training.min_snr_gamma": _POSITIVE,
    "training.sigmoid_bias": (lambda v: abs(v) < float("inf"), "a finite number"),
    "training.huber_delta": _POSITIVE,
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
    "sampling.analytic_images": _whole(1),
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
    "comparison.steps": (lambda v: v and _sizes(v), "a tuple of whole numbers > 0"),
    "comparison.num_samples": _whole(10),
    "comparison.seed": (lambda v: 0 <= v < 2**32, "a whole number in 0..2^32 - 1"),
    "sampling.dynamic_threshold": (lambda v: 0 <= v <= 1, "0 or a quantile in (0, 1]"),
    "sampling.label": _whole(-1),
    "sampling.guidance_scale": _FINITE,
    "sampling.guidance_interval": (_interval, "() or (lo, hi) with 0 <= lo < hi, in sigma/alpha"),
    "sampling.guidance_rescale": (lambda v: 0 <= v <= 1, "in [0, 1]"),
    "sampling.classifier_scale": _FINITE,
    "sampling.ema_relative_std": (lambda v: 0 <= v <= 0.28, "0 or in (0, 0.28]"),
    "sampling.low_resolution_noise": _FRACTION,
    "sampling.num_samples": _whole(1),
    "sampling.batch_size": _whole(1),
    "sampling.seed": (lambda v: 0 <= v < 2**32, "a whole number in 0..2^32 - 1"),
    "editing.t": _whole(0),
    "editing.num_variations": _whole(1),
    "editing.box": (_box, "() or (top, left, height, width), whole numbers"),
    "editing.jump_length": _whole(1),
    "editing.resamplings": _whole(1),
    "editing.fractions": (_fractions, "a tuple of numbers in [0, 1]"),
    "editing.iterations": _whole(0),
    "evaluation.parts": (
        lambda v: v and set(v) <= set(PARTS),
        f"a tuple of some of {', '.join(PARTS)}",
    ),
    "evaluation.batch_size": _whole(1),
    "evaluation.bound_times": _whole(0),
    "evaluation.bound_images": _whole(0),
    "evaluation.flow_images": _whole(1),
    "evaluation.flow_tolerance": (lambda v: 1e-7 <= v < 1, "in [1e-7, 1)"),
    "evaluation.num_samples": _whole(10),
    "evaluation.seeds": (_seeds, "a tuple of different whole numbers in 0..2^32 - 1"),
}
