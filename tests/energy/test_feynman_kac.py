"""Feynman-Kac correctors: the weights by the Fokker-Planck equation, and Gaussian products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from ddpm.diffusion.streams import sample_keys
from ddpm.energy import composition, feynman_kac
from tests.energy.test_composition import example


def test_weights_make_up_for_what_the_sde_lacks():
    """d log pi / d tau less the SDE's Fokker-Planck operator is beta / 2 (|s|^2 - sum a_i |s_i|^2)
    up to a constant in x; by automatic differentiation, in constant noise beta = 1."""
    module = example()
    parts = module.PAIRS["mixture x Gaussian"]

    def log_q(part, x, tau):
        """Noised by the SDE dx = -x dt / 2 + dW for a time 2 - tau."""
        alpha_bar = jnp.exp(tau - 2)
        variance = alpha_bar * part.covariances + (1 - alpha_bar) * np.eye(2)
        away = x - jnp.sqrt(alpha_bar) * part.means
        inverse = jnp.linalg.inv(variance)
        logs = jnp.einsum("kd,kde,ke->k", away, inverse, away, precision="highest")
        logs = -0.5 * (logs + jnp.log(jnp.linalg.det(variance)))
        return jax.nn.logsumexp(logs + jnp.log(part.weights))

    def log_pi(x, tau, a):
        return sum(a[i] * log_q(part, x, tau) for i, part in enumerate(parts))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    @functools.partial(jax.vmap, in_axes=(0, None))
    def lacks(x, a):
        tau = 1.5
        score, hessian = jax.grad(log_pi)(x, tau, a), jax.hessian(log_pi)(x, tau, a)
        laplacian = jnp.trace(hessian)
        # -div(drift pi) / pi + laplacian(pi) / (2 pi), drift = x / 2 + score
        sde = -(1 + laplacian) - (x / 2 + score) @ score + (laplacian + score @ score) / 2
        scores = [jax.grad(log_q, 1)(part, x, tau)[None] for part in parts]
        rate = feynman_kac.weight_rate(scores, [a[0], a[1]])[0]
        return jax.grad(log_pi, 1)(x, tau, a) - sde, rate

    x = jnp.float32(np.random.default_rng(0).normal(size=(20, 2)))
    lacking, rate = lacks(x, jnp.float32([[1.0, 1.0], [3.0, -2.0], [1.7, 0.4]]))
    constant = lacking - rate
    np.testing.assert_allclose(constant, constant[:, :1].repeat(20, 1), rtol=2e-3, atol=5e-3)
    assert (np.std(rate, axis=1) > 0.5).all()


@pytest.mark.parametrize(("exponents", "churn"), [((1.0, 1.0), 0.0), ((2.0, -1.0), 4.0)])
def test_gaussian_products_have_their_moments(exponents, churn):
    """Two Gaussians apart: product, guidance and powers, all in closed form; with churn, which
    needs fewer weights, the same."""
    schedule = ddpm.schedules.linear(1000)
    means, variances = (0.5, -0.5), (0.3, 0.8)
    times, n = ddpm.grids.log_snr(schedule, 150, sigma_max=None), 2000

    def part(mean, variance):
        def log_density(x_t, t):
            level = schedule.at(t)
            spread = level.alpha**2 * variance + level.sigma_squared
            return -0.5 * (x_t[:, 0] - level.alpha * mean) ** 2 / spread

        return composition.of_log_density(schedule, log_density)

    parts = [part(m, v) for m, v in zip(means, variances, strict=True)]
    population = jax.jit(
        lambda key: feynman_kac.sample(
            key, schedule, parts, exponents, (n, 1), times=times, churn=churn
        )
    )(jax.random.key(0))
    precision = sum(a / v for a, v in zip(exponents, variances, strict=True))
    mean = sum(a * m / v for a, m, v in zip(exponents, means, variances, strict=True)) / precision
    x = np.asarray(population.x_0, np.float64)[:, 0]
    assert abs(x.mean() - mean) < 0.15 / np.sqrt(precision)
    assert abs(x.var() * precision - 1) < 0.15
    sizes = np.asarray(population.effective_sizes)
    assert sizes.shape == (150,)
    assert ((sizes > 1) & (sizes < n * 1.001)).all()
    assert sizes.min() < (0.9 if churn else 0.6) * n  # weights matter here
    assert len(np.unique(x)) > n / 2


def test_systematic_resampling_is_proportional():
    weights = np.array([0.5, 0.03, 0.0, 0.27, 0.2] * 8)
    logs = jnp.log(jnp.float32(weights))
    expected = len(weights) * weights / weights.sum()
    keys = sample_keys(jax.random.key(0), np.arange(400))
    chosen = jax.vmap(lambda key: feynman_kac.resampled(key, logs))(keys)
    counts = np.stack([np.bincount(c, minlength=len(weights)) for c in np.asarray(chosen)])
    assert (np.abs(counts - expected) < 1 + 1e-4).all()
    np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.1)
    assert float(feynman_kac.effective_size(jnp.zeros(7))) == pytest.approx(7)
    assert float(feynman_kac.effective_size(jnp.asarray([0.0, -100.0]))) == pytest.approx(1)


def test_what_cannot_be_is_refused():
    schedule = ddpm.schedules.linear(10)
    part = lambda x, t: ddpm.Prediction(x, x)  # noqa: E731
    draw = lambda a, **options: feynman_kac.sample(  # noqa: E731
        jax.random.key(0), schedule, [part, part], a, (4, 1), **options
    )
    with pytest.raises(ValueError, match="the exponents' sum is -1"):
        draw([1.0, -2.0])
    with pytest.raises(ValueError, match="3 numbers for 2 denoisers"):
        draw([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="churn = -1"):
        draw([1.0, 1.0], churn=-1)
    with pytest.raises(ValueError, match="threshold = 2"):
        draw([1.0, 1.0], threshold=2)
