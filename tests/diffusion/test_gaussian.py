"""The forward process and its posterior against their definitions; the formulas against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from scipy import stats
from scipy.special import log_ndtr

from ddpm import q_posterior, q_sample, q_step, schedules
from ddpm.diffusion.gaussian import decoder_log_likelihood, expand_like, normal_kl, same_shape
from tests.exact import NAMES, close, pair

PIXELS = (np.arange(256) / 127.5 - 1).astype(np.float32)


def factors_of_x_0_and_eps(schedule, t):
    one, none = jnp.ones((len(t), 1)), jnp.zeros((len(t), 1))
    return (
        np.float64(q_sample(schedule, one, t, none))[:, 0],
        np.float64(q_sample(schedule, none, t, one))[:, 0],
    )


def factors_of_posterior(schedule, s, t):
    """Of x_0 and x_t, and the variance, found by evaluation."""
    one, none = jnp.ones((len(t), 1)), jnp.zeros((len(t), 1))
    first = q_posterior(schedule, one, none, t, s=s)
    second = q_posterior(schedule, none, one, t, s=s)
    return tuple(np.float64(x)[:, 0] for x in (first.mean, second.mean, first.variance))


@pytest.mark.parametrize("name", NAMES)
def test_marginals_are_the_single_steps_composed(name):
    schedule, _ = pair(name, 1000)
    mean, variance = [1.0], [0.0]
    for beta in np.float64(schedule.beta)[1:]:
        mean.append(mean[-1] * np.sqrt(max(1 - beta, 0)))
        variance.append(variance[-1] * (1 - beta) + beta)
    alpha, sigma = factors_of_x_0_and_eps(schedule, np.arange(1001))
    close(alpha, mean, rtol=1e-5, atol=1e-7)
    close(sigma**2, variance, rtol=1e-5)


def test_time_zero_is_the_data():
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    assert (q_sample(schedules.linear(), x_0, jnp.zeros(3, int), eps) == x_0).all()


@pytest.mark.parametrize("name", NAMES)
def test_step_between_two_times_composes_to_the_marginal(name):
    schedule, exact = pair(name, 1000)
    s = np.array([0, 0, 0, 1, 1, 2, 10, 499, 999, 990, 300])
    t = np.array([1, 300, 1000, 2, 1000, 3, 11, 500, 1000, 1000, 700])
    one, none = jnp.ones((len(t), 1)), jnp.zeros((len(t), 1))
    kept = np.float64(q_step(schedule, one, t, none, s=s))[:, 0]
    added = np.float64(q_step(schedule, none, t, one, s=s))[:, 0]
    close(added**2, exact.step_beta(s, t), rtol=1e-5, atol=1e-12)
    close(exact.alpha[s] * kept, exact.alpha[t], rtol=2e-5, atol=1e-7)
    close(kept**2 * exact.variance[s] + added**2, exact.variance[t], rtol=1e-5)
    at_zero = s == 0
    x, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    found = q_step(schedule, x, t[at_zero], eps, s=s[at_zero])
    close(found, q_sample(schedule, x, t[at_zero], eps), rtol=1e-6)
    near = q_step(schedule, x, jnp.array([1, 500, 1000]), eps)
    close(near, q_step(schedule, x, jnp.array([1, 500, 1000]), eps, s=jnp.array([0, 499, 999])))


@pytest.mark.parametrize("name", NAMES)
def test_posterior_is_bayes_rule(name):
    """q(x_s | x_t, x_0) is q(x_t | x_s) q(x_s | x_0) over its integral, by quadrature over x_s."""
    schedule, exact = pair(name, 1000)
    s = np.array([1, 1, 2, 10, 100, 499, 900, 999, 10, 300, 1])
    t = np.array([2, 3, 3, 11, 101, 500, 901, 1000, 700, 1000, 1000])
    x_0, z = 0.7, np.linspace(-2, 2, len(t))
    x_t = exact.alpha[t] * x_0 + exact.sigma[t] * z

    grid = np.linspace(-12, 12, 20001)[:, None] * exact.sigma[s] + exact.alpha[s] * x_0
    beta = exact.step_beta(s, t)
    log_product = -((x_t - np.sqrt(1 - beta) * grid) ** 2) / (2 * beta) - (
        grid - exact.alpha[s] * x_0
    ) ** 2 / (2 * exact.variance[s])
    density = np.exp(log_product - log_product.max(0))
    density /= density.sum(0)
    mean = (density * grid).sum(0)
    variance = (density * (grid - mean) ** 2).sum(0)

    column = lambda x: jnp.asarray(x, jnp.float32)[:, None]  # noqa: E731
    q = q_posterior(schedule, column(np.full(len(t), x_0)), column(x_t), t, s=s)
    close(q.mean[:, 0], mean, rtol=1e-5, atol=1e-6)
    close(q.variance[:, 0], variance, rtol=1e-5)
    close(q.log_variance[:, 0], np.log(variance), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_over_all_x_t_gives_the_marginal_at_s(name):
    schedule, exact = pair(name, 1000)
    rng = np.random.default_rng(3)
    t = np.concatenate([np.arange(1, 1001), rng.integers(1, 1001, 300)])
    s = np.concatenate([np.arange(1000), rng.integers(0, t[1000:])])
    of_x_0, of_x_t, variance = factors_of_posterior(schedule, s, t)
    alpha, sigma = factors_of_x_0_and_eps(schedule, t)
    close(of_x_0 + of_x_t * alpha, exact.alpha[s], rtol=1e-5)
    close(variance + (of_x_t * sigma) ** 2, exact.variance[s], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_posterior_in_two_steps_is_that_in_one(name):
    """q(x_s | x_t, x_0), then q(x_r | x_s, x_0), is q(x_r | x_t, x_0) for r < s < t."""
    schedule, _ = pair(name, 1000)
    r = np.array([0, 1, 2, 10, 500, 998])
    s = np.array([1, 2, 9, 90, 510, 999])
    t = np.array([2, 3, 800, 91, 1000, 1000])
    first, second = factors_of_posterior(schedule, s, t), factors_of_posterior(schedule, r, s)
    whole = factors_of_posterior(schedule, r, t)
    close(second[0] + second[1] * first[0], whole[0], rtol=1e-5)
    close(second[1] * first[1], whole[1], rtol=1e-5)
    close(second[2] + second[1] ** 2 * first[2], whole[2], rtol=1e-5)


def test_posterior_of_the_step_before_by_default():
    schedule = schedules.linear(50)
    x_0, x_t = jax.random.normal(jax.random.key(1), (2, 3, 4))
    t = jnp.array([1, 20, 50])
    for left_out, given in zip(
        q_posterior(schedule, x_0, x_t, t),
        q_posterior(schedule, x_0, x_t, t, s=t - 1),
        strict=True,
    ):
        assert (left_out == given).all()


def test_posterior_at_the_data_is_the_data():
    schedule = schedules.linear(50)
    x_0, x_t = jax.random.normal(jax.random.key(1), (2, 3, 4))
    q = q_posterior(schedule, x_0, x_t, jnp.array([1, 20, 50]), s=jnp.zeros(3, int))
    assert (q.mean == x_0).all()
    assert (q.variance == 0).all()
    assert jnp.isfinite(q.log_variance).all()


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 5, 2)])
def test_scalar_time_is_one_for_every_example(shape):
    schedule = schedules.linear(50)
    noised, posterior = jax.jit(q_sample), jax.jit(q_posterior)
    x_0, eps = np.float32(np.random.default_rng(2).normal(size=(2, *shape)))
    many = jnp.full(3, 20)
    close(noised(schedule, x_0, 20, eps), noised(schedule, x_0, many, eps), rtol=1e-6)
    for one, each in zip(
        posterior(schedule, x_0, eps, 20), posterior(schedule, x_0, eps, many), strict=True
    ):
        close(*np.broadcast_arrays(one, each), rtol=1e-6)


def test_each_example_has_its_own_time():
    schedule = schedules.linear(50)
    x_0, eps = np.float32(np.random.default_rng(2).normal(size=(2, 3, 3, 3, 3)))
    t, noised = jnp.array([1, 7, 50]), jax.jit(q_sample)
    together = noised(schedule, x_0, t, eps)
    for i in range(3):
        close(together[i], noised(schedule, x_0[i], t[i], eps[i]), rtol=1e-6)


def test_nothing_broadcasts_silently():
    schedule, t = schedules.linear(50), jnp.array([1, 2, 3])
    x = jnp.ones((3, 4, 1))
    with pytest.raises(ValueError, match="shapes must be equal"):
        q_sample(schedule, x, t, jnp.ones((3, 4, 2)))
    with pytest.raises(ValueError, match="shapes must be equal"):
        q_posterior(schedule, x, jnp.ones((1, 4, 1)), t)
    with pytest.raises(ValueError, match="one per example"):
        q_sample(schedule, x, t[:, None], x)
    with pytest.raises(ValueError, match="one per example"):
        q_sample(schedule, x, jnp.array([1]), x)
    with pytest.raises(ValueError, match="a \\(1,\\), b \\(2,\\)"):
        same_shape(a=jnp.ones(1), b=jnp.ones(2))


def test_lift():
    assert expand_like(jnp.ones(3), jnp.ones((3, 2, 2, 1))).shape == (3, 1, 1, 1)
    assert expand_like(jnp.ones(()), jnp.ones((3, 2))).shape == ()
    assert expand_like(jnp.ones(3), jnp.ones(3)).shape == (3,)


# --- The KL of two Gaussians


def exact_kl(m1, lv1, m2, lv2):
    m1, lv1, m2, lv2 = (np.float64(x) for x in (m1, lv1, m2, lv2))
    d = lv1 - lv2
    return 0.5 * (np.expm1(d) - d + (m1 - m2) ** 2 * np.exp(-lv2))


@pytest.mark.parametrize("jitted", [False, True])
def test_kl_in_closed_form(jitted):
    rng = np.random.default_rng(4)
    m1, m2, lv1, lv2 = (rng.normal(size=500) * k for k in (1, 1, 6, 6))
    arguments = [np.float32(x) for x in (m1, lv1, m2, lv2)]
    found = (jax.jit(normal_kl) if jitted else normal_kl)(*arguments)
    close(found, exact_kl(*arguments), rtol=1e-5)


@pytest.mark.parametrize("centre", [0.0, -0.01, -9.8])
def test_kl_of_nearly_equal_variances_keeps_its_digits(centre):
    lv2 = np.float32(centre)
    difference = np.concatenate([np.logspace(-6, 1, 200), -np.logspace(-6, 1, 200), [0.5, -0.5]])
    lv1 = np.float32(lv2 + difference)
    zero = np.float32(0)
    found, d = normal_kl(zero, lv1, zero, lv2), np.float64(lv1) - np.float64(lv2)
    series = d**2 / 4 * (1 + d / 3 + d**2 / 12)  # where float64's expm1 - d is short of digits
    close(found, np.where(abs(d) < 1e-3, series, exact_kl(zero, lv1, zero, lv2)), rtol=1e-5)
    assert (found >= 0).all()


@pytest.mark.parametrize(("m", "std"), [(0.3, 1.0), (-1.2, 0.5), (0.0, 1.7)])
def test_kl_by_quadrature(m, std):
    p, q = stats.norm(m, std), stats.norm(0.1, 0.8)
    expected, _ = scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -15, 15)
    close(normal_kl(m, 2 * np.log(std), 0.1, 2 * np.log(0.8)), expected, rtol=1e-5)


def test_kl_of_equal_gaussians_is_zero_with_zero_gradient():
    value, gradient = jax.value_and_grad(normal_kl, argnums=(0, 1, 2, 3))(0.3, -1.2, 0.3, -1.2)
    assert value == 0
    assert gradient == (0, 0, 0, 0)


@pytest.mark.parametrize("lv1", [-30.0, -1.0, -0.4, 0.3, 3.0])
def test_gradient_of_kl(lv1):
    gradient = jax.grad(normal_kl, argnums=(0, 1, 2, 3))(0.3, lv1, 0.1, 0.0)
    ratio = np.exp(lv1)
    expected = (0.2, (ratio - 1) / 2, -0.2, (1 - ratio - 0.04) / 2)
    close(gradient, expected, rtol=1e-5)


# --- The discretised decoder


def exact_decoder(x_0, mean, log_variance):
    x_0, mean, log_variance = (np.float64(x) for x in (x_0, mean, log_variance))
    std = np.exp(log_variance / 2)
    upper, lower = (x_0 - mean + 1 / 255) / std, (x_0 - mean - 1 / 255) / std
    swap = lower + upper > 0  # into the left tail, where log Phi has its digits
    high, low = np.where(swap, -lower, upper), np.where(swap, -upper, lower)
    inside = log_ndtr(high) + np.log(-np.expm1(log_ndtr(low) - log_ndtr(high)))
    ends = np.where(x_0 == -1, log_ndtr(upper), log_ndtr(-lower))
    return np.where(abs(x_0) == 1, ends, inside)


MEANS = np.float32([-3, -1.001, -1, -0.99, -0.3, 0, 0.00392157, 0.5, 0.9999, 1, 1.2, 3])
STDS = np.logspace(-3, 1, 41)


@pytest.mark.parametrize("jitted", [False, True])
def test_decoder_against_float64(jitted):
    log_variance = np.float32(2 * np.log(STDS))[:, None, None]
    arguments = (PIXELS, MEANS[:, None], log_variance)

    def log_likelihood(*args):
        return decoder_log_likelihood(*args, floor=0)

    found = (jax.jit(log_likelihood) if jitted else log_likelihood)(*arguments)
    assert found.shape == (41, 12, 256)
    close(found, exact_decoder(*arguments), rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("std", [1e-3, 0.00738, 0.02, 0.3, 10])
def test_all_bins_sum_to_one(std):
    log_likelihood = decoder_log_likelihood(PIXELS, MEANS[:, None], 2 * np.log(std), floor=0)
    close(np.exp(np.float64(log_likelihood)).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("std", [1e-3, 0.03, 2.0])
def test_end_bins_are_open(std):
    ends = np.float32([-1, 1])
    far = decoder_log_likelihood(ends, 5 * ends, 2 * np.log(std))
    close(far, np.log(stats.norm.cdf((4 + 1 / 255) / std)), rtol=1e-5, atol=1e-7)


def test_decoder_is_symmetric():
    f = lambda x, m: decoder_log_likelihood(x, m, -5.0, floor=0)  # noqa: E731
    close(f(PIXELS, MEANS[:, None]), f(-PIXELS, -MEANS[:, None]), rtol=1e-6)


def test_decoder_floor():
    x_0, log_variance = np.float32([0.2]), 2 * np.log(1e-3)
    floored = decoder_log_likelihood(x_0, -0.5, log_variance)
    close(-floored / np.log(2), 39.86, rtol=1e-4)
    close(decoder_log_likelihood(x_0, -0.5, log_variance, floor=1e-6), np.log(1e-6), rtol=1e-6)
    assert decoder_log_likelihood(x_0, -0.5, log_variance, floor=0) < -1e5


def test_distortion_of_the_paper():
    """Table 4 against the codelength: a residual of 0.95 grey levels costs 1.975 bits/dim."""
    x_0 = PIXELS[100:101]
    log_likelihood = decoder_log_likelihood(x_0, x_0 + 0.95 / 127.5, np.log(5.453e-5))
    close(-log_likelihood / np.log(2), 1.975, rtol=1e-3)


def test_gradient_of_decoder():
    """In units of the std, against central differences of the oracle."""
    mean, log_variance = np.meshgrid(MEANS, np.float32(2 * np.log(STDS)))
    log_likelihood = lambda *a: decoder_log_likelihood(*a, floor=0)  # noqa: E731
    gradient = jax.jit(jax.vmap(jax.vmap(jax.grad(log_likelihood, argnums=(1, 2)))))
    std, h = np.exp(np.float64(log_variance) / 2), 1e-5
    for x_0 in PIXELS[[0, 1, 100, 255]]:
        found = gradient(np.full_like(mean, x_0), mean, log_variance)
        assert np.isfinite(found).all()
        # Farther out than 40 standard deviations, the tail's slope is rounded by JAX's log_ndtr.
        near = exact_decoder(x_0, mean, log_variance) > -1000
        arguments = np.float64(x_0), np.float64(mean), np.float64(log_variance)
        for i, (value, step) in enumerate(zip(found, (h * std, h), strict=True)):
            up, down = ([*arguments[: i + 1], arguments[i + 1] + sign * step, *arguments[i + 2 :]]
                        for sign in (1, -1))  # fmt: skip
            slope = (exact_decoder(*up) - exact_decoder(*down)) / (2 * h)
            value = value * std if i == 0 else value
            close(value[near], slope[near], rtol=2e-4, atol=1e-5)
