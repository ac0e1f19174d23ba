"""What training carries from step to step, and the pure step itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddpm.data.pipeline import to_float
from ddpm.diffusion import timesteps
from ddpm.diffusion.conditioning import Beside, Prepare, self_conditioned_by
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.training import ema
from ddpm.training.objective import Objective, simple

NUM_BUCKETS = 10
# Streams of random numbers, each folded into the root key and then the step into it: nothing is
# carried over, so that resuming needs nothing saved.
_INIT, _TIMES, _NOISE, _DROPOUT, _LABELS, _BESIDE, _COINS = range(7)


class TrainState(NamedTuple):
    """After `step` updates: the weights, their moving average, the optimiser's state.

    `loss_history` is that of the objective (`timesteps.LossHistory`), or () where it has none.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any
    loss_history: Any = ()


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
        """Nothing summed yet."""
        scalar, buckets = jnp.zeros(()), jnp.zeros(NUM_BUCKETS)
        return cls(scalar, scalar, scalar, buckets, buckets, jnp.full((), -1, jnp.int32))


TrainStep = Callable[..., tuple[TrainState, Metrics]]


def adam(
    learning_rate: float, *, warmup_steps: int = 0, grad_clip: float = 0.0
) -> optax.GradientTransformation:
    """Adam (0.9, 0.999, 1e-8), linear warm-up from 0, the gradient clipped to a global norm.

    (The authors clip each replica's gradient and then average; with one replica it is the same.)
    """
    # A schedule also without warm-up: the state is of one shape, whatever is changed on the way.
    rate = (
        optax.linear_schedule(0.0, learning_rate, warmup_steps)
        if warmup_steps
        else optax.constant_schedule(learning_rate)
    )
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return optax.chain(clip, optax.adam(rate))


def init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    loss_history: Any = (),
) -> TrainState:
    """The state before the first step; the average starts from the weights."""
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    params = model.init(key, jnp.zeros((1, *image_shape)), jnp.ones((1,), jnp.int32))["params"]
    # A copy: both are donated to the step, and one buffer cannot be donated twice.
    ema_params = jax.tree.map(jnp.copy, params)
    opt_state = optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema_params, opt_state, loss_history)


def make_train_step(
    model: nn.Module,
    schedule: NoiseSchedule,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | ema.Rate,
    seed: int,
    objective: Objective | None = None,
    num_classes: int = 0,
    label_dropout: float = 0.0,
    prepare: Prepare | None = None,
    self_conditioning: bool = False,
) -> TrainStep:
    """The step (state, metrics, images uint8[B, H, W, C], labels int[B] or None) -> (state,
    metrics): pure, to be jitted.

    By default Algorithm 1: L_simple at uniform t. Dropout is on, nothing clipped but the gradient.
    `ema_decay` is one number, or a rate of `ema`. Each label is replaced by num_classes, 'no
    label', with probability `label_dropout` (Ho & Salimans 2022). `prepare` changes x_0 and says
    what the network is told beside it. With `self_conditioning` the network is also given its own
    guess of x_0, for half of the examples, which takes another call of it.
    """
    root = jax.random.key(seed)
    aim = objective or simple(schedule)
    rate = ema_decay if callable(ema_decay) else ema.constant(ema_decay)

    def loss_fn(
        params: Any, x_0: jax.Array, labels: jax.Array | None, step: jax.Array, history: Any
    ) -> tuple[jax.Array, Any]:
        stream = lambda s: jax.random.fold_in(jax.random.fold_in(root, s), step)  # noqa: E731
        x_0, beside = (x_0, Beside()) if prepare is None else prepare(stream(_BESIDE), x_0)
        t, factor = aim.draw(history, stream(_TIMES), len(x_0))
        eps = jax.random.normal(stream(_NOISE), x_0.shape)
        conditions: tuple[jax.Array, ...] = ()  # a network without labels need not take any
        if labels is not None:
            dropped = jax.random.bernoulli(stream(_LABELS), label_dropout, labels.shape)
            conditions = (jnp.where(dropped, num_classes, labels),)

        def with_guess(guess: jax.Array | None) -> Denoiser:
            told = beside.arguments(len(x_0), guess)

            def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
                how: Any = {"train": True, "rngs": {"dropout": stream(_DROPOUT)}} | told
                return jnp.asarray(model.apply({"params": params}, x_t, t, *conditions, **how))

            return aim.denoiser(network)

        denoiser = with_guess(None)
        if self_conditioning:
            coins = jax.random.bernoulli(stream(_COINS), 0.5, (len(x_0),))
            denoiser = self_conditioned_by(with_guess, coins)
        loss = aim.loss(denoiser, x_0, t, eps)
        return (loss if factor is None else factor * loss).mean(), (loss, t)

    def train_step(
        state: TrainState, metrics: Metrics, images: jax.Array, labels: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        x_0, history = to_float(images), state.loss_history
        (loss, per_example), grads = grad_fn(state.params, x_0, labels, state.step, history)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = optax.incremental_update(params, state.ema_params, rate(state.step + 1))
        metrics = _add(metrics, state.step, loss, optax.tree.norm(grads), *per_example)
        if isinstance(history, timesteps.LossHistory):
            of_examples, t = per_example
            history = timesteps.record(history, t, of_examples)
        return TrainState(state.step + 1, params, ema_params, opt_state, history), metrics

    def _add(
        m: Metrics,
        step: jax.Array,
        loss: jax.Array,
        grad_norm: jax.Array,
        losses: jax.Array,
        t: jax.Array,
    ) -> Metrics:
        t = jnp.ceil(t).astype(jnp.int32)  # of the step that a fractional time is in
        bucket = (t - 1) * NUM_BUCKETS // schedule.num_steps
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        return Metrics(
            steps=m.steps + 1,
            loss=m.loss + loss,
            grad_norm=m.grad_norm + grad_norm,
            bucket_loss=m.bucket_loss.at[bucket].add(losses),
            bucket_count=m.bucket_count.at[bucket].add(1.0),
            first_bad_step=jnp.where(bad & (m.first_bad_step < 0), step + 1, m.first_bad_step),
        )

    return train_step
