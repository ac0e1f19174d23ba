"""Denoising diffusion probabilistic models in JAX: the mathematics as pure functions.

schedule = ddpm.schedules.linear(1000)
x_t = ddpm.q_sample(schedule, x_0, t, eps)
"""

from ddpm.diffusion import (
    continuous,
    flow,
    gaussian,
    likelihood,
    losses,
    predictions,
    schedules,
    timesteps,
    variances,
    weights,
)
from ddpm.diffusion.gaussian import Gaussian, fixed_large, fixed_small, q_posterior, q_sample
from ddpm.diffusion.keys import sample_keys
from ddpm.diffusion.predictions import Denoiser, Prediction, clipped, denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.models.unet import UNet
from ddpm.sampling.sample import Chain, sample, sample_chain
from ddpm.sampling.samplers import Sampler, ancestral, ddim

__all__ = [
    "Chain",
    "Denoiser",
    "Gaussian",
    "NoiseSchedule",
    "Prediction",
    "Sampler",
    "UNet",
    "ancestral",
    "clipped",
    "continuous",
    "ddim",
    "denoiser",
    "fixed_large",
    "fixed_small",
    "flow",
    "gaussian",
    "likelihood",
    "losses",
    "predictions",
    "q_posterior",
    "q_sample",
    "sample",
    "sample_chain",
    "sample_keys",
    "schedules",
    "timesteps",
    "variances",
    "weights",
]
