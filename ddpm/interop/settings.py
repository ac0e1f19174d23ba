"""The settings of a UNet and of its noise as `diffusers` writes them, in ours, and the way back.

What this library cannot represent is refused by its name: sampling something else in silence would
be worse.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import InputError

# Of UNet2DModel: what a key that is left out means.
_UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
}
# The values that the UNet has without a setting for them.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# Of config.model: what diffusers has no word for, and how every network of its is.
_PLAIN: dict[str, Any] = {
    "name": "unet",
    "energy": "none",
    "up_down": "conv",
    "skip_scale": 1.0,
    "time_features": "sinusoids",
    "input_features": (),
    "add_input": False,
    "noise_input": "t",
}
# Of no consequence: of the schedule, and of a training script's moving average.
_UNET_OTHER = ("num_train_timesteps", "decay", "min_decay", "optimization_step",
               "update_after_step", "use_ema_warmup", "inv_gamma", "power")  # fmt: skip
_SCHEDULER_FIXED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon",),
    "thresholding": (False,),
    "clip_sample_range": (1,),
    "rescale_betas_zero_snr": (False,),
    "set_alpha_to_one": (True,),
}
# Of few-step chains, whose times are this library's own, or unused.
_SCHEDULER_OTHER = ("timestep_spacing", "steps_offset", "dynamic_thresholding_ratio",
                    "sample_max_value", "skip_prk_steps", "predict_epsilon", "tensor_format",
                    "timestep_values")  # fmt: skip
_VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small",
              "fixed_large": "fixed_large"}  # fmt: skip
_SCHEDULES = {"linear": "linear", "scaled_linear": "quadratic", "squaredcos_cap_v2": "cosine"}


# Our own, which diffusers passes over for its underscore: config.training.label_dropout, 0 for a
# table of labels without a row for 'no label'.
LABEL_DROPOUT = "_label_dropout"


class ModelSettings(NamedTuple):
    """keys of config.model, all but dropout and dtype; (height, width, channels) of the images; and
    config.training.label_dropout, 0 for weights without a row for 'no label', and whether they
    said so."""

    model: dict[str, Any]
    image_shape: tuple[int, int, int]
    label_dropout: float
    said: bool


def model_settings(
    unet: Mapping[str, Any], path: object, label_dropout: float = 0.1
) -> ModelSettings:
    """Reads a UNet2DModel's config.json; InputError, which names `path`, for what cannot be
    represented.

    Where that does not say whether there is a row for 'no label', `label_dropout` does.
    """
    kind = unet.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise InputError(f"{path}: a {kind}; only a UNet2DModel can be read")
    known = _UNET_DEFAULTS.keys() | _UNET_FIXED.keys() | set(_UNET_OTHER)
    known |= {"attn_norm_num_groups", "time_embedding_dim"}
    _refuse_others(unet, known, _UNET_FIXED, path)
    c: dict[str, Any] = _UNET_DEFAULTS | dict(unet)

    def refuse(key: str, allowed: str) -> InputError:
        return InputError(f"{path}: {key} = {c.get(key)!r}: must be {allowed} to be read here")

    def whole(*values: Any) -> bool:
        return all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values)

    size = c["sample_size"]
    sizes = (size, size) if isinstance(size, int) else size
    if not isinstance(sizes, list | tuple) or len(sizes) != 2 or not whole(*sizes):
        raise refuse("sample_size", "the side of the images, or [height, width]")
    for key in ("in_channels", "layers_per_block", "norm_num_groups"):
        if not whole(c[key]):
            raise refuse(key, "a whole number > 0")
    if c["out_channels"] != c["in_channels"]:
        raise refuse("out_channels", f"in_channels = {c['in_channels']}, of a fixed variance")
    channels = c["block_out_channels"]
    if not isinstance(channels, list | tuple) or not channels or not whole(*channels):
        raise refuse("block_out_channels", "a list of whole numbers > 0")
    if any(n % channels[0] for n in channels):
        raise refuse("block_out_channels", "multiples of the first")
    attends = _attending(c["down_block_types"], "Down")
    if attends is None or len(attends) != len(channels):
        raise refuse("down_block_types", "DownBlock2D or AttnDownBlock2D for each of the levels")
    upwards = _attending(c["up_block_types"], "Up")
    if upwards is None or upwards[::-1] != attends:
        raise refuse("up_block_types", "the mirror image of down_block_types")
    if c["downsample_padding"] not in (0, 1):
        raise refuse("downsample_padding", "0 or 1")
    if c["freq_shift"] not in (0, 1):
        raise refuse("freq_shift", "0 or 1")
    # Left out, it means norm_num_groups; but with scale_shift, no norm in the middle's attention.
    scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
    if c.get("attn_norm_num_groups") not in [c["norm_num_groups"], *[None] * (not scale_shift)]:
        allowed = "norm_num_groups, with scale_shift" if scale_shift else "null or norm_num_groups"
        raise refuse("attn_norm_num_groups", allowed)
    if c.get("time_embedding_dim") not in (None, 4 * channels[0]):
        raise refuse("time_embedding_dim", f"null or {4 * channels[0]}")
    if not isinstance(c["flip_sin_to_cos"], bool):
        raise refuse("flip_sin_to_cos", "true or false")
    epsilon = c["norm_eps"]
    if not isinstance(epsilon, int | float) or isinstance(epsilon, bool) or not epsilon > 0:
        raise refuse("norm_eps", "a number > 0")
    heads = c["attention_head_dim"]
    with_attention = {channels[-1], *(n for n, a in zip(channels, attends, strict=True) if a)}
    if heads is not None and (not whole(heads) or any(n % heads for n in with_attention)):
        raise refuse("attention_head_dim", f"null or a divisor of {sorted(with_attention)}")
    said = c.get(LABEL_DROPOUT, label_dropout)
    if not isinstance(said, int | float) or isinstance(said, bool) or not 0 <= said < 1:
        raise refuse(LABEL_DROPOUT, "in [0, 1)")
    if (said > 0) != (label_dropout > 0):  # otherwise both mean the same table
        label_dropout = float(said)
    labels, without = c["num_class_embeds"], int(label_dropout > 0)
    if labels is not None and not (whole(labels) and labels > without):
        allowed = "null, or the number of classes"
        if without:
            allowed += " and one for no label (--config.training.label_dropout=0: of classes alone)"
        raise refuse("num_class_embeds", allowed)
    model = {
        "channels": channels[0],
        "channel_multipliers": tuple(n // channels[0] for n in channels),
        "num_res_blocks": c["layers_per_block"],
        "attention_resolutions": tuple(min(sizes) // 2**i for i, a in enumerate(attends) if a),
        "num_groups": c["norm_num_groups"],
        "norm_epsilon": float(epsilon),
        "head_channels": 0 if heads is None else heads,
        "symmetric_downsampling": c["downsample_padding"] == 1,
        "cosines_first": c["flip_sin_to_cos"],
        "frequency_shift": int(c["freq_shift"]),
        "num_classes": 0 if labels is None else labels - without,
        "scale_shift": scale_shift,
        **_PLAIN,
    }
    return ModelSettings(model, (*sizes, c["in_channels"]), label_dropout, LABEL_DROPOUT in c)


class NoiseSettings(NamedTuple):
    """keys of config.diffusion; of config.sampling, what its own scheduler would do."""

    diffusion: dict[str, Any]
    sampling: dict[str, Any]


def noise_settings(scheduler: Mapping[str, Any], path: object) -> NoiseSettings:
    """Reads a DDPMScheduler's or DDIMScheduler's config; InputError as above."""
    kind = scheduler.get("_class_name", "DDPMScheduler")
    if kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise InputError(f"{path}: a {kind}; only a DDPMScheduler or DDIMScheduler can be read")
    known = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
             "variance_type", "clip_sample"}  # fmt: skip
    known |= _SCHEDULER_FIXED.keys() | set(_SCHEDULER_OTHER)
    _refuse_others(scheduler, known, _SCHEDULER_FIXED, path)
    if scheduler.get("predict_epsilon") is False:  # the key of before 2023
        raise InputError(f"{path}: predict_epsilon = False: must be true to be read here")
    num_steps = scheduler.get("num_train_timesteps", 1000)
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    betas, name = scheduler.get("trained_betas"), scheduler.get("beta_schedule", "linear")
    if betas is None and name == "sigmoid":
        rising = 1 / (1 + np.exp(-np.linspace(-6, 6, num_steps)))
        betas = (rising * (end - start) + start).tolist()
    diffusion: dict[str, Any]
    if betas is not None:
        diffusion = {"schedule": "betas", "betas": tuple(float(b) for b in betas)}
        diffusion["num_steps"] = len(betas)
    elif name in _SCHEDULES:
        diffusion = {"schedule": _SCHEDULES[name], "betas": (), "num_steps": num_steps}
        diffusion |= {"beta_start": float(start), "beta_end": float(end)}
    else:
        allowed = ", ".join((*_SCHEDULES, "sigmoid"))
        raise InputError(f"{path}: beta_schedule = {name!r}: must be one of {allowed}")
    diffusion |= {"prediction": "eps", "variance": "fixed_large", "zero_terminal_snr": False}
    diffusion["reference_resolution"] = 0
    variance = scheduler.get("variance_type", "fixed_small")
    if variance not in _VARIANCES:
        allowed = ", ".join(_VARIANCES)
        raise InputError(f"{path}: variance_type = {variance!r}: must be one of {allowed}")
    clip = scheduler.get("clip_sample", True)
    if not isinstance(clip, bool):
        raise InputError(f"{path}: clip_sample = {clip!r}: must be true or false to be read here")
    return NoiseSettings(diffusion, {"variance": _VARIANCES[variance], "clip": clip})


def to_unet_config(config: ConfigDict, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns config.json of the UNet2DModel that config.model is."""
    m, (height, width, channels) = config.model, image_shape
    label_dropout = config.training.label_dropout
    sides = [min(height, width) // 2**i for i in range(len(m.channel_multipliers))]
    attn = ["Attn" if side in tuple(m.attention_resolutions) else "" for side in sides]
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.35.0",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [m.channels * n for n in m.channel_multipliers],
        "down_block_types": [f"{a}DownBlock2D" for a in attn],
        "up_block_types": [f"{a}UpBlock2D" for a in attn[::-1]],
        "layers_per_block": m.num_res_blocks,
        "norm_num_groups": m.num_groups,
        "attn_norm_num_groups": m.num_groups if m.scale_shift else None,
        "norm_eps": m.norm_epsilon,
        "attention_head_dim": m.head_channels or None,
        "downsample_padding": int(m.symmetric_downsampling),
        "flip_sin_to_cos": m.cosines_first,
        "freq_shift": m.frequency_shift,
        "dropout": m.dropout,
        "num_class_embeds": m.num_classes + (label_dropout > 0) if m.num_classes else None,
        **({LABEL_DROPOUT: label_dropout} if m.num_classes else {}),
        **{key: allowed[0] for key, allowed in _UNET_FIXED.items()},
        "resnet_time_scale_shift": "scale_shift" if m.scale_shift else "default",
    }


