"""The train step against what it should compute, on a model small enough to check."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm import schedules
from ddpm.training.objectives import LEARNED_SCHEDULE, simple
from ddpm.training.optimizer import adam
from ddpm.training.state import NUM_BUCKETS, Metrics, init
from ddpm.training.step import make_train_step

IMAGE = (4, 4, 1)


class Constant(nn.Module):
    """Predicts a learned constant as eps: the gradient of its loss is known by hand."""

    @nn.compact
    def __call__(self, x, t, *, train=False):
        return jnp.broadcast_to(self.param("c", nn.initializers.ones, ()), x.shape)


class ByLabel(nn.Module):
    """Wrong by 100 where there is no label, and by twice the class where there is one."""

    @nn.compact
    def __call__(self, x, t, label, *, train=False):
        c = self.param("c", nn.initializers.zeros, ())
        wrong = jnp.where(label == CLASSES, 100.0, 2.0 * label)
        return c + jnp.broadcast_to(wrong[:, None, None, None], x.shape)


CLASSES = 3


@functools.cache
def labelled_step(model):
    """A compiled training step of any dropout of labels, from any step."""

    @functools.partial(jax.jit, static_argnames="dropout")
    def loss(images, labels, step, dropout):
        state = init(Constant(), adam(0.1), IMAGE, 0)._replace(step=step)
        train_step = make_train_step(
            model,
            simple(schedules.linear(100)),
            adam(0.1),
            ema_decay=0.9,
            seed=0,
            num_classes=CLASSES,
            label_dropout=dropout,
        )
        return train_step(state, Metrics.zero(), images, labels)[1].loss

    return loss


def labelled_loss(dropout, labels, step=0, model=None):
    """The mean loss of a step on 2000 images of these labels."""
    images = np.full((2000, *IMAGE), 100, np.uint8)
    return float(labelled_step(model or ByLabel())(images, labels, np.int32(step), dropout))


def run(steps, *, seed=0, ema_decay=0.9, learning_rate=0.1, images=None, model=None, **options):
    model = model or Constant()
    schedule = schedules.linear(100)
    optimizer = adam(learning_rate, **options)
    state, metrics = init(model, optimizer, IMAGE, seed), Metrics.zero()
    step = jax.jit(
        make_train_step(model, simple(schedule), optimizer, ema_decay=ema_decay, seed=seed)
    )
    images = np.full((64, *IMAGE), 100, np.uint8) if images is None else images
    history = [state]
    for _ in range(steps):
        state, metrics = step(state, metrics, images)
        history.append(state)
    return history, metrics


def test_ema_is_the_weighted_sum_of_all_weights_from_the_first_ones():
    history, _ = run(5, ema_decay=0.9)
    c = [float(s.params["c"]) for s in history]
    expected = c[0]
    for value in c[1:]:
        expected = 0.9 * expected + 0.1 * value
    np.testing.assert_allclose(history[-1].ema_params["c"], expected, rtol=1e-6)


def test_constant_model_finds_the_mean_of_the_noise():
    history, _ = run(200, learning_rate=0.05)
    assert abs(float(history[-1].params["c"])) < 0.1


def test_warm_up_rises_linearly_from_zero():
    history, _ = run(4, learning_rate=0.4, warmup_steps=4)
    c = np.array([float(s.params["c"]) for s in history])
    # The gradient is near 2c at every step, so Adam moves by the learning rate, 0, .1, .2, .3.
    np.testing.assert_allclose(-np.diff(c), [0, 0.1, 0.2, 0.3], atol=0.02)


def test_gradient_is_clipped_to_its_global_norm():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    for limit, factor in ((1.0, 0.2), (10.0, 1.0)):
        optimizer = adam(0.1, grad_clip=limit)
        _, state = optimizer.update(grads, optimizer.init(grads), grads)
        momentum = optax.tree.get(state, "mu")
        np.testing.assert_allclose(momentum["b"], 0.1 * 4 * factor, rtol=1e-5)


def test_b2_and_decay_are_those_of_adamw():
    """Two steps equal those by hand; neither biases decay nor a learned schedule."""
    optimizer = adam(0.1, b2=0.9, weight_decay=0.5)
    two = jnp.array([2.0])
    params = {"c": two, "conv": {"bias": two}, LEARNED_SCHEDULE: {"start": two}}
    state, c, free, m, v = optimizer.init(params), 2.0, 2.0, 0.0, 0.0
    for k, g in enumerate((1.0, -3.0), 1):
        grads = jax.tree.map(lambda p, g=g: jnp.full_like(p, g), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.9 * v + 0.1 * g * g
        move = m / (1 - 0.9**k) / ((v / (1 - 0.9**k)) ** 0.5 + 1e-8)
        c, free = c - 0.1 * (move + 0.5 * c), free - 0.1 * move
    np.testing.assert_allclose(params["c"], [c], rtol=1e-5)
    np.testing.assert_allclose(params[LEARNED_SCHEDULE]["start"], [free], rtol=1e-5)
    np.testing.assert_allclose(params["conv"]["bias"], [free], rtol=1e-5)


def test_metrics_sum_the_loss_by_parts_of_the_times():
    history, metrics = run(3)
    assert float(metrics.steps) == 3
    assert float(metrics.bucket_count.sum()) == 3 * 64
    np.testing.assert_allclose(metrics.bucket_loss.sum() / 64, metrics.loss, rtol=1e-5)
    assert metrics.bucket_count.shape == (NUM_BUCKETS,)
    assert int(metrics.first_bad_step) == -1
    assert int(history[-1].step) == 3


def test_first_step_that_is_not_finite_is_remembered():
    class Breaks(Constant):
        @nn.compact
        def __call__(self, x, t, *, train=False):
            c = self.param("c", nn.initializers.ones, ())
            return jnp.broadcast_to(jnp.where(c < 0.75, jnp.nan, c), x.shape)

    _, metrics = run(6, learning_rate=0.1, model=Breaks())
    assert int(metrics.first_bad_step) == 4  # c falls by 0.1 a step: 0.7 after the third


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_are_a_pure_function_of_seed_and_step(seed):
    once, again = run(3, seed=seed)[0][-1], run(3, seed=seed)[0][-1]
    other = run(3, seed=seed + 1)[0][-1]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), once, again))
    assert float(once.params["c"]) != float(other.params["c"])


def test_noise_and_times_differ_from_step_to_step():
    schedule, optimizer = schedules.linear(100), adam(0.1)
    first = init(Constant(), optimizer, IMAGE, 0)
    train_step = jax.jit(
        make_train_step(Constant(), simple(schedule), optimizer, ema_decay=0.9, seed=0)
    )
    losses = []
    for step in range(3):
        state = first._replace(step=jnp.int32(step))
        _, metrics = train_step(state, Metrics.zero(), np.zeros((8, *IMAGE), np.uint8))
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3


def test_network_is_given_the_labels():
    for label in (0, 1, 2):
        # E (c + 2 label - eps)^2 with c = 1, where the constant starts.
        found = labelled_loss(0.0, np.full(2000, label, np.int32))
        assert abs(found - (1 + (1 + 2 * label) ** 2)) < 0.3


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_labels_are_dropped_with_their_probability_anew_at_each_step(dropout):
    labels = np.zeros(2000, np.int32)
    shares = [labelled_loss(dropout, labels, step) / 101**2 for step in (0, 1)]
    for share in shares:
        assert abs(share - dropout) < 4 * (dropout * (1 - dropout) / 2000) ** 0.5
    assert shares[0] != shares[1]


def test_labels_leave_times_and_noise_as_they_were():
    """A network that makes no use of them learns the same, bit for bit."""

    class Deaf(Constant):
        @nn.compact
        def __call__(self, x, t, label=None, *, train=False):
            return jnp.broadcast_to(self.param("c", nn.initializers.ones, ()), x.shape)

    labels = np.zeros(2000, np.int32)
    assert labelled_loss(0.3, labels, model=Deaf()) == labelled_loss(0.3, None, model=Deaf())
