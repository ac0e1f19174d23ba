"""Loading of a trained run from its folder, or of pretrained weights, for the modes that use it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm.build.data import source as data_source
from ddpm.build.experiment import Experiment, build
from ddpm.build.network import check_model
from ddpm.config import to_json
from ddpm.config.same_run import check_same_run
from ddpm.data.images import check_image_shape
from ddpm.diffusion.analytic import second_moments
from ddpm.diffusion.pixels import to_float
from ddpm.errors import InputError
from ddpm.files.atomic import write_atomically
from ddpm.files.progress import doing, say
from ddpm.files.tensors import read_tensors
from ddpm.interop import weights
from ddpm.modes.run_folder import compiling, described
from ddpm.sampling.generate import Generator
from ddpm.training import sharding, snapshots
from ddpm.training.checkpoints import Checkpoints, digest, saved_meta
from ddpm.version import __version__

RUN_ON = "the run is on images of"


class Run(NamedTuple):
    """The experiment, the weights that config.sampling.ema selects, and their origin.

    `step` is None for pretrained weights; `origin` is reported, `tag` begins file names, and
    `digest` distinguishes weights with the same tag, as of a run restarted in the same folder,
    which is `folder`.
    """

    built: Experiment
    params: Any
    mesh: Mesh
    step: int | None
    origin: str
    tag: str
    digest: str = ""
    folder: str = ""

    def generator(self, num_samples: int) -> Generator:
        """Returns the generator for num_samples, which caps the batch size of config.sampling."""
        return self.built.generator(self.mesh, num_samples)

    def sample_name(self, seed: int, num_samples: int) -> str:
        """Returns the file name of samples, with all settings that they depend on."""
        s = self.built.config.sampling
        how = self.built.sampler_name
        raw = self.step is not None and not s.ema
        other = ("_raw" if raw else "") + ("" if s.clip else "_unclipped")
        steered = steering_name(s) + self._small_name()
        return f"{self.tag}_{how}{steered}_seed{seed}_n{num_samples}{other}"

    def provenance(self, seed: int) -> dict[str, Any]:
        """Returns what samples are made by, for their files: run, weights, sampler, versions, and
        the whole config."""
        return {
            "ddpm": __version__,
            "jax": jax.__version__,
            "run": self.folder,
            "weights": self.origin,
            "weights_digest": self.digest,
            "step": self.step,
            "sampler": self.built.sampler_name,
            "seed": seed,
            "config": to_json(self.built.config),
        }

    def fingerprint(self, *more: str) -> str:
        """Returns a digest, for names of reused files, of the weights and the config's sections
        model, diffusion and `more`."""
        config = to_json(self.built.config)
        about = [self.digest, *(config[section] for section in ("model", "diffusion", *more))]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]

    def _small_name(self) -> str:
        """Returns a digest of the images to enlarge; '' without any."""
        small, noise = self.built.small_images, self.built.config.sampling.low_resolution_noise
        if small is None:
            return ""
        digest = hashlib.sha256(small.tobytes()).hexdigest()[:8]
        return f"_from{digest}" + (f"noised{noise:.9g}" if noise else "")


def steering_name(s: ConfigDict) -> str:
    """Returns the guidance settings of config.sampling, for file names; '' for none."""
    parts = [f"label{s.label}"] if s.label >= 0 else []
    if s.guidance_scale != 1:
        parts.append(f"guided{s.guidance_scale:.9g}")
        if s.guidance_interval:
            parts.append("from{:.9g}to{:.9g}".format(*s.guidance_interval))
        if s.guidance_rescale:
            parts.append(f"rescaled{s.guidance_rescale:.9g}")
    if s.classifier_scale:
        parts.append(f"classifier{s.classifier_scale:.9g}")
    if s.dynamic_threshold:
        parts.append(f"threshold{s.dynamic_threshold:.9g}")
    return "".join(f"_{part}" for part in parts)


def load_run(config: ConfigDict, workdir: Path, mode: str, init_from: str = "") -> Run:
    """Loads the pretrained weights that `init_from` names, else the latest good checkpoint in
    `workdir`. Raises InputError if there is none, or if it is of another experiment."""
    if jax.process_count() > 1:
        raise InputError(f"--mode={mode} runs in a single process: leave out --distributed")
    mesh, std = sharding.data_mesh(), config.sampling.ema_relative_std
    if init_from:
        if std:
            raise InputError(
                f"config.sampling.ema_relative_std = {std}: is made of a run's own averages, and "
                "--init_from names weights of others: leave it at 0"
            )
        found = weights.load(init_from, config)
        built = build(found.config, found.image_shape)
        params = jax.device_put(found.params, sharding.replicated(mesh))
        origin = f"weights of {init_from}, sha256 {found.sha256[:8]}"
        short = found.sha256[:8]
        run = Run(built, params, mesh, None, origin, f"weights_{short}", short)
        return with_variance(run, workdir)
    folder = workdir / "checkpoints"
    saved = saved_meta(folder)
    if saved is None:
        raise InputError(
            f"no checkpoint in {workdir}: train first, with the same command without "
            f"--mode={mode}, or name weights of others with --init_from"
        )
    check_same_run(config, saved["config"], workdir)
    image_shape = tuple(saved["image_shape"])
    built = build(config, image_shape)
    chosen = "ema_params" if config.sampling.ema else "params"
    shapes = check_model(built.model, image_shape)
    shapes |= jax.eval_shape(built.objective.schedule_parameters)
    abstract = {chosen: sharding.abstract_like(shapes, sharding.replicated(mesh))}
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(abstract, say)
    checkpoints.close()
    if restored is None:
        raise InputError(f"no checkpoint in {workdir}")
    items, meta = restored
    step, params = meta["step"], items[chosen]
    origin = f"step {step}, weights {'averaged (EMA)' if config.sampling.ema else 'not averaged'}"
    tag, digests = f"step_{step:08}", meta["digests"][chosen]
    if std:
        average = snapshots.reconstruct(workdir / "averages", step, std, params)
        step, tag = average.step, f"step_{average.step:08}_std{std:.9g}"
        params = jax.device_put(average.params, sharding.replicated(mesh))
        digests = digest(params)
        origin = f"step {step}, averaged with width {std:g}, of {average.snapshots} snapshots"
    short = hashlib.sha256(repr(digests).encode()).hexdigest()[:8]
    built = built.with_schedule(params)
    run = Run(built, params, mesh, step, origin, tag, short, str(workdir))
    return with_variance(run, workdir)


def announce(run: Run, workdir: Path) -> None:
    """Says the start line of a mode that uses a run, once nothing is left to refuse."""
    batch_size = run.built.config.sampling.batch_size
    say(f"{described(run.built, workdir, run.params, batch_size)}; {run.origin}")


def with_variance(run: Run, workdir: Path) -> Run:
    """Returns the run with the moments for variance 'analytic', from its folder or measured now."""
    config = run.built.config
    s = config.sampling
    if s.variance != "analytic":
        return run
    path = workdir / "moments" / f"{run.tag}_n{s.analytic_images}_{run.fingerprint('data')}.npz"
    wanted = (run.built.schedule.num_steps + 1,)
    if path.exists():
        moments = read_tensors(path, hint="remove it").get("moments")
        if moments is None or moments.shape != wanted or not np.isfinite(moments).all():
            raise InputError(f"{path}: not {wanted[0]} finite numbers; remove it")
        return run._replace(built=run.built._replace(moments=jnp.asarray(moments)))
    source = data_source(config)
    check_image_shape(source.image_shape, run.built.image_shape, RUN_ON)
    places = np.linspace(0, len(source) - 1, min(s.analytic_images, len(source))).astype(int)
    say(f"measuring the optimal variance on {len(places)} images, once ..")
    # One key for all, independent of the sampling seed: the variance belongs to the run.
    key, schedule = jax.random.key(config.seed), run.built.schedule
    examples = source.read(places)
    label = examples.label if config.model.num_classes else None
    measure = jax.jit(
        lambda params, x, label: second_moments(
            schedule, run.built.unclipped_denoiser(params, label, x), x, key
        )
    )
    moments = np.asarray(measure(run.params, to_float(examples.image), label))
    if not np.isfinite(moments).all():
        raise InputError("the model's predictions are not finite: try an earlier checkpoint")

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, moments=moments)

    try:
        write_atomically(path, write)
    except OSError as error:
        say(f"{path}: cannot be kept there ({error.strerror}), so it is measured at each use")
    return run._replace(built=run.built._replace(moments=jnp.asarray(moments)))


def draw(
    generator: Generator, params: Any, num_samples: int, seed: int, workdir: Path
) -> Iterator[np.ndarray]:
    """Yields batches of samples, and shows how far it is, compiling included."""
    if not generator.compiled:
        with compiling("the sampler", workdir):
            generator.compile(params)
    speaks = jax.process_index() == 0
    with doing("sampling", total=num_samples, speaks=speaks) as bar:
        for images in generator.batches(params, num_samples, seed=seed):
            bar.update(len(images))
            yield images
