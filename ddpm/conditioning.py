"""Config -> what the network is told beside x_t, t and a label; `experiment`'s names for it."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm.diffusion import conditioning
from ddpm.diffusion.conditioning import Beside, Guessing, Prepare, SelfConditioned
from ddpm.diffusion.keys import normal, sample_keys
from ddpm.diffusion.predictions import Denoiser
from ddpm.errors import InputError
from ddpm.sampling.samplers import Sampler
from ddpm.sampling.self_conditioning import self_conditioning
from ddpm.training import augmentation

_NOISE = 2**31 - 1  # the stream of a sample's noise in its low resolution: no chain has so many


def network_inputs(config: ConfigDict, channels: int) -> dict[str, Any]:
    """How many channels of condition, and features, the network takes for data of `channels`."""
    images = bool(config.training.self_conditioning) + bool(config.model.low_resolution)
    features = augmentation.NUM_FEATURES * bool(config.training.augmentation)
    features += bool(config.model.low_resolution)
    return {"condition_channels": images * channels, "num_features": features}


def small_size(config: ConfigDict, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """(height, width) at low resolution; InputError where the images do not average down to it."""
    shorter, (height, width) = config.model.low_resolution, image_shape[:2]
    factor = min(height, width) // shorter
    if factor < 2 or min(height, width) % shorter or max(height, width) % factor:
        raise InputError(
            f"config.model.low_resolution = {shorter}: must be a smaller part of the shorter side "
            f"of images of {height}x{width} whose factor divides both sides"
        )
    return height // factor, width // factor


def prepare(config: ConfigDict, image_shape: tuple[int, int, int]) -> Prepare | None:
    """What a training step makes of x_0: augmented, its low resolution told; None for neither."""
    t, low = config.training, config.model.low_resolution
    if not t.augmentation and not low:
        return None
    small = small_size(config, image_shape) if low else None

    def prepared(key: jax.Array, x_0: jax.Array) -> tuple[jax.Array, Beside]:
        of_changes, of_levels, of_noise = jax.random.split(key, 3)
        features, image = [], None
        if t.augmentation:
            x_0, how = augmentation.augment(of_changes, x_0, t.augmentation)
            features.append(how)
        if small is not None:
            z = conditioning.averaged(x_0, small)
            level = t.low_resolution_noise * jax.random.uniform(of_levels, (len(x_0),))
            noise = jax.random.normal(of_noise, z.shape)
            image, level_told = conditioning.low_resolution(z, level, noise, image_shape[:2])
            features.append(level_told)
        return x_0, Beside(image, jnp.concatenate(features, axis=-1))

    return prepared


def beside(
    config: ConfigDict,
    size: tuple[int, int],
    small: jax.Array | None,
    indices: jax.Array | None = None,
) -> Beside:
    """When not training: the small images [B, h, w, C] enlarged to `size`, and nothing augmented.

    Samples with these numbers, int[B], get noise of config.sampling.low_resolution_noise in them,
    by config.sampling.seed and their number; without numbers, none.
    """
    if small is None:
        return Beside()
    level, noise = jnp.zeros(()), jnp.zeros_like(small)
    if indices is not None and config.sampling.low_resolution_noise:
        keys = sample_keys(jax.random.key(config.sampling.seed), indices)
        level = jnp.asarray(config.sampling.low_resolution_noise)
        noise = normal(keys, _NOISE, small.shape[1:])
    image, features = conditioning.low_resolution(small, level, noise, size)
    if config.training.augmentation:
        features = jnp.pad(features, ((0, 0), (augmentation.NUM_FEATURES, 0)))
    return Beside(image, features)


def denoiser(config: ConfigDict, with_guess: Guessing) -> Denoiser:
    """A function of x_t and t, of two calls of the network where it is given its own guess."""
    if config.training.self_conditioning:
        return SelfConditioned(with_guess)
    return with_guess(None)


def sampler(config: ConfigDict, plain: Sampler) -> Sampler:
    """The sampler by such a denoiser, with the guess of the step before where there is one."""
    adaptive = config.sampling.sampler == "probability_flow"
    remembers = config.training.self_conditioning and not adaptive
    return self_conditioning(plain) if remembers else plain
