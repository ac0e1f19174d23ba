"""The driver: any sampler over any denoiser as one `lax.scan`.

Noise is seeded per sample: what is added on the way into x_s comes from fold_in(key of the sample,
s), so a sample is the same in whatever batch, and on however many devices, it is drawn.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.keys import normal, one_each
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling import samplers
from ddpm.sampling.samplers import Sampler, ancestral


class Chain(NamedTuple):
    """A reverse process with snapshots: x_0 [B, ...], and at each of the F times, [F, B, ...],
    x_t and the x_0 predicted there."""

    x_0: jax.Array
    times: np.ndarray
    x_t: jax.Array
    predicted_x_0: jax.Array


def sample(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    sampler: Sampler | None = None,
    times: np.ndarray | None = None,
    x_t: jax.Array | None = None,
) -> jax.Array:
    """Draws x_0 of `shape` [B, ...] by `sampler` (by default `ancestral()`, Algorithm 2).

    Args:
      key: one typed key, split into one per sample by its number, or B keys (`sample_keys`).
      denoiser: wrap it in `clipped` to keep x_0 in the data's range, as the paper does.
      times: falling, in place of the sampler's own from T to 0; the last is where it ends.
      x_t: where to begin, at the first of the times; standard normal if left out.

    Raises ValueError for times that do not fall within 0..T, or x_t of another shape.
    """
    return sample_chain(
        key, schedule, denoiser, shape, sampler=sampler, times=times, x_t=x_t, snapshots=0
    ).x_0


def sample_chain(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    *,
    sampler: Sampler | None = None,
    times: np.ndarray | None = None,
    x_t: jax.Array | None = None,
    snapshots: int = 10,
) -> Chain:
    """As `sample`, keeping `snapshots` evenly spread moments of the chain, the start first."""
    sampler = sampler or ancestral()
    shape = tuple(shape)
    keys = one_each(key, shape[0])
    t = samplers.times(schedule.num_steps, sampler.steps) if times is None else np.asarray(times)
    if t.ndim != 1 or len(t) < 2 or (np.diff([schedule.num_steps + 1, *t, -1]) >= 0).any():
        raise ValueError(f"times {t.tolist()}: must fall within T = {schedule.num_steps}..0")
    if x_t is not None and x_t.shape != shape:
        raise ValueError(f"x_t is of shape {x_t.shape}, the samples of {shape}")
    steps = len(t) - 1
    snapshots = min(snapshots, steps)
    moments = np.round(np.linspace(0, steps - 1, snapshots)).astype(int)
    # Where step i's snapshot goes; one row too many takes those of no interest.
    slots = np.full(steps, snapshots)
    slots[moments] = np.arange(snapshots)

    def noise(s: jax.Array) -> jax.Array:
        return normal(keys, s, shape[1:])

    def step(carry, inputs):
        x_t, kept = carry
        t, s, slot = inputs
        prediction = denoiser(x_t, jnp.broadcast_to(t, shape[:1]))
        if snapshots:
            kept = jax.tree.map(lambda k, x: k.at[slot].set(x), kept, (x_t, prediction.x_0))
        return (sampler.step(schedule, prediction, x_t, t, s, noise(s)), kept), None

    start = noise(jnp.asarray(t[0])) if x_t is None else x_t
    empty = jnp.zeros((snapshots + 1 if snapshots else 0, *shape), jnp.float32)
    inputs = (jnp.asarray(t[:-1]), jnp.asarray(t[1:]), jnp.asarray(slots))
    (x_0, kept), _ = jax.lax.scan(step, (start, (empty, empty)), inputs)
    return Chain(x_0, t[:-1][moments], kept[0][:snapshots], kept[1][:snapshots])
