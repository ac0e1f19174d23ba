"""Sampling from a run: a grid PNG, an .npz of any number of samples, a GIF or MP4 of the chain."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ddpm.files import pictures
from ddpm.modes.inputs import with_small_images
from ddpm.modes.loading import announce, draw, load_run
from ddpm.modes.run_folder import compiling

GRID_SAMPLES = 100
CHAIN_SAMPLES = 25
CHAIN_FRAMES = 50


def sample(config: ConfigDict, workdir: Path, init_from: str = "") -> None:
    """Draws config.sampling.num_samples from the latest good checkpoint in `workdir`, or from
    the pretrained weights that `init_from` names.

    Sample i depends only on config.sampling.seed and i. Writes workdir/samples/<name>.npz, .png
    (the first 100), .gif and, with sampling.mp4, .mp4 (the first 25). The name consists of step (or
    digest of the weights), sampler, seed and number.
    """
    if config.sampling.mp4:
        pictures.mp4_writer()  # fails now if it is not installed
    run = load_run(config, workdir, "sample", init_from)
    s, image_shape = config.sampling, run.built.image_shape
    run = run._replace(built=with_small_images(run.built, s.num_samples))
    announce(run, workdir)
    name = run.sample_name(s.seed, s.num_samples)
    generator = run.generator(s.num_samples)
    first: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for images in draw(generator, run.params, s.num_samples, s.seed, workdir):
            if sum(map(len, first)) < GRID_SAMPLES:
                first.append(images)
            yield images

    out = workdir / "samples"
    pictures.save_npz(out / f"{name}.npz", batches(), (s.num_samples, *image_shape))
    pictures.save_grid(out / f"{name}.png", np.concatenate(first)[:GRID_SAMPLES])
    few = min(CHAIN_SAMPLES, s.num_samples)
    with compiling(f"and drawing the chain of {few} samples", workdir):
        frames = generator.chain(run.params, few, seed=s.seed, snapshots=CHAIN_FRAMES)
    pictures.save_gif(out / f"{name}.gif", frames)
    if s.mp4:
        pictures.save_mp4(out / f"{name}.mp4", frames)
    for suffix in ("npz", "png", "gif", *(["mp4"] if s.mp4 else [])):
        print(out / f"{name}.{suffix}")
