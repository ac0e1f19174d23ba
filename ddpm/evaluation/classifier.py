"""A small convolutional classifier, whose features stand in where Inception's mean nothing."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

FEATURES = 128


class Classified(NamedTuple):
    """features [B, 128], the layer before the last, and logits [B, classes]."""

    features: jax.Array
    logits: jax.Array


class Classifier(nn.Module):
    """Three stages of 3x3 convolutions, the size halved between them; a mean over space."""

    num_classes: int
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Classified:
        """Computes features and logits of x [B, H, W, C] in [-1, 1]. train=True needs
        rngs={"dropout": key}."""
        for i, (channels, layers) in enumerate(((32, 1), (64, 2), (128, 2))):
            if i:
                x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
            for j in range(layers):
                x = nn.Conv(channels, (3, 3), name=f"conv_{i + 1}_{j + 1}")(x)
                x = nn.swish(nn.GroupNorm(8, name=f"norm_{i + 1}_{j + 1}")(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))
        features = nn.swish(nn.Dense(FEATURES, name="features")(x))
        return Classified(features, nn.Dense(self.num_classes, name="logits")(features))


def shifted(key: jax.Array, x: jax.Array, most: int, *, flip: bool) -> jax.Array:
    """Moves each image by up to `most` pixels, edges repeated; mirrors half of them if asked.

    [B, H, W, C] in and out.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    key_shift, key_flip = jax.random.split(key)
    offsets = jax.random.randint(key_shift, (len(x), 2), 0, 2 * most + 1, jnp.int32)

    def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
        start = (offset[0], offset[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, image.shape[-1]))

    x = jax.vmap(cut)(padded, offsets)
    if flip:
        mirrored = jax.random.bernoulli(key_flip, jnp.float32(0.5), (len(x), 1, 1, 1))
        x = jnp.where(mirrored, x[:, :, ::-1], x)
    return x
