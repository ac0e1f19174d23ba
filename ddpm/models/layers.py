"""The parts of the networks: layers, the embedding of time and label, attention."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ddpm.models import winograd

# Of the authors' "zero" layers: small enough to start as the identity, and not a dead zero.
ZERO_SCALE = 1e-10
FOURIER_SCALE = 16.0  # of Song et al. (2021) and Karras et al. (2022)


def initializer(scale: float = 1.0) -> nn.initializers.Initializer:
    """Returns the uniform initializer, variance scaled by the mean of fan-in and fan-out."""
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
    """Returns a 3x3 convolution. With stride 2, 'SAME' pads an even size at the bottom and right
    only."""
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
    """Computes lax.conv_general_dilated, in a faster way for wide layers on a CPU."""
    wide = min(kernel.shape[2:]) >= 128
    if wide and strides == (1, 1) and x.dtype == jnp.float32 and jax.default_backend() == "cpu":
        return winograd.conv3x3(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **how)


def plus_input(out: jax.Array, x: jax.Array) -> jax.Array:
    """Adds x to the first channels of the output, which are those in the place of x."""
    channels = x.shape[-1]
    return jnp.concatenate([out[..., :channels] + x, out[..., channels:]], axis=-1)


def dense(features: int, name: str, *, dtype: DTypeLike, scale: float = 1.0) -> nn.Dense:
    """Returns a linear layer over the last axis; on [B, H, W, C] it is a 1x1 convolution."""
    return nn.Dense(features, kernel_init=initializer(scale), dtype=dtype, name=name)


class GroupNorm(nn.Module):
    """Normalisation over the positions and channels of each of `num_groups` groups; learned scale
    and bias.

    Written as one scale and one shift per example and channel, so that x is read once for the
    statistics and once to be normalised: half the time of flax's own on a CPU.
    """

    num_groups: int
    epsilon: float = 1e-6  # of the authors' framework

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [B, H, W, C], in the same shape and dtype; the statistics are float32."""
        batch, height, width, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
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
    frequencies = jnp.exp(
        -jnp.log(1e4) / (half - frequency_shift) * jnp.arange(half, dtype=jnp.float32)
    )
    angles = (jnp.asarray(t, jnp.float32) - 1)[:, None] * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    sinusoids = jnp.concatenate(parts[::-1] if cosines_first else parts, axis=-1)
    return jnp.pad(sinusoids, ((0, 0), (0, dimension % 2)))


def fourier_embedding(t: jax.Array, dimension: int) -> jax.Array:
    """Sines and cosines of 2 pi w t, [B] -> [B, dimension], for t in about [0, 1].

    The frequencies w are normal of standard deviation 16, drawn once and for all: fixed Gaussian
    Fourier features (Tancik et al. 2020; Song et al. 2021). An odd dimension ends in a zero.
    """
    # RandomState's numbers are the same in every NumPy, which trained weights rely on.
    w = np.random.RandomState(0).normal(0.0, FOURIER_SCALE, dimension // 2)
    angles = jnp.asarray(t, jnp.float32)[:, None] * jnp.asarray(2 * np.pi * w, jnp.float32)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(waves, ((0, 0), (0, dimension % 2)))


class LabelEmbedding(nn.Module):
    """A learned vector for each of `num_labels`: int[B] -> [B, features]; NaN for other labels."""

    num_labels: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        shape = (self.num_labels, self.features)
        # Of size 1, as PyTorch begins embeddings: at 0.02 the labels were learned far later.
        table = jnp.asarray(
            self.param("embedding", nn.initializers.normal(1.0), shape, jnp.float32)
        )
        # JAX's defaults, to clamp and to wrap, would take a wrong label for another class.
        found = table.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        return found.astype(self.dtype)


def takes_cudnn(dtype: DTypeLike, head_channels: int, capability: tuple[int, int] | None) -> bool:
    """Returns whether cuDNN's fused attention can be used on a GPU of this compute capability; None
    is any other device.

    In half precision, from Ampere on: heads of a multiple of 8 channels, at most 128, from Hopper
    on 256.
    """
    if capability is None or capability < (8, 0):
        return False
    most = 256 if capability >= (9, 0) else 128
    half = jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16)
    return half and head_channels % 8 == 0 and head_channels <= most


