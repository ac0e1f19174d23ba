"""The state that training carries from step to step, and the metrics since the last log line."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddpm.diffusion import streams
from ddpm.training.objectives import Objective

NUM_BUCKETS = 10


class TrainState(NamedTuple):
    """After `step` updates: the weights, their moving average, the optimiser's state.

    `loss_history` is the objective's (`timesteps.LossHistory`), or () where it has none.
    `other_ema_params` are averages by other rates. The parameters of a learned schedule stand
    next to the network's (`objectives.LEARNED_SCHEDULE`).
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    loss_history: Any = ()
    other_ema_params: tuple[Any, ...] = ()


class Metrics(NamedTuple):
    """Sums since the last log line, kept on the device so that no step waits for the host."""

    steps: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    bucket_loss: jax.Array  # float32[NUM_BUCKETS], by t: equal parts of 1..T
    bucket_count: jax.Array
    first_bad_step: jax.Array  # of a loss or gradient that was not finite; -1: none

    @classmethod
    def zero(cls) -> "Metrics":
        """Returns metrics with nothing summed yet."""
        scalar, buckets = jnp.zeros((), jnp.float32), jnp.zeros(NUM_BUCKETS, jnp.float32)
        return cls(scalar, scalar, scalar, buckets, buckets, jnp.full((), -1, jnp.int32))

    def add(
        self,
        step: jax.Array,
        loss: jax.Array,
        grad_norm: jax.Array,
        losses: jax.Array,
        t: jax.Array,
        num_steps: int,
    ) -> "Metrics":
        """Returns the sums with those of one step: its loss, and its examples' losses [B] at t."""
        t = jnp.maximum(jnp.ceil(t), 1).astype(jnp.int32)  # the step a fractional time is in
        bucket = (t - 1) * NUM_BUCKETS // num_steps
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        return Metrics(
            steps=self.steps + 1,
            loss=self.loss + loss,
            grad_norm=self.grad_norm + grad_norm,
            bucket_loss=self.bucket_loss.at[bucket].add(losses),
            bucket_count=self.bucket_count.at[bucket].add(1.0),
            first_bad_step=jnp.where(
                bad & (self.first_bad_step < 0), step + 1, self.first_bad_step
            ),
        )


def init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    objective: Objective | None = None,
    *,
    other_averages: int = 0,
) -> TrainState:
    """Returns the state before the first step; the averages start from the weights.

    `objective` may add a history of losses, and the parameters of a learned schedule.
    """
    key = streams.draw(jax.random.key(seed), streams.INIT)
    params = model.init(key, jnp.zeros((1, *image_shape), jnp.float32), jnp.ones((1,), jnp.int32))[
        "params"
    ]
    if objective is not None:
        params |= objective.schedule_parameters()
    # Copies: all are donated to the step, and one buffer cannot be donated twice.
    ema_params, *others = (jax.tree.map(jnp.copy, params) for _ in range(1 + other_averages))
    history = () if objective is None else objective.history
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, ema_params, optimizer.init(params), history, tuple(others))
