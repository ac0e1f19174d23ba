"""Densities by their energies: log q_t(x) = -E(x, t) / sigma_t + c(t).

    energy = lambda x, t: model.apply({"params": params}, x, t, method="energy")
    denoiser = ddpm.denoiser(schedule, ddpm.energy.density.gradient(energy))
    log_q = ddpm.energy.density.log_density(schedule, energy)
    log_q(x, t) - log_q(y, t)  # nats: the constant is gone

An **energy** is a function (x [B, ...], t [B]) -> [B] whose gradient by x is eps. As eps = -sigma_t
grad log q_t (Ho et al. 2020, Section 3.2), grad E = -sigma_t grad log q_t, and the integral is the
line above. The constant c(t) is no number that such an energy has learned: compare log_density at
one time alone.
"""

from collections.abc import Callable

import jax

from ddpm.diffusion.predictions import Network
from ddpm.diffusion.schedules import Schedule
from ddpm.diffusion.times import as_times

Energy = Callable[[jax.Array, jax.Array], jax.Array]


def gradient(energy: Energy) -> Network:
    """Returns the network (x [B, ...], t [B]) -> grad E by x, that predicts eps."""

    def network(x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.grad(lambda x: energy(x, t).sum())(x)

    return network


def log_density(schedule: Schedule, energy: Energy) -> Energy:
    """Returns (x_t [B, ...], t [B]) -> -E / sigma_t [B], log q_t(x_t) in nats but for a constant of
    t; not defined at t = 0, where sigma_t = 0: ValueError."""

    def log_q(x_t: jax.Array, t: jax.Array) -> jax.Array:
        t = as_times(schedule.ends, t, noisy=True)
        return -energy(x_t, t) / schedule.at(t).sigma

    return log_q
