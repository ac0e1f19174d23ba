"""Pictures that a mode is given: files, a folder, or an .npz; and those to be enlarged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ddpm import conditioning, experiment
from ddpm.data import sources
from ddpm.data.folders import folder
from ddpm.data.images import read_image
from ddpm.data.pipeline import to_float
from ddpm.diffusion.conditioning import averaged
from ddpm.errors import InputError
from ddpm.experiment import Experiment


def pictures_at(given: str, said: str) -> Callable[[tuple[int, int, int]], np.ndarray]:
    """A function of a shape [H, W, C] to the pictures that `given` names, uint8[n, H, W, C].

    InputError, which begins with what the user `said`, at once for a file that is not there.
    """
    paths = [Path(p).expanduser() for p in ([given] if Path(given).exists() else given.split(","))]
    for path in paths:
        if not path.exists():
            raise InputError(f"{said}: {path}: there is no such file or folder")

    def read(shape: tuple[int, int, int]) -> np.ndarray:
        return np.concatenate([_read(path, shape, said) for path in paths])

    return read


def by(shape: tuple[int, ...]) -> str:
    """(8, 8, 1) as '8x8x1'."""
    return "x".join(map(str, shape))


def with_small_images(built: Experiment, most: int) -> Experiment:
    """With what its samples enlarge, for `most` samples or fewer, where the model enlarges.

    By config.sampling.low_resolution_images; else the first images of the held-out data, or without
    any of the training data, averaged down. InputError for what cannot be read.
    """
    config = built.config
    if not config.model.low_resolution:
        return built
    size = conditioning.small_size(config, built.image_shape)
    given = config.sampling.low_resolution_images
    if given:
        read = pictures_at(given, "config.sampling.low_resolution_images")
        small = to_float(read((*size, built.image_shape[-1]))[:most])
    else:
        source = experiment.held_out(config) or experiment.source(config)
        if source.image_shape != built.image_shape:
            raise InputError(
                f"the images to enlarge, held out or of training, are {source.image_shape}, the "
                f"run's {built.image_shape}: set config.sampling.low_resolution_images"
            )
        first = source.read(np.arange(min(most, len(source)))).image
        small = averaged(to_float(first), size)
    return built._replace(small_images=small)


def _read(path: Path, shape: tuple[int, int, int], said: str) -> np.ndarray:
    size, channels = shape[:2], shape[2]
    if path.is_dir():
        source: Any = folder(path, size, channels=channels, memory_budget=0)
    elif path.suffix.lower() == ".npz":
        source = sources.npz(path)
        if source.image_shape != shape:
            raise InputError(
                f"{said}: {path}: its images are {by(source.image_shape)}, the model's "
                f"{by(shape)}; only pictures and folders are resized"
            )
    else:
        return read_image(path, channels=channels, image_size=size)[None]
    return source.read(np.arange(len(source))).image