def to_scheduler_config(config: ConfigDict, schedule: NoiseSchedule) -> dict[str, Any]:
    """Returns scheduler_config.json of the DDPMScheduler with the same noise, variance and
    clipping.

    With few steps it visits this library's times, if their number divides T.
    """
    d = config.diffusion
    names = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    shifted = bool(d.reference_resolution)
    betas = None if d.schedule in names and not shifted else list(d.betas)
    if betas == [] or shifted:
        betas = np.asarray(schedule.beta[1:], np.float64).tolist()
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.35.0",
        "num_train_timesteps": schedule.num_steps,
        "beta_start": d.beta_start,
        "beta_end": d.beta_end,
        "beta_schedule": names.get(d.schedule, "linear"),
        "trained_betas": betas,
        "variance_type": config.sampling.variance,
        "clip_sample": config.sampling.clip,
        "clip_sample_range": 1.0,
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
    }


def check_network(config: ConfigDict) -> None:
    """Raises InputError for a network that the layouts of others have no place for."""
    for key, plain in _PLAIN.items():
        given = config.model[key]
        if (tuple(given) if isinstance(given, list) else given) != plain:
            raise InputError(
                f"config.model.{key} = {given!r}: such a network can be neither exported nor "
                f"imported: only one with {plain!r}"
            )


