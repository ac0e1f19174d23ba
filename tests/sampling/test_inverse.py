"""Posteriors of linear inverse problems on Gaussian data, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from ddpm.sampling import inverse

SCHEDULE = ddpm.schedules.linear(1000)
TIMES = ddpm.grids.log_snr(SCHEDULE, 20)
MEAN = np.array([0.3, -0.2, 0.1, 0.0])
COVARIANCE = 0.4 * 0.7 ** np.abs(np.subtract.outer(range(4), range(4)))
OPERATORS = {  # [4, 2]: y = x @ A
    "inpainting": np.eye(4)[:, [0, 3]],
    "average pooling": np.array([[0.5, 0], [0.5, 0], [0, 0.5], [0, 0.5]]),
}
STD = 0.2


def log_q(x_t, t):
    """log q(x_t) of data N(MEAN, COVARIANCE)."""
    level = SCHEDULE.at(t)
    values, vectors = (jnp.float32(z) for z in np.linalg.eigh(COVARIANCE))
    spread = level.alpha[:, None] ** 2 * values + level.sigma_squared[:, None]
    away = (x_t - level.alpha[:, None] * jnp.float32(MEAN)) @ vectors
    return -0.5 * (away**2 / spread).sum(-1)


@jax.jit
def drawn(key, matrix, y):
    """3000 samples of the posterior by MALA, and their acceptance."""
    denoiser = ddpm.energy.composition.of_log_density(SCHEDULE, log_q)

    def of(n):
        said = inverse.log_likelihood(
            SCHEDULE, lambda x: x @ matrix, jnp.broadcast_to(y, (n, 2)), STD
        )
        guided = ddpm.classifier_guided(SCHEDULE, denoiser, said, 1.0)
        return guided, lambda x_t, t: log_q(x_t, t) + said(x_t, t)

    n, how = 3000, {"times": TIMES}
    guided, posterior = of(64)
    tuned = ddpm.langevin.tune(
        jax.random.fold_in(key, n),
        SCHEDULE,
        guided,
        (64, 4),
        ddpm.mcmc.mala,
        posterior,
        predictor=ddpm.ddim(),
        **how,
    )
    guided, posterior = of(n)
    sampler = ddpm.predictor_corrector(
        ddpm.ddim(),
        corrector_steps=15,
        kernel=ddpm.mcmc.mala,
        log_density=posterior,
        snr=tuned.snr,
    )
    chain = ddpm.sample_chain(key, SCHEDULE, guided, (n, 4), sampler=sampler, snapshots=0, **how)
    return chain.x_0, chain.reports


@pytest.mark.parametrize("name", OPERATORS)
def test_samples_are_of_the_posterior(name):
    matrix, y = OPERATORS[name], np.array([0.9, -0.6])
    x, acceptance = drawn(jax.random.key(0), jnp.float32(matrix), jnp.float32(y))
    x = np.asarray(x, np.float64)
    covariance = np.linalg.inv(np.linalg.inv(COVARIANCE) + matrix @ matrix.T / STD**2)
    mean = covariance @ (np.linalg.solve(COVARIANCE, MEAN) + matrix @ y / STD**2)
    error = np.sqrt(np.diag(covariance) / len(x))
    assert (np.abs(x.mean(axis=0) - mean) < 4.5 * error).all()
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    np.testing.assert_allclose(np.cov(x.T) / scale, covariance / scale, atol=0.1)
    assert 0.4 < acceptance.mean() < 0.8


def test_at_the_data_it_is_the_likelihood():
    y = jnp.zeros((3, 2))
    said = inverse.log_likelihood(SCHEDULE, lambda x: x[:, :2], y, STD)
    x = jnp.arange(12.0).reshape(3, 4) / 10
    expected = -0.5 * np.asarray((x[:, :2] ** 2).sum(-1)) / STD**2
    np.testing.assert_allclose(said(x, jnp.zeros(3, jnp.int32)), expected, rtol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="std = 0"):
        inverse.log_likelihood(SCHEDULE, lambda x: x, jnp.zeros((1, 2)), 0)
    said = inverse.log_likelihood(SCHEDULE, lambda x: x[:, :1], jnp.zeros((2, 2)), 0.1)
    with pytest.raises(ValueError, match="shapes must be equal"):
        said(jnp.zeros((2, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match="leaves no signal"):
        inverse.log_likelihood(ddpm.schedules.jsd(5), lambda x: x, jnp.zeros((1, 2)), 0.1)
