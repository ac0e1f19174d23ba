"""Energies distilled from a trained denoiser: the log-densities that MCMC on compositions needs.

A network that predicts eps has scores, which are nobody's gradient exactly, and no density. An
energy network, a scalar log q(x_t) of its own weights, is fitted to the denoiser's scores instead
of to noise (Thornton et al. 2025): the targets have no variance, so that it takes fewer steps than
training by `losses.simple`, of the same minimum.

    def log_density(params):
        return lambda x_t, t: -model.apply(params, x_t, t)  # [B]

    loss = lambda params: distill.loss(schedule, log_density(params), denoiser, x_0, t, eps).mean()
"""

import jax

from ddpm.diffusion.gaussian import per_example_mean, q_sample, same_shape
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.energy.composition import of_log_density
from ddpm.sampling.langevin import LogDensity


def loss(
    schedule: NoiseSchedule,
    log_density: LogDensity,
    denoiser: Denoiser,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
) -> jax.Array:
    """Returns sigma_t^2 |grad log q(x_t) - score(x_t)|^2, [B], the mean over dimensions: the error
    of eps, squared, against that of the denoiser, which is not trained.

    Its mean is that of `losses.simple` less a constant where the denoiser is exact: the loss is 0
    for the exact log-density, and for whatever differs from it by a function of t.

    Args:
      log_density: (x_t [B, ...], t [B]) -> [B], of the weights that are trained.
      denoiser: the teacher.
      x_0, t, eps: as of `losses`: [B, ...], [B] and [B, ...].
    """
    x_t = q_sample(schedule, x_0, t, eps)
    found = predict(of_log_density(schedule, log_density), x_t, t).eps
    taught = jax.lax.stop_gradient(predict(denoiser, x_t, t).eps)
    same_shape(found=found, taught=taught)
    return per_example_mean((found - taught) ** 2)
