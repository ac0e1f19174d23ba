"""Config -> sampler and the times that it visits, and its name in files."""

import hashlib
import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ddpm.build import parts
from ddpm.build.objective import chosen_parts
from ddpm.build.parts import Part
from ddpm.build.schedule import schedule_facts
from ddpm.build.variance import SAMPLING_VARIANCES
from ddpm.diffusion.gaussian import fixed_large
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance
from ddpm.errors import InputError
from ddpm.sampling import grids, langevin, samplers, solvers
from ddpm.sampling.adaptive import probability_flow
from ddpm.sampling.sample import check_chain, check_times
from ddpm.sampling.samplers import Sampler

# make(config.sampling, variance) -> Sampler, which says itself what it needs
SAMPLERS: dict[str, Part] = {
    "ancestral": Part(lambda s, variance: samplers.ancestral(variance)),
    "ddim": Part(lambda s, variance: samplers.ddim(s.eta)),
    "euler": Part(lambda s, variance: solvers.euler()),
    "dpm_solver": Part(lambda s, variance: solvers.dpm_solver(s.order, stochastic=s.stochastic)),
    "unipc": Part(lambda s, variance: solvers.unipc(s.order)),
    "heun": Part(
        lambda s, variance: solvers.heun(
            churn=s.churn,
            churn_range=tuple(s.churn_range) or (0.0, math.inf),
            churn_noise=s.churn_noise,
        )
    ),
    "probability_flow": Part(lambda s, variance: probability_flow(s.tolerance)),
    "langevin": Part(
        lambda s, variance: langevin.annealed_langevin(
            s.langevin_steps, step_size=s.langevin_step_size
        )
    ),
}
# make(config.sampling, schedule, steps) -> times. Uniform ones go without a label.
GRIDS: dict[str, Part] = {
    "uniform": Part(lambda s, *of: grids.uniform(*of), label=lambda s: ""),
    "leading": Part(lambda s, *of: grids.leading(*of)),
    "trailing": Part(lambda s, *of: grids.trailing(*of), label=lambda s: ""),
    "linspace": Part(lambda s, *of: grids.linspace(*of)),
    "quadratic": Part(lambda s, *of: grids.quadratic(*of)),
    "log_snr": Part(
        lambda s, *of: grids.log_snr(*of, sigma_max=s.sigma_max or None),
        label=lambda s: f"log_snr{s.sigma_max:g}",
    ),
    "karras": Part(
        lambda s, *of: grids.karras(*of, rho=s.rho, sigma_max=s.sigma_max or None),
        label=lambda s: f"karras{s.sigma_max:g}rho{s.rho:g}",
    ),
}
_FLOW = Part(
    facts={parts.FLOW},
    excludes={
        parts.NO_SIGNAL: "the schedule leaves no signal at t = T, so its flow has no end in "
        "log-SNR: leave 'flow' out of config.evaluation.parts"
    },
)
_ENERGY = Part(
    needs={
        parts.DUAL: "the energy is normalised by config.training.loss = 'dual' alone, not "
        "{training_loss}: leave 'energy' out of config.evaluation.parts"
    },
)
_CLASSIFIER = Part(
    excludes={
        parts.NO_SIGNAL: "the schedule leaves no signal at t = T, of which a classifier has "
        "nothing to say"
    }
)


def plain_sampler(config: ConfigDict, variance: ReverseVariance = fixed_large) -> Sampler:
    """Returns the sampler of config.sampling, without corrector steps; InputError for settings
    that it refuses."""
    name = config.sampling.sampler
    try:
        return SAMPLERS[name].make(config.sampling, variance)
    except ValueError as error:
        raise InputError(f"config.sampling.sampler = {name!r}: {error}") from error


def sampler(config: ConfigDict, variance: ReverseVariance = fixed_large) -> Sampler:
    """Returns the sampler of config.sampling; with Langevin steps before each step, if asked."""
    s, plain = config.sampling, plain_sampler(config, variance)
    if not s.corrector_steps:
        return plain
    return langevin.predictor_corrector(
        plain, corrector_steps=s.corrector_steps, snr=s.corrector_snr
    )


def times(config: ConfigDict, schedule: NoiseSchedule) -> np.ndarray:
    """Returns the times that the sampler visits, [N + 1]; InputError for what cannot be."""
    s, last = config.sampling, schedule.num_steps
    most = 1 if plain_sampler(config).adaptive else last
    try:
        if s.times:
            return check_times(s.times, last)
        return GRIDS[s.grid].make(s, schedule, s.steps or most)
    except ValueError as error:
        raise InputError(f"config.sampling: {error}") from error


