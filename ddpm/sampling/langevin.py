"""Langevin dynamics: sampling by the score alone (Song & Ermon 2019), and as a corrector.

x <- x + h score(x) + sqrt(2 h) z has p as its stationary distribution for small h, if score is
grad log p. On N(0, v) it is N(0, v / (1 - h / (2 v))), which says what a step of size h costs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import same_shape
from ddpm.diffusion.predictions import Denoiser, Prediction, predict, to_score
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

    At each time the Langevin steps, of size h = step_size sigma_t^2; then y = x_t/alpha_t is
    carried to the next level; into t = 0 the predicted x_0 goes, the denoising step of Song & Ermon
    (2020). Levels should be near: all of `schedules.geometric`, or `grids.log_snr`.

    In y, with s_i = sigma_t/alpha_t, a step is y <- y + a_i score(y) + sqrt(2 a_i) z with
    a_i = step_size s_i^2: the same chain, with step_size = epsilon/s_1^2 for the epsilon of Song &
    Ermon (2020, Algorithm 1), and half of that for those of 2019, who move by a_i/2 and sqrt(a_i).
    `ncsn.langevin_step_size` chooses it.

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
        t, s = step_info.t, step_info.s
        h = step_size * schedule.at(t).sigma_squared
        x_t, found = _moved(schedule, denoiser, x_t, t, noise, steps_per_level, h)
        into_data = s == 0  # where the denoiser is asked once more, of x_t as it now is
        prediction = jax.lax.cond(
            into_data, lambda x: predict(denoiser, x, t), lambda x: found, x_t
        )
        carried = x_t * (schedule.at(s).alpha / schedule.at(t).alpha)
        x_s = jnp.where(into_data, prediction.x_0, carried)
        return StepResult(x_s, prediction, memory, steps_per_level + jnp.int32(into_data))

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
        h = 2 * snr**2 * schedule.at(step_info.t).sigma_squared
        x_t, _ = _moved(schedule, denoiser, x_t, step_info.t, noise, corrector_steps, h)
        found = predictor.step(schedule, denoiser, x_t, step_info, noise, memory)
        return found._replace(evaluations=found.evaluations + corrector_steps)

    steps = predictor.steps if steps is None else steps
    return predictor._replace(step=step, steps=steps, draws_noise=True)


def _moved(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_t: jax.Array,
    t: jax.Array,
    noise: Callable[[Any], jax.Array],
    steps: int,
    step_size: jax.Array,
) -> tuple[jax.Array, Prediction]:
    """Returns x_t after `steps` Langevin steps, all at t, and the prediction that the last one
    went by."""
    times = jnp.broadcast_to(t, x_t.shape[:1])

    def move(k: jax.Array, now: tuple[jax.Array, Prediction]) -> tuple[jax.Array, Prediction]:
        x, _ = now
        found = predict(denoiser, x, times)
        score = to_score(schedule, times, found)
        return langevin_step(score, x, step_size, noise(LANGEVIN + k)), found

    shapes = jax.eval_shape(lambda x: predict(denoiser, x, times), x_t)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    moved: tuple[jax.Array, Prediction] = jax.lax.fori_loop(0, steps, move, (x_t, none))
    return moved