def check_written(config: ConfigDict) -> None:
    """Raises InputError for what diffusers' networks and schedulers cannot represent here, such as
    anything but eps alone."""
    check_network(config)
    for section, key in (
        ("training", "self_conditioning"),
        ("training", "augmentation"),
        ("model", "low_resolution"),
    ):
        if config[section][key]:
            raise InputError(
                f"config.{section}.{key} = {config[section][key]!r}: diffusers' UNet2DModel takes "
                "x_t, t and a label alone, so this network cannot be exported"
            )
    d = config.diffusion
    for key in ("prediction", "variance"):
        if d[key] not in ("eps", "fixed_large", "fixed_small"):
            raise InputError(
                f"config.diffusion.{key} = {d[key]!r}: only networks that predict eps, and no "
                "variance, can be exported"
            )


def _attending(kinds: Any, way: str) -> list[bool] | None:
    """Returns whether each block attends; None for a kind that cannot be had."""
    names = {f"{way}Block2D": False, f"Attn{way}Block2D": True}
    if not isinstance(kinds, list | tuple) or any(k not in names for k in kinds):
        return None
    return [names[k] for k in kinds]


def _refuse_others(
    given: Mapping[str, Any], known: set[str], fixed: dict[str, tuple[Any, ...]], path: object
) -> None:
    for key, value in given.items():
        if key not in known and not key.startswith("_") and value is not None:
            raise InputError(f"{path}: {key} = {value!r}: there is no such setting here")
        if key in fixed and value not in fixed[key]:
            allowed = " or ".join(repr(v) for v in fixed[key])
            raise InputError(f"{path}: {key} = {value!r}: must be {allowed} to be read here")