def compute_capability() -> tuple[int, int] | None:
    """Returns that of this process's NVIDIA GPUs, the least; None on other devices."""
    names = [getattr(device, "compute_capability", None) for device in jax.local_devices()]
    found = [re.fullmatch(r"(\d+)\.(\d+)", str(name)) for name in names]  # AMD's are as gfx942
    return min(((int(x[1]), int(x[2])) for x in found if x), default=None)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, num_heads: int = 1) -> jax.Array:
    """Computes softmax(q k^T / sqrt(C)) v in each head of C channels, the softmax in float32.

    [B, N, heads * C] each -> the same.
    """
    shape = q.shape
    q, k, v = (x.reshape(*shape[:2], num_heads, -1) for x in (q, k, v))
    if takes_cudnn(q.dtype, q.shape[-1], compute_capability()):
        # JAX itself never chooses it. It keeps the N x N weights out of memory.
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn").reshape(shape)
    # Plain products, and the division left to the few outputs: less time on a CPU than JAX's own.
    logits = float32_einsum("bqhc,bkhc->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    out = float32_einsum("bhqk,bkhc->bhqc", weights.astype(v.dtype), v)
    out = (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return out.transpose(0, 2, 1, 3).reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def float32_einsum(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Computes a product of two arrays of one dtype to float32; its derivatives in their dtype,
    where JAX's own would be products of float32."""
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


@float32_einsum.defjvp
def _float32_einsum_jvp(equation: str, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    out = float32_einsum(equation, x, y)
    tangent = jnp.einsum(equation, dx, y) + jnp.einsum(equation, x, dy)
    return out, tangent.astype(out.dtype)


def embed(
    time: jax.Array,
    label: jax.Array | None,
    features: jax.Array | None,
    *,
    size: int,
    num_classes: int,
    num_features: int,
    dtype: DTypeLike,
) -> jax.Array:
    """Returns the conditioning of every block, [B, size]: two layers of `time`, [B, N], the label's
    vector, and a linear layer of the features.

    The layers are those of the compact method that calls it. ValueError for a label or features
    where the network takes none, and for features that are not [B, num_features].
    """
    embedding = dense(size, "time_1", dtype=dtype)(time)
    embedding = dense(size, "time_2", dtype=dtype)(nn.swish(embedding))
    if num_classes:
        known = jnp.broadcast_to(num_classes if label is None else label, time.shape[:1])
        embedding += LabelEmbedding(num_classes + 1, size, dtype, name="label")(known)
    elif label is not None:
        raise ValueError("a network without classes (num_classes = 0) takes no label")
    if num_features:
        given = jnp.zeros((1, num_features), jnp.float32) if features is None else features
        if given.ndim != 2 or given.shape[-1] != num_features:
            raise ValueError(f"features of shape {given.shape}: must be [B, {num_features}]")
        # Without bias: features of zero are no features.
        embedding += nn.Dense(size, use_bias=False, dtype=dtype, name="features")(given)
    elif features is not None:
        raise ValueError("a network without features (num_features = 0) takes none")
    return embedding


def concatenate_inputs(
    x: jax.Array,
    condition: jax.Array | None,
    *,
    condition_channels: int,
    exponents: Sequence[int] = (),
) -> jax.Array:
    """Concatenates x [B, H, W, C], sin(2^n pi x) and cos(2^n pi x) for each exponent n, and the
    condition, of x's size.

    The waves tell fine differences apart (Kingma et al. 2021, Appendix C). ValueError for a
    condition of another shape than [B, H, W, condition_channels]; None is zeros.
    """
    shape = (*x.shape[:3], condition_channels)
    if condition is None:
        condition = jnp.zeros(shape, jnp.float32)
    elif condition.shape != shape:
        raise ValueError(f"a condition of shape {condition.shape}: must be {shape}")
    angles = [2.0**n * np.pi * x.astype(jnp.float32) for n in exponents]
    parts = [x, *(wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos))]
    if condition_channels:
        parts.append(condition)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else x
