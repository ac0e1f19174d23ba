"""MCMC: detailed balance by numbers, known densities, and what each chain draws on its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.diffusion.streams import sample_keys
from ddpm.sampling import mcmc


def bimodal(x):
    """log p of two normal densities, up to a constant."""
    x = x.sum(axis=range(1, x.ndim))
    return jnp.logaddexp(-0.5 * (x - 1.5) ** 2 / 0.4, jnp.log(0.5) - 0.5 * (x + 1.0) ** 2 / 0.6)


@functools.cache
def of_bimodal():
    """Mean and variance, by quadrature."""
    x = np.linspace(-12, 12, 20001)
    p = np.exp(np.asarray(bimodal(jnp.asarray(x)[:, None]), np.float64))
    p /= p.sum()
    mean = (p * x).sum()
    return mean, (p * (x - mean) ** 2).sum()


def keys(n, seed=0):
    return sample_keys(jax.random.key(seed), np.arange(n))


def test_langevin_proposals_keep_detailed_balance():
    """p(x) q(x' | x) min(1, r) = p(x') q(x | x') min(1, 1 / r) at all pairs of a grid, q written
    out here: a ratio with 2 h^2 for 4 h fails."""
    h, target = 0.3, mcmc.target(bimodal)
    x = jnp.linspace(-4, 4, 41)
    a, b = (z.reshape(-1, 1) for z in jnp.meshgrid(x, x))
    states = mcmc.at(target, a), mcmc.at(target, b)

    def flow(of, to):
        log_p = np.asarray(of.log_density, np.float64)
        away = np.asarray(to.x - of.x - h * of.gradient, np.float64)[:, 0]
        ratio = np.asarray(mcmc.log_ratio(of, to, jnp.asarray(h)), np.float64)
        return log_p - away**2 / (4 * h) + np.minimum(ratio, 0)

    np.testing.assert_allclose(flow(*states), flow(*states[::-1]), atol=1e-3)


def test_leapfrog_leads_back_and_keeps_volume():
    target = mcmc.target(lambda x: -0.25 * (x**4).sum(-1) - (x[:, 0] * x[:, 1]))
    x, momentum = jnp.asarray([[0.3, -0.7]]), jnp.asarray([[0.5, 0.2]])

    def moved(x, momentum):
        state, turned = mcmc.leapfrog(target, mcmc.at(target, x), momentum, jnp.asarray(0.02), 7)
        return state.x, turned

    there = moved(x, momentum)
    back = moved(there[0], -there[1])
    np.testing.assert_allclose(back[0], x, atol=1e-5)
    np.testing.assert_allclose(-back[1], momentum, atol=1e-5)
    both = lambda z: jnp.concatenate(moved(z[None, :2], z[None, 2:]), -1)[0]  # noqa: E731
    jacobian = jax.jacfwd(both)(jnp.concatenate([x[0], momentum[0]]))
    assert float(jnp.linalg.det(jacobian)) == pytest.approx(1, abs=1e-4)


def variance_of(kernel, *, step_size, steps, density=bimodal, n=16_000, **options):
    found = jax.jit(
        lambda keys, x: mcmc.run(
            kernel, mcmc.target(density), keys, x, step_size=step_size, steps=steps, **options
        )
    )(keys(n), jnp.zeros((n, 1)))
    return float(found.state.x.mean()), float(found.state.x.var()), found


@pytest.mark.parametrize(
    ("kernel", "step_size"), [(mcmc.mala, 0.4), (mcmc.hmc(4), 0.1)], ids=["mala", "hmc"]
)
def test_adjusted_chains_have_the_moments_of_the_density(kernel, step_size):
    """The variance is right to 2 %, though both accept only a part; the mean of 16,000 chains is
    within four standard errors."""
    mean, variance, found = variance_of(kernel, step_size=step_size, steps=70)
    expected_mean, expected = of_bimodal()
    error = np.sqrt(expected / 16_000)
    assert abs(mean - expected_mean) < 4 * error
    assert abs(variance / expected - 1) < 0.02
    assert 0.5 < float(found.acceptance.mean()) < 0.99


def test_unadjusted_langevin_is_wrong_as_its_docstring_says():
    v, h = 1.0, 0.6
    normal = lambda x: -0.5 * (x**2).sum(-1) / v  # noqa: E731
    _, variance, found = variance_of(mcmc.ula, step_size=h, steps=30, density=normal)
    assert variance == pytest.approx(v / (1 - h / (2 * v)), rel=0.02)
    assert (found.acceptance == 1).all()
    _, adjusted, _ = variance_of(mcmc.mala, step_size=h, steps=30, density=normal)
    assert adjusted == pytest.approx(v, rel=0.02)


def test_each_chain_adapts_and_draws_on_its_own():
    """To the acceptance aimed at, on densities of widths apart by ten; alike in any batch."""
    widths = jnp.asarray([0.1, 1.0, 0.1, 1.0])

    def density(widths):
        return lambda x: -0.5 * (x**2).sum((1, 2)) / widths**2

    def adapted(which):
        found = mcmc.run(
            mcmc.mala,
            mcmc.target(density(widths[which])),
            keys(4, seed=3)[which],
            jnp.zeros((4, 3, 2))[which] + 0.01,
            step_size=0.05,
            steps=300,
            burn_in=500,
        )
        return found

    whole = adapted(jnp.arange(4))
    assert np.abs(whole.acceptance - 0.574).max() < 0.12
    ratio = whole.step_size[1] / whole.step_size[0]
    assert 40 < float(ratio) < 250  # of squares, as a step size is
    part = adapted(jnp.asarray([2, 1]))
    np.testing.assert_allclose(
        part.state.x, whole.state.x[jnp.asarray([2, 1])], rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(whole.state.x[0], whole.state.x[2])


def test_what_is_not_finite_is_never_accepted():
    """A density that is zero beyond a wall, from where no gradient leads back."""
    walled = lambda x: jnp.where(x[:, 0] < 0.5, -0.5 * x[:, 0] ** 2, jnp.nan)  # noqa: E731
    for kernel in (mcmc.mala, mcmc.hmc(3)):
        _, _, found = variance_of(kernel, step_size=0.5, steps=50, density=walled, n=200)
        assert (found.state.x < 0.5).all()
        assert np.isfinite(found.state.log_density).all()
        assert np.isfinite(found.acceptance).all()
    with pytest.raises(ValueError, match="leapfrogs = 0"):
        mcmc.hmc(0)
