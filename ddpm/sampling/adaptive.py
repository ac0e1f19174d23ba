"""The probability flow by an adaptive solver, as a sampler."""

from typing import Any

import jax
import jax.numpy as jnp

from ddpm.diffusion import flow
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.process import Noise, StepInfo, StepResult
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling.samplers import Sampler


def probability_flow(tolerance: float = 1e-4, *, steps: int = 1) -> Sampler:
    """Solves the probability-flow ODE to a tolerance between the times of the chain, from T to 1;
    at t = 0 it returns the x_0 predicted at t = 1.

    The solver takes as many steps as the hardest sample of a batch needs, so a sample depends on
    its batch, to the tolerance. `flow.transport` goes the other way. Samples are NaN where the
    tolerance was not reached.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance = {tolerance}: must be in (0, 1)")

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        del noise
        end = jnp.maximum(step_info.s, 1)

        def solve() -> tuple[jax.Array, jax.Array]:
            found = flow.transport(schedule, denoiser, x_t, step_info.t, end, tolerance=tolerance)
            return found.x, jnp.asarray(found.evaluations, jnp.int32)

        none = jnp.zeros((), jnp.int32)
        x_s, evaluations = jax.lax.cond(step_info.t == end, lambda: (x_t, none), solve)
        prediction = predict(denoiser, x_s, end)
        x_s = jnp.where(step_info.s == 0, prediction.x_0, x_s)
        return StepResult(x_s, prediction, memory, evaluations + 1)

    return Sampler(
        step,
        steps,
        label=f"tolerance{tolerance:g}",
        needs_signal=True,
        whole_times=False,
        adaptive=True,
    )
