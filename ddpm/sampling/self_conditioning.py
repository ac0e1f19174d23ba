"""Sampling by a network that sees its own estimate of x_0 (Chen et al. 2023, Algorithm 2)."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm.diffusion.network_inputs import SelfConditioned
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.process import Noise, StepInfo, StepResult
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling.samplers import Sampler


def self_conditioning(sampler: Sampler) -> Sampler:
    """Returns the sampler that gives each step's network the x_0 predicted at the step before.

    So the network is called as often as without estimates. The first estimate is zeros, none. For a
    `SelfConditioned` denoiser: another, or one wrapped anew, raises TypeError. Not for
    `probability_flow`, whose step is the whole chain.
    """

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        if not isinstance(denoiser, SelfConditioned):
            raise TypeError(f"self_conditioning is for a SelfConditioned denoiser, not {denoiser}")
        estimate, inner = memory
        found = sampler.step(
            schedule, denoiser.from_estimate(estimate), x_t, step_info, noise, inner
        )
        return found._replace(memory=(found.prediction.x_0, found.memory))

    def memory(x: jax.Array) -> Any:
        return jnp.zeros_like(x), sampler.memory(x)

    return sampler._replace(step=step, memory=memory)
