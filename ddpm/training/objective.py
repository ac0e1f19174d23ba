"""What is trained: how t is drawn, how the network is read, and the loss."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ddpm.diffusion import losses, timesteps
from ddpm.diffusion.continuous import Levels, MonotoneLogSNR
from ddpm.diffusion.predictions import Denoiser, Network, denoiser
from ddpm.diffusion.schedules import NoiseSchedule

Draw = Callable[[Any, jax.Array, int], tuple[jax.Array, jax.Array | None]]
Loss = Callable[[Denoiser, jax.Array, jax.Array, jax.Array], jax.Array]


LEARNED_SCHEDULE = "log_snr"  # its parameters' place beside the network's, in one tree


class Objective(NamedTuple):
    """Pure functions, handed to `make_train_step`.

    denoiser(network) reads the network. draw(history, key, batch_size) gives t [B] and the factors
    of the losses in their mean, or None. loss(denoiser, x_0, t, eps) is [B]. `history` is what
    `draw` goes by at first: a `timesteps.LossHistory`, kept in the training's state, or ().
    For a schedule that is learned, `begin` is where it begins, and at(levels) the objective at the
    times of a batch, drawn in 0..1.
    """

    denoiser: Callable[[Network], Denoiser]
    draw: Draw
    loss: Loss
    history: Any = ()
    begin: MonotoneLogSNR | None = None
    at: "Callable[[Levels], Objective] | None" = None

    def schedule_parameters(self) -> dict[str, Any]:
        """What training adds to the network's parameters: those of a learned schedule, or {}."""
        return {} if self.begin is None else {LEARNED_SCHEDULE: self.begin._asdict()}


def simple(schedule: NoiseSchedule) -> Objective:
    """Algorithm 1: L_simple of a network that predicts eps, at uniform t."""
    return Objective(
        denoiser=lambda network: denoiser(schedule, network),
        draw=lambda history, key, n: (timesteps.uniform(schedule, key, n), None),
        loss=functools.partial(losses.simple, schedule),
    )
