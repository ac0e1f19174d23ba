"""Sampling from a run: a grid PNG, an .npz of any number of samples, a GIF of the chain."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ddpm import experiment
from ddpm.errors import InputError
from ddpm.sampling import pictures
from ddpm.training import sharding
from ddpm.training.checkpoints import Checkpoints, saved_meta
from ddpm.training.logbook import say

GRID_SAMPLES = 100
CHAIN_SAMPLES = 25
CHAIN_FRAMES = 50


def sample(config: ConfigDict, workdir: Path) -> None:
    """Draws config.sampling.num_samples from the latest good checkpoint in `workdir`.

    Sample i depends on config.sampling.seed and i alone. Writes workdir/samples/<name>.npz, .png
    (the first 100) and .gif (the first 25), the name made of step, sampler, seed and number.
    """
    if jax.process_count() > 1:
        raise InputError("--mode=sample runs in a single process: leave out --distributed")
    folder = workdir / "checkpoints"
    saved = saved_meta(folder)
    if saved is None:
        raise InputError(
            f"no checkpoint in {workdir}: train first, with the same command without --mode=sample"
        )
    experiment.check_same_run(config, saved["config"], workdir)

    s = config.sampling
    image_shape = tuple(saved["image_shape"])
    built = experiment.build(config, image_shape)
    mesh = sharding.data_mesh()
    weights = "ema_params" if s.ema else "params"
    shapes = experiment.check_model(built.model, image_shape)
    abstract = {weights: sharding.abstract_like(shapes, sharding.replicated(mesh))}
    checkpoints = Checkpoints(folder, read_only=True)
    found = checkpoints.restore(abstract, say)
    checkpoints.close()
    if found is None:
        raise InputError(f"no checkpoint in {workdir}")
    params, step = found[0][weights], found[1]["step"]

    steps = s.steps or built.schedule.num_steps
    how = f"ddim{steps}_eta{s.eta:g}" if s.sampler == "ddim" else f"ancestral{steps}_{s.variance}"
    raw = "" if s.ema else "_raw"
    name = f"step_{step:08}_{how}_seed{s.seed}_n{s.num_samples}{raw}"
    generator = built.generator(mesh, batch_size=min(s.batch_size, s.num_samples))
    first: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        with tqdm(total=s.num_samples, unit="image", disable=None) as bar:
            for images in generator.batches(params, s.num_samples, seed=s.seed):
                if sum(map(len, first)) < GRID_SAMPLES:
                    first.append(images)
                bar.update(len(images))
                yield images

    out = workdir / "samples"
    pictures.save_npz(out / f"{name}.npz", batches(), (s.num_samples, *image_shape))
    pictures.save_grid(out / f"{name}.png", np.concatenate(first)[:GRID_SAMPLES])
    frames = generator.chain(
        params, min(CHAIN_SAMPLES, s.num_samples), seed=s.seed, snapshots=CHAIN_FRAMES
    )
    pictures.save_gif(out / f"{name}.gif", frames)
    for suffix in ("npz", "png", "gif"):
        print(out / f"{name}.{suffix}")
