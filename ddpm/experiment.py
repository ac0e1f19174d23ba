"""Config -> objects: the only place where a name in a config becomes a function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm import conditioning, networks, reverse_process
from ddpm.config import default, flatten, to_json
from ddpm.data import sources
from ddpm.data.folders import folder
from ddpm.data.sources import Source
from ddpm.data.tfds_sets import tfds
from ddpm.diffusion import continuous, schedules
from ddpm.diffusion.analytic import analytic
from ddpm.diffusion.conditioning import Guessing, Prepare, averaged
from ddpm.diffusion.predictions import Denoiser, clipped, thresholded
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance
from ddpm.errors import InputError
from ddpm.evaluation.classifier import log_probability
from ddpm.objectives import FIXED, ema_rate, objective, other_ema_rates, with_decoder
from ddpm.sampling.generate import Generator
from ddpm.sampling.guidance import classifier_free, classifier_guided, of_x_0
from ddpm.sampling.samplers import Sampler
from ddpm.training import ema, sharding
from ddpm.training.objective import LEARNED_SCHEDULE, Objective
from ddpm.training.state import adam
from ddpm.validation import check_steering, validate

SCHEDULES: dict[str, Callable[[Any], NoiseSchedule]] = {
    "linear": lambda d: schedules.linear(d.num_steps, d.beta_start, d.beta_end),
    "quadratic": lambda d: schedules.quadratic(d.num_steps, d.beta_start, d.beta_end),
    "constant": lambda d: schedules.constant(d.num_steps, d.beta_end),
    "jsd": lambda d: schedules.jsd(d.num_steps),
    "warmup10": lambda d: schedules.warmup10(d.num_steps, d.beta_start, d.beta_end),
    "warmup50": lambda d: schedules.warmup50(d.num_steps, d.beta_start, d.beta_end),
    "cosine": lambda d: schedules.cosine(d.num_steps),
    "sigmoid": lambda d: schedules.sigmoid(d.num_steps),
    "linear_log_snr": lambda d: continuous.table(
        continuous.linear(d.log_snr_0, d.log_snr_1), d.num_steps
    ),
    "edm": lambda d: continuous.table(continuous.edm(), d.num_steps),
    # As it begins; what was learned is known once there are weights: `Experiment.with_schedule`.
    "learned": lambda d: continuous.table(
        continuous.learned(continuous.init_learned(d.log_snr_0, d.log_snr_1)), d.num_steps
    ),
    "betas": lambda d: schedules.from_betas(d.betas),
}
UNMEASURED = (
    "config.sampling.variance = 'analytic' is measured on a trained run: train with another, and "
    "then sample with it"
)


class Experiment(NamedTuple):
    """What a checked config stands for, all but the data."""

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

    @property
    def variance(self) -> ReverseVariance:
        """Of the reverse steps. InputError for 'analytic' before it was measured."""
        name = self.config.sampling.variance
        if name != "analytic":
            return with_decoder(self.config, FIXED[name])
        if self.moments is None:
            raise InputError(UNMEASURED)
        return with_decoder(self.config, analytic(self.moments))

    def with_schedule(self, params: Any) -> "Experiment":
        """With the schedule that these weights have learned; itself, where none is learned."""
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
        """By config.sampling, for a denoiser that is a function of x_t and t."""
        return reverse_process.sampler(self.config, self.variance)

    @property
    def times(self) -> np.ndarray:
        """What the sampler visits, [N + 1]."""
        return reverse_process.times(self.config, self.schedule)

    @property
    def prepare(self) -> Prepare | None:
        """What a training step makes of x_0 and tells of it."""
        return conditioning.prepare(self.config, self.image_shape)

    def unclipped_denoiser(
        self, params: Any, label: jax.Array | None = None, x_0: jax.Array | None = None
    ) -> Denoiser:
        """The network at these weights without dropout; with labels int[B], if it knows any.

        A network that enlarges is given the low resolution of `x_0`, [B, H, W, C].
        """
        small = self._averaged(x_0)
        return conditioning.denoiser(self.config, self._network(params, label, small))

    def denoiser(self, params: Any, x_0: jax.Array | None = None) -> Denoiser:
        """The same without label, clipped where the config says so: what the bound is of."""
        denoise = self.unclipped_denoiser(params, x_0=x_0)
        return clipped(self.schedule, denoise) if self.config.sampling.clip else denoise

    def steered_denoiser(
        self, params: Any, indices: jax.Array | None = None, small: jax.Array | None = None
    ) -> Denoiser:
        """What samples are drawn by: of a class, guided and clipped as config.sampling says.

        `indices` [B] number the samples: of a model with labels, sample i is of class
        i mod num_classes, or all are of config.sampling.label; without numbers, if that is -1, of
        no class. A network that enlarges is given `small`, [B, h, w, C].
        """
        s, classes = self.config.sampling, self.config.model.num_classes
        label = None
        if classes and (s.label >= 0 or indices is not None):
            label = jnp.full(1, s.label) if s.label >= 0 else indices % classes
        labelled = self._network(params, label, small, indices)
        unlabelled = self._network(params, None, small, indices)
        return conditioning.denoiser(
            self.config, lambda guess: self._steered(labelled(guess), unlabelled(guess))
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
    ) -> Guessing:
        """Read as the objective does, of a guess of x_0 (None where it takes none)."""
        beside = conditioning.beside(self.config, self.image_shape[:2], small, indices)

        def with_guess(guess: jax.Array | None) -> Denoiser:
            def network(x_t: jax.Array, t: jax.Array) -> jax.Array:
                told = beside.arguments(len(x_t), guess)
                return jnp.asarray(self.model.apply({"params": params}, x_t, t, label, **told))

            return self.objective.denoiser(network)

        return with_guess

    def _averaged(self, x_0: jax.Array | None) -> jax.Array | None:
        if x_0 is None or not self.config.model.low_resolution:
            return None
        return averaged(x_0, conditioning.small_size(self.config, self.image_shape))

    def generator(self, mesh: Mesh, *, batch_size: int) -> Generator:
        """Samples by the config's sampler; the batch size is rounded up to the devices' number."""
        devices = mesh.devices.size
        return Generator(
            self.schedule,
            self.steered_denoiser,
            conditioning.sampler(self.config, self.sampler),
            self.image_shape,
            times=self.times,
            batch_size=-(-batch_size // devices) * devices,
            sharding=sharding.split_batch(mesh),
            given=self.small_images,
        )


def build(config: ConfigDict, image_shape: tuple[int, int, int]) -> Experiment:
    """All objects of a config for images of this shape; InputError for what does not fit."""
    validate(config)
    check_steering(config)
    if config.model.low_resolution:
        conditioning.small_size(config, image_shape)
    t, model = config.training, networks.network(config, image_shape)
    if config.sampling.classifier_scale:
        classifier(config, image_shape)
    optimizer = adam(
        t.learning_rate,
        warmup_steps=t.warmup_steps,
        grad_clip=t.grad_clip,
        b2=t.adam_b2,
        weight_decay=t.weight_decay,
    )
    schedule = noise_schedule(config, image_shape)
    aim, rates = objective(config, schedule), (ema_rate(config), other_ema_rates(config))
    built = Experiment(config, schedule, model, optimizer, image_shape, aim, *rates)
    reverse_process.check_sampling(config, schedule)
    return built


def with_settings(config: ConfigDict, **sections: dict[str, Any]) -> tuple[ConfigDict, list[str]]:
    """A copy with keys set, by section; and what differs from before, a phrase each."""
    new, changed = config.copy_and_resolve_references(), []
    for section, settings in sections.items():
        for key, value in settings.items():
            before = new[section][key]
            if isinstance(before, tuple | list):
                before = tuple(before)
            if before != value:
                said = f"{len(value)} values" if len(str(value)) > 60 else f"{value!r}"
                changed.append(f"config.{section}.{key} = {said}")
            with new.ignore_type():
                new[section][key] = value
    return new, changed


def noise_schedule(
    config: ConfigDict, image_shape: tuple[int, int, int] | None = None
) -> NoiseSchedule:
    """The schedule by its name; shifted, with the images' shape, and rescaled where the config
    says so."""
    d = config.diffusion
    try:
        schedule = SCHEDULES[d.schedule](d)
        if d.reference_resolution and image_shape:
            side = min(image_shape[:2])
            schedule = schedules.shifted(schedule, side, reference=d.reference_resolution)
        return schedules.zero_terminal_snr(schedule) if d.zero_terminal_snr else schedule
    except (ValueError, MemoryError) as error:
        raise InputError(f"config.diffusion: {error}") from error


def classifier(
    config: ConfigDict, image_shape: tuple[int, int, int]
) -> Callable[[jax.Array], jax.Array]:
    """log p(config.sampling.label | x_0), nats, by the classifier of the data, if there is one."""
    try:
        return log_probability(config.data.name, image_shape, config.sampling.label)
    except InputError as error:
        raise InputError(
            f"config.sampling.classifier_scale = {config.sampling.classifier_scale}: {error}"
        ) from error


def check_labels(config: ConfigDict, source: Source) -> None:
    """InputError for a model with labels on data without, or with another number of classes."""
    wanted, there = config.model.num_classes, source.num_classes
    if wanted and wanted != there:
        has = "no labels" if there is None else f"{there} classes"
        raise InputError(
            f"config.model.num_classes = {wanted}: the data set {config.data.name!r} has {has}; "
            f"set it to {there or 0}" + (", or to 0 to learn without labels" if there else "")
        )


def source(config: ConfigDict) -> Source:
    """The training data by name: 'digits', 'folder', 'npz', or any image set of tfds."""
    d = config.data
    size = tuple(d.image_size) or None
    if d.name in ("folder", "npz") and not d.path:
        raise InputError(
            f"config.data.path is empty: name the {d.name} with --config.data.path=..."
        )
    if d.name == "folder":
        if size is None:
            raise InputError("config.data.image_size = (): a folder needs (height, width)")
        if d.split:
            raise InputError(
                f"config.data.split = {d.split!r}: a folder has no splits; name the folder of the "
                "split with config.data.path"
            )
        return folder(d.path, size, channels=d.channels, broken=d.broken_images)
    if d.name not in ("digits", "npz"):
        return tfds(d.name, d.split or "train", data_dir=d.path or None, image_size=size)
    npz = d.name == "npz"
    here = sources.npz(d.path, d.split) if npz else sources.digits(d.split or "train")
    if size not in (None, here.image_shape[:2]):
        raise InputError(
            f"config.data.image_size = {size}: those of {d.name} are {here.image_shape[:2]}, and "
            "only folders and tfds' sets are resized"
        )
    return here


def held_out(config: ConfigDict) -> Source | None:
    """The data that were not trained on, by evaluation.split and .path; None for neither."""
    split, path = config.evaluation.split, config.evaluation.path
    if not split and not path:
        return None
    other = config.copy_and_resolve_references()
    other.data.split = split
    if path:
        other.data.path = path
    try:
        return source(other)
    except InputError as error:
        raise InputError(
            f"{error} (of the held-out data: config.evaluation.split = {split!r}, .path = {path!r})"
        ) from error


def check_same_run(config: ConfigDict, saved: dict[str, Any], workdir: Any) -> list[str]:
    """InputError if a run folder's config differs in what a run cannot change on its way.

    Returns what it may change, and does, of what its weights depend on. A key that is missing, of a
    run by an older version, had its default.
    """
    now, before = flatten(to_json(config)), flatten(to_json(default())) | flatten(saved)
    free = ("sampling.", "editing.", "comparison.", "evaluation.", "training.steps",
            "training.log_every",
            "training.sample_every", "training.checkpoint",
            "training.ema_snapshot_every")  # fmt: skip
    told = ("data.path", "data.broken_images", "model.dtype", "training.learning_rate",
            "training.warmup_steps", "training.grad_clip")  # fmt: skip
    changed = []
    for key in sorted(now.keys() | before.keys()):
        if key.startswith(free) or now.get(key) == before.get(key):
            continue
        if key not in told:
            raise InputError(
                f"{workdir} holds a run with config.{key} = {before.get(key)!r}, this one says "
                f"{now.get(key)!r}: choose another --workdir"
            )
        changed.append(f"config.{key} = {now[key]!r}, before {before[key]!r}")
    return changed
