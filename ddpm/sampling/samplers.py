"""Samplers that call the denoiser once for each step from x_t to x_s, and remember nothing.

A step of an ancestral chain and one of DDIM are one formula; eta = 1 of the second is the first
with fixed-small variance. Solvers of higher order are in `solvers`, Langevin dynamics in
`langevin`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import fixed_large
from ddpm.diffusion.predictions import Denoiser, Prediction, to_posterior_mean
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance, reverse_log_variance


class Stride(NamedTuple):
    """The way from t to s, scalars: step `number` (0, 1, ..) of a chain over `times`, [N + 1]."""

    t: jax.Array
    s: jax.Array
    number: jax.Array
    times: jax.Array


class Stepped(NamedTuple):
    """x_s, what was predicted on the way, what the next step is to know, the denoiser's calls."""

    x: jax.Array
    prediction: Prediction
    memory: Any = ()
    evaluations: jax.typing.ArrayLike = 1


class Noise(Protocol):
    """Standard normal in the shape of x_t, another one for each k (k may be traced)."""

    def __call__(self, k: jax.typing.ArrayLike = 0) -> jax.Array: ...


Step = Callable[[NoiseSchedule, Denoiser, jax.Array, Stride, Noise, Any], Stepped]


def nothing(x: jax.Array) -> tuple[()]:
    """The memory of a sampler without one."""
    del x
    return ()


class Sampler(NamedTuple):
    """How a reverse process goes from one time to the next.

    step(schedule, denoiser, x_t, stride, noise, memory) -> Stepped, a pure function.
    steps: how many, evenly spread, where `sample` is not given times; None: T.
    memory: what the first step is given, made of x_T.
    turns: whether it can go up in time too.
    """

    step: Step
    steps: int | None = None
    memory: Callable[[jax.Array], Any] = nothing
    turns: bool = False


def predict(denoiser: Denoiser, x_t: jax.Array, t: jax.Array) -> Prediction:
    """At one time for the whole batch."""
    return denoiser(x_t, jnp.broadcast_to(t, x_t.shape[:1]))


Move = Callable[[NoiseSchedule, Prediction, jax.Array, jax.Array, jax.Array, Noise], jax.Array]


def single_step(move: Move, steps: int | None) -> Sampler:
    """The sampler of move(schedule, prediction, x_t, t, s, noise) -> x_s."""

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        stride: Stride,
        noise: Noise,
        memory: Any,
    ) -> Stepped:
        prediction = predict(denoiser, x_t, stride.t)
        x_s = move(schedule, prediction, x_t, stride.t, stride.s, noise)
        return Stepped(x_s, prediction, memory)

    return Sampler(step, steps)


def ancestral(variance: ReverseVariance = fixed_large, *, steps: int | None = None) -> Sampler:
    """Algorithm 2: x_s ~ N(posterior mean at the predicted x_0, variance); no noise into x_0.

    `fixed_large` needs (nearly) all T steps; with few, take `fixed_small`, `analytic` or `ddim`.
    A denoiser that learns its variance has the say over `variance`.
    """

    def move(
        schedule: NoiseSchedule,
        prediction: Prediction,
        x_t: jax.Array,
        t: jax.Array,
        s: jax.Array,
        noise: Noise,
    ) -> jax.Array:
        log_variance = reverse_log_variance(schedule, prediction, t, s, variance)
        std = jnp.where(s > 0, jnp.exp(0.5 * log_variance), 0.0)
        return to_posterior_mean(schedule, x_t, t, prediction, s=s) + std * noise()

    return single_step(move, steps)


def ddim(eta: float = 0.0, *, steps: int | None = None) -> Sampler:
    """DDIM (Song et al. 2021, Eq. 12), deterministic at eta = 0.

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps + std z, std^2 = eta^2 beta-tilde.
    Raises ValueError unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}: must be between 0 (deterministic) and 1 (ancestral)")

    def move(
        schedule: NoiseSchedule,
        prediction: Prediction,
        x_t: jax.Array,
        t: jax.Array,
        s: jax.Array,
        noise: Noise,
    ) -> jax.Array:
        level = schedule.at(s)
        if not eta:  # for s > t too, which inverts the chain
            return level.alpha * prediction.x_0 + level.sigma * prediction.eps
        transition = schedule.between(s, t)
        # sigma_s^2 - std^2 = sigma_s^2 (1 - eta^2 + eta^2 SNR_t/SNR_s)
        kept = jnp.sqrt(1 - eta**2 + eta**2 * jnp.exp(-transition.log_snr_drop))
        mean = level.alpha * prediction.x_0 + level.sigma * kept * prediction.eps
        return mean + eta * jnp.sqrt(transition.posterior_variance) * noise()

    return single_step(move, steps)


def times(num_steps: int, steps: int | None = None) -> np.ndarray:
    """The times of a chain of `steps` steps from T to 0, evenly spread: int[steps + 1], falling.

    Raises ValueError unless 1 <= steps <= T.
    """
    steps = num_steps if steps is None else steps
    check_steps(num_steps, steps)
    return np.round(np.linspace(num_steps, 0, steps + 1)).astype(np.int32)


def check_steps(num_steps: int, steps: int) -> None:
    """Raises ValueError unless 1 <= steps <= T."""
    if not 1 <= steps <= num_steps:
        raise ValueError(f"{steps} sampling steps: must be between 1 and T = {num_steps}")
