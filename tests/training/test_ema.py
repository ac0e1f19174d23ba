"""Averages against the weighted sums over all steps that they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from ddpm.training import ema

STEPS = 400


def average(rate, values, steps=None):
    """By the recursion over values[0], the first weights, and values[1:], those of each step."""

    def update(mean, step_and_value):
        step, value = step_and_value
        mean = ema.update(mean, value, rate(step))
        return mean, mean

    steps = jnp.arange(1, len(values))
    return jax.lax.scan(update, values[0], (steps, values[1:]))[1]


@pytest.fixture(scope="module")
def walk():
    steps = np.random.default_rng(0).normal(size=(STEPS + 1, 3))
    return jnp.asarray(np.cumsum(steps, axis=0), jnp.float32)


def test_long_averages_do_not_shrink():
    """In float64 the same average of weights that jitter about 1, decay 0.99999."""
    noise = np.float32(1 + 0.01 * np.random.default_rng(0).normal(size=(20_001, 16)))
    found = average(ema.constant(0.99999), jnp.asarray(noise))[-1]
    expected = np.float64(noise[0])
    for value in noise[1:]:
        expected += 1e-5 * (value - expected)
    assert abs(np.mean(found / expected) - 1) < 1e-6


def test_constant_weighs_each_step_by_the_decay_to_its_age(walk):
    found = average(ema.constant(0.98), walk)[-1]
    weights = 0.02 * 0.98 ** (STEPS - np.arange(STEPS + 1.0))
    weights[0] = 0.98**STEPS
    np.testing.assert_allclose(found, weights @ np.float64(walk), rtol=1e-4)


def test_warm_up_is_short_first_and_then_the_given_one():
    rate = ema.warm_up(0.98)
    decay = 1 - np.array([rate(step) for step in (1, 10, 100, 1000)])
    np.testing.assert_allclose(decay, [2 / 11, 11 / 20, 101 / 110, 0.98], rtol=1e-6)


def test_half_life_is_in_images_whatever_the_batch():
    for batch in (16, 64):
        rate = ema.half_life(640, batch, ramp_up=None)
        np.testing.assert_allclose((1 - np.float64(rate(5))) ** (640 / batch), 0.5, rtol=1e-6)
        # At first a twentieth of what was seen; from 12,800 images on it is the whole.
        ramped, step = ema.half_life(640, batch), 3200 // batch
        np.testing.assert_allclose((1 - np.float64(ramped(step))) ** (160 / batch), 0.5, rtol=1e-6)
        np.testing.assert_allclose(ramped(12_800 // batch), rate(1), rtol=1e-6)
        assert ramped(1 + 12_800 // batch) == rate(1)


@pytest.mark.parametrize("relative_std", [0.05, 0.1, 0.2])
def test_power_weighs_each_step_by_a_power_of_its_number(walk, relative_std):
    gamma = ema.power_of(relative_std)
    found = average(ema.power(relative_std), walk)[-1]
    # Exactly, Gamma(step + gamma + ..) in place of the power; that is its limit.
    weights = np.arange(1.0, STEPS + 1) ** gamma
    mean = weights @ np.float64(walk[1:]) / weights.sum()
    np.testing.assert_allclose(found, mean, atol=0.15)
    assert abs(np.float64(walk[-1]) - mean).max() > 1  # there was something to average
    # The definition of the width, over [0, 1].
    moment = lambda k: (gamma + 1) / (gamma + 1 + k)  # noqa: E731
    np.testing.assert_allclose(np.sqrt(moment(2) - moment(1) ** 2), relative_std, rtol=1e-9)


def test_power_keeps_its_digits_late_in_training():
    gamma = ema.power_of(0.05)
    for step in (10**5, 10**7):
        exact = -np.expm1((gamma + 1) * np.log1p(-1 / step))
        np.testing.assert_allclose(ema.power(0.05)(jnp.int32(step)), exact, rtol=1e-5)


def test_inner_products_are_integrals():
    for a, b in (((100, 3.0), (70, 6.5)), ((50, 2.0), (200, 9.0)), ((80, 4.0), (80, 4.0))):
        a, b = ema.Profile(*a), ema.Profile(*b)
        density = lambda p, x: (p.gamma + 1) * x**p.gamma / p.time ** (p.gamma + 1)  # noqa: E731
        end = min(a.time, b.time)
        area = integrate.quad(lambda x: density(a, x) * density(b, x), 0, end)[0]  # noqa: B023
        np.testing.assert_allclose(ema._inner(a, b), area, rtol=1e-6)


def test_a_snapshot_is_reconstructed_as_itself():
    snapshots = [ema.Profile(t, ema.power_of(s)) for t in range(100, 900, 100) for s in (0.05, 0.1)]
    for i in (0, 7, 15):
        factors = ema.reconstruction(snapshots, snapshots[i])
        np.testing.assert_allclose(factors, np.arange(16) == i, atol=1e-6)


@pytest.mark.parametrize("relative_std", [0.04, 0.07, 0.12, 0.2])
def test_snapshots_give_the_average_of_another_length(walk, relative_std):
    every = STEPS // 20
    averages, profiles = [], []
    for std in (0.05, 0.1):
        history = average(ema.power(std), walk)
        for step in range(every, STEPS + 1, every):
            averages.append({"w": np.asarray(history[step - 1]), "b": np.float32(step)})
            profiles.append(ema.Profile(step, ema.power_of(std)))
    end = STEPS - every
    direct = average(ema.power(relative_std), walk)[end - 1]
    found = ema.reconstruct(averages, profiles, end, relative_std)
    assert found["w"].dtype == np.float32
    others = [a["w"] for a, p in zip(averages, profiles, strict=True) if p.time == end]
    error = abs(found["w"] - direct).max()
    assert error < 0.1
    # Nearer than what was kept.
    assert error < 0.1 * min(abs(o - direct).max() for o in others)


def test_what_cannot_be_reconstructed_is_refused():
    snapshot = ema.Profile(100, 6.9)
    with pytest.raises(ValueError, match="no snapshot of the time 101"):
        ema.reconstruction([snapshot], ema.Profile(101, 6.9))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ema.reconstruct([0, 0], [snapshot], 100, 0.1)
    with pytest.raises(ValueError, match=r"must be in \(0, 0.289\)"):
        ema.power_of(0.3)
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
            ema.constant(wrong)
    with pytest.raises(ValueError, match="must be > 0"):
        ema.half_life(0, 4)
