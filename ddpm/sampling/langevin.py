"""Langevin dynamics: sampling by the score alone (Song & Ermon 2019), and MCMC as a corrector.

x <- x + h score(x) + sqrt(2 h) z has p as its stationary distribution for small h, if score is
grad log p. On N(0, v) it is N(0, v / (1 - h / (2 v))), which says what a step of size h costs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.predictions import Denoiser, Prediction, predict, to_score
from ddpm.diffusion.process import Noise, StepInfo, StepResult
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import LANGEVIN
from ddpm.diffusion.times import whole_number
from ddpm.sampling import mcmc
from ddpm.sampling.mcmc import Kernel, langevin_step
from ddpm.sampling.sample import sample_chain
from ddpm.sampling.samplers import Sampler, ancestral

LogDensity = Callable[[jax.Array, jax.Array], jax.Array]


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
    whole_number("steps_per_level", steps_per_level)
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
    snr: float | jax.Array = 0.16,
    kernel: Kernel | None = None,
    log_density: LogDensity | None = None,
    steps: int | None = None,
) -> Sampler:
    """Returns a sampler of Langevin steps at t, then a step of the predictor (Song et al. 2021,
    Algorithms 3 and 5); with a kernel, of MCMC steps at t (Du et al. 2023).

    h = 2 (snr sigma_t)^2. The authors have |z| / |score| in the place of sigma_t, norms over the
    batch: the same where the predicted eps is of norm |z|, but a sample would depend on its batch.
    (Their factor 1 - beta_t, within 0.98 and 1, is left out.)

    With a kernel every chain is accepted on its own; `Chain.reports` are the mean acceptances [N,
    B], of each step of the chain and each example. The last noise level is corrected too, and the
    step from there to t = 0 is the predictor's alone: let that level's noise be small (t = 1), or
    end the times there.

        tuned = ddpm.langevin.tune(key, schedule, denoiser, (64, 2), ddpm.mcmc.mala, log_density)
        sampler = ddpm.predictor_corrector(
            kernel=ddpm.mcmc.mala, log_density=log_density, snr=tuned.snr, corrector_steps=10
        )

    Args:
      predictor: `ancestral()` if left out.
      snr: one number or, with a kernel, one for each step of the chain, [N], as `tune` finds.
      kernel: `mcmc.ula`, `mcmc.mala` or `mcmc.hmc()`.
      log_density: log q(x_t) for the kernel, (x_t [B, ...], t [B]) -> [B], up to a function of t.
      steps: the predictor's own if left out.

    Raises ValueError unless corrector_steps >= 1 and 0 < snr < 1 (with a kernel, snr > 0), or for
    only one of kernel and log_density.
    """
    predictor = predictor or ancestral()
    whole_number("corrector_steps", corrector_steps)
    if (kernel is None) != (log_density is None):
        raise ValueError("a kernel goes with a log_density, and a log_density with a kernel")
    if kernel is None and not 0 < snr < 1:
        raise ValueError(f"snr = {snr}: must be in (0, 1)")
    if kernel is not None and not _positive(snr):
        raise ValueError(f"snr = {snr}: must be > 0")

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        if kernel is None or log_density is None:
            h = 2 * snr**2 * schedule.at(step_info.t).sigma_squared
            x_t, _ = _moved(schedule, denoiser, x_t, step_info.t, noise, corrector_steps, h)
            found = predictor.step(schedule, denoiser, x_t, step_info, noise, memory)
            return found._replace(evaluations=found.evaluations + corrector_steps)
        ratio = jnp.asarray(snr, jnp.float32)
        if ratio.ndim and ratio.shape != (len(step_info.times) - 1,):
            raise ValueError(
                f"snr is of shape {ratio.shape}: must be a number, or one for each of the "
                f"{len(step_info.times) - 1} steps of the chain"
            )
        ratio = ratio[step_info.number] if ratio.ndim else ratio
        at_t = level_target(log_density, step_info.t)
        chains = mcmc.run(
            kernel,
            at_t,
            _keys(noise),
            x_t,
            step_size=2 * (ratio * schedule.at(step_info.t).sigma) ** 2,
            steps=corrector_steps,
        )
        found = predictor.step(schedule, denoiser, chains.state.x, step_info, noise, memory)
        return found._replace(report=chains.acceptance)

    steps = predictor.steps if steps is None else steps
    return predictor._replace(step=step, steps=steps, draws_noise=True)


class Tuned(NamedTuple):
    """The snr that a corrector needs at each of the N steps of a chain, and the acceptance that it
    had there, the mean over the pilot chains: [N]."""

    snr: jax.Array
    acceptance: jax.Array


def tune(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    kernel: Kernel,
    log_density: LogDensity,
    *,
    predictor: Sampler | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    x_t: jax.Array | None = None,
    aim: float = 0.574,
    burn_in: int = 100,
) -> Tuned:
    """Finds the snr of `predictor_corrector` with a kernel by pilot chains: it adapts at each noise
    level until proposals are accepted with probability `aim`.

    The step sizes of the chains drawn afterwards are then constants, so that every step keeps its
    density exactly, and a sample depends on nothing but its key.

    Args:
      shape: of the pilot chains, [B, ...]; some tens are enough.
      predictor, times, x_t: as `predictor_corrector` and `sample` will be given them.
      aim: 0.574 is best for MALA in many dimensions, 0.65 for HMC.
      burn_in: steps at each level, the second half of which measures the acceptance.
    """
    predictor = predictor or ancestral()
    steps = whole_number("burn_in", burn_in, 2) // 2

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        relative, inner = memory
        unit = schedule.at(step_info.t).sigma_squared
        at_t = level_target(log_density, step_info.t)
        chains = mcmc.run(
            kernel,
            at_t,
            _keys(noise),
            x_t,
            step_size=relative * unit,
            steps=0,
            burn_in=burn_in - steps,
            aim=aim,
        )
        # The chains' own sizes differ by chance: their geometric mean is what all will have.
        relative = jnp.exp(jnp.log(chains.step_size / unit).mean())
        measured = mcmc.run(
            kernel,
            at_t,
            jax.vmap(jax.random.fold_in, (0, None))(_keys(noise), burn_in),
            chains.state.x,
            step_size=relative * unit,
            steps=steps,
        )
        found = predictor.step(schedule, denoiser, measured.state.x, step_info, noise, inner)
        tuned = Tuned(jnp.sqrt(relative / 2), measured.acceptance.mean())
        return found._replace(memory=(relative, found.memory), report=tuned)

    def memory(x: jax.Array) -> Any:
        return jnp.asarray(2 * 0.16**2, x.dtype), predictor.memory(x)

    pilot = predictor._replace(step=step, memory=memory, draws_noise=True)
    chain = sample_chain(
        key, schedule, denoiser, shape, sampler=pilot, times=times, x_t=x_t, snapshots=0
    )
    tuned: Tuned = chain.reports
    return tuned


def level_target(log_density: LogDensity, t: jax.Array) -> mcmc.Target:
    """Returns the target of MCMC at one time t: x -> log q_t(x) and its gradient."""
    return mcmc.target(lambda x: log_density(x, jnp.broadcast_to(t, x.shape[:1])))


def _keys(noise: Noise) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(noise.keys, LANGEVIN)


def _positive(snr: float | jax.Array) -> bool:
    """Returns False where some is not above 0; True under tracing, where nobody knows."""
    return isinstance(snr, jax.core.Tracer) or bool((np.asarray(snr) > 0).all())


def _moved(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_t: jax.Array,
    t: jax.Array,
    noise: Noise,
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
