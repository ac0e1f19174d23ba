"""Densities by their energies: closed forms of Gaussian data, and what samplers make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ddpm
from ddpm.build.sampler import SAMPLERS
from ddpm.config import default
from ddpm.energy import density
from tests.exact import Process, close

BETAS = np.linspace(1e-3, 0.3, 20)
EXACT, SCHEDULE = Process(BETAS), ddpm.schedules.from_betas(BETAS)
MEAN, STD = 0.3, 0.4


def gaussian(x, t):
    """The energy of x_0 ~ N(0.3, 0.4^2 I): sigma_t |x - alpha_t 0.3|^2 / (2 v_t)."""
    level = SCHEDULE.at(t)
    variance = level.alpha**2 * STD**2 + level.sigma**2
    return level.sigma * ((x - level.alpha[:, None] * MEAN) ** 2).sum(-1) / (2 * variance)


def test_gradient_and_log_density_of_gaussian_data():
    rng = np.random.default_rng(0)
    t = np.repeat(np.arange(1, 21), 2)
    x = rng.normal(size=(len(t), 3))
    mean, variance = EXACT.alpha[t] * MEAN, EXACT.alpha[t] ** 2 * STD**2 + EXACT.variance[t]
    eps = jax.jit(density.gradient(gaussian))(np.float32(x), t)
    close(eps, (EXACT.sigma[t] / variance)[:, None] * (x - mean[:, None]), rtol=1e-4, atol=1e-5)

    log_q = np.asarray(jax.jit(density.log_density(SCHEDULE, gaussian))(np.float32(x), t))
    exact = stats.norm.logpdf(x, mean[:, None], np.sqrt(variance)[:, None]).sum(-1)
    close(log_q[::2] - log_q[1::2], exact[::2] - exact[1::2], rtol=1e-3, atol=1e-3)


def test_there_is_no_density_of_the_data_itself():
    with pytest.raises(ValueError, match=r"t = 0: must be in 1\.\.20"):
        density.log_density(SCHEDULE, gaussian)(jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32))


def test_every_sampler_takes_an_energy():
    """And draws from the Gaussian that it is the energy of, in one program for all."""
    s, n = default().sampling, 512
    s.langevin_steps = 20
    denoiser = ddpm.denoiser(SCHEDULE, density.gradient(gaussian))

    @jax.jit
    def draw(key):
        samplers = {name: part.make(s, ddpm.fixed_small) for name, part in SAMPLERS.items()}
        return {
            name: ddpm.sample(key, SCHEDULE, denoiser, (n, 3), sampler=sampler)
            for name, sampler in samplers.items()
        }

    for name, x in draw(jax.random.key(1)).items():
        # Of 1536 numbers, and twenty steps: variance 'fixed_small' alone costs 0.07.
        assert abs(np.mean(x) - MEAN) < 0.05, name
        assert abs(np.std(x) - STD) < 0.1, name
