"""Random keys, one for each example: what is drawn for it depends on its own key alone.

So an image is noised, or sampled, alike in whatever batch and on however many devices.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sample_keys(key: jax.Array, indices: jax.typing.ArrayLike) -> jax.Array:
    """The key of each example by its number: fold_in(key, index), [n]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices))


def one_each(key: jax.Array, n: int) -> jax.Array:
    """One key as n of them, by their number; n keys as they are. ValueError for any other number.

    Typed keys, or those of jax.random.PRNGKey.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = sample_keys(key, np.arange(n)) if jnp.ndim(key) == 0 else key
    if keys.shape != (n,):
        raise ValueError(f"{keys.shape} keys for {n} examples: give one key, or one each")
    return keys


def normal(keys: jax.Array, stream: jax.typing.ArrayLike, shape: Sequence[int]) -> jax.Array:
    """Standard normal float32[B, *shape], of fold_in(key of the example, stream).

    `stream` is a scalar, or [B].
    """
    folded = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(stream, keys.shape))
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape), jnp.float32))(folded)
