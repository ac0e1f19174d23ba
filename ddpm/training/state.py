"""What training carries from step to step, and the pure step itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from ddpm.data.pipeline import to_float
from ddpm.diffusion import continuous, timesteps
from ddpm.diffusion.conditioning import Beside, Prepare, self_conditioned_by
from ddpm.diffusion.losses import ends_of_bound
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.training import ema
from ddpm.training.objective import LEARNED_SCHEDULE, Objective, simple

NUM_BUCKETS = 10
# Streams of random numbers, each folded into the root key and then the step into it: nothing is
# carried over, so that resuming needs nothing saved.
_INIT, _TIMES, _NOISE, _DROPOUT, _LABELS, _BESIDE, _COINS = range(7)


class TrainState(NamedTuple):
    """After `step` updates: the weights, their moving average, the optimiser's state.

    `loss_history` is that of the objective (`timesteps.LossHistory`), or () where it has none.
    `other_ema_params` are averages by other rates. Of a learned schedule, the parameters stand
    beside the network's (`LEARNED_SCHEDULE`).
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
        """Nothing summed yet."""
        scalar, buckets = jnp.zeros(()), jnp.zeros(NUM_BUCKETS)
        return cls(scalar, scalar, scalar, buckets, buckets, jnp.full((), -1, jnp.int32))


class Example(NamedTuple):
    """A batch as the network meets it: x_0 and eps [B, ...], what is told beside, labels and t."""

    x_0: jax.Array
    beside: Beside
    labels: jax.Array | None
    t: jax.Array
    eps: jax.Array


TrainStep = Callable[..., tuple[TrainState, Metrics]]


