"""Compositions against closed forms, and the products of the example against exact draws."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from ddpm.energy import composition
from tests.exact import close, gaussian_denoiser, mixture_denoiser, pair, per_example

T = 30
SCHEDULE, EXACT = pair("cosine", T)
TIMES = jnp.arange(1, T + 1)
X_T = jnp.float32(np.random.default_rng(0).normal(size=(T, 2)))


def example():
    """The module examples/composition.py."""
    path = Path(__file__).parents[2] / "examples" / "composition.py"
    spec = importlib.util.spec_from_file_location("example_composition", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def log_gaussian(mean, variance):
    """log q(x_t), normalised, of data N(mean, variance) in every dimension."""

    def log_density(x_t, t):
        alpha, sigma = (per_example(jnp.float32(a)[t], x_t) for a in (EXACT.alpha, EXACT.sigma))
        spread = alpha**2 * variance + sigma**2
        logs = (x_t - alpha * jnp.float32(mean)) ** 2 / spread + jnp.log(2 * jnp.pi * spread)
        return -0.5 * logs.sum(-1)

    return log_density


def at_all_times(denoiser):
    return jax.jit(denoiser)(X_T, TIMES)


def same(found, expected, **tolerance):
    for a, b in zip(at_all_times(found)[:2], at_all_times(expected)[:2], strict=True):
        close(a, b, **tolerance)


MEANS, VARIANCE = np.array([[-0.7, 0.1], [0.5, 0.6]]), 0.05
PARTS = [gaussian_denoiser(EXACT, jnp.float32(m), VARIANCE) for m in MEANS]
LOGS = [log_gaussian(m, VARIANCE) for m in MEANS]


def test_guidance_is_a_product_with_exponents_w_and_1_minus_w():
    for w in (0.0, 1.0, 3.0, -1.5, jnp.linspace(-2, 5, T)):
        guided = ddpm.classifier_free(SCHEDULE, *PARTS, w)
        same(composition.product(SCHEDULE, PARTS, [w, 1 - w]), guided, rtol=1e-5, atol=1e-5)


def test_the_score_of_a_product_is_that_of_its_log_density():
    for exponents in (None, [1.0, -0.5], [0.3, 2.0]):
        by_scores = composition.product(SCHEDULE, PARTS, exponents)
        log_density = composition.log_product(LOGS, exponents)
        by_density = composition.of_log_density(SCHEDULE, log_density)
        same(by_scores, by_density, rtol=2e-4, atol=2e-4)
        found = at_all_times(by_scores)
        alpha, sigma = (np.float32(a)[1:, None] for a in (EXACT.alpha, EXACT.sigma))
        # Far from 0 where alpha is small: x_0 is then a number of that size.
        scale = 1 + np.abs(alpha * found.x_0) + np.abs(sigma * found.eps)
        assert (np.abs(alpha * found.x_0 + sigma * found.eps - X_T) / scale).max() < 3e-6


def test_a_negated_gaussian_is_a_gaussian():
    """N(0, v)_t / N(0, w)_t^g has the precision 1/v_t - g/w_t."""
    v, w, g = 0.2, 0.9, 0.6
    both = [gaussian_denoiser(EXACT, 0.0, u) for u in (v, w)]
    eps = at_all_times(composition.product(SCHEDULE, both, [1.0, -g])).eps
    v_t, w_t = (EXACT.alpha_bar[1:] * u + EXACT.variance[1:] for u in (v, w))
    precision = 1 / v_t - g / w_t
    close(eps, (EXACT.sigma[1:] * precision)[:, None] * X_T, rtol=1e-4, atol=1e-5)


def test_a_noised_mixture_is_the_mixture_of_the_noised():
    weights = np.array([0.2, 0.8])
    mixed = composition.mixture(SCHEDULE, LOGS, list(weights * 5))  # whatever their sum
    same(mixed, mixture_denoiser(EXACT, weights, MEANS, VARIANCE), rtol=2e-3, atol=2e-4)


def test_a_chain_of_a_product_starts_with_its_variance():
    x = composition.start(jax.random.key(0), SCHEDULE, (4000, 3), [1.5, 1.0])
    close(np.var(x), 1 / 2.5, rtol=4 * np.sqrt(2 / x.size))
    keys = ddpm.sample_keys(jax.random.key(0), [7, 9])
    close(composition.start(keys, SCHEDULE, (2, 3), [1.5, 1.0]), x[np.array([7, 9])], rtol=1e-6)
    each = composition.start(keys, SCHEDULE, (2, 3), [jnp.asarray([1.0, 4.0]), 0.0])
    close(each[1] * 2 / x[9], np.sqrt(2.5), rtol=1e-5)


def test_without_signal_exponents_of_sum_1_leave_x_0_finite():
    schedule = ddpm.schedules.jsd(5)
    part = lambda v: lambda x, t: ddpm.predictions.from_v(schedule, x, t, v + 0 * x)  # noqa: E731
    whole = composition.product(schedule, [part(0.3), part(-0.2)], [2.0, -1.0])
    assert np.isfinite(jax.jit(whole)(jnp.ones((1, 2)), jnp.array([5])).x_0).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: composition.product(SCHEDULE, PARTS, [1.0]), "1 numbers for 2 denoisers"),
        (lambda: composition.product(SCHEDULE, []), "0 numbers for 0 denoisers"),
        (lambda: composition.log_mixture(LOGS, [1, 2, 3]), "3 numbers for 2 log-densities"),
        (
            lambda: composition.start(jax.random.key(0), SCHEDULE, (2, 1), [1.0, -1.0]),
            "the exponents' sum is 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_mcmc_makes_products_right_where_reverse_diffusion_is_wrong(monkeypatch):
    """A short version of the example: fewer samples, levels and steps."""
    module, n, key = example(), 1000, jax.random.key(1)
    monkeypatch.setattr(module, "TESTED", n)
    monkeypatch.setattr(module, "EXACT", 20_000)
    monkeypatch.setattr(module, "PILOT", 30)
    monkeypatch.setattr(module, "LEVELS", ddpm.grids.log_snr(module.schedule, 20, sigma_max=None))
    for (title, parts), kernel in zip(
        module.PAIRS.items(), (ddpm.mcmc.mala, ddpm.mcmc.hmc(4)), strict=True
    ):
        truth = module.product(*parts)
        right = jax.jit(lambda key: module.corrected(kernel, 10)(key, parts, n))(key)  # noqa: B023
        found = module.judge(right.x_0, truth, 0)
        assert abs(found.excess) < 0.1, title  # of a standard error of 0.03
        assert found.p_value > 0.01, title
        assert 0.4 < right.kept < 0.8
        denoiser = composition.product(module.schedule, module.denoisers(parts))
        start = composition.start(key, module.schedule, (n, 2), [1, 1])
        wrong = jax.jit(
            lambda x_t: ddpm.sample(
                key,
                module.schedule,
                denoiser,  # noqa: B023
                (n, 2),
                sampler=ddpm.ddim(steps=100),
                x_t=x_t,
            )
        )(start)
        assert module.judge(wrong, truth, 0).p_value < 0.01, title