def check_sampling(config: ConfigDict, schedule: NoiseSchedule) -> None:
    """Raises InputError, with the reason, for a sampler that this model and its schedule cannot
    have."""
    s, visited, chosen = config.sampling, times(config, schedule), sampler(config)
    whole = np.issubdtype(visited.dtype, np.integer)
    skips = not whole or bool((np.diff(visited) != -1).any())
    facts = schedule_facts(config, schedule)
    if chosen.uses_variance and skips:
        few = 0 < s.steps < schedule.num_steps
        facts[parts.SKIPS] = "sampling." + ("times" if s.times else "steps" if few else "grid")
    if not (whole and chosen.whole_times):
        facts[parts.BETWEEN] = "sampling.sampler" if whole else "sampling.grid"
    registries = {
        "sampling.sampler": SAMPLERS,
        "sampling.grid": GRIDS,
        "sampling.variance": SAMPLING_VARIANCES,
    }
    asked = parts.choose(config, registries)
    if s.classifier_scale:
        asked["sampling.classifier_scale"] = s.classifier_scale, _CLASSIFIER
    parts.check(config, chosen_parts(config) | asked, facts)
    try:
        check_chain(schedule, chosen, visited)
    except ValueError as error:
        raise InputError(f"config.sampling.sampler = {s.sampler!r}: {error}") from error


def check_flow(config: ConfigDict, schedule: NoiseSchedule) -> None:
    """Raises InputError for a model that has no probability flow, and so no likelihood by it."""
    chosen = chosen_parts(config) | {"evaluation.parts": ("flow", _FLOW)}
    parts.check(config, chosen, schedule_facts(config, schedule))


def check_energy(config: ConfigDict) -> None:
    """Raises InputError for a model without a normalised energy, or whose energy is conditioned."""
    if config.model.low_resolution:
        raise InputError(
            f"config.model.low_resolution = {config.model.low_resolution}: the energy depends on "
            "the images to enlarge: leave 'energy' out of config.evaluation.parts"
        )
    parts.check(config, chosen_parts(config) | {"evaluation.parts": ("energy", _ENERGY)})


def sampler_name(config: ConfigDict, schedule: NoiseSchedule, variance: ReverseVariance) -> str:
    """Returns the sampler and all of its settings that matter, for the names of files."""
    s, plain = config.sampling, plain_sampler(config, variance)
    steps = s.steps or (0 if plain.adaptive else schedule.num_steps)
    label = GRIDS[s.grid].label
    grid = s.grid if label is None else label(s)
    if s.times:
        digest = hashlib.sha256(repr([float(t) for t in s.times]).encode()).hexdigest()
        steps, grid = len(s.times) - 1, f"times{digest[:8]}"
    corrected = f"corrected{s.corrector_steps}x{s.corrector_snr:g}" if s.corrector_steps else ""
    named = (f"{s.sampler}{steps or ''}", plain.label, grid, corrected)
    return "_".join(filter(None, named))


class _Noting:
    """A section of a config that notes which of its keys are read."""

    def __init__(self, section: ConfigDict) -> None:
        self.section, self.keys = section, []  # type: ignore[var-annotated]

    def __getattr__(self, key: str) -> Any:
        self.keys.append(key)
        return self.section[key]


def settings(
    config: ConfigDict, schedule: NoiseSchedule, variance: ReverseVariance
) -> dict[str, Any]:
    """Returns all settings of config.sampling that its samples depend on, seed and number aside:
    with those that the sampler and its grid read, the number of steps that are taken, and the
    variance that is used."""
    s = config.sampling
    noted, visited = _Noting(s), times(config, schedule)
    plain = SAMPLERS[noted.sampler].make(noted, variance)
    found = {key: s[key] for key in noted.keys}
    if plain.uses_variance:
        found["variance"] = variance.__name__
    if not plain.adaptive:
        found["steps"] = len(visited) - 1
        noted.keys.clear()
        if not noted.times:
            GRIDS[noted.grid].make(noted, schedule, found["steps"])
            noted.keys.remove("times")
        found |= {key: s[key] for key in noted.keys}
    given = (
        (plain.uses_variance and s.variance == "analytic", ("analytic_images",)),
        (s.corrector_steps, ("corrector_steps", "corrector_snr")),
        (True, ("dynamic_threshold" if s.dynamic_threshold else "clip",)),
        (config.model.num_classes or s.classifier_scale, ("label",)),
        (s.guidance_scale != 1, ("guidance_scale", "guidance_interval", "guidance_rescale")),
        (s.classifier_scale, ("classifier_scale",)),
        (config.model.low_resolution, ("low_resolution_images", "low_resolution_noise")),
        (True, ("ema",)),
        (s.ema_relative_std, ("ema_relative_std",)),
    )
    return found | {key: s[key] for matters, keys in given if matters for key in keys}
