"""Langevin dynamics: sampling by the score alone (Song & Ermon 2019), and as a corrector.

x <- x + h score(x) + sqrt(2 h) z has p as its stationary distribution for small h, if score is
grad log p. On N(0, v) it is N(0, v / (1 - h / (2 v))), which says what a step of size h costs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import same_shape
from ddpm.diffusion.predictions import Denoiser, predict, to_score
from ddpm.diffusion.process import Noise, StepInfo, StepResult
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import LANGEVIN
from ddpm.sampling.samplers import Sampler, ancestral


def langevin_step(
    score: jax.Array, x: jax.Array, step_size: jax.typing.ArrayLike, noise: jax.Array
) -> jax.Array:
    """Returns x + h score + sqrt(2 h) noise, the unadjusted Langevin algorithm."""
    same_shape(score=score, x=x, noise=noise)
    return x + step_size * score + jnp.sqrt(2 * step_size) * noise


def annealed_langevin(
    steps_per_level: int = 5, *, step_size: float = 0.2, steps: int | None = None
) -> Sampler:
    """Returns annealed Langevin dynamics (Song & Ermon 2019, Algorithm 1), one noise level a step.

    At each time the Langevin steps, of size h = step_size sigma_t^2; then x/alpha is carried to the
    next level; into t = 0 the predicted x_0 goes. Levels should be near: take `grids.log_snr`.

    Raises ValueError unless steps_per_level >= 1 and 0 < step_size < 2, beyond which x grows.
    """
    if steps_per_level < 1:
        raise ValueError(f"steps_per_level = {steps_per_level}: must be a whole number >= 1")
    if not 0 < step_size < 2:
        raise ValueError(f"step_size = {step_size}: must be in (0, 2)")

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        x_t = _corrected(schedule, denoiser, x_t, step_info.t, noise, steps_per_level, step_size)
        prediction = predict(denoiser, x_t, step_info.t)
        carried = x_t * (schedule.at(step_info.s).alpha / schedule.at(step_info.t).alpha)
        x_s = jnp.where(step_info.s == 0, prediction.x_0, carried)
        # The last prediction is asked for by t = 0 alone, and by whoever looks on.
        return StepResult(x_s, prediction, memory, steps_per_level + 1)

    label = f"{steps_per_level}x{step_size:g}"
    return Sampler(step, steps, label=label, draws_noise=True, needs_signal=True)


def predictor_corrector(
    predictor: Sampler | None = None,
    *,
    corrector_steps: int = 1,
    snr: float = 0.16,
    steps: int | None = None,
) -> Sampler:
    """Returns a sampler of Langevin steps at t, then a step of the predictor (Song et al. 2021,
    Algorithms 3 and 5).

    h = 2 (snr sigma_t)^2. The authors have |z| / |score| in the place of sigma_t, norms over the
    batch: the same where the predicted eps is of norm |z|, but a sample would depend on its batch.
    (Their factor 1 - beta_t, within 0.98 and 1, is left out.)

    Args:
      predictor: `ancestral()` if left out.
      steps: the predictor's own if left out.

    Raises ValueError unless corrector_steps >= 1 and 0 < snr < 1.
    """
    predictor = predictor or ancestral()
    if corrector_steps < 1:
        raise ValueError(f"corrector_steps = {corrector_steps}: must be a whole number >= 1")
    if not 0 < snr < 1:
        raise ValueError(f"snr = {snr}: must be in (0, 1)")

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        x_t = _corrected(schedule, denoiser, x_t, step_info.t, noise, corrector_steps, 2 * snr**2)
        found = predictor.step(schedule, denoiser, x_t, step_info, noise, memory)
        return found._replace(evaluations=found.evaluations + corrector_steps)

    steps = predictor.steps if steps is None else steps
    return predictor._replace(step=step, steps=steps, draws_noise=True)


def _corrected(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_t: jax.Array,
    t: jax.Array,
    noise: Callable[[Any], jax.Array],
    steps: int,
    relative: float,
) -> jax.Array:
    """Returns x_t after `steps` Langevin steps of size relative * sigma_t^2, all at t."""
    step_size = relative * schedule.at(t).sigma_squared
    times = jnp.broadcast_to(t, x_t.shape[:1])

    def move(k: jax.Array, x: jax.Array) -> jax.Array:
        score = to_score(schedule, times, predict(denoiser, x, times))
        return langevin_step(score, x, step_size, noise(LANGEVIN + k))

    return jax.lax.fori_loop(0, steps, move, x_t)
