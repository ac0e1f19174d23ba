"""Config -> network, the names of `experiment` that have to do with it."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm import conditioning
from ddpm.errors import InputError, first_line
from ddpm.models.dit import DiT
from ddpm.models.unet import UNet
from ddpm.objectives import channels_out


def unet(config: ConfigDict, image_shape: tuple[int, int, int]) -> UNet:
    """By config.model."""
    m = config.model
    return UNet(
        channels=m.channels,
        channel_multipliers=tuple(m.channel_multipliers),
        num_res_blocks=m.num_res_blocks,
        attention_resolutions=tuple(m.attention_resolutions),
        dropout=m.dropout,
        num_groups=m.num_groups,
        norm_epsilon=m.norm_epsilon,
        head_channels=m.head_channels,
        symmetric_downsampling=m.symmetric_downsampling,
        scale_shift=m.scale_shift,
        skip_scale=m.skip_scale,
        resample_in_blocks=m.up_down == "resblock",
        **_common(config, image_shape),
    )


def dit(config: ConfigDict, image_shape: tuple[int, int, int]) -> DiT:
    """The same; InputError for what only the UNet can be told."""
    m = config.model
    for key, without in (("scale_shift", False), ("up_down", "conv"), ("skip_scale", 1.0),
                         ("symmetric_downsampling", False)):  # fmt: skip
        if m[key] != without:
            raise InputError(
                f"config.model.{key} = {m[key]!r}: is of the UNet alone: leave it at {without!r} "
                "with config.model.name = 'dit'"
            )
    return DiT(
        patch_size=m.patch_size,
        channels=m.channels,
        depth=m.depth,
        head_channels=m.head_channels,
        dropout=m.dropout,
        norm_epsilon=m.norm_epsilon,
        **_common(config, image_shape),
    )


NETWORKS: dict[str, Callable[[ConfigDict, tuple[int, int, int]], nn.Module]] = {
    "unet": unet,
    "dit": dit,
}


def network(config: ConfigDict, image_shape: tuple[int, int, int]) -> nn.Module:
    """The network by its name; InputError, before anything is computed, if it cannot be built."""
    model = NETWORKS[config.model.name](config, image_shape)
    check_model(model, image_shape)
    return model


def check_model(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    """The shapes of the parameters, without computing them; InputError if it cannot be built."""
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    try:
        return jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]
    except ValueError as error:
        raise InputError(f"config.model: {first_line(error)}") from error


def _common(config: ConfigDict, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What all networks take: of the input and output, and of time and labels."""
    m = config.model
    # EDM tells the network log(sigma)/4, about -1.5..1.1; all else has t = 1..T, T of the order of
    # a thousand.
    range_of_t = 1.0 if config.diffusion.prediction == "edm" else 1000.0
    return {
        "out_channels": channels_out(config, image_shape[-1]),
        "dtype": jnp.dtype(m.dtype),
        "cosines_first": m.cosines_first,
        "frequency_shift": m.frequency_shift,
        "num_classes": m.num_classes,
        "fourier_range": range_of_t if m.time_features == "fourier" else 0.0,
        "input_exponents": tuple(m.input_features),
        "add_input": m.add_input,
        **conditioning.network_inputs(config, image_shape[-1]),
    }
