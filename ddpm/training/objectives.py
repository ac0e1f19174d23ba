"""Objectives: the loss of a network on data, all that it draws included.

    found = objective.loss(network, x_0, key)       found.mean(), found.losses [B]

A Gaussian diffusion's is a `GaussianObjective`: how t is drawn, what the network's output means,
and a loss of `diffusion.losses`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ddpm.diffusion import continuous, losses, streams, timesteps
from ddpm.diffusion.continuous import Levels, MonotoneLogSNR
from ddpm.diffusion.network_inputs import self_conditioned_by
from ddpm.diffusion.predictions import Denoiser, Network, denoiser, log_snr_input
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import StepKey
from ddpm.energy import dual

LEARNED_SCHEDULE = "log_snr"  # the key of its parameters, next to the network's, in one tree
OFFSET = "energy_offset"  # as that, of an energy's

# (history, key, batch_size) -> t [B], and the losses' factors in their mean, or None
Draw = Callable[[Any, jax.Array, int], tuple[jax.Array, jax.Array | None]]
Loss = Callable[[Denoiser, jax.Array, jax.Array, jax.Array], jax.Array]


class Losses(NamedTuple):
    """The losses of a batch [B], their times [B], and their factors [B] in the mean, or None."""

    losses: jax.Array
    t: jax.Array
    factor: jax.Array | None = None

    def mean(self) -> jax.Array:
        """Returns the scalar that training descends."""
        return (self.losses if self.factor is None else self.factor * self.losses).mean()


class Objective(Protocol):
    """The interface that `make_train_step` trains: a Gaussian diffusion's, or another process's.

    history: what draws go by at first, carried in the training's state; () for nothing.
    num_steps: T, by which the metrics part the times of losses.
    denoiser: network -> the denoiser that samplers and bounds take.
    """

    @property
    def history(self) -> Any: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def denoiser(self) -> Callable[[Any], Any]: ...

    def loss(
        self, network: Any, x_0: jax.Array, key: jax.Array | StepKey, history: Any = ()
    ) -> Losses:
        """Returns the losses at what the objective itself draws from the key."""
        ...

    def gradient(
        self, network: Any, params: Any, x_0: jax.Array, key: jax.Array | StepKey, history: Any
    ) -> tuple[jax.Array, Losses, Any]:
        """Returns the loss, its parts, and its gradient; network(params) is a network."""
        ...

    def record(self, history: Any, found: Losses) -> Any:
        """Returns the history after these losses."""
        ...

    def schedule_parameters(self) -> dict[str, Any]:
        """Returns what training adds to the network's parameters, or {}."""
        ...


def times(
    draw: Draw, history: Any, key: jax.Array | StepKey, n: int
) -> tuple[jax.Array, jax.Array | None]:
    """Returns t [n] and the factors of the losses in their mean, or None, drawn for a batch."""
    drawn: tuple[jax.Array, jax.Array | None] = streams.of_batch(
        key, n, lambda n: draw(history, streams.draw(key, streams.TIMES), n)
    )
    return drawn


def noise_like(x_0: jax.Array, key: jax.Array | StepKey) -> jax.Array:
    """Returns eps of the shape of a batch [n, ...]."""

    def draws(n: int) -> jax.Array:
        shape = (n, *x_0.shape[1:])
        return jax.random.normal(streams.draw(key, streams.NOISE), shape, jnp.float32)

    return jnp.asarray(streams.of_batch(key, len(x_0), draws))


def _mean_gradient(loss: Callable[[Any], Losses], params: Any) -> tuple[jax.Array, Losses, Any]:
    """Returns the mean of the losses at these parameters, the losses, and the mean's gradient."""

    def mean(params: Any) -> tuple[jax.Array, Losses]:
        found = loss(params)
        return found.mean(), found

    (value, found), grads = jax.value_and_grad(mean, has_aux=True)(params)
    return value, found, grads


