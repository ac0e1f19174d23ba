"""EDM (Karras et al. 2022) on one page, as plain calls: what configs/cifar10_edm.py builds.

The network is a function F(x [B, H, W, C], log(sigma) / 4 [B]) of x's shape; x_0 is data in [-1, 1]
of standard deviation 0.5. Noise levels sigma are sigma_t / alpha_t of a table of 1000.
"""

from collections.abc import Callable, Sequence

import jax

import ddpm
from ddpm import streams

Network = Callable[[jax.Array, jax.Array], jax.Array]

SIGMA_DATA = 0.5
schedule = ddpm.continuous.table(ddpm.continuous.edm(0.002, 80.0, rho=7.0), 1000)  # Eq. 5


def denoiser(network: Network) -> ddpm.Denoiser:
    """Preconditions the network: x_0 = c_skip x + c_out F(c_in x, c_noise) (Eq. 7)."""
    return ddpm.predictions.preconditioned(schedule, network, sigma_data=SIGMA_DATA)


def loss(network: Network, x_0: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the weighted squared error of x_0, [B], at log sigma ~ N(-1.2, 1.2^2)."""
    t = ddpm.timesteps.log_normal(
        schedule, streams.draw(key, streams.TIMES), len(x_0), mean=-1.2, std=1.2
    )
    eps = jax.random.normal(streams.draw(key, streams.NOISE), x_0.shape)
    weighted = ddpm.losses.weighted(ddpm.loss_weights.edm(SIGMA_DATA))
    return ddpm.losses.regression(schedule, denoiser(network), x_0, t, eps, weighted)


def sample(network: Network, key: jax.Array, shape: Sequence[int], steps: int = 18) -> jax.Array:
    """Draws x_0 by Heun's method in 2 steps - 1 calls of the network (Algorithm 1)."""
    times = ddpm.grids.karras(schedule, steps, rho=7.0, sigma_max=80.0)
    return ddpm.sample(key, schedule, denoiser(network), shape, sampler=ddpm.heun(), times=times)
