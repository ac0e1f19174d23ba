"""Draws of t against the distributions they should have; the loss history against a plain one."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from ddpm import schedules, timesteps
from ddpm.diffusion import continuous
from ddpm.diffusion.timesteps import LossHistory, draw_important, importance, record
from tests.exact import close

N = 20_000


def test_low_discrepancy_has_one_in_each_equal_part_and_each_is_uniform():
    batches = jax.jit(jax.vmap(lambda key: timesteps.low_discrepancy(key, 8)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert (np.sort(np.floor(8 * batches), axis=1) == np.arange(8)).all()
    for of_one in (batches[:, 0], batches[:, 5]):
        assert stats.kstest(of_one, "uniform").pvalue > 1e-3


def test_whole_steps_are_equal_parts():
    schedule = schedules.linear(7)
    u = np.float32(
        [0, 1 / 7 - 1e-3, 1 / 7 + 1e-3, 0.5, 1 - 1e-3, np.nextafter(np.float32(1), 0), 1]
    )
    t = timesteps.whole(schedule, u)
    assert t.dtype == jnp.int32
    assert t.tolist() == [1, 1, 2, 4, 7, 7, 7]
    close(timesteps.within(schedule, u), 1 + 6 * u)
    close(timesteps.within(continuous.linear(), u), u)


def test_logit_normal():
    u = np.float64(timesteps.logit_normal(jax.random.key(1), N, mean=0.5, std=2.0))
    assert stats.kstest(special.logit(u), stats.norm(0.5, 2.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "schedule", [continuous.table(continuous.edm(), 50), continuous.edm()], ids=["table", "edm"]
)
def test_log_normal_in_the_noise_level(schedule):
    t = timesteps.log_normal(schedule, jax.random.key(2), N)
    first, last = schedule.ends
    assert ((t >= first) & (t <= last)).all()
    log_sigma = np.float64(-schedule.at(t).high) / 2
    # The part beyond the ends is put there: 0.002 is 4.2, 80 is 4.6 deviations away.
    assert stats.kstest(log_sigma, stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3


def test_noise_beyond_the_ends_goes_there():
    schedule = schedules.linear(20)
    t = timesteps.log_normal(schedule, jax.random.key(3), 500, mean=0.0, std=30.0)
    assert {float(t.min()), float(t.max())} == {1.0, 20.0}
    assert ((t == 1) | (t == 20)).mean() > 0.8


class PlainHistory:
    """The last ten losses of each t, one by one."""

    def __init__(self, num_steps):
        self.last = [collections.deque(maxlen=10) for _ in range(num_steps)]

    def record(self, t, losses):
        for i, loss in zip(t, losses, strict=True):
            if np.isfinite(loss):
                self.last[i - 1].append(loss)


def test_history_keeps_the_last_ten_of_each_t():
    rng, plain, history = np.random.default_rng(4), PlainHistory(5), LossHistory.empty(5)
    add = jax.jit(record)
    for _ in range(12):
        # Some t more than ten times in a batch, some not at all.
        t = rng.choice(5, 16, p=[0.75, 0.15, 0.05, 0.05, 0.0]) + 1
        losses = np.float32(rng.exponential(size=16))
        losses[rng.random(16) < 0.1] = np.nan
        plain.record(t, losses)
        history = add(history, t, losses)
        for row, deque in zip(history.losses, plain.last, strict=True):
            assert sorted(x for x in row.tolist() if x) == sorted(np.float32(deque).tolist())
    assert history.seen[4] == 0
    close(importance(history), 0.2, rtol=1e-6)  # one t has none yet


def test_important_times_are_drawn_by_the_root_of_the_second_moment():
    rng = np.random.default_rng(5)
    losses = np.float32(rng.exponential(size=(4, 10)) * np.array([[1], [5], [0.2], [1]]))
    history = LossHistory(jnp.asarray(losses), jnp.full(4, 10))
    size = np.sqrt((np.float64(losses) ** 2).mean(1))
    p = 0.999 * size / size.sum() + 0.001 / 4
    close(importance(history), p, rtol=1e-5)
    close(importance(history, uniform_part=0.5), 0.5 * size / size.sum() + 0.125, rtol=1e-5)
    t, weight = jax.jit(lambda h, k: draw_important(h, k, N))(history, jax.random.key(6))
    counts = np.bincount(t, minlength=5)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:], N * p).pvalue > 1e-3
    close(weight, 1 / (4 * p[np.asarray(t) - 1]), rtol=1e-5)
    # The mean of anything over uniform t is kept, and it is less noisy where it is as the losses.
    value = np.array([1.0, 5.0, 0.2, 1.0])
    drawn = value[np.asarray(t) - 1] * np.float64(weight)
    assert abs(drawn.mean() - value.mean()) < 4 * drawn.std() / np.sqrt(N)
    assert drawn.std() < 0.5 * value.std()


def test_uniform_until_all_have_ten():
    history = LossHistory(jnp.ones((3, 10)).at[0].set(9.0), jnp.array([10, 10, 9]))
    close(importance(history), 1 / 3, rtol=1e-6)
    full = record(history, jnp.array([3]), jnp.ones(1))
    assert importance(full)[0] > 0.8
    # All losses 0, as an exact model of a constant has: no division by it.
    close(importance(LossHistory(jnp.zeros((3, 10)), jnp.full(3, 10))), 1 / 3, rtol=1e-6)
