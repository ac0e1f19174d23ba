"""The bound by a few of its terms, drawn for each image: its mean is that of all."""

import functools

import jax
import numpy as np
import pytest

from ddpm import Prediction, fixed_small, likelihood, sample_keys, schedules
from tests.exact import close, gaussian_denoiser, pair

MEAN, STD = 0.1, 0.3


def pixels(n):
    x = np.round((np.random.default_rng(15).normal(MEAN, STD, (n, 2)) + 1) * 127.5).clip(0, 255)
    return np.float32(x / 127.5 - 1)


def sampled(x_0, keys, num_times, num_steps=50):
    schedule, exact = pair("linear", num_steps)
    denoise = gaussian_denoiser(exact, MEAN, STD**2)
    return jax.jit(
        lambda x_0, keys: likelihood.sampled_bits_per_dim(
            schedule, denoise, x_0, keys, num_times=num_times, variance=fixed_small
        )
    )(x_0, keys)


@functools.cache
def all_terms(n):
    schedule, exact = pair("linear", 50)
    denoise = gaussian_denoiser(exact, MEAN, STD**2)
    return jax.jit(
        lambda x_0, key: likelihood.bits_per_dim(schedule, denoise, x_0, key, variance=fixed_small)
    )(pixels(n), jax.random.key(3))


@pytest.mark.parametrize("num_times", [1, 4])
def test_few_terms_have_the_mean_of_all(num_times):
    n = 4000
    found = sampled(pixels(n), jax.random.key(2), num_times)
    whole = all_terms(n)
    difference = np.float64(found.total) - whole.total
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)
    assert difference.std() / np.sqrt(n) < 0.03 * whole.total.mean()
    assert found.t.shape == (n, num_times)
    close(found.squared_error[:, 0].mean(), whole.squared_error[:, 0].mean(), rtol=0.1)
    # Every term by itself: drawn in its share, and of its own mean.
    for t in (2, 3, 10, 50):
        drawn = np.asarray(found.t) == t
        share = num_times / t / (1 / np.arange(2, 51)).sum()
        assert abs(drawn.sum() - n * share) < 5 * np.sqrt(n * share)
        close(found.weight[drawn], 1 / share, rtol=1e-5)
        mean = np.asarray(found.steps)[drawn].mean()
        close(mean, whole.steps[:, t - 2].mean(), rtol=6 / np.sqrt(drawn.sum()))
        error = np.asarray(found.squared_error)[:, 1:][drawn].mean()
        close(error, whole.squared_error[:, t - 1].mean(), rtol=6 / np.sqrt(drawn.sum()))


def test_times_of_an_example_are_spread():
    """Four draws: one in each quarter of the distribution of 1/t."""
    t = np.sort(np.asarray(sampled(pixels(500), jax.random.key(0), 4).t))
    edges = (1 / np.arange(2, 51)).cumsum() / (1 / np.arange(2, 51)).sum()
    upper, lower = edges[t - 2], np.concatenate([[0], edges])[t - 2]
    quarter = np.arange(4) / 4
    assert (upper > quarter).all()
    assert (lower < quarter + 0.25).all()


def test_an_example_is_noised_alike_in_any_batch():
    x_0, keys = pixels(5), sample_keys(jax.random.key(1), np.arange(5))
    whole = sampled(x_0, jax.random.key(1), 3)
    part = sampled(x_0[3:], keys[3:], 3)
    assert (part.t == whole.t[3:]).all()
    close(part.total, whole.total[3:], rtol=1e-5)
    schedule = schedules.linear(7)
    copy = lambda x_t, t: Prediction(x_t, x_t)  # noqa: E731
    of = jax.jit(lambda x_0, k: likelihood.bits_per_dim(schedule, copy, x_0, k).total)
    close(of(x_0[3:], keys[3:]), of(x_0, jax.random.key(1))[3:], rtol=1e-5)


def test_too_few_terms_are_refused():
    for num_steps, num_times in ((7, 0), (1, 3)):
        with pytest.raises(ValueError, match="at least one needed"):
            sampled(np.zeros((2, 3), np.float32), jax.random.key(0), num_times, num_steps)
