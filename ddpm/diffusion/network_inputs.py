"""Inputs of a network other than x_t, t and a label: an estimate of x_0, a small image, features.

**Self-conditioning** (Chen et al. 2023): the network sees an earlier estimate of x_0, its own.
**Low resolution** (Ho et al. 2022, cascades): it sees the image that x_0 averages down to, enlarged
again, with noise in it whose level is a feature (conditioning augmentation).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import expand_like
from ddpm.diffusion.predictions import Denoiser, Prediction, predict

# (an estimate of x_0, [B, ...], or None where the network takes none) -> Denoiser
DenoiserFromEstimate = Callable[[Any], Denoiser]


class Conditioning(NamedTuple):
    """Extra inputs, for each example or one for all: image [B, H, W, C] of x_0's size, features
    [B, n]."""

    image: jax.Array | None = None
    features: jax.Array | None = None

    def arguments(self, batch_size: int, estimate: jax.Array | None = None) -> dict[str, Any]:
        """Returns keyword arguments for the network: `condition`, the estimate and then the image,
        and `features`.

        An estimate outside the data's range [-1, 1], as eps of much noise may make it, is clipped.
        """
        images = [] if estimate is None else [jnp.clip(estimate, -1.0, 1.0)]
        if self.image is not None:
            images.append(jnp.broadcast_to(self.image, (batch_size, *self.image.shape[1:])))
        given: dict[str, Any] = {"condition": jnp.concatenate(images, axis=-1)} if images else {}
        if self.features is not None:
            width = self.features.shape[-1]
            given["features"] = jnp.broadcast_to(self.features, (batch_size, width))
        return given


# (key, x_0 [B, H, W, C]) -> x_0 as it is trained on, and the other inputs that go with it.
Prepare = Callable[[jax.Array, jax.Array], tuple[jax.Array, Conditioning]]


# --- Self-conditioning


def self_conditioned_by(from_estimate: DenoiserFromEstimate, coins: jax.Array) -> Denoiser:
    """Returns the denoiser of training: where the coin (bool[B]) is True, it is given what it
    predicts without an estimate.

    No gradient reaches that first call (Chen et al. 2023, Algorithm 1).
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        none = jnp.zeros_like(x_t)
        estimate = jax.lax.stop_gradient(predict(from_estimate(none), x_t, t).x_0)
        return from_estimate(jnp.where(expand_like(coins, x_t), estimate, none))(x_t, t)

    return denoise


@dataclass(frozen=True)
class SelfConditioned:
    """The denoiser of two calls: the second is given what the first predicts without an estimate.

    It is a function of x_t and t, as bounds and flows need it, and both calls are differentiated.
    A sampler may go by `from_estimate` and what it has predicted before, with a call for each step
    (`sampling.self_conditioning`).
    """

    from_estimate: DenoiserFromEstimate

    def __call__(self, x_t: jax.Array, t: jax.Array) -> Prediction:
        """Returns the prediction at x_t, as any denoiser does."""
        estimate = predict(self.from_estimate(jnp.zeros_like(x_t)), x_t, t).x_0
        return self.from_estimate(estimate)(x_t, t)


# --- Low resolution


def averaged(x: Any, size: tuple[int, int]) -> Any:
    """Averages over blocks, NumPy or JAX: [B, H, W, C] -> [B, *size, C].

    Raises ValueError unless `size` divides (H, W).
    """
    batch, height, width, channels = x.shape
    if height % size[0] or width % size[1]:
        raise ValueError(f"images of {height}x{width} do not average down to {size[0]}x{size[1]}")
    blocks = (batch, size[0], height // size[0], size[1], width // size[1], channels)
    return x.reshape(blocks).mean(axis=(2, 4))


def enlarged(small: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Enlarges bilinearly, [B, h, w, C] -> [B, *size, C], which leaves no edges of blocks."""
    shape = (small.shape[0], *size, small.shape[-1])
    return jax.image.resize(small, shape, "linear")


def low_resolution(
    small: jax.Array, level: jax.Array, noise: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Returns small images [B, h, w, C] noised as q(z_s | z) and enlarged to `size`, and a feature.

    sigma_s = `level` [B] and alpha_s^2 = 1 - level^2. The feature, [B, 1], is the level: 0 is the
    image itself, and no feature.
    """
    level = jnp.broadcast_to(level, small.shape[:1])
    z = expand_like(jnp.sqrt(1 - level**2), small) * small + expand_like(level, small) * noise
    return enlarged(z, size), level[:, None]
