"""Improved DDPM (Nichol & Dhariwal 2021) on one page: what configs/cifar10_iddpm.py builds.

The network puts out eps and, in as many more channels, a place between the two fixed variances. It
is a function (x_t [B, H, W, C], t [B]) -> [B, H, W, 2 C]; x_0 is data in [-1, 1], k/127.5 - 1.
"""

from collections.abc import Callable, Sequence

import jax

import ddpm
from ddpm import streams

Network = Callable[[jax.Array, jax.Array], jax.Array]

schedule = ddpm.schedules.cosine(4000)  # Eq. 17
model = ddpm.UNet(
    out_channels=6,
    channels=128,
    channel_multipliers=(1, 2, 2, 2),
    num_res_blocks=3,
    attention_resolutions=(16, 8),
    head_channels=64,
    dropout=0.3,
    scale_shift=True,
    norm_epsilon=1e-5,
    symmetric_downsampling=True,
    cosines_first=True,
    frequency_shift=0,
)


def denoiser(network: Network) -> ddpm.Denoiser:
    """Reads the output as eps and the range of the variance (Eq. 15)."""
    return ddpm.denoiser(schedule, network, learned=ddpm.variances.learned_range)


def loss(network: Network, x_0: jax.Array, key: jax.Array) -> jax.Array:
    """Returns L_hybrid, [B]: L_simple for the mean, the bound for the variance (Eq. 16)."""
    t = ddpm.timesteps.uniform(schedule, streams.draw(key, streams.TIMES), len(x_0))
    eps = jax.random.normal(streams.draw(key, streams.NOISE), x_0.shape)
    return ddpm.losses.hybrid(schedule, denoiser(network), x_0, t, eps)


def sample(network: Network, key: jax.Array, shape: Sequence[int], steps: int = 4000) -> jax.Array:
    """Draws x_0 in that many steps, evenly spread (Section 4), with the learned variance."""
    clipped = ddpm.clipped(schedule, denoiser(network))
    return ddpm.sample(key, schedule, clipped, shape, sampler=ddpm.ancestral(steps=steps))
