"""Samplers that call the denoiser once for each step from x_t to x_s, and remember nothing.

A step of an ancestral chain and one of DDIM are one formula; eta = 1 of the second is the first
with fixed-small variance. Solvers of higher order are in `solvers`, Langevin dynamics in
`langevin`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import fixed_large
from ddpm.diffusion.predictions import Denoiser, Prediction, predict
from ddpm.diffusion.process import (
    Noise,
    Step,
    StepInfo,
    StepResult,
    ancestral_draw,
    no_memory,
)
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance

INFINITE_SIGMA = (
    "where sigma/alpha, by which this sampler goes, is infinite: begin below T, with the grid "
    "'log_snr', or take dpm_solver"
)


class Sampler(NamedTuple):
    """A reverse process, step by step, and what it needs.

    step(schedule, denoiser, x_t, step_info, noise, memory) -> StepResult, a pure function.
    steps: how many, evenly spread, where `sample` is not given times; None: T.
    memory: makes what the first step is given, of x_T.
    label: its settings, for the names of files.
    draws_noise: its steps do; else a sample is a function of its x_T.
    needs_signal: it cannot begin where the schedule leaves no signal.
    whole_times: of whole times it calls the denoiser at whole times only.
    uses_variance: its steps have the reverse variance, fixed or learned.
    adaptive: it finds its own steps between the times, and is one step for the whole chain.
    may_increase_t: it can go up in time too.
    """

    step: Step
    steps: int | None = None
    memory: Callable[[jax.Array], Any] = no_memory
    label: str = ""
    draws_noise: bool = False
    needs_signal: bool = False
    whole_times: bool = True
    uses_variance: bool = False
    adaptive: bool = False
    may_increase_t: bool = False


Move = Callable[[NoiseSchedule, Prediction, jax.Array, jax.Array, jax.Array, Noise], jax.Array]


def single_step(move: Move, steps: int | None, **about: Any) -> Sampler:
    """Returns the sampler of move(schedule, prediction, x_t, t, s, noise) -> x_s.

    `about` are other fields of `Sampler`.
    """

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        prediction = predict(denoiser, x_t, step_info.t)
        x_s = move(schedule, prediction, x_t, step_info.t, step_info.s, noise)
        return StepResult(x_s, prediction, memory)

    return Sampler(step, steps, **about)


def ancestral(variance: ReverseVariance = fixed_large, *, steps: int | None = None) -> Sampler:
    """Returns Algorithm 2: x_s ~ N(posterior mean at the predicted x_0, variance); no noise into
    x_0.

    `fixed_large` needs (nearly) all T steps; with few, take `fixed_small`, `analytic` or `ddim`.
    Where the denoiser learns its variance, that is taken in the place of `variance`.
    """

    def move(
        schedule: NoiseSchedule,
        prediction: Prediction,
        x_t: jax.Array,
        t: jax.Array,
        s: jax.Array,
        noise: Noise,
    ) -> jax.Array:
        return ancestral_draw(schedule, prediction, x_t, t, s, noise(), variance)

    label = getattr(variance, "__name__", "")
    return single_step(move, steps, label=label, draws_noise=True, uses_variance=True)


def ddim(eta: float = 0.0, *, steps: int | None = None) -> Sampler:
    """Returns DDIM (Song et al. 2021, Eq. 12), deterministic at eta = 0.

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std z, std^2 = eta^2 beta-tilde.
    Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: must be between 0 (deterministic) and 1 (ancestral)")

    def move(
        schedule: NoiseSchedule,
        prediction: Prediction,
        x_t: jax.Array,
        t: jax.Array,
        s: jax.Array,
        noise: Noise,
    ) -> jax.Array:
        level = schedule.at(s)
        if not eta:  # for s > t too, which inverts the chain
            return level.alpha * prediction.x_0 + level.sigma * prediction.eps
        transition = schedule.between(s, t)
        # sigma_s^2 - std^2 = sigma_s^2 (1 - eta^2 + eta^2 SNR_t/SNR_s)
        kept = jnp.sqrt(1 - eta**2 + eta**2 * jnp.exp(-transition.log_snr_drop))
        mean = level.alpha * prediction.x_0 + level.sigma * kept * prediction.eps
        return mean + eta * jnp.sqrt(transition.posterior_variance) * noise()

    return single_step(move, steps, label=f"eta{eta:g}", draws_noise=eta > 0)


def times(num_steps: int, steps: int | None = None) -> np.ndarray:
    """Returns the times of a chain of `steps` steps from T to 0, evenly spread: int[steps + 1],
    falling.

    Raises ValueError unless 1 <= steps <= T.
    """
    steps = num_steps if steps is None else steps
    check_steps(num_steps, steps)
    return np.round(np.linspace(num_steps, 0, steps + 1)).astype(np.int32)


def check_steps(num_steps: int, steps: int) -> None:
    """Raises ValueError unless 1 <= steps <= T, and whole."""
    if not isinstance(steps, int | np.integer) or not 1 <= steps <= num_steps:
        raise ValueError(
            f"{steps} sampling steps: must be a whole number between 1 and T = {num_steps}"
        )
