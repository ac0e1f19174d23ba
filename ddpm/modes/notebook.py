"""A trained model in a notebook: from its run folder, or weights of others, to samples.

model = ddpm.load("fashion_mnist")
ddpm.show(model.sample(jax.random.key(0), 16, sampler="ddim", steps=50))
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging as absl_logging
from ml_collections import ConfigDict

from ddpm.build.checks import check, with_sampling
from ddpm.build.experiment import classifier
from ddpm.config import default, to_json
from ddpm.config.combinations import check_steering
from ddpm.config.same_run import saved_config
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.streams import sample_keys
from ddpm.diffusion.times import as_times
from ddpm.errors import InputError
from ddpm.modes.inputs import by, with_small_images
from ddpm.modes.loading import Run, load_run, with_variance
from ddpm.sampling.generate import Generator
from ddpm.sampling.samplers import Sampler
from ddpm.training.checkpoints import saved_meta

# Keys of config.sampling that `load` takes, or that are arguments of `sample`.
_OF_LOAD = ("ema", "ema_relative_std")
_NOT_OF_SAMPLE = (*_OF_LOAD, "num_samples", "seed", "mp4")


class Model:
    """A trained model: what `load` returns."""

    def __init__(self, run: Run, workdir: Path) -> None:
        self._run, self._workdir = run, workdir
        self._generators: dict[Any, Generator] = {}
        self._log_z: jax.Array | None = None

    def __repr__(self) -> str:
        diffusion = self.config.diffusion
        return (
            f"<ddpm model: {self._run.origin}; images {by(self.image_shape)}, schedule "
            f"{diffusion.schedule}, T = {self.schedule.num_steps}, predicts {diffusion.prediction}>"
        )

    @property
    def config(self) -> ConfigDict:
        """The config, whose section `sampling` has the defaults of `sample`."""
        return self._run.built.config

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule, the learned one where one is learned."""
        return self._run.built.schedule

    @property
    def params(self) -> Any:
        """The network's parameters, averaged (EMA) unless loaded with ema=False."""
        return self._run.params

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (height, width, channels)."""
        return self._run.built.image_shape

    @property
    def denoiser(self) -> Denoiser:
        """The function (x_t, t) -> Prediction that samples are drawn with: guided and clipped as
        config.sampling says, of the class config.sampling.label, or of none where that is -1.

        Raises InputError for super-resolution, whose denoiser depends on the images to enlarge.
        """
        if self.config.model.low_resolution:
            raise InputError(
                "a super-resolution model has no denoiser without the images to enlarge: use "
                "model.sample(key, n, low_resolution_images=FOLDER)"
            )
        return self._run.built.steered_denoiser(self.params)

    def energy(
        self, x_t: jax.Array, t: jax.typing.ArrayLike, label: int | None = None
    ) -> jax.Array:
        """Computes the energy E(x_t, t), whose gradient by x_t is eps: [B, H, W, C], t [B] or one
        for all -> float32[B]. Of a class, where the model has labels, or of none.

        -E / sigma_t is log q(x_t) in nats, but for a constant of t (`ddpm.energy.density`). Raises
        InputError for a model without an energy (config.model.energy = 'none'), or one that
        enlarges.
        """
        given = None if label is None else jnp.full(1, label, jnp.int32)
        energy = self._run.built.energy(self.params, given)
        t = jnp.broadcast_to(as_times(self.schedule.ends, t), x_t.shape[:1])
        return energy(x_t, t)

    def bits_per_dim(self, x_0: jax.Array, key: jax.Array) -> jax.Array:
        """Computes bits/dim of images x_0, k/127.5 - 1 of k = 0..255 [B, H, W, C], by a normalised
        energy, of which it takes one evaluation: float32[B].

        The key draws the noise within the 8-bit bins. Raises InputError for a model that was not
        trained for it (config.training.loss = 'dual'): see `ddpm.likelihood` and `ddpm.flow`.
        """
        built = self._run.built
        if self._log_z is None:
            seed = jax.random.key(self.config.seed)
            normalizer = jax.jit(lambda params: built.log_normalizer(params, seed).value)
            self._log_z = normalizer(self.params)
        return built.energy_bits_per_dim(self.params, self._log_z, x_0, key)

    def sample(
        self,
        key: jax.Array,
        num_samples: int,
        *,
        sampler: Sampler | str | None = None,
        **settings: Any,
    ) -> jax.Array:
        """Draws samples: float32[num_samples, H, W, C], x_0 in about [-1, 1].

        Sample i depends only on the key and i: with jax.random.key(seed), they are those of
        --mode=sample with that seed, before rounding. `sampler` is a name of config.sampling or a
        function's, as ddpm.ddim(steps=50); `settings` are other keys of config.sampling: steps=50,
        label=3, guidance_scale=2.0. Compiled once for each number of samples and settings.

        Raises InputError for settings that this model cannot have or samples that are not finite,
        TypeError for what is no key.
        """
        sample_keys(key, jnp.arange(1))  # raises for what is no key
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples = {num_samples!r}: must be a whole number >= 1")
        for name in _OF_LOAD:
            if name in settings:
                raise InputError(f"{name!r} chooses the weights: ddpm.load(.., {name}=..)")
        given = sampler if isinstance(sampler, Sampler) else None
        named = {"sampler": sampler} if isinstance(sampler, str) else {}
        if sampler is not None and given is None and not named:
            raise TypeError(f"sampler is {sampler!r}: must be a name, or made as ddpm.ddim() is")
        if given is not None and given.steps and {"steps", "times", "grid"} & settings.keys():
            raise InputError("the sampler has its own steps: leave out steps, times and grid")
        config = with_sampling(self.config, settings | named, _NOT_OF_SAMPLE)
        about = json.dumps(to_json(config)["sampling"]), num_samples, given
        if about not in self._generators:
            self._generators[about] = self._generator(config, num_samples, given)
        return jnp.asarray(self._generators[about].floats(self.params, num_samples, key))

    def _generator(self, config: ConfigDict, num_samples: int, given: Sampler | None) -> Generator:
        if given is None:
            check(config, self.schedule)
        else:  # which `sample_chain` checks, as it says itself what it needs
            check_steering(config)
        if config.sampling.classifier_scale:
            classifier(config, self.image_shape)
        built = self._run.built._replace(config=config, given_sampler=given)
        run = with_variance(self._run._replace(built=built), self._workdir)
        run = run._replace(built=with_small_images(run.built, num_samples))
        return run.generator(num_samples)


def load(where: str | Path, config: ConfigDict | None = None, **sampling: Any) -> Model:
    """Loads a trained model: the newest good checkpoint of a run folder, or weights of others.

    `where` is a run folder, runs/digits, or whatever --init_from takes: the library's own weights
    by name, "digits" or "fashion_mnist"; a folder of diffusers, a file, the name of a repository on
    the hub. `config` is by default the run's own, for weights of
    others the paper's for CIFAR-10 with the settings that come with them. `sampling` are keys of
    config.sampling: ema=False for the last weights, not their average, or new defaults of
    `Model.sample`.

    Raises InputError where there is nothing to load, or it cannot be read.
    """
    path = Path(where).expanduser()
    saved = saved_meta(path / "checkpoints")
    if saved is None and (path / "checkpoints").is_dir():
        raise InputError(
            f"no checkpoint in {path}: the run has saved none yet, or none is readable"
        )
    if config is None:
        config = default() if saved is None else saved_config(saved["config"])
    config = with_sampling(config, sampling)
    workdir, others = (Path("runs"), str(where)) if saved is None else (path, "")
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax says that it only reads
    try:
        return Model(load_run(config, workdir, "sample", others), workdir)
    finally:
        absl_logging.set_verbosity(before)
