"""Random numbers that are the same on every machine: what encoder and decoder share.

A counter-based generator in 32-bit integers (Threefry-2x32 of 20 rounds, Salmon et al. 2011), and a
table of normal quantiles that are whole numbers of 2^-11. No floating-point function is in it,
whose last bit is its library's; and the streams of `jax.random` may change with its version.

A **key** is two words, uint32[2]: a file's seed and a step's number.
"""

import functools
import hashlib
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_QUANTILES = 1 << 16  # each of a half word
_UNIT = 2.0**-11
_SHA256 = "74dbf310d712641dcdf8660c6c17bb6f5a69b5fe359b4ec021b41eb7554ca2ad"


def threefry(key: jax.Array, counter: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the cipher's two words, uint32[...], of a key uint32[2] and a two-word counter."""
    words = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + words[0], counter[1] + words[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x = x + y
            y = ((y << r) | (y >> (32 - r))) ^ x
        x = x + words[(i + 1) % 3]
        y = y + words[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def normals(key: jax.Array, block: jax.Array, rows: jax.Array, width: int) -> jax.Array:
    """Returns N(0, 1) numbers, float32[..., width]: row `rows` (uint32[...]) of a table that the
    key and `block` (uint32) name.

    Of any row alone they are what they are within all. Raises ValueError unless width >= 1.
    """
    if width < 1:
        raise ValueError(f"width = {width}: must be >= 1")
    calls = -(-width // 4)  # four numbers each
    low = rows[..., None] * np.uint32(calls) + np.arange(calls, dtype=np.uint32)
    high = jnp.broadcast_to(jnp.asarray(block, jnp.uint32), low.shape)
    words = jnp.stack(threefry(key, (high, low)), axis=-1)
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=-1)
    numbers = jnp.asarray(quantiles())[halves.reshape(*rows.shape, 4 * calls)[..., :width]]
    return numbers.astype(jnp.float32) * _UNIT


def permutation(key: jax.Array, size: int) -> jax.Array:
    """Returns a random order of 0 .. size - 1, int32[size]: that of the key's random words."""
    places = jnp.arange(size, dtype=jnp.uint32)
    words, _ = threefry(key, (jnp.full_like(places, 0xFFFFFFFF), places))
    return jnp.argsort(words, stable=True).astype(jnp.int32)


@functools.cache
def quantiles() -> np.ndarray:
    """Returns the quantiles of N(0, 1) at (k + 1/2) / 2^16, int16[2^16], in units of 2^-11.

    Their variance is 0.99998, the largest 4.3. Raises RuntimeError where this machine computes them
    otherwise: no file by others could be read.
    """
    half = range(_QUANTILES // 2, _QUANTILES)
    inverse = NormalDist().inv_cdf
    upper = np.asarray([round(inverse((k + 0.5) / _QUANTILES) / _UNIT) for k in half], "<i2")
    if hashlib.sha256(upper.tobytes()).hexdigest() != _SHA256:
        raise RuntimeError("the table of normal quantiles is not the codec's: report this machine")
    return np.concatenate([-upper[::-1], upper])
