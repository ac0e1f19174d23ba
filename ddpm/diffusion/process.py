"""The interface of a diffusion, Gaussian or discrete, for sampling and for the bound.

The driver of chains (`sampling.sample.run_chain`) and the bound (`likelihood.bound`) take a
`Process`: where it begins (`prior`), what its steps draw (`noise`), how x_0 becomes x_t
(`forward`), how x_t becomes x_s (`reverse`), and the terms of its bound. `GaussianDiffusion` is the
paper's. Arrays are [B, ...], times the paper's, terms bits/dim [B].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ddpm.diffusion.bound_terms import decoder_nll, prior_kl, step_kl
from ddpm.diffusion.gaussian import fixed_large, per_example_mean, q_sample
from ddpm.diffusion.predictions import Denoiser, Prediction, predict, to_posterior_mean
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import normal
from ddpm.diffusion.variances import ReverseVariance, reverse_log_variance


class StepInfo(NamedTuple):
    """One step of a chain, from t to s: step `number` (0, 1, ..) over its `times`, [N + 1]."""

    t: jax.Array
    s: jax.Array
    number: jax.Array
    times: jax.Array


class StepResult(NamedTuple):
    """x_s, the prediction made at t, the memory for the next step, the denoiser's calls, and what
    else a sampler reports of a step, such as an acceptance [B]."""

    x: jax.Array
    prediction: Any
    memory: Any = ()
    evaluations: jax.typing.ArrayLike = 1
    report: Any = ()


class Noise(NamedTuple):
    """The noise of one step of a chain: noise(k) draws the process's in the shape of x_t, another
    one for each k (may be traced).

    keys: of the examples in this step, [B], for whatever else is drawn.
    """

    draw: Callable[[jax.typing.ArrayLike], jax.Array]
    keys: jax.Array

    def __call__(self, k: jax.typing.ArrayLike = 0) -> jax.Array:
        """Returns draw k, [B, ...]."""
        return self.draw(k)


Step = Callable[[NoiseSchedule, Denoiser, jax.Array, StepInfo, Noise, Any], StepResult]


class Process(Protocol):
    """A forward process, its reversal and the terms of its bound, in pure functions.

    A denoiser (x_t, t [B]) gives a prediction, of whatever the process needs; its `x_0`, of x_t's
    shape, is what snapshots of a chain show.
    """

    @property
    def num_steps(self) -> int:
        """T: times are whole, t = 1..T noise levels, 0 the data."""
        ...

    def noise(self, keys: jax.Array, stream: Any, shape: Sequence[int]) -> jax.Array:
        """Draws what a step is random by, [B, *shape], from fold_in(key of the example, stream)."""
        ...

    def prior(self, noise: jax.Array) -> jax.Array:
        """Returns x_T, by its noise."""
        ...

    def forward(self, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns x_t ~ q(x_t | x_0), by its noise."""
        ...

    def memory(self, x_t: jax.Array) -> Any:
        """Returns what the first step of a chain is given."""
        ...

    def reverse(
        self, denoiser: Any, x_t: jax.Array, step: StepInfo, noise: Noise, memory: Any
    ) -> StepResult:
        """Returns x_s ~ p(x_s | x_t), with what was predicted on the way."""
        ...

    def prior_term(self, x_0: jax.Array, t: Any) -> jax.Array:
        """Returns L_T: KL(q(x_t | x_0) || prior), t the last time."""
        ...

    def step_term(
        self, x_0: jax.Array, x_t: jax.Array, t: jax.Array, s: jax.Array, prediction: Any
    ) -> jax.Array:
        """Returns KL(q(x_s | x_t, x_0) || p(x_s | x_t)), s >= 1."""
        ...

    def decoder_term(
        self, x_0: jax.Array, x_t: jax.Array, t: jax.Array, prediction: Any
    ) -> jax.Array:
        """Returns L_0: -log p(x_0 | x_t), t the first time."""
        ...

    def distortion(self, x_0: jax.Array, prediction: Any) -> jax.Array:
        """Returns the squared error of x_0 as predicted, a mean over dimensions."""
        ...


