"""DDPM (Ho, Jain & Abbeel 2020) on one page, as plain calls: what configs/cifar10.py builds.

A network is a function (x_t [B, H, W, C], t [B]) -> eps of x_t's shape, such as
`lambda x, t: model.apply({"params": params}, x, t)`; x_0 is data in [-1, 1], k/127.5 - 1.
"""

from collections.abc import Callable, Sequence

import jax

import ddpm
from ddpm import streams

Network = Callable[[jax.Array, jax.Array], jax.Array]

schedule = ddpm.schedules.linear(1000, 1e-4, 0.02)  # Section 4
model = ddpm.UNet(  # Appendix B: 35.7 million parameters
    out_channels=3,
    channels=128,
    channel_multipliers=(1, 2, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(16,),
    dropout=0.1,
)


def denoiser(network: Network) -> ddpm.Denoiser:
    """Reads the network's output as eps (Section 3.2)."""
    return ddpm.denoiser(schedule, network)


def loss(network: Network, x_0: jax.Array, key: jax.Array) -> jax.Array:
    """Returns L_simple at t and eps drawn from the key, [B]: Algorithm 1."""
    t = ddpm.timesteps.uniform(schedule, streams.draw(key, streams.TIMES), len(x_0))
    eps = jax.random.normal(streams.draw(key, streams.NOISE), x_0.shape)
    return ddpm.losses.simple(schedule, denoiser(network), x_0, t, eps)


def sample(network: Network, key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Draws x_0 in T steps, x_0 clipped at each: Algorithm 2 with the larger variance."""
    clipped = ddpm.clipped(schedule, denoiser(network))
    return ddpm.sample(key, schedule, clipped, shape, sampler=ddpm.ancestral(ddpm.fixed_large))
