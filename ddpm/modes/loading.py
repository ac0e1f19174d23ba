"""A trained run from its folder, or weights of others, for the modes that use one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm import experiment
from ddpm.errors import InputError
from ddpm.experiment import Experiment
from ddpm.interop import weights
from ddpm.objectives import variance_name
from ddpm.sampling.generate import Generator
from ddpm.training import sharding
from ddpm.training.checkpoints import Checkpoints, saved_meta
from ddpm.training.logbook import say


class Run(NamedTuple):
    """The experiment, the weights that config.sampling.ema chooses, and where they are from.

    `step` is None for weights of others; `origin` is told, `tag` begins the names of files.
    """

    built: Experiment
    params: Any
    mesh: Mesh
    step: int | None
    origin: str
    tag: str

    def generator(self, num_samples: int) -> Generator:
        """Of samples by config.sampling, for that many or more."""
        batch_size = min(self.built.config.sampling.batch_size, num_samples)
        return self.built.generator(self.mesh, batch_size=batch_size)

    def sample_name(self, seed: int, num_samples: int) -> str:
        """Of the files of samples: all that they depend on."""
        s = self.built.config.sampling
        steps = s.steps or self.built.schedule.num_steps
        how = (
            f"ddim{steps}_eta{s.eta:g}"
            if s.sampler == "ddim"
            else f"ancestral{steps}_{variance_name(self.built.config)}"
        )
        raw = self.step is not None and not s.ema
        other = ("_raw" if raw else "") + ("" if s.clip else "_unclipped")
        return f"{self.tag}_{how}_seed{seed}_n{num_samples}{other}"


def load_run(config: ConfigDict, workdir: Path, mode: str, init_from: str = "") -> Run:
    """The weights of others where `init_from` names them, else the latest good checkpoint in
    `workdir`; InputError without one, or of another experiment."""
    if jax.process_count() > 1:
        raise InputError(f"--mode={mode} runs in a single process: leave out --distributed")
    mesh = sharding.data_mesh()
    if init_from:
        found = weights.load(init_from, config)
        built = experiment.build(found.config, found.image_shape)
        params = jax.device_put(found.params, sharding.replicated(mesh))
        origin = f"weights of {init_from}, sha256 {found.sha256[:8]}"
        return Run(built, params, mesh, None, origin, f"weights_{found.sha256[:8]}")
    folder = workdir / "checkpoints"
    saved = saved_meta(folder)
    if saved is None:
        raise InputError(
            f"no checkpoint in {workdir}: train first, with the same command without "
            f"--mode={mode}, or name weights of others with --init_from"
        )
    experiment.check_same_run(config, saved["config"], workdir)
    image_shape = tuple(saved["image_shape"])
    built = experiment.build(config, image_shape)
    chosen = "ema_params" if config.sampling.ema else "params"
    shapes = experiment.check_model(built.model, image_shape)
    abstract = {chosen: sharding.abstract_like(shapes, sharding.replicated(mesh))}
    checkpoints = Checkpoints(folder, read_only=True)
    restored = checkpoints.restore(abstract, say)
    checkpoints.close()
    if restored is None:
        raise InputError(f"no checkpoint in {workdir}")
    items, meta = restored
    step = meta["step"]
    origin = f"step {step}, weights {'averaged (EMA)' if config.sampling.ema else 'not averaged'}"
    return Run(built, items[chosen], mesh, step, origin, f"step_{step:08}")


def draw(run: Run, generator: Generator, num_samples: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of samples, with a bar on a terminal."""
    with tqdm(total=num_samples, desc="sampling", unit="image", disable=None) as bar:
        for images in generator.batches(run.params, num_samples, seed=seed):
            bar.update(len(images))
            yield images
