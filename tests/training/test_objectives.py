"""The train step with objectives: the default is Algorithm 1 to the last bit; what others carry."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm import losses, schedules, timesteps
from ddpm.training import ema
from ddpm.training.objectives import GaussianObjective, simple
from ddpm.training.optimizer import adam
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step

IMAGE, STEPS = (4, 4, 1), 20
SCHEDULE = schedules.linear(STEPS)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 16, *IMAGE), dtype=np.uint8)


class Network(nn.Module):
    """Small, of x_t and t, with dropout."""

    @nn.compact
    def __call__(self, x, t, *, train=False):
        h = nn.Dense(8)(jnp.concatenate([x.reshape(len(x), -1), t[:, None] / STEPS], axis=1))
        h = nn.Dropout(0.5, deterministic=not train)(nn.tanh(h))
        return nn.Dense(16)(h).reshape(x.shape)


def run(objective=None, *, ema_decay=0.9, steps=3, state=None):
    model, optimizer = Network(), adam(1e-2, warmup_steps=2, grad_clip=1.0)
    objective = objective or simple(SCHEDULE)
    state = init(model, optimizer, IMAGE, 0, objective) if state is None else state
    step = jax.jit(make_train_step(
        model, objective, optimizer, ema_decay=ema_decay, seed=0
    ))  # fmt: skip
    states, metrics = [state], Metrics.zero()
    for _ in range(steps):
        state, metrics = step(state, metrics, IMAGES[int(state.step) % 3])
        states.append(state)
    return states, metrics


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_default_is_algorithm_1_bit_for_bit():
    """As it was before there were objectives: the same draws, in the same order of operations."""
    model, optimizer = Network(), adam(1e-2, warmup_steps=2, grad_clip=1.0)
    state, root = init(model, optimizer, IMAGE, 0), jax.random.key(0)

    def loss_fn(params, x_0, step):
        stream = lambda s: jax.random.fold_in(jax.random.fold_in(root, s), step)  # noqa: E731
        t = jax.random.randint(stream(1), (len(x_0),), 1, STEPS + 1)
        eps = jax.random.normal(stream(2), x_0.shape)
        level = SCHEDULE.at(t)
        alpha, sigma = (x.reshape(-1, 1, 1, 1) for x in (level.alpha, level.sigma))
        x_t = alpha * x_0 + sigma * eps
        rngs = {"dropout": stream(3)}
        predicted = model.apply({"params": params}, x_t, t, train=True, rngs=rngs)
        return jnp.mean((eps - predicted) ** 2, axis=(1, 2, 3)).mean()

    @jax.jit
    def step(state, images):
        x_0 = images.astype(jnp.float32) / 127.5 - 1
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x_0, state.step)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = ema.update(state.ema_params, params, 1 - 0.9)
        return state._replace(
            step=state.step + 1, params=params, ema_params=average, opt_state=opt_state
        ), loss

    total = jnp.zeros(())
    for images in IMAGES:
        state, loss = step(state, images)
        total += loss
    for objective in (None, simple(SCHEDULE)):
        states, metrics = run(objective)
        assert same(states[-1], state)
        assert same(metrics.loss, total)
    assert not same(run(ema_decay=0.8)[0][-1], state)


def important(factor=1.0):
    plain = simple(SCHEDULE)
    return plain._replace(
        draw=timesteps.draw_important,
        loss_at=lambda *xs: factor * plain.loss_at(*xs),
        history=timesteps.LossHistory.empty(STEPS),
    )


def test_history_of_losses_is_carried_and_drawn_by():
    states, _ = run(important())
    assert int(states[-1].loss_history.seen.sum()) == 3 * 16
    assert int(states[0].loss_history.seen.sum()) == 0
    # Again from the middle: nothing but the state is carried.
    assert same(run(important(), steps=1, state=states[2])[0][-1], states[-1])
    # With all losses known, one t is drawn as seldom or often as its losses are small or large.
    known = jnp.full((STEPS, 10), 1e-3).at[4].set(100.0)
    history = timesteps.LossHistory(known, jnp.full(STEPS, 10))
    _, metrics = run(important(), state=states[0]._replace(loss_history=history), steps=1)
    assert int(metrics.bucket_count[(5 - 1) * 10 // STEPS]) >= 12


def test_factors_of_the_losses_are_in_their_mean_but_not_in_the_history():
    each = {}

    def draw(history, key, n):
        t = timesteps.uniform(SCHEDULE, key, n)
        return t, jnp.where(t > 10, 2.0, 0.0)

    for name, factors in (("plain", False), ("factors", True)):
        objective = important()._replace(draw=draw if factors else lambda *xs: (draw(*xs)[0], None))
        states, metrics = run(objective, steps=1)
        each[name] = states[-1].loss_history, metrics
    (plain, plainly), (weighted, weightily) = each.values()
    assert same(plain, weighted)
    assert same(plainly.bucket_loss, weightily.bucket_loss)
    upper = plainly.bucket_loss[5:].sum() * 2 / 16
    np.testing.assert_allclose(weightily.loss, upper, rtol=1e-5)


@pytest.mark.parametrize("rate", [ema.warm_up(0.99), ema.power(0.1), ema.half_life(100, 16)])
def test_average_follows_its_rate(rate):
    states, _ = run(ema_decay=rate)
    expected = jax.tree.leaves(states[0].params)[0]
    for i, state in enumerate(states[1:]):
        now = jax.tree.leaves(state.params)[0]
        expected = expected + float(rate(jnp.int32(i + 1))) * (now - expected)
    np.testing.assert_allclose(jax.tree.leaves(states[-1].ema_params)[0], expected, rtol=1e-4)
    assert not same(states[-1].ema_params, states[-1].params)


def test_fractional_times_count_to_their_step():
    objective = simple(SCHEDULE)._replace(
        draw=lambda history, key, n: (jnp.full(n, 4.25), None),
        loss_at=lambda *xs: losses.continuous_bound(SCHEDULE, *xs),
    )
    assert isinstance(objective, GaussianObjective)
    _, metrics = run(objective, steps=1)
    assert int(metrics.bucket_count[(5 - 1) * 10 // STEPS]) == 16