class GaussianObjective(NamedTuple):
    """The objective of a Gaussian diffusion.

    denoiser(network) says what the output means. draw(history, key, batch_size) gives t [B] and
    the factors of the losses in their mean, or None. loss_at(denoiser, x_0, t, eps) is [B].
    history is a `timesteps.LossHistory` where `draw` goes by one.
    With self_conditioning, network(x_t, t, estimate=..) is given its own estimate of x_0, for half
    of the examples, which takes another call of it.
    """

    denoiser: Callable[[Network], Denoiser]
    draw: Draw
    loss_at: Loss
    num_steps: int
    history: Any = ()
    self_conditioning: bool = False

    def loss(
        self, network: Any, x_0: jax.Array, key: jax.Array | StepKey, history: Any = ()
    ) -> Losses:
        """Returns the losses of x_0 [B, ...] at t and eps drawn from the key."""
        t, factor = times(self.draw, history, key, len(x_0))
        return Losses(self.losses_at(network, x_0, t, key), t, factor)

    def losses_at(
        self, network: Any, x_0: jax.Array, t: jax.Array, key: jax.Array | StepKey
    ) -> jax.Array:
        """Returns the losses [B] at given times, eps drawn from the key."""
        eps = noise_like(x_0, key)
        if not self.self_conditioning:
            return self.loss_at(self.denoiser(network), x_0, t, eps)

        def from_estimate(estimate: jax.Array | None) -> Denoiser:
            return self.denoiser(functools.partial(network, estimate=estimate))

        flip, half = streams.draw(key, streams.COINS), jnp.float32(0.5)
        coins = streams.of_batch(key, len(x_0), lambda n: jax.random.bernoulli(flip, half, (n,)))
        return self.loss_at(self_conditioned_by(from_estimate, coins), x_0, t, eps)

    def gradient(
        self,
        network: Callable[[Any], Network],
        params: Any,
        x_0: jax.Array,
        key: jax.Array | StepKey,
        history: Any = (),
    ) -> tuple[jax.Array, Losses, Any]:
        """Returns the mean loss, its parts, and the gradient by the parameters."""
        return _mean_gradient(lambda p: self.loss(network(p), x_0, key, history), params)

    def record(self, history: Any, found: Losses) -> Any:
        """Returns the history after these losses."""
        if isinstance(history, timesteps.LossHistory):
            return timesteps.record(history, found.t, found.losses)
        return history

    def schedule_parameters(self) -> dict[str, Any]:
        """Returns {}: the schedule is fixed."""
        return {}


class LearnedScheduleObjective(NamedTuple):
    """The objective of a network and its schedule (Kingma et al. 2021).

    at(levels) is the objective at the levels of a batch, `draw` draws t in 0..1, and `begin` is
    where the schedule begins. A time of 1 is `num_steps` in the metrics.
    """

    at: Callable[[Levels], GaussianObjective]
    denoiser: Callable[[Network], Denoiser]
    draw: Draw
    num_steps: int
    begin: MonotoneLogSNR
    history: Any = ()

    def loss(
        self, network: Network, x_0: jax.Array, key: jax.Array | StepKey, history: Any = ()
    ) -> Losses:
        """Returns the losses by the schedule as it begins, without the end points' terms."""
        t, _ = times(self.draw, history, key, len(x_0))
        schedule = continuous.learned(self.begin)
        levels = Levels(schedule.log_snr(t), schedule.slope(t))
        return Losses(self.at(levels).losses_at(network, x_0, t, key), t * self.num_steps)

    def gradient(
        self,
        network: Callable[[Any], Network],
        params: Any,
        x_0: jax.Array,
        key: jax.Array | StepKey,
        history: Any = (),
    ) -> tuple[jax.Array, Losses, Any]:
        """Returns the bound, its steps' losses, and the gradient by network and schedule.

        The end points descend the whole bound, the shape between them the variance of the losses.
        """
        parameters = MonotoneLogSNR(**params[LEARNED_SCHEDULE])
        t, _ = times(self.draw, history, key, len(x_0))

        def at_levels(params: Any, log_snr: jax.Array, slope: jax.Array) -> jax.Array:
            return self.at(Levels(log_snr, slope)).losses_at(network(params), x_0, t, key)

        def ends(parameters: MonotoneLogSNR) -> jax.Array:
            eps = noise_like(x_0, key)
            return losses.ends_of_bound(continuous.learned(parameters), x_0, eps).mean()

        found = continuous.learned_gradients(at_levels, params, parameters, t)
        of_ends, gradient = jax.value_and_grad(ends)(parameters)
        schedule = jax.tree.map(jnp.add, found.schedule, gradient)
        grads = found.network | {LEARNED_SCHEDULE: schedule._asdict()}
        parts = Losses(found.losses, t * self.num_steps)
        return found.losses.mean() + of_ends, parts, grads

    def record(self, history: Any, found: Losses) -> Any:
        """Returns the history as it is: none is kept."""
        return history

    def schedule_parameters(self) -> dict[str, Any]:
        """Returns the schedule's parameters as they begin, at their place."""
        return {LEARNED_SCHEDULE: self.begin._asdict()}


