"""Closed-form denoisers that the codec takes as it takes a network: a function and parameters."""

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddpm import Prediction
from ddpm.diffusion.gaussian import expand_like
from ddpm.diffusion.pixels import to_float, to_uint8


def _gaussian(parameters, x_t, t):
    schedule, eigenvalues = parameters
    alpha, sigma = (expand_like(x, x_t) for x in (schedule.at(t).alpha, schedule.at(t).sigma))
    centred = x_t / (alpha**2 * eigenvalues + sigma**2)
    return Prediction(alpha * eigenvalues * centred, sigma * centred)


def gaussian(schedule, eigenvalues):
    """E[x_0 | x_t] for x_0 ~ N(0, diag(eigenvalues)); one for all dimensions, or one for each."""
    return Partial(_gaussian, (schedule, jnp.asarray(eigenvalues, jnp.float32)))


def pixels(shape, seed=0, sigma=0.2):
    """Independent 8-bit pixels of about N(0, sigma^2), scaled."""
    x = np.random.default_rng(seed).normal(0, sigma, shape)
    return to_float(to_uint8(x))
