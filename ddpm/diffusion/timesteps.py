"""Draws of the training times t: whole ones in 1..T for a table, or places u in [0, 1).

t = uniform(schedule, key, n)                       Algorithm 1
t = whole(schedule, low_discrepancy(key, n))        of a table's T noise levels
t = within(schedule, low_discrepancy(key, n))       in continuous time, also of a table's
t = log_normal(schedule, key, n)                    as EDM draws its noise levels
t, weight = draw_important(history, key, n)         and after the losses: record(history, ..)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.schedules import NoiseSchedule, Schedule
from ddpm.diffusion.streams import check_key
from ddpm.diffusion.times import as_times, whole_number


def uniform(schedule: NoiseSchedule, key: jax.Array, batch_size: int) -> jax.Array:
    """Draws t uniform over 1..T (Algorithm 1), int32[batch_size]."""
    return jax.random.randint(check_key(key), (batch_size,), 1, schedule.num_steps + 1, jnp.int32)


def whole(schedule: NoiseSchedule, u: jax.Array) -> jax.Array:
    """Returns the step of 1..T that u in [0, 1] falls into, T equal parts: int32."""
    t = 1 + jnp.floor(u * schedule.num_steps).astype(jnp.int32)
    return jnp.minimum(t, schedule.num_steps)


def within(schedule: Schedule, u: jax.Array) -> jax.Array:
    """Returns the time at u in [0, 1] between the schedule's ends, fractional."""
    first, last = schedule.ends
    return first + (last - first) * u


def low_discrepancy(key: jax.Array, batch_size: int) -> jax.Array:
    """Draws u_i = (u + i/B) mod 1 with one u for all, an even batch (Kingma et al. 2021)."""
    u = jax.random.uniform(check_key(key), (), jnp.float32)
    return (u + jnp.arange(batch_size, dtype=jnp.float32) / batch_size) % 1.0


def logit_normal(
    key: jax.Array, batch_size: int, *, mean: float = 0.0, std: float = 1.0
) -> jax.Array:
    """Draws u with log(u/(1 - u)) ~ N(mean, std^2): most in the middle (Esser et al. 2024)."""
    return jax.nn.sigmoid(
        mean + std * jax.random.normal(check_key(key), (batch_size,), jnp.float32)
    )


def log_normal(
    schedule: Schedule,
    key: jax.Array,
    batch_size: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
) -> jax.Array:
    """Draws the fractional time of log(sigma/alpha) ~ N(mean, std^2) (Karras et al. 2022, Table 1).

    What lies beyond the schedule's ends goes to the nearer one.
    """
    log_sigma = mean + std * jax.random.normal(check_key(key), (batch_size,), jnp.float32)
    return schedule.time_of(-2 * log_sigma)


class LossHistory(NamedTuple):
    """The last losses of every t: float32[T, 10], t = 1 first; and how many have come, int32[T]."""

    losses: jax.Array
    seen: jax.Array

    @classmethod
    def empty(cls, num_steps: int, length: int = 10) -> "LossHistory":
        """Returns a history of no losses yet; 10 of each t is IDDPM's number."""
        shape = whole_number("num_steps", num_steps), whole_number("length", length)
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(shape[0], jnp.int32))


def importance(history: LossHistory, *, uniform_part: float = 1e-3) -> jax.Array:
    """Returns p_t, float32[T], proportional to sqrt(mean of squared losses), mixed with a uniform
    part (IDDPM, Eq. 18).

    Uniform until every t has all its losses.
    """
    num_steps, length = history.losses.shape
    size = jnp.sqrt(jnp.mean(history.losses**2, axis=1))
    total = size.sum()
    ready = (history.seen >= length).all() & (total > 0)
    share = jnp.where(ready, size / jnp.where(ready, total, 1.0), 1 / num_steps)
    return (1 - uniform_part) * share + uniform_part / num_steps


def draw_important(
    history: LossHistory, key: jax.Array, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Draws t ~ p_t of `importance`, int32[B]; and returns 1/(T p_t), which keeps the loss
    unbiased."""
    p = importance(history)
    t = 1 + jax.random.choice(check_key(key), len(p), (batch_size,), p=p)
    return t.astype(jnp.int32), 1 / (len(p) * p[t - 1])


def record(history: LossHistory, t: jax.Array, losses: jax.Array) -> LossHistory:
    """Returns the history after the losses [B] at times t [B], unweighted; those not finite are
    left out.

    The later ones of a batch count as later. Pure, and the same on however many devices.
    """
    length = history.losses.shape[1]
    t = as_times((1, len(history.seen)), t, noisy=True)
    good = jnp.isfinite(losses)
    same = (t[:, None] == t) & good[:, None] & good
    batch = jnp.arange(len(t))
    earlier = (same & (batch < batch[:, None])).sum(axis=1)
    of_batch = same.sum(axis=1)
    slot = (history.seen[t - 1] + earlier) % length
    # Of more than ten at one t, the last ten: no place is written twice.
    kept = good & (of_batch - earlier <= length)
    row = jnp.where(kept, t - 1, len(history.seen))
    return LossHistory(
        history.losses.at[row, slot].set(losses, mode="drop"),
        history.seen.at[jnp.where(good, t - 1, len(history.seen))].add(1, mode="drop"),
    )
