"""The driver: any sampler over any denoiser as one `lax.scan`.

Noise is seeded per sample: what is added on the way into x_s comes from fold_in(key of the sample,
s), so a sample is the same in whatever batch, and on however many devices, it is drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling.samplers import Sampler, ancestral, times


class Chain(NamedTuple):
    """A reverse process with snapshots: x_0 [B, ...], and at each of the F times, [F, B, ...],
    x_t and the x_0 predicted there."""

    x_0: jax.Array
    times: np.ndarray
    x_t: jax.Array
    predicted_x_0: jax.Array


def sample_keys(key: jax.Array, indices: jax.typing.ArrayLike) -> jax.Array:
    """The key of each sample by its number: fold_in(key, index), [n]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices))


def sample(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    sampler: Sampler | None = None,
) -> jax.Array:
    """Draws x_0 of `shape` [B, ...] by `sampler` (by default `ancestral()`, Algorithm 2).

    Args:
      key: one typed key, split into one per sample by its number, or B keys (`sample_keys`).
      denoiser: wrap it in `clipped` to keep x_0 in the data's range, as the paper does.
    """
    return sample_chain(key, schedule, denoiser, shape, sampler=sampler, snapshots=0).x_0


def sample_chain(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    sampler: Sampler | None = None,
    snapshots: int = 10,
) -> Chain:
    """As `sample`, keeping `snapshots` evenly spread moments of the chain, x_T the first."""
    sampler = sampler or ancestral()
    shape = tuple(shape)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # one of jax.random.PRNGKey
    keys = sample_keys(key, np.arange(shape[0])) if jnp.ndim(key) == 0 else key
    if keys.shape != shape[:1]:
        raise ValueError(
            f"{keys.shape} keys for samples of shape {shape}: give one key, or one each"
        )
    t = times(schedule.num_steps, sampler.steps)
    steps = len(t) - 1
    snapshots = min(snapshots, steps)
    moments = np.round(np.linspace(0, steps - 1, snapshots)).astype(int)
    # Where step i's snapshot goes; one row too many takes those of no interest.
    slots = np.full(steps, snapshots)
    slots[moments] = np.arange(snapshots)

    def noise(s: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(jax.random.fold_in(key, s), shape[1:], jnp.float32)

        return jax.vmap(draw)(keys)

    def step(carry, inputs):
        x_t, kept = carry
        t, s, slot = inputs
        prediction = denoiser(x_t, jnp.broadcast_to(t, shape[:1]))
        if snapshots:
            kept = jax.tree.map(lambda k, x: k.at[slot].set(x), kept, (x_t, prediction.x_0))
        return (sampler.step(schedule, prediction, x_t, t, s, noise(s)), kept), None

    empty = jnp.zeros((snapshots + 1 if snapshots else 0, *shape), jnp.float32)
    inputs = (jnp.asarray(t[:-1]), jnp.asarray(t[1:]), jnp.asarray(slots))
    (x_0, kept), _ = jax.lax.scan(step, (noise(jnp.asarray(t[0])), (empty, empty)), inputs)
    return Chain(x_0, t[:-1][moments], kept[0][:snapshots], kept[1][:snapshots])
