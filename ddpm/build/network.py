"""Config -> network."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm.build import conditioning
from ddpm.build.parts import (
    HALF_PRECISION,
    HAS_ENERGY,
    LEARNS_VARIANCE,
    NO_SIGNAL,
    PRECONDITIONED,
    PREDICTS_EPS,
    SEES_LOG_SNR,
    SELF_CONDITIONED,
    Part,
)
from ddpm.build.variance import learns_variance
from ddpm.diffusion.predictions import conditioned_on_log_snr, noise_unconditional
from ddpm.errors import InputError, first_line
from ddpm.models.dit import DiT
from ddpm.models.energy import EnergyNetwork, Form, denoising, inner_product, norm
from ddpm.models.unet import UNet

# make(schedule, network) -> the network of (x_t, t)
NOISE_INPUTS: dict[str, Part] = {
    "t": Part(lambda schedule, network: network),
    "log_snr": Part(
        conditioned_on_log_snr,
        facts={SEES_LOG_SNR},
        excludes={PRECONDITIONED: "EDM's preconditioning has its own input for it: take 't'"},
    ),
    "none": Part(
        noise_unconditional,
        excludes={
            PRECONDITIONED: "EDM's preconditioning has its own input for the noise: take 't'",
            NO_SIGNAL: "the network is given x_t/alpha_t, which is infinite at t = T, where the "
            "schedule leaves no signal: take 't'",
            HAS_ENERGY: "the energy would be of x_t/alpha_t, and no longer -sigma_t log q(x_t): "
            "take 't' or 'log_snr'",
        },
    ),
}


def _energy(form: Form) -> Part:
    """Returns the part of an energy, by its form."""
    return Part(
        lambda network: EnergyNetwork(network, form),
        facts={HAS_ENERGY},
        needs={
            PREDICTS_EPS: "the gradient of an energy is eps, and config.diffusion.prediction = "
            "{diffusion_prediction}: take 'eps'"
        },
        excludes={
            LEARNS_VARIANCE: "an energy is one number, without a place for the variance of "
            "config.diffusion.variance = {diffusion_variance}: take 'fixed_large'",
            SELF_CONDITIONED: "with its own estimate of x_0 as an input, eps would not be the "
            "gradient of config.model.energy = {model_energy}: leave it off",
            HALF_PRECISION: "the gradient of config.model.energy = {model_energy} passes through "
            "all layers, whose rounding would be noise in eps: take 'float32'",
        },
    )


# make(network) -> the network whose output is the energy's gradient, or as it was
ENERGIES: dict[str, Part] = {
    "none": Part(lambda network: network),
    "denoising": _energy(denoising),
    "inner_product": _energy(inner_product),
    "norm": _energy(norm),
}
DTYPES = ("float32", "bfloat16")
UP_DOWN = {"conv": False, "resblock": True}  # whether blocks resample within
TIME_FEATURES = {"sinusoids": False, "fourier": True}  # whether frequencies are random


def unet(config: ConfigDict, image_shape: tuple[int, int, int]) -> UNet:
    """Builds the UNet from config.model."""
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
        resample_in_blocks=UP_DOWN[m.up_down],
        **_common(config, image_shape),
    )


def dit(config: ConfigDict, image_shape: tuple[int, int, int]) -> DiT:
    """Builds the transformer from config.model; raises InputError for settings of the UNet."""
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


# make(config, image_shape) -> Flax module
NETWORKS: dict[str, Part] = {"unet": Part(unet), "dit": Part(dit)}


def network(config: ConfigDict, image_shape: tuple[int, int, int]) -> nn.Module:
    """Returns the network of config.model; raises InputError, before anything is computed, if it
    cannot be built."""
    plain = NETWORKS[config.model.name].make(config, image_shape)
    model: nn.Module = ENERGIES[config.model.energy].make(plain)
    check_model(model, image_shape)
    return model


def check_model(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    """Returns the shapes of the parameters, without computing them; InputError for none."""
    try:
        return jax.tree.map(lambda x: x, _shapes(model, tuple(image_shape)))
    except ValueError as error:
        raise InputError(f"config.model: {first_line(error)}") from error
    except OverflowError as error:
        raise InputError("config.model: its layers are beyond any memory") from error


@functools.lru_cache(maxsize=4)  # whoever builds a network asks for its shapes soon after
def _shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> Any:
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), x, t)["params"]


def _common(config: ConfigDict, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the arguments that all networks take: of input and output, of time and labels."""
    m, channels = config.model, image_shape[-1]
    # EDM gives the network log(sigma)/4, about -1.5..1.1; all else t = 1..T, T about a thousand.
    range_of_t = 1.0 if config.diffusion.prediction == "edm" else 1000.0
    return {
        "out_channels": channels * (2 if learns_variance(config) else 1),
        "dtype": jnp.dtype(m.dtype),
        "cosines_first": m.cosines_first,
        "frequency_shift": m.frequency_shift,
        "num_classes": m.num_classes,
        "fourier_range": range_of_t if TIME_FEATURES[m.time_features] else 0.0,
        "input_exponents": tuple(m.input_features),
        "add_input": m.add_input,
        "remat": m.remat,
        "scan_blocks": m.scan_blocks,
        **conditioning.network_inputs(config, channels),
    }
