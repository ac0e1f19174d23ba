"""The paper's UNet (Appendix B): (x [B, H, W, C], t int[B], label) -> array in the shape of x.

With the settings of the paper it has 35,746,307 parameters for CIFAR-10 and 113,673,219 at 256x256.
Its last settings but one are those in which networks trained by others differ (`ddpm.interop`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm.models import winograd

# Of the authors' "zero" layers: small enough to start as the identity, and not a dead zero.
ZERO_SCALE = 1e-10


def initializer(scale: float = 1.0) -> nn.initializers.Initializer:
    """Uniform, variance scaled by the mean of fan-in and fan-out."""
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")


def conv3x3(
    channels: int,
    name: str,
    *,
    dtype: DTypeLike,
    stride: int = 1,
    scale: float = 1.0,
    padding: str | int = "SAME",
) -> nn.Conv:
    """A 3x3 convolution. With stride 2, 'SAME' pads an even size at the bottom and right only."""
    return nn.Conv(
        channels,
        (3, 3),
        (stride, stride),
        padding,
        kernel_init=initializer(scale),
        conv_general_dilated=convolution,
        dtype=dtype,
        name=name,
    )


def convolution(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **how: Any) -> Any:
    """lax.conv_general_dilated, by another way where that is faster: wide layers on a CPU."""
    wide = min(kernel.shape[2:]) >= 128
    if wide and strides == (1, 1) and x.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return winograd.conv3x3(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)


def dense(features: int, name: str, *, dtype: DTypeLike, scale: float = 1.0) -> nn.Dense:
    """A linear layer over the last axis; on [B, H, W, C] it is a 1x1 convolution."""
    return nn.Dense(features, kernel_init=initializer(scale), dtype=dtype, name=name)


class GroupNorm(nn.Module):
    """Over the positions and channels of each of `num_groups` groups; learned scale and bias.

    Written as one scale and one shift per example and channel, so that x is read once for the
    statistics and once to be normalised: half the time of flax's own on a CPU.
    """

    num_groups: int
    epsilon: float = 1e-6  # of the authors' framework

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same shape and dtype; the statistics are float32."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        size = channels // self.num_groups

        def group_mean(per_channel: jax.Array) -> jax.Array:
            sums = per_channel.reshape(batch, self.num_groups, size).sum(axis=-1)
            return jnp.repeat(sums / (height * width * size), size, axis=-1)

        x_32 = x.astype(jnp.float32)
        mean = group_mean(x_32.sum(axis=(1, 2)))
        square = group_mean(jnp.square(x_32).sum(axis=(1, 2)))
        variance = jnp.maximum(square - jnp.square(mean), 0.0)
        scale = scale * jax.lax.rsqrt(variance + self.epsilon)
        shift = bias - mean * scale
        return (x_32 * scale[:, None, None, :] + shift[:, None, None, :]).astype(x.dtype)


def time_embedding(
    t: jax.Array, dimension: int, *, cosines_first: bool = False, frequency_shift: int = 1
) -> jax.Array:
    """Sinusoids of the authors' index t - 1 = 0..T-1: [B] -> [B, dimension], sines first.

    Frequencies fall from 1 to 1e-4, or with a shift of 0 to just above. An odd dimension ends in a
    zero.
    """
    half = dimension // 2
    frequencies = jnp.exp(-jnp.log(1e4) / (half - frequency_shift) * jnp.arange(half))
    angles = (t - 1)[:, None] * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    sinusoids = jnp.concatenate(parts[::-1] if cosines_first else parts, axis=-1)
    return jnp.pad(sinusoids, ((0, 0), (0, dimension % 2)))


class LabelEmbedding(nn.Module):
    """A learned vector for each of `num_labels`: int[B] -> [B, features]; NaN for other labels."""

    num_labels: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        shape = (self.num_labels, self.features)
        # Of size 1, as PyTorch begins embeddings: at 0.02 the labels were learned far later.
        table = jnp.asarray(self.param("embedding", nn.initializers.normal(1.0), shape))
        # JAX's defaults, to clamp and to wrap, would take a wrong label for another class.
        found = table.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return found.astype(self.dtype)


class ResBlock(nn.Module):
    """Norm, swish, conv, + time; norm, swish, dropout, conv; plus the input, by 1x1 if it must."""

    channels: int
    dropout: float
    num_groups: int
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        h = nn.swish(GroupNorm(self.num_groups, self.epsilon, name="norm_1")(x))
        h = conv3x3(self.channels, "conv_1", dtype=self.dtype)(h)
        time = dense(self.channels, "time", dtype=self.dtype)(nn.swish(embedding))
        h += time[:, None, None, :]
        h = nn.swish(GroupNorm(self.num_groups, self.epsilon, name="norm_2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3x3(self.channels, "conv_2", dtype=self.dtype, scale=ZERO_SCALE)(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, "shortcut", dtype=self.dtype)(x)
        return x + h


def attention(q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int = 1) -> jax.Array:
    """softmax(q k^T / sqrt(C)) v in each head of C channels, the softmax in float32.

    [B, N, heads * C] each -> the same.
    """
    shape = q.shape
    q, k, v = (x.reshape(*shape[:2], num_heads, -1) for x in (q, k, v))
    if jax.default_backend() != "cpu":
        return jax.nn.dot_product_attention(q, k, v).reshape(shape)
    # The same in less time on a CPU: plain products, and the division left to the few outputs.
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = einsum("bqhc,bkhc->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out = einsum("bhqk,bkhc->bhqc", weights.astype(v.dtype), v)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return out.transpose(0, 2, 1, 3).reshape(shape)


class AttentionBlock(nn.Module):
    """Self-attention over all positions, and the residual; one head, or of `head_channels` each."""

    num_groups: int
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6
    head_channels: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, self.epsilon, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (dense(channels, n, dtype=self.dtype)(h) for n in ("query", "key", "value"))
        h = attention(q, k, v, channels // (self.head_channels or channels)).reshape(x.shape)
        return x + dense(channels, "out", dtype=self.dtype, scale=ZERO_SCALE)(h)


class UNet(nn.Module):
    """See the module.

    Attributes:
      channels: of the first level; level i has channels * channel_multipliers[i] and half the
        resolution of level i - 1.
      num_res_blocks: per level on the way down; one more on the way up.
      attention_resolutions: attention follows every ResBlock of a level whose shorter side is one
        of these. The middle always has one attention block.
      dropout: its rate, in training.
      num_groups: of every GroupNorm.
      out_channels: those of the input, if None.
      dtype: of the computation, float32 or bfloat16. Parameters, the statistics of norms, the
        softmax and the output are float32 either way.
      norm_epsilon: of every GroupNorm.
      head_channels: of each head of attention; 0: one head of all channels.
      symmetric_downsampling: whether halving pads one pixel on all sides, not at the bottom and
        right only.
      cosines_first, frequency_shift: of the time embedding.
      num_classes: of labels, each a learned vector that is added to the time embedding, and one
        more for no label; 0: the network takes none.
      condition_channels: of an image that is seen beside x; 0: none.
      num_features: of a vector that is added to the time embedding by a linear layer; 0: none.
    """

    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    dropout: float = 0.1
    num_groups: int = 32
    out_channels: int | None = None
    dtype: DTypeLike = jnp.float32
    norm_epsilon: float = 1e-6
    head_channels: int = 0
    symmetric_downsampling: bool = False
    cosines_first: bool = False
    frequency_shift: int = 1
    num_classes: int = 0
    condition_channels: int = 0
    num_features: int = 0

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
        """x [B, H, W, C], t [B] (the paper's 1..T; or one for all) -> [B, H, W, out_channels].

        label int[B] (or one for all) in 0..num_classes, of which num_classes is 'no label', as is
        None; NaN for any other. condition [B, H, W, condition_channels] and features
        [B, num_features] are zeros if None. ValueError for what the network does not take.
        Raises ValueError for x that is not [B, H, W, C], a size that cannot be halved, an attention
        resolution never reached, or channels that do not divide into groups or heads. train=True
        needs rngs={"dropout": key}.
        """
        if x.ndim != 4:
            raise ValueError(f"expected images [B, H, W, C], got {x.shape}")
        t = jnp.broadcast_to(t, x.shape[:1])
        levels = range(len(self.channel_multipliers))
        resolutions = self._resolutions(*x.shape[1:3])

        embedding = time_embedding(
            t,
            self.channels,
            cosines_first=self.cosines_first,
            frequency_shift=self.frequency_shift,
        )
        embedding = dense(4 * self.channels, "time_1", dtype=self.dtype)(embedding)
        embedding = dense(4 * self.channels, "time_2", dtype=self.dtype)(nn.swish(embedding))
        if self.num_classes:
            known = jnp.broadcast_to(self.num_classes if label is None else label, x.shape[:1])
            embedding += LabelEmbedding(
                self.num_classes + 1, 4 * self.channels, self.dtype, name="label"
            )(known)
        elif label is not None:
            raise ValueError("a network without classes (num_classes = 0) takes no label")
        if self.num_features:
            given = jnp.zeros((1, self.num_features)) if features is None else features
            # Without bias: features of zero are no features.
            embedding += nn.Dense(
                4 * self.channels, use_bias=False, dtype=self.dtype, name="features"
            )(given)
        elif features is not None:
            raise ValueError("a network without features (num_features = 0) takes none")

        def res_block(h: jax.Array, channels: int, name: str) -> jax.Array:
            options = (self.dropout, self.num_groups, self.dtype, self.norm_epsilon)
            return ResBlock(channels, *options, name=name)(h, embedding, train)

        def attention_block(h: jax.Array, name: str) -> jax.Array:
            options = (self.num_groups, self.dtype, self.norm_epsilon, self.head_channels)
            return AttentionBlock(*options, name=name)(h)

        def block(h: jax.Array, level: int, name: str) -> jax.Array:
            h = res_block(h, self.channels * self.channel_multipliers[level], name)
            if resolutions[level] in self.attention_resolutions:
                h = attention_block(h, f"{name}_attention")
            return h

        h = conv3x3(self.channels, "conv_in", dtype=self.dtype)(self._beside(x, condition))
        skips = [h]
        for level in levels:
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_{i}")
                skips.append(h)
            if level != levels[-1]:
                name, padding = f"downsample_{level}", 1 if self.symmetric_downsampling else "SAME"
                h = conv3x3(h.shape[-1], name, dtype=self.dtype, stride=2, padding=padding)(h)
                skips.append(h)

        middle = h.shape[-1]
        h = res_block(h, middle, "middle_0")
        h = attention_block(h, "middle_attention")
        h = res_block(h, middle, "middle_1")

        for level in reversed(levels):
            for i in range(self.num_res_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_{i}")
            if level != levels[0]:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
                h = conv3x3(h.shape[-1], f"upsample_{level}", dtype=self.dtype)(h)

        h = nn.swish(GroupNorm(self.num_groups, self.norm_epsilon, name="norm_out")(h))
        channels = self.out_channels or x.shape[-1]
        h = conv3x3(channels, "conv_out", dtype=self.dtype, scale=ZERO_SCALE)(h)
        return h.astype(jnp.float32)

    def _beside(self, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        """x and the condition, of its size, in one array."""
        shape = (*x.shape[:3], self.condition_channels)
        if condition is None:
            condition = jnp.zeros(shape, x.dtype)
        elif condition.shape != shape:
            raise ValueError(f"a condition of shape {condition.shape}: must be {shape}")
        return jnp.concatenate([x, condition], axis=-1) if self.condition_channels else x

    def _resolutions(self, height: int, width: int) -> list[int]:
        """The shorter side at each level, after checking that the network can be built."""
        levels = len(self.channel_multipliers)
        stride = 2 ** (levels - 1)
        if height % stride or width % stride:
            raise ValueError(
                f"images of {height}x{width} cannot be halved {levels - 1} times: both sides must "
                f"be divisible by {stride} for {levels} channel_multipliers"
            )
        resolutions = [min(height, width) // 2**level for level in range(levels)]
        missed = [r for r in self.attention_resolutions if r not in resolutions]
        if missed:
            raise ValueError(
                f"attention_resolutions {missed} never reached: the levels of {height}x{width} "
                f"images are {resolutions}"
            )
        if self.channels < 4:
            raise ValueError(f"{self.channels} channels: the time embedding needs at least 4")
        for channels in {self.channels, *(self.channels * m for m in self.channel_multipliers)}:
            if channels % self.num_groups:
                raise ValueError(
                    f"{channels} channels do not divide into num_groups = {self.num_groups}"
                )
        attending = [m for m, r in zip(self.channel_multipliers, resolutions, strict=True)
                     if r in self.attention_resolutions]  # fmt: skip
        for multiplier in {self.channel_multipliers[-1], *attending}:
            if self.head_channels and self.channels * multiplier % self.head_channels:
                raise ValueError(
                    f"{self.channels * multiplier} channels do not divide into heads of "
                    f"head_channels = {self.head_channels}"
                )
        return resolutions
