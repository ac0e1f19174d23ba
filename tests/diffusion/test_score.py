"""Scores against grad log q of mixtures, in both views, and the losses against one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import Prediction, losses, schedules
from ddpm.diffusion import score
from ddpm.diffusion.gaussian import q_sample
from examples import score_matching

SCHEDULE = schedules.linear(100)
TIMES = np.arange(1, 101)


def mixture(dimensions, kind):
    """Weights, means [3, D] and the variance of a mixture."""
    rng = np.random.default_rng(dimensions)
    return kind([0.2, 0.3, 0.5]), kind(rng.normal(size=(3, dimensions))), kind(0.1)


def log_q(x, alpha, variance_of_noise, of):
    """log q_t of one x [D] under a mixture."""
    weights, means, variance = of
    spread = alpha**2 * variance + variance_of_noise
    logs = -0.5 * ((x - alpha * means) ** 2).sum(-1) / spread
    return jax.nn.logsumexp(logs + jnp.log(weights)) - 0.5 * x.size * jnp.log(2 * jnp.pi * spread)


def closed_form(schedule, of):
    """The exact denoiser, by the posterior means of the components and not by any gradient."""
    weights, means, variance = of

    def denoise(x_t, t):
        level = schedule.at(t)
        alpha, noise = level.alpha[:, None], level.sigma_squared[:, None]
        spread = alpha**2 * variance + noise
        apart = x_t[:, None] - alpha[..., None] * means
        logs = jnp.log(weights) - 0.5 * (apart**2).sum(-1) / spread
        gain = (alpha * variance / spread)[..., None]
        x_0 = (jax.nn.softmax(logs)[..., None] * (means + gain * apart)).sum(1)
        return Prediction(x_0, (x_t - alpha * x_0) / level.sigma[:, None])

    return denoise


@pytest.mark.parametrize(
    ("dimensions", "schedule"),
    [(2, SCHEDULE), (16, SCHEDULE), (64, SCHEDULE), (64, schedules.geometric(100))],
)
def test_score_is_the_gradient_of_log_q_at_every_t(dimensions, schedule):
    """In both views; and there and back."""
    of = mixture(dimensions, jnp.float32)
    rng = np.random.default_rng(0)
    x_0 = rng.normal(size=(len(TIMES), dimensions)).astype(np.float32)
    x_t = q_sample(schedule, x_0, TIMES, rng.normal(size=x_0.shape).astype(np.float32))
    level = schedule.at(TIMES)

    @jax.jit
    def all_of(x_t):
        alpha, noise = level.alpha, level.sigma_squared
        exact = jax.vmap(jax.grad(log_q), (0, 0, 0, None))(x_t, alpha, noise, of)
        y, s = x_t / level.alpha[:, None], level.sigma / level.alpha
        of_y = jax.vmap(jax.grad(log_q), (0, None, 0, None))(y, 1.0, s**2, of)
        found = score.of(schedule, closed_form(schedule, of))
        exploding = score.exploding(schedule, found)
        back = score.preserving(schedule, exploding)
        again = score.denoiser(schedule, found)(x_t, TIMES).x_0
        expected = closed_form(schedule, of)(x_t, TIMES).x_0
        return ((found(x_t, TIMES), exact), (exploding(y, TIMES), of_y), (back(x_t, TIMES), exact),
                (again, expected))  # fmt: skip

    scale = np.asarray(level.sigma)[:, None]
    for found, expected in all_of(x_t):
        np.testing.assert_allclose(scale * found, scale * expected, atol=1e-4)


@pytest.mark.parametrize("make", [schedules.linear, schedules.geometric], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_in_float64_to_ten_digits(dimensions, make):
    with jax.enable_x64(True):
        of = mixture(dimensions, np.float64)
        schedule = make(100)
        x_t = np.random.default_rng(1).normal(size=(len(TIMES), dimensions))
        level = jax.tree.map(lambda x: np.asarray(x, np.float64), schedule.at(TIMES))
        alpha, noise = (np.asarray(x, np.float64) for x in (level.alpha, level.sigma_squared))
        exact = jax.vmap(jax.grad(log_q), (0, 0, 0, None))(x_t, alpha, noise, of)

        class Exactly:  # the schedule's levels as float64
            def at(self, t):
                del t
                return level

        found = closed_form(Exactly(), of)(jnp.asarray(x_t), TIMES).eps / -np.sqrt(noise)[:, None]
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, exact, rtol=1e-9, atol=1e-10)


def test_denoising_is_l_simple_in_both_views():
    rng = np.random.default_rng(2)
    x_0, eps = (jnp.asarray(rng.normal(size=(64, 5)), jnp.float32) for _ in range(2))
    t = jnp.asarray(rng.integers(1, 101, 64))
    denoise = closed_form(SCHEDULE, mixture(5, jnp.float32))
    found = score.of(SCHEDULE, denoise)
    simple = losses.simple(SCHEDULE, denoise, x_0, t, eps)
    np.testing.assert_allclose(score.denoising(SCHEDULE, found, x_0, t, eps), simple, rtol=1e-4)
    of_y = score.exploding(SCHEDULE, found)
    other = score.denoising_exploding(SCHEDULE, of_y, x_0, t, eps)
    np.testing.assert_allclose(other, simple, rtol=1e-4)
    level = SCHEDULE.at(t)
    ones = functools.partial(score.denoising, SCHEDULE, found, x_0, t, eps, weight=jnp.ones_like)
    np.testing.assert_allclose(ones(), simple / level.sigma_squared, rtol=1e-4)
    theirs = score.denoising_exploding(SCHEDULE, of_y, x_0, t, eps, weight=lambda s: s)
    np.testing.assert_allclose(theirs, simple * level.alpha / level.sigma, rtol=1e-4)


def test_a_trained_network_comes_within_two_percent_of_the_floor_at_every_level():
    """The floor is what the exact score, which no network can beat, pays on the same draws."""
    schedule, data = schedules.geometric(8, 0.02, 10.0), score_matching.mixture(2)
    denoise = score_matching.trained(jax.random.key(0), schedule, data, "conditioned", steps=1500)
    floor, more = score_matching.paid(jax.random.key(1), schedule, data, denoise, 40_000)
    assert (floor > 0).all()
    assert (more > -1e-3).all(), more
    assert (more < 0.02).all(), more


def test_exact_denoisers_of_mixtures_agree():
    """The two mixtures: the example's, and the one here."""
    data, t = score_matching.mixture(16), np.arange(1, 101)
    of = data.weights, data.means, data.variance
    x_t = np.random.default_rng(3).normal(size=(100, 16)).astype(np.float32)
    found, expected = data.denoiser(SCHEDULE)(x_t, t), closed_form(SCHEDULE, of)(x_t, t)
    np.testing.assert_allclose(found.x_0, expected.x_0, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def on_a_line():
    """A one-dimensional mixture at one level, by quadrature: its points x and weights, the exact
    score and a wrong one."""
    t = 40
    level = jax.tree.map(float, SCHEDULE.at(t))
    of = mixture(1, jnp.float32)
    x = jnp.linspace(-8, 8, 4001)[:, None]
    log_density = functools.partial(
        log_q, alpha=level.alpha, variance_of_noise=level.sigma**2, of=of
    )
    weights = jax.nn.softmax(jax.vmap(log_density)(x))
    exact = jax.vmap(jax.grad(log_density))
    wrong = lambda x, t: 0.7 * exact(x) + jnp.sin(x)  # noqa: E731
    return t, level, of, x, weights, lambda x, t: exact(x), wrong


def test_denoising_and_explicit_differ_by_their_constant(on_a_line):
    """For the exact score and for a wrong one; by quadrature over x_0 and eps, or over x_t."""
    t, level, (weights, means, variance), x, density, exact, wrong = on_a_line
    nodes, of_node = np.polynomial.hermite_e.hermegauss(60)
    of_node = of_node / of_node.sum()
    k, i, j = np.meshgrid(np.arange(3), np.arange(60), np.arange(60), indexing="ij")
    probability = np.asarray(weights)[k] * of_node[i] * of_node[j]
    x_0 = np.asarray(means)[k, 0] + np.sqrt(variance) * nodes[i]
    eps = jnp.asarray(nodes[j].reshape(-1, 1), jnp.float32)
    x_0 = jnp.asarray(x_0.reshape(-1, 1), jnp.float32)
    constant = 1 / level.sigma**2 - float((density * exact(x, t)[:, 0] ** 2).sum())
    for s in (exact, wrong):
        paid = score.denoising(SCHEDULE, s, x_0, jnp.asarray(t), eps, weight=jnp.ones_like)
        of_fisher = score.explicit(s, exact, x, jnp.asarray(t))
        np.testing.assert_allclose(
            (probability.ravel() * paid).sum(), (density * of_fisher).sum() + constant, rtol=1e-3
        )


def test_implicit_and_sliced_are_explicit_up_to_one_constant(on_a_line):
    t, _, _, x, density, exact, wrong = on_a_line
    mean = lambda values: float((density * values).sum())  # noqa: E731
    constant = mean(exact(x, t)[:, 0] ** 2)
    times = jnp.full(len(x), t)
    for s in (exact, wrong):
        expected = mean(score.explicit(s, exact, x, times)) - constant
        assert mean(score.implicit(s, x, times)) == pytest.approx(expected, abs=2e-3)
        signs = jnp.where(jnp.arange(len(x)) % 3 == 0, -1.0, 1.0)[:, None]
        # In one dimension any sign gives the divergence itself.
        assert mean(score.sliced(s, x, times, signs)) == pytest.approx(expected, abs=2e-3)


def test_slices_average_to_the_divergence():
    of = mixture(3, jnp.float32)
    found = score.of(SCHEDULE, closed_form(SCHEDULE, of))
    x, t = jnp.asarray([[0.3, -0.2, 0.8]]), jnp.asarray([30])
    all_signs = jnp.asarray(np.stack(np.meshgrid(*[[-1.0, 1.0]] * 3), -1).reshape(8, 3))
    each = score.sliced(found, jnp.repeat(x, 8, 0), jnp.repeat(t, 8), all_signs)
    np.testing.assert_allclose(each.mean(), score.implicit(found, x, t)[0], rtol=1e-4)
