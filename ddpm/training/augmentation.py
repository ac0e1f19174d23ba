"""Augmentation that the network is conditioned on, so that it does not leak into samples.

Karras et al. (2022), Appendix F.2, after Karras et al. (2020): each geometric change is made with a
small probability, and its parameters are features of the network; with features of zero, none,
it makes images as the data are. Warped bilinearly, where theirs is filtered against aliases.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

# flips: x, y; log2 of the scale, in units of SCALE; cos - 1 and sin of the rotation; the
# anisotropic scale's size and direction, as a vector; translation: x, y, in units of SHIFT.
NUM_FEATURES = 9
SCALE = 0.2  # octaves
SHIFT = 1 / 8  # of the image's side


def augment(key: jax.Array, x_0: jax.Array, probability: float) -> tuple[jax.Array, jax.Array]:
    """Returns x_0 [B, H, W, C] warped, and the features [B, NUM_FEATURES] of `draw` that say how.

    The six changes are made in the order of `draw`.
    """
    features = draw(key, len(x_0), probability)
    return warp(x_0, matrices(features, (x_0.shape[1], x_0.shape[2]))), features


def draw(key: jax.Array, n: int, probability: float) -> jax.Array:
    """Draws features float32[n, NUM_FEATURES], zeros for what is not changed.

    As in the authors' code: x-flip by a coin, whatever the probability above 0; by the probability,
    y-flip if a coin says so, scale, rotation, anisotropic scale, along x or, by a coin, in any
    direction, and translation.
    """
    of_which, of_sizes, of_angles, of_coins = jax.random.split(key, 4)
    made = jax.random.bernoulli(of_which, jnp.float32(probability), (n, 5)).astype(jnp.float32)
    size = jax.random.normal(of_sizes, (n, 4), jnp.float32)
    turn, direction = jax.random.uniform(
        of_angles, (2, n), jnp.float32, minval=-jnp.pi, maxval=jnp.pi
    )
    coins = jax.random.bernoulli(of_coins, jnp.float32(0.5), (n, 3)).astype(jnp.float32)
    x_flip = coins[:, :1] * (probability > 0)
    y_flip, scale, rotation, stretch, shift = made.T[:, :, None]
    direction = coins[:, 2] * direction
    return jnp.concatenate(
        [
            x_flip,
            y_flip * coins[:, 1:2],
            scale * size[:, :1],
            rotation * jnp.stack([jnp.cos(turn) - 1, jnp.sin(turn)], axis=1),
            stretch * size[:, 1:2] * jnp.stack([jnp.cos(direction), jnp.sin(direction)], axis=1),
            shift * size[:, 2:],
        ],
        axis=1,
    )


def matrices(features: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns [n, 2, 3]: where a pixel of the result, (y, x) from the image's middle, comes from.

    The changes are made one after the other; so the way back undoes the last one first.
    """
    flip_x, flip_y, scale, cos_less_1, sin, stretch_x, stretch_y, x, y = features.T
    zero = jnp.zeros_like(scale)
    sign_x, sign_y = 1 - 2 * flip_x, 1 - 2 * flip_y
    cos = 1 + cos_less_1
    # Stretched by 2^(SCALE r) along a direction, and shrunk by as much across it.
    r = jnp.hypot(stretch_x, stretch_y)
    safe = jnp.where(r > 0, r, 1.0)
    u, v = jnp.where(r > 0, stretch_x / safe, 1.0), stretch_y / safe
    along, across = jnp.exp2(-SCALE * r), jnp.exp2(SCALE * r)
    less = along - across

    def matrix(yy: jax.Array, yx: jax.Array, xy: jax.Array, xx: jax.Array) -> jax.Array:
        return jnp.stack([jnp.stack([yy, yx], -1), jnp.stack([xy, xx], -1)], -2)

    back = matrix(sign_y, zero, zero, sign_x)
    back = _times(back, matrix(jnp.exp2(-SCALE * scale), zero, zero, jnp.exp2(-SCALE * scale)))
    back = _times(back, matrix(cos, -sin, sin, cos))
    back = _times(
        back, matrix(across + less * v * v, less * u * v, less * u * v, across + less * u * u)
    )
    moved = SHIFT * jnp.stack([y * size[0], x * size[1]], -1)
    offset = -_times(back, moved[..., None])
    return jnp.concatenate([back, offset], axis=-1)


def warp(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """Warps [B, H, W, C] bilinearly at [B, 2, 3] of (y, x) from the middle, mirrored at the
    borders."""
    height, width = x.shape[1:3]
    middle = jnp.array([(height - 1) / 2, (width - 1) / 2], jnp.float32)
    rows, columns = (jnp.arange(n, dtype=jnp.float32) for n in (height, width))
    grid = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), -1)

    def one(image: jax.Array, matrix: jax.Array) -> jax.Array:
        found = _times(matrix[:, :2], (grid - middle)[..., None])[..., 0]
        y, x = jnp.moveaxis(found + matrix[:, 2] + middle, -1, 0)
        of_channel = lambda c: map_coordinates(c, [y, x], order=1, mode="reflect")  # noqa: E731
        return jax.vmap(of_channel, -1, -1)(image)

    return jax.vmap(one)(x, matrices)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of small matrices, in float32 on every device."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
