"""Streams of random numbers: every number that sets one use of a key apart from another.

Nothing random is carried from step to step: each draw has the key fold_in(.., its stream), so that
resuming needs nothing saved, and a sample or an example is the same in whatever batch, and on
however many devices, it is drawn. Keys of examples come first, then the numbers:

    of a training step     fold_in(fold_in(root, stream), step)         INIT .. COINS
    of a population        fold_in(key, the number of the sample), and RESAMPLING
    of a chain             fold_in(key of the sample, the time), and LOW_RESOLUTION_NOISE
    within one step of it  fold_in(key of the sample and time, k)       0, LANGEVIN + k, KNOWN
    of a likelihood        fold_in(key of the example, ..)              the time, OFFSET; or FLOW_*
    of a batch of data     NumPy's default_rng((seed, ..))              FLIPS
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Of a training step, and of the weights before the first.
INIT, TIMES, NOISE, DROPOUT, LABELS, CONDITIONING, COINS = range(7)
# Of a population whose samples are chosen together: none has so many.
RESAMPLING = 2**31 - 1
# Of a sample, whose other streams are the times of its chain: no chain has so many.
LOW_RESOLUTION_NOISE = 2**31 - 1
# Of one step of a chain, whose own draws are k = 0, 1, ..: Langevin dynamics' come after.
LANGEVIN = 1000
# In inpainting the step has the even numbers, 2k for k, and what is known of x_0 this one.
KNOWN = 1
# Of an example's likelihood, whose other streams are the times 1..T.
OFFSET = 0
# Of an example's likelihood by the probability flow.
FLOW_NOISE, FLOW_PROBE = 1, 2
# Of a batch of data. A zero at the end would be lost: NumPy pads seeds with zeros.
FLIPS = 1


class StepKey(NamedTuple):
    """The key of a training step: `draw` gives each of its uses one of its own.

    Where the batch is taken in several `parts`, the key of one of them, number `part`.
    """

    root: jax.Array
    step: jax.Array
    part: jax.typing.ArrayLike = 0
    parts: int = 1


def check_key(key: Any) -> jax.Array:
    """Returns the key, or keys, as they are: typed, or those of jax.random.PRNGKey.

    Raises TypeError for anything else, such as the seed itself.
    """
    kind = getattr(key, "dtype", None)
    raw = kind == np.uint32 and np.ndim(key) > 0  # of jax.random.PRNGKey; a number is a seed
    if not (raw or (kind is not None and jnp.issubdtype(kind, jax.dtypes.prng_key))):
        shown = f"an array of {kind}" if np.ndim(key) else f"{key!r}"
        raise TypeError(f"key is {shown}: pass a key, jax.random.key(seed)")
    return key


def draw(key: jax.Array | StepKey, stream: int) -> jax.Array:
    """Returns the key of one stream, of a training step or of any other key."""
    if isinstance(key, StepKey):
        return jax.random.fold_in(jax.random.fold_in(key.root, stream), key.step)
    return jax.random.fold_in(check_key(key), stream)


def of_batch(key: jax.Array | StepKey, n: int, draws: Callable[[int], Any]) -> Any:
    """Returns draws(n), arrays [n, ...] for the examples of a batch; of the key of a part, those
    that its n examples have in the whole batch."""
    if not isinstance(key, StepKey) or key.parts == 1:
        return draws(n)
    return part_of(draws(n * key.parts), key.part, key.parts)


def part_of(tree: Any, part: jax.typing.ArrayLike, parts: int) -> Any:
    """Returns examples part, part + parts, .. of arrays [n, ...] in a tree: equally many of each
    device's, over which batches are split."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:])[:, part], tree)


def sample_keys(key: jax.Array, indices: jax.typing.ArrayLike) -> jax.Array:
    """Returns the key of each example by its number, fold_in(key, index): [n]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(check_key(key), jnp.asarray(indices))


def keys_per_example(key: jax.Array, n: int) -> jax.Array:
    """Returns n keys: one key split by the examples' numbers, or n keys as they are.

    Takes typed keys, or those of jax.random.PRNGKey. Raises TypeError for what is no key,
    ValueError for any other number of them.
    """
    if not jnp.issubdtype(check_key(key).dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    keys = sample_keys(key, np.arange(n)) if jnp.ndim(key) == 0 else key
    if keys.shape != (n,):
        raise ValueError(f"{keys.shape} keys for {n} examples: give one key, or one each")
    return keys


def normal(keys: jax.Array, stream: jax.typing.ArrayLike, shape: Sequence[int]) -> jax.Array:
    """Draws standard normal float32[B, *shape], each example from fold_in(its key, stream).

    `stream` is a scalar, or [B].
    """
    folded = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(stream, keys.shape))
    return jax.vmap(lambda key: jax.random.normal(key, tuple(shape), jnp.float32))(folded)


def noise_streams(times: np.ndarray, num_steps: int) -> np.ndarray:
    """Returns the stream of the noise drawn into each time of a chain, int32[N + 1].

    It is the time t itself, and another one at each new visit of a chain that goes up again.
    """
    visits = np.array([(times[:i] == times[i]).sum() for i in range(len(times))])
    if np.issubdtype(times.dtype, np.integer):
        return (times + (num_steps + 1) * visits).astype(np.int32)
    # A float's bits are larger than any T.
    return (times.view(np.int32) + visits).astype(np.int32)