def adam(
    learning_rate: float,
    *,
    warmup_steps: int = 0,
    grad_clip: float = 0.0,
    b2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam (0.9, b2, 1e-8), linear warm-up from 0, the gradient clipped to a global norm.

    With `weight_decay`, AdamW: every step takes this part, times the learning rate, off the
    network's weights, but not off biases (as Kingma et al. 2021) or a learned schedule.
    (The authors clip each replica's gradient and then average; with one replica it is the same.)
    """
    # A schedule also without warm-up: the state is of one shape, whatever is changed on the way.
    rate = (
        optax.linear_schedule(0.0, learning_rate, warmup_steps)
        if warmup_steps
        else optax.constant_schedule(learning_rate)
    )
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    if not weight_decay:  # not AdamW with 0, whose state, and so checkpoints, are of another shape
        return optax.chain(clip, optax.adam(rate, b2=b2))

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[0].key != LEARNED_SCHEDULE and path[-1].key != "bias", params
        )

    return optax.chain(clip, optax.adamw(rate, b2=b2, weight_decay=weight_decay, mask=decays))


def init(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    loss_history: Any = (),
    *,
    schedule_parameters: dict[str, Any] | None = None,
    other_averages: int = 0,
) -> TrainState:
    """The state before the first step; the averages start from the weights."""
    key = jax.random.fold_in(jax.random.key(seed), _INIT)
    params = model.init(key, jnp.zeros((1, *image_shape)), jnp.ones((1,), jnp.int32))["params"]
    params |= schedule_parameters or {}
    # Copies: all are donated to the step, and one buffer cannot be donated twice.
    ema_params, *others = (jax.tree.map(jnp.copy, params) for _ in range(1 + other_averages))
    opt_state = optimizer.init(params)
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, ema_params, opt_state, loss_history, tuple(others))


def make_train_step(
    model: nn.Module,
    schedule: NoiseSchedule,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | ema.Rate,
    other_ema_rates: Sequence[ema.Rate] = (),
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
    `ema_decay` is one number, or a rate of `ema`; `other_ema_rates` are those of other averages.
    Each label is replaced by num_classes, 'no label', with probability `label_dropout` (Ho &
    Salimans 2022). `prepare` changes x_0 and says what the network is told beside it. With
    `self_conditioning` the network is also given its own guess of x_0, for half of the examples,
    which takes another call of it.
    """
    root = jax.random.key(seed)
    aim = objective or simple(schedule)
    first = ema_decay if callable(ema_decay) else ema.constant(ema_decay)
    rates = (first, *other_ema_rates)

    def stream(number: int, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(root, number), step)

    def losses_of(aim: Objective, params: Any, example: Example, step: jax.Array) -> jax.Array:
        """[B]."""
        x_0, beside, labels, t, eps = example
        conditions: tuple[jax.Array, ...] = ()  # a network without labels need not take any
        if labels is not None:
            dropped = jax.random.bernoulli(stream(_LABELS, step), label_dropout, labels.shape)
            conditions = (jnp.where(dropped, num_classes, labels),)

        def with_guess(guess: jax.Array | None) -> Denoiser:
            told = beside.arguments(len(x_0), guess)

            def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
                how: Any = {"train": True, "rngs": {"dropout": stream(_DROPOUT, step)}} | told
                return jnp.asarray(model.apply({"params": params}, x_t, t, *conditions, **how))

            return aim.denoiser(network)

        denoiser = with_guess(None)
        if self_conditioning:
            coins = jax.random.bernoulli(stream(_COINS, step), 0.5, (len(x_0),))
            denoiser = self_conditioned_by(with_guess, coins)
        return aim.loss(denoiser, x_0, t, eps)

    def fixed(
        params: Any, example: Example, factor: jax.Array | None, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """The loss, and those of the examples; and the gradient."""

        def mean(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = losses_of(aim, params, example, step)
            return (losses if factor is None else factor * losses).mean(), losses

        return jax.value_and_grad(mean, has_aux=True)(params)

    def learned(
        params: Any, example: Example, factor: jax.Array | None, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """The same, of the schedule too: its end points by the whole bound."""
        assert aim.at is not None
        at, parameters = aim.at, continuous.MonotoneLogSNR(**params[LEARNED_SCHEDULE])

        def at_levels(params: Any, log_snr: jax.Array, slope: jax.Array) -> jax.Array:
            return losses_of(at(continuous.Levels(log_snr, slope)), params, example, step)

        def ends(parameters: continuous.MonotoneLogSNR) -> jax.Array:
            schedule = continuous.learned(parameters)
            return ends_of_bound(schedule, example.x_0, example.eps).mean()

        found = continuous.learned_gradients(at_levels, params, parameters, example.t)
        of_ends, gradient = jax.value_and_grad(ends)(parameters)
        schedule = jax.tree.map(jnp.add, found.schedule, gradient)
        grads = found.network | {LEARNED_SCHEDULE: schedule._asdict()}
        return (found.losses.mean() + of_ends, found.losses), grads

    def train_step(
        state: TrainState, metrics: Metrics, images: jax.Array, labels: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        step, history = state.step, state.loss_history
        x_0, beside = to_float(images), Beside()
        if prepare is not None:
            x_0, beside = prepare(stream(_BESIDE, step), x_0)
        t, factor = aim.draw(history, stream(_TIMES, step), len(x_0))
        eps = jax.random.normal(stream(_NOISE, step), x_0.shape)
        example = Example(x_0, beside, labels, t, eps)
        gradient = fixed if aim.at is None else learned
        (loss, losses), grads = gradient(state.params, example, factor, step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params, *others = (
            ema.update(average, params, rate(step + 1))
            for average, rate in zip(
                (state.ema_params, *state.other_ema_params), rates, strict=True
            )
        )
        t = t if aim.at is None else t * schedule.num_steps  # it is drawn in 0..1
        metrics = _add(metrics, step, loss, optax.tree.norm(grads), losses, t)
        if isinstance(history, timesteps.LossHistory):
            history = timesteps.record(history, t, losses)
        state = TrainState(step + 1, params, ema_params, opt_state, history, tuple(others))
        return state, metrics

    def _add(
        m: Metrics,
        step: jax.Array,
        loss: jax.Array,
        grad_norm: jax.Array,
        losses: jax.Array,
        t: jax.Array,
    ) -> Metrics:
        t = jnp.maximum(jnp.ceil(t), 1).astype(jnp.int32)  # the step a fractional time is in
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
