"""The optimal reverse variance on data whose posterior variance is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import fixed_large, fixed_small
from ddpm.diffusion.analytic import analytic, second_moments
from tests.exact import close, gaussian_denoiser, pair


def moments_of_gaussian(exact, variance):
    """E |E[eps | x_t]|^2 per dimension, float64[T + 1]."""
    return exact.variance / (exact.alpha_bar * variance + exact.variance)


@pytest.mark.parametrize("variance", [0.05, 0.5])
def test_second_moments_of_gaussian_data(variance):
    schedule, exact = pair("linear", 200)
    denoise = gaussian_denoiser(exact, 0.0, variance)
    x_0 = jnp.sqrt(variance) * jax.random.normal(jax.random.key(0), (400, 50))
    found = jax.jit(lambda x: second_moments(schedule, denoise, x, jax.random.key(1)))(x_0)
    assert found.shape == (201,)
    # x_0 is the same at every t, the noise is not: its own spread is what remains.
    close(found[1:], moments_of_gaussian(exact, variance)[1:], rtol=5 * np.sqrt(2 / x_0.size))


@pytest.mark.parametrize("stride", [1, 20])
def test_variance_is_that_of_x_s_given_x_t(stride):
    """Of Gaussian data p(x_s | x_t) is Gaussian: Bayes' rule in float64 gives its variance."""
    schedule, exact = pair("linear", 200)
    variance = 0.3
    moments = jnp.float32(moments_of_gaussian(exact, variance))
    t = np.arange(stride + 1, 201, 7)
    s = t - stride
    found = np.exp(analytic(moments)(schedule, jnp.asarray(t), s=jnp.asarray(s)))
    at_s = exact.alpha_bar[s] * variance + exact.variance[s]
    ratio, added = exact.alpha_bar[t] / exact.alpha_bar[s], exact.step_beta(s, t)
    close(found, 1 / (1 / at_s + ratio / added), rtol=2e-4)


def test_ends():
    """G = 1 gives fixed small; G = 0, cut at 1, never more than the data can have."""
    schedule, exact = pair("cosine", 200)
    t = jnp.arange(2, 200)
    close(analytic(jnp.ones(201))(schedule, t), fixed_small(schedule, t), rtol=1e-6)
    of_x_0, _, small = exact.posterior(np.asarray(t) - 1, np.asarray(t))
    most = np.minimum(exact.variance / exact.alpha_bar, 1.0)[2:200]
    found = np.exp(analytic(jnp.zeros(201))(schedule, t))
    close(found, small + of_x_0**2 * most, rtol=1e-4)


def test_into_the_data_it_is_fixed_small_as_the_others_are():
    schedule, _ = pair("linear", 200)
    moments = jnp.full(201, 0.5)
    for t in (1, 30):
        of_t = jnp.asarray(t)
        expected = fixed_large(schedule, of_t, s=jnp.zeros_like(of_t))
        close(analytic(moments)(schedule, of_t, s=jnp.zeros_like(of_t)), expected, rtol=1e-6)


def test_between_whole_times():
    schedule, exact = pair("linear", 200)
    moments = jnp.float32(moments_of_gaussian(exact, 0.3))
    around = [float(analytic(moments)(schedule, jnp.asarray(t), s=jnp.asarray(90)))
              for t in (100, 101)]  # fmt: skip
    found = float(analytic(moments)(schedule, jnp.asarray(100.5), s=jnp.asarray(90.0)))
    assert around[0] < found < around[1]