def no_memory(x: jax.Array) -> tuple[()]:
    """Returns the memory of a step that remembers nothing."""
    del x
    return ()


def ancestral_draw(
    schedule: NoiseSchedule,
    prediction: Prediction,
    x_t: jax.Array,
    t: jax.Array,
    s: jax.Array,
    noise: jax.Array,
    variance: ReverseVariance,
) -> jax.Array:
    """Returns x_s ~ N(posterior mean at the predicted x_0, variance) (Algorithm 2); no noise into
    x_0."""
    log_variance = reverse_log_variance(schedule, prediction, t, s, variance)
    std = jnp.where(s > 0, jnp.exp(0.5 * log_variance), 0.0)
    return to_posterior_mean(schedule, x_t, t, prediction, s=s) + std * noise


class GaussianDiffusion(NamedTuple):
    """The paper's process: Gaussian noise by a schedule, reversed by ancestral steps.

    variance: of the reverse steps, where the denoiser does not learn it.
    step, make_memory: those of a sampler, in the place of ancestral steps.
    floor: the decoder's least probability.
    """

    schedule: NoiseSchedule
    variance: ReverseVariance = fixed_large
    step: Step | None = None
    make_memory: Callable[[jax.Array], Any] = no_memory
    floor: float = 1e-12

    @property
    def num_steps(self) -> int:
        """T."""
        return self.schedule.num_steps

    def noise(self, keys: jax.Array, stream: Any, shape: Sequence[int]) -> jax.Array:
        """Draws standard normal noise, float32[B, *shape]."""
        return normal(keys, stream, shape)

    def prior(self, noise: jax.Array) -> jax.Array:
        """Returns x_T ~ N(0, I): the noise itself."""
        return noise

    def forward(self, x_0: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
        """Returns x_t ~ q(x_t | x_0) (Eq. 4)."""
        return q_sample(self.schedule, x_0, t, noise)

    def memory(self, x_t: jax.Array) -> Any:
        """Returns what the first step is given."""
        return self.make_memory(x_t)

    def reverse(
        self, denoiser: Denoiser, x_t: jax.Array, step: StepInfo, noise: Noise, memory: Any
    ) -> StepResult:
        """Returns x_s, by the sampler's step or an ancestral one."""
        if self.step is not None:
            return self.step(self.schedule, denoiser, x_t, step, noise, memory)
        prediction, (t, s) = predict(denoiser, x_t, step.t), step[:2]
        x_s = ancestral_draw(self.schedule, prediction, x_t, t, s, noise(), self.variance)
        return StepResult(x_s, prediction, memory)

    def prior_term(self, x_0: jax.Array, t: Any) -> jax.Array:
        """Returns L_T, `prior_kl`."""
        return prior_kl(self.schedule, x_0, t=t)

    def step_term(
        self, x_0: jax.Array, x_t: jax.Array, t: jax.Array, s: jax.Array, prediction: Prediction
    ) -> jax.Array:
        """Returns L_{t-1} of the step to s, `step_kl`."""
        return step_kl(self.schedule, x_0, t, prediction, s=s, variance=self.variance)

    def decoder_term(
        self, x_0: jax.Array, x_t: jax.Array, t: jax.Array, prediction: Prediction
    ) -> jax.Array:
        """Returns L_0, `decoder_nll`."""
        how: dict[str, Any] = {"variance": self.variance, "floor": self.floor}
        return decoder_nll(self.schedule, x_0, x_t, t, prediction, **how)

    def distortion(self, x_0: jax.Array, prediction: Prediction) -> jax.Array:
        """Returns the squared error of x_0 as predicted, a mean over dimensions."""
        return per_example_mean((x_0 - prediction.x_0) ** 2)
