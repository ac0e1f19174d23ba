"""Training losses, one value per example: whoever trains takes the mean."""

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import q_sample, same_shape
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule


def simple(
    schedule: NoiseSchedule, denoiser: Denoiser, x_0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """L_simple (Eq. 14): |eps - eps_hat(x_t, t)|^2, the mean over dimensions.

    Args:
      x_0: the data [B, ...]. t: int[B] in 1..T, or one for all.
      eps: standard normal noise in the shape of x_0.

    Returns:
      float32[B], not reduced.
    """
    x_t = q_sample(schedule, x_0, t, eps)
    predicted = denoiser(x_t, jnp.broadcast_to(t, x_0.shape[:1])).eps
    same_shape(eps=eps, predicted=predicted)
    return per_example_mean((eps - predicted) ** 2)


def per_example_mean(x: jax.Array) -> jax.Array:
    """The mean over all axes but the first, in float32: [B, ...] -> [B]."""
    return jnp.mean(x, axis=range(1, x.ndim), dtype=jnp.float32)
