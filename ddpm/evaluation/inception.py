"""The Inception network of FID: that of December 2015, with what sets it apart from Inception v3.

Average pools count no padding, the last block pools by maximum, and there are 1008 classes (Szegedy
et al. 2015; Heusel et al. 2017). Modules bear the names of the published weights' tensors.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299
CLASSES = 1008
# TF32 would move a feature by a thousandth on GPUs, and every distance with it.
_PRECISION = jax.lax.Precision.HIGHEST


class Inceptions(NamedTuple):
    """The four blocks by which features are called, and the classes."""

    first_pool: jax.Array  # [B, 73, 73, 64]
    second_pool: jax.Array  # [B, 35, 35, 192]
    before_auxiliary: jax.Array  # [B, 17, 17, 768]
    pool: jax.Array  # [B, 2048]: the features of FID
    logits: jax.Array  # [B, 1008], without bias, as for the Inception score


class Inception(nn.Module):
    """x: [B, 299, 299, 3] in [-1, 1], from `preprocess`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Inceptions:
        x = _Conv(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = _Conv(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _Conv(64, 3, name="Conv2d_2b_3x3")(x)
        first = x = _halved(x)
        x = _Conv(80, 1, name="Conv2d_3b_1x1")(x)
        x = _Conv(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)
        second = x = _halved(x)
        for letter, pooled in (("b", 32), ("c", 64), ("d", 64)):
            x = _BlockA(pooled, name=f"Mixed_5{letter}")(x)
        x = _BlockB(name="Mixed_6a")(x)
        for letter, channels in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = _BlockC(channels, name=f"Mixed_6{letter}")(x)
        third = x
        x = _BlockD(name="Mixed_7a")(x)
        x = _BlockE(_average, name="Mixed_7b")(x)
        x = _BlockE(_maximum, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision=_PRECISION, name="fc")(pool)
        return Inceptions(first, second, third, pool, logits)


class Resize(NamedTuple):
    """The scaling of pixels, and where a place of the resized axis is on the original one."""

    scaled: Callable[[jax.Array], jax.Array]
    source: Callable[[np.ndarray, float], np.ndarray]


RESIZES = {
    "half_pixel": Resize(
        lambda x: 2 * x / 255 - 1,
        lambda place, scale: ((place + 0.5) * scale - 0.5).clip(min=0),
    ),
    "tf1": Resize(lambda x: (x - 128) / 128, lambda place, scale: place * scale),
}


def preprocess(images: jax.Array, resize: str) -> jax.Array:
    """Resizes uint8[B, H, W, 1 or 3] to float32[B, 299, 299, 3], bilinear without antialiasing.

    resize="half_pixel": aligned by pixel centres and scaled by 2 x / 255 - 1, as pytorch-fid does.
    resize="tf1": by corners, which shifts small images, and (x - 128) / 128, as the authors' graph
    and those that reproduce it do. FIDs of the two differ: compare within one.
    """
    x = jnp.broadcast_to(images, (*images.shape[:3], 3)).astype(jnp.float32)
    x = RESIZES[resize].scaled(x)
    rows, columns = (jnp.asarray(resize_matrix(n, SIDE, resize)) for n in images.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision=_PRECISION)


def resize_matrix(size: int, to: int, resize: str) -> np.ndarray:
    """Returns what resizes one axis linearly: float32[to, size], two weights in each row."""
    scale, place = size / to, np.arange(to)
    source = RESIZES[resize].source(place, scale)
    low = np.floor(source).astype(int)
    weight = source - low
    matrix = np.zeros((to, size))
    np.add.at(matrix, (place, low), 1 - weight)
    np.add.at(matrix, (place, np.minimum(low + 1, size - 1)), weight)
    return matrix.astype(np.float32)


class _Conv(nn.Module):
    """A convolution without bias, batch normalisation by the moments of training, ReLU."""

    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        strides = (self.stride, self.stride)
        x = nn.Conv(self.channels, kernel, strides, self.padding, use_bias=False,
                    precision=_PRECISION, name="conv")(x)  # fmt: skip
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


_halved = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
_maximum = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
_average = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)


def _joined(*branches: jax.Array) -> jax.Array:
    return jnp.concatenate(branches, axis=-1)


class _BlockA(nn.Module):
    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _Conv(64, 1, name="branch1x1")(x)
        five = _Conv(48, 1, name="branch5x5_1")(x)
        five = _Conv(64, 5, name="branch5x5_2")(five)
        three = _Conv(64, 1, name="branch3x3dbl_1")(x)
        three = _Conv(96, 3, name="branch3x3dbl_2")(three)
        three = _Conv(96, 3, name="branch3x3dbl_3")(three)
        return _joined(one, five, three, _Conv(self.pooled, 1, name="branch_pool")(_average(x)))


class _BlockB(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _Conv(384, 3, 2, "VALID", name="branch3x3")(x)
        double = _Conv(64, 1, name="branch3x3dbl_1")(x)
        double = _Conv(96, 3, name="branch3x3dbl_2")(double)
        double = _Conv(96, 3, 2, "VALID", name="branch3x3dbl_3")(double)
        return _joined(three, double, _halved(x))


class _BlockC(nn.Module):
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, wide, tall = self.channels, (1, 7), (7, 1)
        one = _Conv(192, 1, name="branch1x1")(x)
        seven = _Conv(c, 1, name="branch7x7_1")(x)
        seven = _Conv(c, wide, name="branch7x7_2")(seven)
        seven = _Conv(192, tall, name="branch7x7_3")(seven)
        double = _Conv(c, 1, name="branch7x7dbl_1")(x)
        double = _Conv(c, tall, name="branch7x7dbl_2")(double)
        double = _Conv(c, wide, name="branch7x7dbl_3")(double)
        double = _Conv(c, tall, name="branch7x7dbl_4")(double)
        double = _Conv(192, wide, name="branch7x7dbl_5")(double)
        return _joined(one, seven, double, _Conv(192, 1, name="branch_pool")(_average(x)))


class _BlockD(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        three = _Conv(192, 1, name="branch3x3_1")(x)
        three = _Conv(320, 3, 2, "VALID", name="branch3x3_2")(three)
        seven = _Conv(192, 1, name="branch7x7x3_1")(x)
        seven = _Conv(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = _Conv(192, (7, 1), name="branch7x7x3_3")(seven)
        seven = _Conv(192, 3, 2, "VALID", name="branch7x7x3_4")(seven)
        return _joined(three, seven, _halved(x))


class _BlockE(nn.Module):
    pool: functools.partial[jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        one = _Conv(320, 1, name="branch1x1")(x)
        three = _Conv(384, 1, name="branch3x3_1")(x)
        wide = _Conv(384, (1, 3), name="branch3x3_2a")(three)
        tall = _Conv(384, (3, 1), name="branch3x3_2b")(three)
        double = _Conv(448, 1, name="branch3x3dbl_1")(x)
        double = _Conv(384, 3, name="branch3x3dbl_2")(double)
        wide_2 = _Conv(384, (1, 3), name="branch3x3dbl_3a")(double)
        tall_2 = _Conv(384, (3, 1), name="branch3x3dbl_3b")(double)
        pooled = _Conv(192, 1, name="branch_pool")(self.pool(x))
        return _joined(one, wide, tall, wide_2, tall_2, pooled)
