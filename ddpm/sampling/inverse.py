"""Linear inverse problems y = A x_0 + noise: masks, blurs, averages of pixels, with a known A.

    said = inverse.log_likelihood(schedule, operator, y, std)  # operator(x_0) is A x_0
    guided = ddpm.classifier_guided(schedule, denoiser, said, 1.0)
    posterior = lambda x_t, t: log_density(x_t, t) + said(x_t, t)
    sampler = ddpm.predictor_corrector(
        ddpm.ddim(), kernel=ddpm.mcmc.mala, log_density=posterior, snr=.., corrector_steps=10
    )
    x_0 = ddpm.sample(key, schedule, guided, shape, sampler=sampler, times=..)

log q_t(x_t) + said(x_t, t) is a path from noise to the posterior p(x_0 | y), which it reaches where
the noise of x_t is small against that of y. On the way it is not the noised posterior, so reverse
diffusion alone does not draw from it: MCMC at each level does, as of a product (see
`ddpm.energy.composition`). With scores alone, without log_density, leave out the kernel: Langevin
steps follow the path up to an error of their step size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm.diffusion.gaussian import expand_like, same_shape
from ddpm.diffusion.schedules import NoiseSchedule, require_signal
from ddpm.sampling.langevin import LogDensity


def log_likelihood(
    schedule: NoiseSchedule,
    operator: Callable[[jax.Array], jax.Array],
    y: jax.Array,
    std: float,
) -> LogDensity:
    """Returns log N(y; A x_t / alpha_t, (std^2 + sigma_t^2 / alpha_t^2) I), up to a function of t:
    (x_t, t) -> [B], in nats; log p(y | x_0) itself at t = 0.

    What noise x_t / alpha_t has is counted as that of y. That would be exact for data that could be
    anything and A with A A^T = I; for others it only chooses the path to the posterior.

    Args:
      operator: a linear function of x [B, ...] to y [B, ...], each example by itself.
      y: what was observed, [B, ...].
      std: the standard deviation of the noise in y, above 0.

    Raises ValueError for a std that is not above 0, for a y not of the shape of what the operator
    gives, and for a schedule without signal at t = T.
    """
    if not std > 0:
        raise ValueError(f"std = {std}: must be above 0, 0.01 say where y has no noise")
    require_signal(schedule, "where x_t tells nothing of y")

    def log_density(x_t: jax.Array, t: jax.Array) -> jax.Array:
        level = schedule.at(t)
        seen = operator(x_t / expand_like(level.alpha, x_t))
        same_shape(y=y, operator_of_x=seen)
        variance = std**2 + jnp.exp(-level.high)
        return -0.5 * ((y - seen) ** 2).sum(axis=range(1, y.ndim)) / variance

    return log_density
