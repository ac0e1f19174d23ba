"""Config -> the network's inputs other than x_t, t and a label: augmentation, low resolution, an
estimate of x_0."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm.diffusion import network_inputs as inputs
from ddpm.diffusion.network_inputs import (
    Conditioning,
    DenoiserFromEstimate,
    Prepare,
    SelfConditioned,
)
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.streams import LOW_RESOLUTION_NOISE, normal, sample_keys
from ddpm.errors import InputError
from ddpm.sampling.samplers import Sampler
from ddpm.sampling.self_conditioning import self_conditioning
from ddpm.training import augmentation


def network_inputs(config: ConfigDict, channels: int) -> dict[str, Any]:
    """Returns how many condition channels and features the network takes for such data."""
    images = bool(config.training.self_conditioning) + bool(config.model.low_resolution)
    features = augmentation.NUM_FEATURES * bool(config.training.augmentation)
    features += bool(config.model.low_resolution)
    return {"condition_channels": images * channels, "num_features": features}


def small_size(config: ConfigDict, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Returns (height, width) at low resolution; InputError where images do not fit."""
    shorter, (height, width) = config.model.low_resolution, image_shape[:2]
    factor = min(height, width) // shorter
    if factor < 2 or min(height, width) % shorter or max(height, width) % factor:
        raise InputError(
            f"config.model.low_resolution = {shorter}: must be a smaller part of the shorter side "
            f"of images of {height}x{width} whose factor divides both sides"
        )
    return height // factor, width // factor


def prepare(config: ConfigDict, image_shape: tuple[int, int, int]) -> Prepare | None:
    """Returns what augments x_0 in training and makes its low resolution; None for neither."""
    t, low = config.training, config.model.low_resolution
    if not t.augmentation and not low:
        return None
    small = small_size(config, image_shape) if low else None

    def prepared(key: jax.Array, x_0: jax.Array) -> tuple[jax.Array, Conditioning]:
        of_changes, of_levels, of_noise = jax.random.split(key, 3)
        features, image = [], None
        if t.augmentation:
            x_0, how = augmentation.augment(of_changes, x_0, t.augmentation)
            features.append(how)
        if small is not None:
            z = inputs.averaged(x_0, small)
            level = t.low_resolution_noise * jax.random.uniform(of_levels, (len(x_0),), jnp.float32)
            noise = jax.random.normal(of_noise, z.shape, jnp.float32)
            image, level_feature = inputs.low_resolution(z, level, noise, image_shape[:2])
            features.append(level_feature)
        return x_0, Conditioning(image, jnp.concatenate(features, axis=-1))

    return prepared


def given(
    config: ConfigDict,
    size: tuple[int, int],
    small: jax.Array | None,
    indices: jax.Array | None = None,
) -> Conditioning:
    """Returns the inputs outside training: small images [B, h, w, C] enlarged to `size`, and no
    augmentation.

    Samples with these numbers, int[B], get noise of config.sampling.low_resolution_noise in them,
    by config.sampling.seed and their number; without numbers, none.
    """
    if small is None:
        return Conditioning()
    level, noise = jnp.zeros((), jnp.float32), jnp.zeros_like(small)
    if indices is not None and config.sampling.low_resolution_noise:
        keys = sample_keys(jax.random.key(config.sampling.seed), indices)
        level = jnp.float32(config.sampling.low_resolution_noise)
        noise = normal(keys, LOW_RESOLUTION_NOISE, small.shape[1:])
    image, features = inputs.low_resolution(small, level, noise, size)
    if config.training.augmentation:
        features = jnp.pad(features, ((0, 0), (augmentation.NUM_FEATURES, 0)))
    return Conditioning(image, features)


def denoiser(config: ConfigDict, from_estimate: DenoiserFromEstimate) -> Denoiser:
    """Returns a function of x_t and t, of two network calls where the network sees an estimate."""
    if config.training.self_conditioning:
        return SelfConditioned(from_estimate)
    return from_estimate(None)


def sampler(config: ConfigDict, plain: Sampler) -> Sampler:
    """Returns the sampler for such a denoiser, with the estimate of the step before where there is
    one."""
    remembers = config.training.self_conditioning and not plain.adaptive
    return self_conditioning(plain) if remembers else plain
