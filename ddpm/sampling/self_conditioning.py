"""Sampling by a network that sees its own guess of x_0 (Chen et al. 2023, Algorithm 2)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm.diffusion.conditioning import SelfConditioned
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling.samplers import Noise, Sampler, Stepped, Stride


def self_conditioning(sampler: Sampler) -> Sampler:
    """The sampler with the x_0 predicted at its last step as the guess at all of this one.

    So the network is called as often as without guesses. At first the guess is zeros, none. For a
    `SelfConditioned` denoiser: another, or one wrapped anew, raises TypeError. Not for
    `probability_flow`, whose step is the whole chain.
    """

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        stride: Stride,
        noise: Noise,
        memory: Any,
    ) -> Stepped:
        if not isinstance(denoiser, SelfConditioned):
            raise TypeError(f"self_conditioning is for a SelfConditioned denoiser, not {denoiser}")
        guess, inner = memory
        found = sampler.step(schedule, denoiser.with_guess(guess), x_t, stride, noise, inner)
        return found._replace(memory=(found.prediction.x_0, found.memory))

    def memory(x: jax.Array) -> Any:
        return jnp.zeros_like(x), sampler.memory(x)

    return sampler._replace(step=step, memory=memory)
