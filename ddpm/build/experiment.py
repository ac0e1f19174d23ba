"""Config -> experiment: all objects of a run but the data, which `build.data` has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm.build import conditioning, network, sampler
from ddpm.build.checks import check, validate
from ddpm.build.objective import ema_rate, objective, other_ema_rates
from ddpm.build.schedule import noise_schedule
from ddpm.build.variance import reverse_variance
from ddpm.diffusion import continuous
from ddpm.diffusion.network_inputs import DenoiserFromEstimate, Prepare, averaged
from ddpm.diffusion.predictions import Denoiser, Network, clipped, thresholded
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance
from ddpm.energy import dual
from ddpm.errors import InputError
from ddpm.evaluation.shipped import log_probability
from ddpm.sampling import samplers
from ddpm.sampling.generate import Generator
from ddpm.sampling.guidance import classifier_free, classifier_guided, of_x_0
from ddpm.sampling.samplers import Sampler
from ddpm.training import ema, sharding
from ddpm.training.objectives import LEARNED_SCHEDULE, OFFSET, DualObjective, Objective
from ddpm.training.optimizer import adam


class Experiment(NamedTuple):
    """The objects of a checked config, all but the data."""

    config: ConfigDict
    schedule: NoiseSchedule
    model: nn.Module
    optimizer: optax.GradientTransformation
    image_shape: tuple[int, int, int]
    objective: Objective
    ema_rate: ema.Rate
    other_ema_rates: tuple[ema.Rate, ...]
    moments: jax.Array | None = None  # of variance 'analytic', float32[T + 1]
    small_images: np.ndarray | None = None  # what samples enlarge, float32[n, h, w, C]
    given_sampler: Sampler | None = None  # in the place of config.sampling.sampler

    @property
    def variance(self) -> ReverseVariance:
        """Returns the reverse variance; raises InputError for 'analytic' before it was measured."""
        return reverse_variance(self.config, self.moments)

    def with_schedule(self, params: Any) -> "Experiment":
        """Returns the experiment with the schedule that these weights have learned, if one is."""
        if LEARNED_SCHEDULE not in params:
            return self
        found = continuous.learned(continuous.MonotoneLogSNR(**params[LEARNED_SCHEDULE]))
        try:
            schedule = continuous.table(found, self.schedule.num_steps)
        except ValueError as error:  # of end points that have crossed, or are NaN
            raise InputError(
                f"the schedule that was learned cannot be used: {error}; train anew with a lower "
                "config.training.learning_rate"
            ) from error
        return self._replace(schedule=schedule, objective=objective(self.config, schedule))

    @property
    def sampler(self) -> Sampler:
        """Returns the sampler of config.sampling, or the given one, for a denoiser of x_t and t."""
        if self.given_sampler is not None:
            return self.given_sampler
        return sampler.sampler(self.config, self.variance)

    @property
    def times(self) -> np.ndarray:
        """Returns the times that the sampler visits, [N + 1]."""
        if self.given_sampler is not None and self.given_sampler.steps:
            return samplers.times(self.schedule.num_steps, self.given_sampler.steps)
        return sampler.times(self.config, self.schedule)

    @property
    def sampler_name(self) -> str:
        """Returns the sampler and its settings, for the names of files."""
        return sampler.sampler_name(self.config, self.schedule, self.variance)

    @property
    def prepare(self) -> Prepare | None:
        """Returns what augments x_0 in a training step and gives the network's other inputs."""
        return conditioning.prepare(self.config, self.image_shape)

    def unclipped_denoiser(
        self, params: Any, label: jax.Array | None = None, x_0: jax.Array | None = None
    ) -> Denoiser:
        """Returns the network at these weights without dropout; with labels int[B], if it has any.

        A network that enlarges is given the low resolution of `x_0`, [B, H, W, C].
        """
        small = self._averaged(x_0)
        return conditioning.denoiser(self.config, self._network(params, label, small))

    def denoiser(self, params: Any, x_0: jax.Array | None = None) -> Denoiser:
        """Returns the denoiser without label, clipped where the config says so, as the bound takes
        it."""
        denoise = self.unclipped_denoiser(params, x_0=x_0)
        return clipped(self.schedule, denoise) if self.config.sampling.clip else denoise

    def steered_denoiser(
        self, params: Any, indices: jax.Array | None = None, small: jax.Array | None = None
    ) -> Denoiser:
        """Returns the denoiser of samples: of a class, guided and clipped as config.sampling says.

        `indices` [B] number the samples: of a model with labels, sample i is of class
        i mod num_classes, or all are of config.sampling.label; without numbers, if that is -1, of
        no class. A network that enlarges is given `small`, [B, h, w, C].
        """
        s, classes = self.config.sampling, self.config.model.num_classes
        label = None
        if classes and (s.label >= 0 or indices is not None):
            label = jnp.full(1, s.label, jnp.int32) if s.label >= 0 else indices % classes
        labelled = self._network(params, label, small, indices)
        unlabelled = self._network(params, None, small, indices)
        return conditioning.denoiser(
            self.config, lambda estimate: self._steered(labelled(estimate), unlabelled(estimate))
        )

    def _steered(self, denoise: Denoiser, unlabelled: Denoiser) -> Denoiser:
        s, schedule = self.config.sampling, self.schedule
        if s.guidance_scale != 1:
            interval = tuple(s.guidance_interval) or None
            denoise = classifier_free(
                schedule,
                denoise,
                unlabelled,
                s.guidance_scale,
                interval=interval,
                rescale=s.guidance_rescale,
            )
        if s.classifier_scale:
            judge = of_x_0(denoise, classifier(self.config, self.image_shape))
            denoise = classifier_guided(schedule, denoise, judge, s.classifier_scale)
        if s.dynamic_threshold:
            return thresholded(schedule, denoise, s.dynamic_threshold)
        return clipped(schedule, denoise) if s.clip else denoise

    def _network(
        self,
        params: Any,
        label: jax.Array | None,
        small: jax.Array | None,
        indices: jax.Array | None = None,
    ) -> DenoiserFromEstimate:
        """Returns the network's denoiser, by an estimate of x_0 (None where it takes none)."""
        given = conditioning.given(self.config, self.image_shape[:2], small, indices)

        def from_estimate(estimate: jax.Array | None) -> Denoiser:
            def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
                more = given.arguments(len(x_t), estimate)
                return jnp.asarray(self.model.apply({"params": params}, x_t, t, label, **more))

            return self.objective.denoiser(network)

        return from_estimate

    def energy(self, params: Any, label: jax.Array | None = None) -> Network:
        """Returns the function (x_t, t) -> E [B] whose gradient by x_t is eps, at these weights.

        Raises InputError for a network without an energy, or one that enlarges.
        """
        scalar = self._scalar(params, label)
        seen: Network = network.NOISE_INPUTS[self.config.model.noise_input].make(
            self.schedule, scalar
        )
        return seen

    def raw_energy(self, params: Any) -> dual.Energy:
        """Returns (x_t, log_snr [B]) -> -log q(x_t) in nats but for one number, [B], without label.

        Raises InputError for a model that was not trained for it (`config.training.loss`).
        """
        if not isinstance(self.objective, DualObjective):
            raise InputError(
                f"config.training.loss = {self.config.training.loss!r}: the energy is not "
                "normalised: train it with 'dual'"
            )
        return self.objective.energy(self._scalar(params, None), params[OFFSET])

    def log_normalizer(self, params: Any, key: jax.Array) -> dual.Estimate:
        """Returns that number, log Z, and its standard error, by samples of the key."""
        return dual.log_normalizer(self.schedule, self.raw_energy(params), self.image_shape, key)

    def energy_bits_per_dim(
        self, params: Any, log_z: jax.Array, x_0: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns bits/dim [B] of 8-bit data by the normalised energy, see
        `dual.dequantised_bits_per_dim`."""
        raw = self.raw_energy(params)
        return dual.dequantised_bits_per_dim(
            self.schedule, lambda x_t, log_snr: raw(x_t, log_snr) + log_z, x_0, key
        )

    def _scalar(self, params: Any, label: jax.Array | None) -> Network:
        """Returns the network's energy by its own input for the noise level."""
        m = self.config.model
        if m.energy == "none":
            raise InputError(
                "config.model.energy = 'none': the network is the gradient of no energy; train one "
                "with config.model.energy = 'denoising'"
            )
        if m.low_resolution:
            raise InputError(
                f"config.model.low_resolution = {m.low_resolution}: the energy depends on the "
                "images to enlarge, which are not given here: use model.sample"
            )
        given = conditioning.given(self.config, self.image_shape[:2], None, None)

        def energy(x_t: jax.Array, t: jax.Array) -> jax.Array:
            more = given.arguments(len(x_t), None)
            at = {"params": params}
            return jnp.asarray(self.model.apply(at, x_t, t, label, **more, method="energy"))

        return energy

    def _averaged(self, x_0: jax.Array | None) -> jax.Array | None:
        if x_0 is None or not self.config.model.low_resolution:
            return None
        return averaged(x_0, conditioning.small_size(self.config, self.image_shape))

    def generator(self, mesh: Mesh, num_samples: int) -> Generator:
        """Returns the generator for num_samples, which caps config.sampling.batch_size; a batch is
        rounded up to divide over the devices."""
        batch_size = min(self.config.sampling.batch_size, num_samples)
        return Generator(
            self.schedule,
            self.steered_denoiser,
            conditioning.sampler(self.config, self.sampler),
            self.image_shape,
            times=self.times,
            batch_size=sharding.rounded_up(batch_size, mesh),
            sharding=sharding.split_batch(mesh),
            given=self.small_images,
        )


def build(config: ConfigDict, image_shape: tuple[int, int, int]) -> Experiment:
    """Returns the objects of a config for images of this shape; InputError if they do not fit."""
    validate(config)
    schedule = noise_schedule(config, image_shape)
    check(config, schedule)
    if config.model.low_resolution:
        conditioning.small_size(config, image_shape)
    t, model = config.training, network.network(config, image_shape)
    if config.sampling.classifier_scale:
        classifier(config, image_shape)
    optimizer = adam(
        t.learning_rate,
        warmup_steps=t.warmup_steps,
        grad_clip=t.grad_clip,
        b2=t.adam_b2,
        weight_decay=t.weight_decay,
        moments_dtype=t.moments_dtype,
    )
    aim, rates = objective(config, schedule), (ema_rate(config), other_ema_rates(config))
    return Experiment(config, schedule, model, optimizer, image_shape, aim, *rates)


def classifier(
    config: ConfigDict, image_shape: tuple[int, int, int]
) -> Callable[[jax.Array], jax.Array]:
    """Returns log p(config.sampling.label | x_0), nats, by the classifier of the data, if there is
    one."""
    try:
        return log_probability(config.data.name, image_shape, config.sampling.label)
    except InputError as error:
        raise InputError(
            f"config.sampling.classifier_scale = {config.sampling.classifier_scale}: {error}"
        ) from error
