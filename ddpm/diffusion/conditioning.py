"""What a network is told beside x_t, t and a label: its own guess of x_0, a small image, a vector.

**Self-conditioning** (Chen et al. 2023): the network sees a guess of x_0, its own of before.
**Low resolution** (Ho et al. 2022, cascades): it sees the image that x_0 averages down to, enlarged
again, with noise in it that it is told the level of (conditioning augmentation).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import lift
from ddpm.diffusion.predictions import Denoiser, Prediction

Guessing = Callable[[Any], Denoiser]  # of a guess of x_0, [B, ...]; None where none is taken


class Beside(NamedTuple):
    """For each example, or one for all: image [B, H, W, C] of x_0's size, features [B, n]."""

    image: jax.Array | None = None
    features: jax.Array | None = None

    def arguments(self, batch_size: int, guess: jax.Array | None = None) -> dict[str, Any]:
        """Those of a network's call: `condition`, first the guess and then the image, `features`.

        A guess outside the data's range [-1, 1], as eps of much noise may make it, is clipped.
        """
        images = [] if guess is None else [jnp.clip(guess, -1.0, 1.0)]
        if self.image is not None:
            images.append(jnp.broadcast_to(self.image, (batch_size, *self.image.shape[1:])))
        told: dict[str, Any] = {"condition": jnp.concatenate(images, axis=-1)} if images else {}
        if self.features is not None:
            width = self.features.shape[-1]
            told["features"] = jnp.broadcast_to(self.features, (batch_size, width))
        return told


# (key, x_0 [B, H, W, C]) -> x_0 as it is trained on, and what is told beside it.
Prepare = Callable[[jax.Array, jax.Array], tuple[jax.Array, Beside]]


# --- Self-conditioning


def self_conditioned_by(with_guess: Guessing, coins: jax.Array) -> Denoiser:
    """For training: where the coin (bool[B]) says so, given what it predicts from no guess.

    No gradient reaches that first call (Chen et al. 2023, Algorithm 1).
    """

    def denoise(x_t: jax.Array, t: jax.Array) -> Prediction:
        none = jnp.zeros_like(x_t)
        guess = jax.lax.stop_gradient(with_guess(none)(x_t, t).x_0)
        return with_guess(jnp.where(lift(coins, x_t), guess, none))(x_t, t)

    return denoise


@dataclass(frozen=True)
class SelfConditioned:
    """The denoiser of two calls: the second is given what the first predicts from no guess.

    It is a function of x_t and t, as bounds and flows need it, and both calls are differentiated.
    A sampler may go by `with_guess` and what it has predicted before, with a call for each step
    (`sampling.self_conditioning`).
    """

    with_guess: Guessing

    def __call__(self, x_t: jax.Array, t: jax.Array) -> Prediction:
        """As any denoiser."""
        guess = self.with_guess(jnp.zeros_like(x_t))(x_t, t).x_0
        return self.with_guess(guess)(x_t, t)


# --- Low resolution


def averaged(x: Any, size: tuple[int, int]) -> Any:
    """Means over blocks, of numpy or jax: [B, H, W, C] -> [B, *size, C].

    Raises ValueError unless `size` divides (H, W).
    """
    batch, height, width, channels = x.shape
    if height % size[0] or width % size[1]:
        raise ValueError(f"images of {height}x{width} do not average down to {size[0]}x{size[1]}")
    blocks = (batch, size[0], height // size[0], size[1], width // size[1], channels)
    return x.reshape(blocks).mean(axis=(2, 4))


def enlarged(small: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinearly, [B, h, w, C] -> [B, *size, C]: without the edges of blocks, which say nothing."""
    shape = (small.shape[0], *size, small.shape[-1])
    return jax.image.resize(small, shape, "linear")


def low_resolution(
    small: jax.Array, level: jax.Array, noise: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Small images [B, h, w, C] noised as q(z_s | z), sigma_s = `level` [B], enlarged to `size`.

    And the feature that tells the level, [B, 1]. alpha_s^2 = 1 - level^2, so level 0 is the image
    itself, and no feature.
    """
    level = jnp.broadcast_to(level, small.shape[:1])
    z = lift(jnp.sqrt(1 - level**2), small) * small + lift(level, small) * noise
    return enlarged(z, size), level[:, None]
