"""Denoising diffusion probabilistic models in JAX: the mathematics as pure functions.

schedule = ddpm.schedules.linear(1000)
x_t = ddpm.q_sample(schedule, x_0, t, eps)

model = ddpm.load("runs/digits")
ddpm.show(model.sample(jax.random.key(0), 16))
"""

import importlib
from typing import TYPE_CHECKING, Any

from ddpm import energy
from ddpm.diffusion import (
    continuous,
    flow,
    gaussian,
    likelihood,
    loss_weights,
    losses,
    ncsn,
    predictions,
    process,
    schedules,
    score,
    streams,
    timesteps,
    variances,
)
from ddpm.diffusion.analytic import analytic, second_moments
from ddpm.diffusion.gaussian import (
    Gaussian,
    fixed_large,
    fixed_small,
    q_posterior,
    q_sample,
    q_step,
)
from ddpm.diffusion.predictions import Denoiser, Prediction, clipped, denoiser, thresholded
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import sample_keys
from ddpm.models.dit import DiT
from ddpm.models.energy import EnergyNetwork
from ddpm.models.unet import UNet
from ddpm.sampling import editing, grids, guidance, inverse, langevin, mcmc
from ddpm.sampling.adaptive import probability_flow
from ddpm.sampling.guidance import classifier_free, classifier_guided
from ddpm.sampling.langevin import annealed_langevin, predictor_corrector
from ddpm.sampling.sample import Chain, sample, sample_chain
from ddpm.sampling.samplers import Sampler, ancestral, ddim
from ddpm.sampling.solvers import dpm_solver, euler, heun, unipc
from ddpm.version import __version__

if TYPE_CHECKING:
    from ddpm import codec
    from ddpm.files.pictures import show
    from ddpm.modes.notebook import load

__all__ = [
    "Chain",
    "Denoiser",
    "DiT",
    "EnergyNetwork",
    "Gaussian",
    "NoiseSchedule",
    "Prediction",
    "Sampler",
    "UNet",
    "__version__",
    "analytic",
    "ancestral",
    "annealed_langevin",
    "classifier_free",
    "classifier_guided",
    "clipped",
    "codec",
    "continuous",
    "ddim",
    "denoiser",
    "dpm_solver",
    "editing",
    "energy",
    "euler",
    "fixed_large",
    "fixed_small",
    "flow",
    "gaussian",
    "grids",
    "guidance",
    "heun",
    "inverse",
    "langevin",
    "likelihood",
    "load",
    "loss_weights",
    "losses",
    "mcmc",
    "ncsn",
    "predictions",
    "predictor_corrector",
    "probability_flow",
    "process",
    "q_posterior",
    "q_sample",
    "q_step",
    "sample",
    "sample_chain",
    "sample_keys",
    "schedules",
    "score",
    "second_moments",
    "show",
    "streams",
    "thresholded",
    "timesteps",
    "unipc",
    "variances",
]

# Imported when they are used: they need Orbax and others, which take longer than all of the above.
_LATE = {"codec": "ddpm.codec", "load": "ddpm.modes.notebook", "show": "ddpm.files.pictures"}


def __getattr__(name: str) -> Any:
    """Returns a public name that is imported late."""
    if name not in _LATE:
        raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
    module = importlib.import_module(_LATE[name])
    found = globals()[name] = getattr(module, name, module)
    return found


def __dir__() -> list[str]:
    """Lists the public names, those that are imported late too."""
    return sorted({*globals(), *__all__})
