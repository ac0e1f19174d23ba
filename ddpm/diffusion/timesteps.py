"""How the training times t are drawn."""

import jax

from ddpm.diffusion.schedules import NoiseSchedule


def uniform(schedule: NoiseSchedule, key: jax.Array, batch_size: int) -> jax.Array:
    """t uniform over 1..T (Algorithm 1), int32[batch_size]."""
    return jax.random.randint(key, (batch_size,), 1, schedule.num_steps + 1)
