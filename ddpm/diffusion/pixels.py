"""Scales 8-bit pixels to the data's range [-1, 1] and back: every number of it stands here.

Pixel k in 0..255 is x = k/127.5 - 1 (Section 3.3), the middle of a bin of width 2/255.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HALF_RANGE = 127.5  # in pixel levels: what 1 in x_0 is
HALF_BIN = 1 / 255  # in x_0: from a pixel's value to the edge of its bin


def to_float(images: Any) -> Any:
    """Scales uint8 0..255 to float32 [-1, 1], NumPy or JAX; `to_uint8` gives every value back."""
    return images.astype(np.float32) / HALF_RANGE - 1


def to_uint8(images: Any) -> Any:
    """Rounds floats, NumPy or JAX, clipped to [-1, 1], to the nearest of 0..255."""
    return ((images.astype(np.float32) + 1) * HALF_RANGE).round().clip(0, 255).astype(np.uint8)


def check_scaled(x: Any, name: str = "x_0") -> jax.Array:
    """Returns x in float32, or float64 if it comes in that (with jax_enable_x64).

    Raises ValueError for integers, which are not scaled yet; `name` is what the argument is called.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} is of {x.dtype}: must be scaled to [-1, 1], k/127.5 - 1")
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
