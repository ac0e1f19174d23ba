"""The training step: pure, to be jitted over devices."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddpm.diffusion import streams
from ddpm.diffusion.network_inputs import Conditioning, Prepare
from ddpm.diffusion.pixels import to_float
from ddpm.diffusion.streams import StepKey
from ddpm.training import ema
from ddpm.training.objectives import Losses, Objective
from ddpm.training.state import Metrics, TrainState

TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    model: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | ema.Rate,
    other_ema_rates: Sequence[ema.Rate] = (),
    seed: int,
    num_classes: int = 0,
    label_dropout: float = 0.0,
    prepare: Prepare | None = None,
    accumulation: int = 1,
) -> TrainStep:
    """Returns the step (state, metrics, images uint8[B, H, W, C], labels int[B] or None) -> (state,
    metrics).

    Dropout is on, nothing clipped but the gradient.

    Args:
      ema_decay: one number, or a rate of `ema`; `other_ema_rates` are those of other averages.
      label_dropout: how probably a label is replaced by num_classes, 'no label' (Ho & Salimans
        2022).
      prepare: changes x_0, and gives the network's other inputs.
      accumulation: how many parts the batch is taken in, one after the other, for less memory. The
        loss and the gradient are those of the whole batch, but for rounding and other dropout.
    """
    root = jax.random.key(seed)
    first = ema_decay if callable(ema_decay) else ema.constant(ema_decay)
    rates = (first, *other_ema_rates)

    def train_step(
        state: TrainState, metrics: Metrics, images: jax.Array, labels: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        step, key = state.step, StepKey(root, state.step)
        x_0, conditioning = to_float(images), Conditioning()
        if prepare is not None:
            x_0, conditioning = prepare(streams.draw(key, streams.CONDITIONING), x_0)
        conditions: tuple[jax.Array, ...] = ()  # a network without labels need not take any
        if labels is not None:
            conditions = (dropped(key, labels, num_classes, label_dropout),)
        given = x_0, conditioning, conditions
        at = state.params, state.loss_history
        loss, found, grads = _gradient(model, objective, at, key, given, accumulation)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = (state.ema_params, *state.other_ema_params)
        ema_params, *others = (
            ema.update(average, params, rate(step + 1))
            for average, rate in zip(averages, rates, strict=True)
        )
        norm = optax.tree.norm(grads)
        metrics = metrics.add(step, loss, norm, found.losses, found.t, objective.num_steps)
        history = objective.record(state.loss_history, found)
        state = TrainState(step + 1, params, ema_params, opt_state, history, tuple(others))
        return state, metrics

    return train_step


def _gradient(
    model: nn.Module,
    objective: Objective,
    at: tuple[Any, Any],
    key: StepKey,
    given: tuple[jax.Array, Conditioning, tuple[jax.Array, ...]],
    parts: int,
) -> tuple[jax.Array, Losses, Any]:
    """Returns the loss, its parts by example and its gradient, of a batch that is taken in parts.

    `at` are the parameters and the history of losses.
    """
    params, history = at
    batch_size = len(given[0])

    def of(key: StepKey, given: Any) -> tuple[jax.Array, Losses, Any]:
        x_0, conditioning, conditions = given
        network = training_network(model, key, conditioning, conditions)
        return objective.gradient(network, params, x_0, key, history)

    if parts == 1:
        return of(key, given)

    def one(total: Any, part: jax.Array) -> tuple[Any, Losses]:
        own = jax.tree.map(  # some are for all examples
            lambda x: streams.part_of(x, part, parts) if len(x) == batch_size else x, given
        )
        loss, found, grads = of(key._replace(part=part, parts=parts), own)
        return jax.tree.map(jnp.add, total, (loss, grads)), found

    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), params))
    total, found = jax.lax.scan(one, zeros, jnp.arange(parts))
    loss, grads = jax.tree.map(lambda x: x / parts, total)
    return loss, jax.tree.map(lambda x: x.T.reshape(batch_size), found), grads


def dropped(key: StepKey, labels: jax.Array, num_classes: int, probability: float) -> jax.Array:
    """Returns the labels int[B], each replaced by `num_classes`, 'no label', with a probability."""
    coins = jax.random.bernoulli(
        streams.draw(key, streams.LABELS), jnp.float32(probability), labels.shape
    )
    return jnp.where(coins, num_classes, labels)


def training_network(
    model: nn.Module, key: StepKey, conditioning: Conditioning, conditions: tuple[jax.Array, ...]
) -> Callable[[Any], Callable[..., jax.Array]]:
    """Returns params -> network(x_t, t, estimate=None), with dropout and its other inputs; `method`
    names another of the module's than its call."""
    dropout = streams.draw(key, streams.DROPOUT)
    if key.parts > 1:
        dropout = jax.random.fold_in(dropout, key.part)
    rngs = {"dropout": dropout}

    def at(params: Any) -> Callable[..., jax.Array]:
        def network(
            x_t: jax.Array,
            t: jax.Array,
            estimate: jax.Array | None = None,
            method: str | None = None,
        ) -> jax.Array:
            how: Any = {"train": True, "rngs": rngs} | conditioning.arguments(len(x_t), estimate)
            at = {"params": params}
            return jnp.asarray(model.apply(at, x_t, t, *conditions, **how, method=method))

        return network

    return at
