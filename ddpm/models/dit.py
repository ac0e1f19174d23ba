"""A transformer in the UNet's place: DiT (Peebles & Xie 2023) with adaLN-Zero blocks.

Its fixed positions are no parameters here. With them, 256 x 1152 numbers, DiT-XL/2 for latents of
32x32x4, 1000 classes and a learned variance has the 675,129,632 of the authors' own.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ddpm.models.layers import (
    attention,
    concatenate_inputs,
    dense,
    embed,
    fourier_embedding,
    plus_input,
    time_embedding,
)
from ddpm.models.remat import rematerialized, rematerialized_within
from ddpm.models.scan import over_blocks

TIME_DIMENSION = 256  # of the sinusoids


def zero_dense(features: int, name: str, *, dtype: DTypeLike) -> nn.Dense:
    """Returns a linear layer that begins at zero, so that a block begins as the identity."""
    return nn.Dense(features, kernel_init=nn.initializers.zeros, dtype=dtype, name=name)


@jax.named_scope("norm")
def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Normalises each token over its channels in float32, times 1 + scale, plus shift.

    x [B, N, C], shift and scale [B, C] -> [B, N, C] in x's dtype.
    """
    x_32 = x.astype(jnp.float32)
    x_32 -= x_32.mean(axis=-1, keepdims=True)
    x_32 *= jax.lax.rsqrt(jnp.square(x_32).mean(axis=-1, keepdims=True) + epsilon)
    return (x_32 * (1 + scale[:, None]) + shift[:, None]).astype(x.dtype)


def positions(rows: int, columns: int, dimension: int) -> np.ndarray:
    """Sines and cosines of the column, then of the row, of each place: float32[rows * columns,
    dimension]. The dimension must be divisible by 4."""
    frequencies = 1e4 ** (-np.arange(dimension // 4) / (dimension // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [place[:, None] * frequencies for place in (column, row)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=-1).astype(np.float32)


class DiTBlock(nn.Module):
    """Attention and a two-layer perceptron of four times the width, each on modulated tokens and
    added through a gate; shifts, scales and gates come of the embedding, and begin at zero."""

    num_heads: int
    dropout: float
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        modulation = zero_dense(6 * channels, "modulation", dtype=self.dtype)(nn.swish(embedding))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)

        h = modulated(x, shift_1, scale_1, self.epsilon)
        q, k, v = (dense(channels, n, dtype=self.dtype)(h) for n in ("query", "key", "value"))
        h = dense(channels, "out", dtype=self.dtype)(attention(q, k, v, self.num_heads))
        x += gate_1[:, None] * h

        h = modulated(x, shift_2, scale_2, self.epsilon)
        h = nn.gelu(dense(4 * channels, "mlp_1", dtype=self.dtype)(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return x + gate_2[:, None] * dense(channels, "mlp_2", dtype=self.dtype)(h)


class DiT(nn.Module):
    """See the module. The defaults are those of DiT-XL/2.

    Attributes:
      patch_size: the side, in pixels, of the squares that become tokens.
      channels: of each token, throughout.
      depth: the number of blocks.
      head_channels: of each head of attention; 0: one head of all channels.
      dropout: its rate within the perceptrons, in training.
      norm_epsilon: of every norm.
      remat: what training computes again in the backward pass: "none"; "blocks", each block from
        its input; or "full", each group of about sqrt(depth) blocks, and then each within.
      All others: those of the UNet.
    """

    patch_size: int = 2
    channels: int = 1152
    depth: int = 28
    head_channels: int = 72
    dropout: float = 0.0
    out_channels: int | None = None
    dtype: DTypeLike = jnp.float32
    norm_epsilon: float = 1e-6
    cosines_first: bool = True
    frequency_shift: int = 0
    num_classes: int = 0
    condition_channels: int = 0
    num_features: int = 0
    fourier_range: float = 0.0
    input_exponents: Sequence[int] = ()
    add_input: bool = False
    remat: str = "none"
    scan_blocks: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        label: jax.Array | None = None,
        *,
        condition: jax.Array | None = None,
        features: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Computes x [B, H, W, C], t [B] -> [B, H, W, out_channels], float32; all else as the UNet.

        Raises ValueError for x that is not [B, H, W, C], sides that do not divide into patches, or
        channels that do not divide into heads or by four.
        """
        if x.ndim != 4:
            raise ValueError(f"expected images [B, H, W, C], got {x.shape}")
        t = jnp.broadcast_to(t, x.shape[:1])
        batch, height, width, image_channels = x.shape
        rows, columns = self._patches(height, width)
        patch = self.patch_size

        if self.fourier_range:
            time = fourier_embedding(t / self.fourier_range, TIME_DIMENSION)
        else:
            time = time_embedding(
                t,
                TIME_DIMENSION,
                cosines_first=self.cosines_first,
                frequency_shift=self.frequency_shift,
            )
        embedding = embed(
            time,
            label,
            features,
            size=self.channels,
            num_classes=self.num_classes,
            num_features=self.num_features,
            dtype=self.dtype,
        )

        seen = concatenate_inputs(
            x,
            condition,
            condition_channels=self.condition_channels,
            exponents=self.input_exponents,
        )
        h = seen.reshape(batch, rows, patch, columns, patch, -1).swapaxes(2, 3)
        h = dense(self.channels, "patches", dtype=self.dtype)(h.reshape(batch, rows * columns, -1))
        h += positions(rows, columns, self.channels).astype(h.dtype)

        heads = self.channels // (self.head_channels or self.channels)
        of_blocks = rematerialized(DiTBlock) if train and self.remat != "none" else DiTBlock

        def block(h: jax.Array, _: None, name: str) -> tuple[jax.Array, None]:
            made = of_blocks(heads, self.dropout, self.dtype, self.norm_epsilon, name=name)
            return jnp.asarray(made(h, embedding, train=train)), None

        def blocks(h: jax.Array, *, numbers: range) -> jax.Array:
            names = [f"block_{i}" for i in numbers]
            none = [None] * len(names)
            return jnp.asarray(over_blocks(self, block, names, h, none, scan=self.scan_blocks)[0])

        full = train and self.remat == "full"
        size = math.isqrt(self.depth - 1) + 1 if full else self.depth  # of about as many groups
        for i in range(0, self.depth, size):
            numbers = range(i, min(i + size, self.depth))
            names = {f"block_{number}" for number in numbers}
            group = rematerialized_within(self, blocks, names.__contains__) if full else blocks
            h = group(h, numbers=numbers)

        modulation = zero_dense(2 * self.channels, "modulation_out", dtype=self.dtype)
        shift, scale = jnp.split(modulation(nn.swish(embedding)), 2, axis=-1)
        h = modulated(h.astype(jnp.float32), shift, scale, self.norm_epsilon)
        channels = self.out_channels or image_channels
        h = zero_dense(patch * patch * channels, "out", dtype=jnp.float32)(h)
        h = h.reshape(batch, rows, columns, patch, patch, channels).swapaxes(2, 3)
        h = h.reshape(batch, height, width, channels)
        return plus_input(h, x) if self.add_input else h

    def _patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of them, after checking that the network can be built."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height}x{width} do not divide into patches of patch_size = "
                f"{self.patch_size}"
            )
        if self.channels % 4:
            raise ValueError(
                f"{self.channels} channels: a transformer's must be divisible by 4, for the "
                "positions"
            )
        if self.head_channels and self.channels % self.head_channels:
            raise ValueError(
                f"{self.channels} channels do not divide into heads of head_channels = "
                f"{self.head_channels}"
            )
        return height // self.patch_size, width // self.patch_size
