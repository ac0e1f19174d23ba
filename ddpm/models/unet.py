"""The paper's UNet (Appendix B): (x [B, H, W, C], t int[B], label) -> array in the shape of x.

With the settings of the paper it has 35,746,307 parameters for CIFAR-10 and 113,673,219 at 256x256.
From `norm_epsilon` on its settings are those in which networks trained by others differ.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ddpm.models.layers import (
    ZERO_SCALE,
    GroupNorm,
    attention,
    concatenate_inputs,
    conv3x3,
    dense,
    embed,
    fourier_embedding,
    plus_input,
    time_embedding,
)
from ddpm.models.remat import rematerialized, rematerialized_within
from ddpm.models.scan import over_blocks


@jax.named_scope("mean")
def halved(x: jax.Array) -> jax.Array:
    """Averages each 2x2 pixels: [B, H, W, C] -> [B, H/2, W/2, C]."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def doubled(x: jax.Array) -> jax.Array:
    """Repeats each pixel four times: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


class ResBlock(nn.Module):
    """Norm, swish, conv, + time; norm, swish, dropout, conv; plus the input, by 1x1 if it must.

    Attributes:
      scale_shift: whether the time scales and shifts the second norm's output, h (1 + scale) +
        shift (Nichol & Dhariwal 2021), in the place of a sum before it.
      skip_scale: of the residual sum.
      resample: `halved` or `doubled`, of the input and before the first convolution (BigGAN's).
    """

    channels: int
    dropout: float
    num_groups: int
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6
    scale_shift: bool = False
    skip_scale: float = 1.0
    resample: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        h = nn.swish(GroupNorm(self.num_groups, self.epsilon, name="norm_1")(x))
        if self.resample:
            x, h = self.resample(x), self.resample(h)
        h = conv3x3(self.channels, "conv_1", dtype=self.dtype)(h)
        width = self.channels * (2 if self.scale_shift else 1)
        time = dense(width, "time", dtype=self.dtype)(nn.swish(embedding))[:, None, None, :]
        norm_2 = GroupNorm(self.num_groups, self.epsilon, name="norm_2")
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = nn.swish(norm_2(h) * (1 + scale) + shift)
        else:
            h = nn.swish(norm_2(h + time))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3x3(self.channels, "conv_2", dtype=self.dtype, scale=ZERO_SCALE)(h)
        if x.shape[-1] != self.channels:
            x = dense(self.channels, "shortcut", dtype=self.dtype)(x)
        return scaled(x + h, self.skip_scale)


def scaled(x: jax.Array, by: float) -> jax.Array:
    """Returns x times `by`, unchanged for 1."""
    return x if by == 1 else x * by


class AttentionBlock(nn.Module):
    """Self-attention over all positions, and the residual; one head, or of `head_channels` each.

    `skip_scale` is of the residual sum.
    """

    num_groups: int
    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6
    head_channels: int = 0
    skip_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, self.epsilon, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        q, k, v = (dense(channels, n, dtype=self.dtype)(h) for n in ("query", "key", "value"))
        h = attention(q, k, v, channels // (self.head_channels or channels)).reshape(x.shape)
        h = dense(channels, "out", dtype=self.dtype, scale=ZERO_SCALE)(h)
        return scaled(x + h, self.skip_scale)


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
        softmax and the last convolution are float32 either way.
      norm_epsilon: of every GroupNorm.
      head_channels: of each head of attention; 0: one head of all channels.
      symmetric_downsampling: whether halving pads one pixel on all sides, not at the bottom and
        right only.
      cosines_first, frequency_shift: of the time embedding.
      num_classes: of labels, each a learned vector that is added to the time embedding, and one
        more for no label; 0: the network takes none.
      condition_channels: of an image that is seen with x; 0: none.
      num_features: of a vector that is added to the time embedding by a linear layer; 0: none.
      scale_shift, skip_scale: of every ResBlock, which see; skip_scale of attention too. NCSN++ and
        DDPM++ (Song et al. 2021; Karras et al. 2022) have sqrt(1/2).
      resample_in_blocks: whether a ResBlock halves and doubles the resolution, by mean and by
        repetition on both of its branches (BigGAN; Song et al. 2021; Dhariwal & Nichol 2021), and
        not a convolution alone.
      fourier_range: what t is divided by for random Fourier features in the place of sinusoids;
        0: sinusoids.
      input_exponents: n of the waves sin(2^n pi x) and cos(2^n pi x) that are seen with x.
      add_input: whether x is added to the output (Kingma et al. 2021).
      remat: what training computes again in the backward pass, to hold less: "none"; "blocks", each
        block from its input; or "full", each level from its inputs, and then each block within.
      scan_blocks: whether equal blocks in a row are compiled once, by `lax.scan`.
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
    scale_shift: bool = False
    skip_scale: float = 1.0
    resample_in_blocks: bool = False
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
        """Computes x [B, H, W, C], t [B] (the paper's 1..T; or one for all) -> [B, H, W,
        out_channels].

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

        if self.fourier_range:
            time = fourier_embedding(t / self.fourier_range, self.channels)
        else:
            time = time_embedding(
                t,
                self.channels,
                cosines_first=self.cosines_first,
                frequency_shift=self.frequency_shift,
            )
        embedding = embed(
            time,
            label,
            features,
            size=4 * self.channels,
            num_classes=self.num_classes,
            num_features=self.num_features,
            dtype=self.dtype,
        )

        again = train and self.remat != "none"
        of_blocks = rematerialized(ResBlock) if again else ResBlock
        of_attention = rematerialized(AttentionBlock) if again else AttentionBlock

        def res_block(
            h: jax.Array,
            channels: int,
            name: str,
            resample: Callable[[jax.Array], jax.Array] | None = None,
        ) -> jax.Array:
            block = of_blocks(
                channels,
                self.dropout,
                self.num_groups,
                self.dtype,
                self.norm_epsilon,
                self.scale_shift,
                self.skip_scale,
                resample,
                name=name,
            )
            return jnp.asarray(block(h, embedding, train=train))

        def attention_block(h: jax.Array, name: str) -> jax.Array:
            block = of_attention(
                self.num_groups,
                self.dtype,
                self.norm_epsilon,
                self.head_channels,
                self.skip_scale,
                name=name,
            )
            return jnp.asarray(block(h))

        in_turn = functools.partial(over_blocks, self, scan=self.scan_blocks)

        def block(h: jax.Array, level: int, name: str) -> jax.Array:
            h = res_block(h, self.channels * self.channel_multipliers[level], name)
            if resolutions[level] in self.attention_resolutions:
                h = attention_block(h, f"{name}_attention")
            return h

        def down(h: jax.Array, name: str) -> jax.Array:
            if self.resample_in_blocks:
                return res_block(h, h.shape[-1], name, halved)
            padding = 1 if self.symmetric_downsampling else "SAME"
            return conv3x3(h.shape[-1], name, dtype=self.dtype, stride=2, padding=padding)(h)

        def up(h: jax.Array, name: str) -> jax.Array:
            if self.resample_in_blocks:
                return res_block(h, h.shape[-1], name, doubled)
            return conv3x3(h.shape[-1], name, dtype=self.dtype)(doubled(h))

        def down_blocks(h: jax.Array, *, level: int) -> list[jax.Array]:
            def one(h: jax.Array, _: None, name: str) -> tuple[jax.Array, jax.Array]:
                h = block(h, level, name)
                return h, h

            names = [f"down_{level}_{i}" for i in range(self.num_res_blocks)]
            return in_turn(one, names, h, [None] * len(names))[1]

        def middle(h: jax.Array) -> jax.Array:
            h = res_block(h, h.shape[-1], "middle_0")
            h = attention_block(h, "middle_attention")
            return res_block(h, h.shape[-1], "middle_1")

        def up_blocks(h: jax.Array, *skips: jax.Array, level: int) -> jax.Array:
            def one(h: jax.Array, skip: jax.Array, name: str) -> tuple[jax.Array, None]:
                return block(jnp.concatenate([h, skip], axis=-1), level, name), None

            names = [f"up_{level}_{i}" for i in range(len(skips))]
            return jnp.asarray(in_turn(one, names, h, skips)[0])

        def of_level(blocks: Callable[..., Any], prefix: str) -> Callable[..., Any]:
            if not (train and self.remat == "full"):
                return blocks
            return rematerialized_within(self, blocks, lambda name: name.startswith(prefix))

        seen = concatenate_inputs(
            x,
            condition,
            condition_channels=self.condition_channels,
            exponents=self.input_exponents,
        )
        h = conv3x3(self.channels, "conv_in", dtype=self.dtype)(seen)
        skips = [h]
        for level in levels:
            skips += of_level(down_blocks, f"down_{level}_")(h, level=level)
            h = skips[-1]
            if level != levels[-1]:
                h = down(h, f"downsample_{level}")
                skips.append(h)

        h = of_level(middle, "middle_")(h)

        for level in reversed(levels):
            taken = [skips.pop() for _ in range(self.num_res_blocks + 1)]
            h = of_level(up_blocks, f"up_{level}_")(h, *taken, level=level)
            if level != levels[0]:
                h = up(h, f"upsample_{level}")

        # In float32: the output's rounding would be noise in x_0 (in mean prediction, most of it).
        h = h.astype(jnp.float32)
        h = nn.swish(GroupNorm(self.num_groups, self.norm_epsilon, name="norm_out")(h))
        channels = self.out_channels or x.shape[-1]
        h = conv3x3(channels, "conv_out", dtype=jnp.float32, scale=ZERO_SCALE)(h)
        return plus_input(h, x) if self.add_input else h

    def _resolutions(self, height: int, width: int) -> list[int]:
        """Returns the shorter side at each level, after checking that the network can be built."""
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
