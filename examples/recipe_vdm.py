"""VDM (Kingma et al. 2021) on one page, as plain calls: what configs/cifar10_vdm.py builds.

The schedule is learned with the network, which is a function (x_t [B, H, W, C], 25 (20 - log-SNR)
[B]) -> eps of x_t's shape; x_0 is 8-bit data in [-1, 1], k/127.5 - 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

import ddpm
from ddpm import continuous, streams

Network = Callable[[jax.Array, jax.Array], jax.Array]

begin = continuous.init_learned(13.3, -5.0)  # parameters of the schedule, before training


def denoiser(schedule: Any, network: Network) -> ddpm.Denoiser:
    """Reads the output as eps, the network conditioned on the log-SNR."""
    seen = ddpm.predictions.conditioned_on_log_snr(schedule, network)
    return ddpm.denoiser(schedule, seen)


def loss(
    network: Network, parameters: continuous.MonotoneLogSNR, x_0: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the bound in bits/dim, [B] each: its steps in continuous time, and L_T + L_0.

    Gradients that also lower the variance of the first are `continuous.learned_gradients`.
    """
    schedule = continuous.learned(parameters)
    u = ddpm.timesteps.low_discrepancy(streams.draw(key, streams.TIMES), len(x_0))
    t = ddpm.timesteps.within(schedule, u)
    eps = jax.random.normal(streams.draw(key, streams.NOISE), x_0.shape)
    denoise = denoiser(schedule, network)
    steps = ddpm.losses.continuous_bound(schedule, denoise, x_0, t, eps)
    return steps, ddpm.losses.ends_of_bound(schedule, x_0, eps)


def sample(
    network: Network,
    parameters: continuous.MonotoneLogSNR,
    key: jax.Array,
    shape: Sequence[int],
    steps: int = 1000,
) -> jax.Array:
    """Draws x_0 by ancestral steps with the smaller variance, x_0 clipped at each."""
    schedule = continuous.table(continuous.learned(parameters), steps)
    variance = ddpm.variances.wide_decoder(ddpm.fixed_small)
    clipped = ddpm.clipped(schedule, denoiser(schedule, network))
    return ddpm.sample(key, schedule, clipped, shape, sampler=ddpm.ancestral(variance))
