"""Config -> sampler and its times, the names of `experiment` that have to do with sampling."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance
from ddpm.errors import InputError
from ddpm.objectives import LEARNED, variance_name
from ddpm.sampling import grids, langevin, samplers, solvers
from ddpm.sampling.adaptive import probability_flow
from ddpm.sampling.sample import check_times
from ddpm.sampling.samplers import Sampler

SAMPLERS: dict[str, Callable[[Any, ReverseVariance], Sampler]] = {
    "ancestral": lambda s, variance: samplers.ancestral(variance),
    "ddim": lambda s, variance: samplers.ddim(s.eta),
    "euler": lambda s, variance: solvers.euler(),
    "dpm_solver": lambda s, variance: solvers.dpm_solver(s.order, stochastic=s.stochastic),
    "unipc": lambda s, variance: solvers.unipc(s.order),
    "heun": lambda s, variance: solvers.heun(
        churn=s.churn,
        churn_range=tuple(s.churn_range) or (0.0, math.inf),
        churn_noise=s.churn_noise,
    ),
    "probability_flow": lambda s, variance: probability_flow(s.tolerance),
    "langevin": lambda s, variance: langevin.annealed_langevin(
        s.langevin_steps, step_size=s.langevin_step_size
    ),
}
GRIDS: dict[str, Callable[[Any, NoiseSchedule, int], np.ndarray]] = {
    "uniform": lambda s, *of: grids.uniform(*of),
    "leading": lambda s, *of: grids.leading(*of),
    "trailing": lambda s, *of: grids.trailing(*of),
    "linspace": lambda s, *of: grids.linspace(*of),
    "quadratic": lambda s, *of: grids.quadratic(*of),
    "log_snr": lambda s, *of: grids.log_snr(*of, sigma_max=s.sigma_max or None),
    "karras": lambda s, *of: grids.karras(*of, rho=s.rho, sigma_max=s.sigma_max or None),
}


def sampler(config: ConfigDict, variance: ReverseVariance) -> Sampler:
    """The sampler by its name, of its settings; with Langevin steps before each, if asked."""
    s = config.sampling
    plain = SAMPLERS[s.sampler](s, variance)
    if not s.corrector_steps:
        return plain
    return langevin.predictor_corrector(
        plain, corrector_steps=s.corrector_steps, snr=s.corrector_snr
    )


def draws_noise(config: ConfigDict) -> bool:
    """Whether the sampler's steps do; else a sample is a function of its x_T."""
    s = config.sampling
    drawn = {"ancestral": 1, "ddim": s.eta, "dpm_solver": s.stochastic, "heun": s.churn,
             "langevin": 1}  # fmt: skip
    return bool(drawn.get(s.sampler) or s.corrector_steps)


def times(config: ConfigDict, schedule: NoiseSchedule) -> np.ndarray:
    """What the sampler visits, [N + 1]; InputError for what cannot be."""
    s, last = config.sampling, schedule.num_steps
    adaptive = s.sampler == "probability_flow"  # finds its own steps
    try:
        if s.times:
            return check_times(s.times, last)
        return GRIDS[s.grid](s, schedule, s.steps or (1 if adaptive else last))
    except ValueError as error:
        raise InputError(f"config.sampling: {error}") from error


def check_sampling(config: ConfigDict, schedule: NoiseSchedule) -> None:
    """InputError, with the reason, for a sampler that this model and its schedule cannot have."""
    s, visited = config.sampling, times(config, schedule)
    dark, whole = schedule.ends_without_signal(), np.issubdtype(visited.dtype, np.integer)
    from_the_dark = dark and visited[0] == schedule.num_steps
    fractional = not whole or s.sampler == "probability_flow" or (s.sampler == "heun" and s.churn)
    learned, skips = config.diffusion.variance, not whole or bool((np.diff(visited) != -1).any())
    for holds, key, why in (
        (
            learned == "learned" and s.sampler == "ancestral" and skips,
            "times" if s.times else "steps" if 0 < s.steps < schedule.num_steps else "grid",
            "config.diffusion.variance = 'learned' is that of single steps from t to t - 1: take "
            "all T, config.sampling.steps = 0 with grid 'uniform', or sampler 'ddim', or train "
            "with 'learned_range'",
        ),
        (
            learned in LEARNED and s.variance == "analytic",
            "variance",
            f"the model has learned its own, config.diffusion.variance = {learned!r}, which "
            "samples and the bound take: leave it at 'fixed_large'",
        ),
        (
            s.sampler in ("euler", "heun", "langevin") and from_the_dark,
            "sampler",
            "it goes by sigma/alpha, infinite at t = T of this schedule: begin below, with "
            "sampling.grid = 'log_snr', or take 'dpm_solver'",
        ),
        (
            s.sampler == "probability_flow" and dark,
            "sampler",
            "the schedule leaves no signal at t = T, so its flow has no end in log-SNR: take "
            "'dpm_solver'",
        ),
        (
            s.classifier_scale and dark,
            "classifier_scale",
            "the schedule leaves no signal at t = T, of which a classifier has nothing to say",
        ),
        (
            fractional and config.diffusion.prediction == "posterior_mean",
            "grid" if not whole else "sampler",
            "config.diffusion.prediction = 'posterior_mean' is of the step from t to t - 1, and "
            "this asks between whole times",
        ),
    ):
        if holds:
            raise InputError(f"config.sampling.{key} = {s[key]!r}: {why}")


def sampler_name(config: ConfigDict, schedule: NoiseSchedule) -> str:
    """For the names of files: the sampler and all of its settings that matter."""
    s = config.sampling
    adaptive = s.sampler == "probability_flow"
    steps = s.steps or (0 if adaptive else schedule.num_steps)
    of: dict[str, list[str]] = {
        "ancestral": [variance_name(config)],
        "ddim": [f"eta{s.eta:g}"],
        "dpm_solver": [f"order{s.order}", *(["stochastic"] if s.stochastic else [])],
        "unipc": [f"order{s.order}"],
        "heun": [f"churn{s.churn:g}"] if s.churn else [],
        "probability_flow": [f"tolerance{s.tolerance:g}"],
        "langevin": [f"{s.langevin_steps}x{s.langevin_step_size:g}"],
    }
    if s.sampler == "heun" and s.churn:
        of["heun"] += [f"noise{s.churn_noise:g}", *(f"{end:g}" for end in s.churn_range)]
    parts = [f"{s.sampler}{steps or ''}", *of.get(s.sampler, [])]
    if s.times:
        digest = hashlib.sha256(repr([float(t) for t in s.times]).encode()).hexdigest()
        parts[0] = f"{s.sampler}{len(s.times) - 1}"
        parts.append(f"times{digest[:8]}")
    elif s.grid not in ("uniform", "trailing"):
        parts.append(s.grid)
        if s.grid in ("log_snr", "karras"):
            parts[-1] += f"{s.sigma_max:g}" + (f"rho{s.rho:g}" if s.grid == "karras" else "")
    if s.corrector_steps:
        parts.append(f"corrected{s.corrector_steps}x{s.corrector_snr:g}")
    return "_".join(parts)