class DualObjective(NamedTuple):
    """The objective of a network whose output is the gradient of an energy, with the energy's
    derivative in the noise level (`energy.dual`).

    loss_at(energy, x_0, t, eps) is [B], of an energy by its log-SNR. The offset's slopes, float32
    [num_rates], are learned over the log-SNR between `ends`, (first, last). The others are as in
    `GaussianObjective`.
    """

    denoiser: Callable[[Network], Denoiser]
    draw: Draw
    loss_at: Callable[[dual.Energy, jax.Array, jax.Array, jax.Array], jax.Array]
    num_steps: int
    ends: tuple[float, float]
    num_rates: int = 32
    history: Any = ()

    def energy(self, scalar: dual.Energy, offset: Mapping[str, jax.Array]) -> dual.Energy:
        """Returns U(x, log_snr), not normalised, of scalar(x, the network's input for the log-SNR)
        and the offset's parameters."""

        def of_log_snr(x_t: jax.Array, log_snr: jax.Array) -> jax.Array:
            return scalar(x_t, log_snr_input(log_snr))

        return dual.of_gradient(of_log_snr, offset["rates"], self.ends)

    def loss(
        self, network: Any, x_0: jax.Array, key: jax.Array | StepKey, history: Any = ()
    ) -> Losses:
        """Returns the losses by the offset as it begins."""
        return self._loss(network, self.schedule_parameters()[OFFSET], x_0, key, history)

    def _loss(self, network: Any, offset: Any, x_0: jax.Array, key: Any, history: Any) -> Losses:
        t, factor = times(self.draw, history, key, len(x_0))
        energy = self.energy(functools.partial(network, method="energy"), offset)
        return Losses(self.loss_at(energy, x_0, t, noise_like(x_0, key)), t, factor)

    def gradient(
        self,
        network: Callable[[Any], Network],
        params: Any,
        x_0: jax.Array,
        key: jax.Array | StepKey,
        history: Any = (),
    ) -> tuple[jax.Array, Losses, Any]:
        """Returns the mean loss, its parts, and the gradient by the network and the offset."""
        return _mean_gradient(
            lambda p: self._loss(network(p), p[OFFSET], x_0, key, history), params
        )

    def record(self, history: Any, found: Losses) -> Any:
        """Returns the history as it is: none is kept."""
        return history

    def schedule_parameters(self) -> dict[str, Any]:
        """Returns the offset's slopes as they begin, at their place."""
        return {OFFSET: {"rates": jnp.zeros(self.num_rates, jnp.float32)}}


def simple(schedule: NoiseSchedule) -> GaussianObjective:
    """Returns Algorithm 1: L_simple of a network that predicts eps, at uniform t."""
    return GaussianObjective(
        denoiser=lambda network: denoiser(schedule, network),
        draw=lambda history, key, n: (timesteps.uniform(schedule, key, n), None),
        loss_at=functools.partial(losses.simple, schedule),
        num_steps=schedule.num_steps,
    )
