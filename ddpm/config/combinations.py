"""Keys of a config that do not go together, whatever the parts are that their names stand for.

What parts need of each other, they say themselves, in `ddpm.build`.
"""

from collections.abc import Mapping
from typing import Any

from ddpm.config.tree import flatten
from ddpm.errors import InputError


def check_keys(config: Mapping[str, Any]) -> None:
    """Raises InputError for the first key that does not go with another."""
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
    """Raises InputError for settings without effect, so that nobody compares them, or at odds."""
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
    if m["add_input"] and m["noise_input"] == "none":
        raise InputError(
            "config.model.add_input = True: would add x_t/alpha_t, which is as large as the noise, "
            "with config.model.noise_input = 'none': leave it at False"
        )


def _check_conditioning(config: Mapping[str, Any]) -> None:
    given = flatten(config)
    enlarges = config["model"]["low_resolution"]
    for key in ("training.low_resolution_noise", "sampling.low_resolution_noise",
                "sampling.low_resolution_images"):  # fmt: skip
        if given[key] and not enlarges:
            raise InputError(
                f"config.{key} = {given[key]!r}: goes with config.model.low_resolution, the size "
                "of the images to enlarge"
            )
    noise, most = (
        config["sampling"]["low_resolution_noise"],
        config["training"]["low_resolution_noise"],
    )
    if noise > most:
        raise InputError(
            f"config.sampling.low_resolution_noise = {noise}: more than in training "
            f"(config.training.low_resolution_noise = {most}), which the model has not learned"
        )
