"""Sampling from a run: a grid PNG, an .npz of any number of samples, a GIF or MP4 of the chain."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ddpm.files import pictures
from ddpm.files.atomic import check_writable
from ddpm.modes.inputs import with_small_images
from ddpm.modes.loading import announce, draw, load_run
from ddpm.modes.run_folder import compiling

GRID_SAMPLES = 100
CHAIN_SAMPLES = 25
CHAIN_FRAMES = 50


def sample(config: ConfigDict, workdir: Path, init_from: str = "", out: str = "") -> None:
    """Draws config.sampling.num_samples from the latest good checkpoint in `workdir`, or from
    the pretrained weights that `init_from` names.

    Sample i depends only on config.sampling.seed and i. Writes <name>.npz, .png (the first 100),
    .gif and, with sampling.mp4, .mp4 (the first 25) to `out`, or else workdir/samples. The name
    consists of step (or digest of the weights), sampler, seed and number; .npz and .png say what
    made them (`Run.provenance`).
    """
    if config.sampling.mp4:
        pictures.mp4_writer()  # fails now if it is not installed
    run = load_run(config, workdir, "sample", init_from)
    s, image_shape = config.sampling, run.built.image_shape
    run = run._replace(built=with_small_images(run.built, s.num_samples))
    announce(run, workdir)
    name = run.sample_name(s.seed, s.num_samples)
    files = [f"{name}.{suffix}" for suffix in ("npz", "png", "gif", *(["mp4"] if s.mp4 else []))]
    folder = Path(out).expanduser() if out else workdir / "samples"
    check_writable(folder, *files)
    generator = run.generator(s.num_samples)
    first: list[np.ndarray] = []

    def batches() -> Iterator[np.ndarray]:
        for images in draw(generator, run.params, s.num_samples, s.seed, workdir):
            if sum(map(len, first)) < GRID_SAMPLES:
                first.append(images)
            yield images

    about = run.provenance(s.seed)
    pictures.save_npz(folder / files[0], batches(), (s.num_samples, *image_shape), about=about)
    pictures.save_grid(folder / files[1], np.concatenate(first)[:GRID_SAMPLES], about=about)
    few = min(CHAIN_SAMPLES, s.num_samples)
    with compiling(f"and drawing the chain of {few} samples", workdir):
        frames = generator.chain(run.params, few, seed=s.seed, snapshots=CHAIN_FRAMES)
    pictures.save_gif(folder / files[2], frames)
    if s.mp4:
        pictures.save_mp4(folder / files[3], frames)
    for file in files:
        print(folder / file)
