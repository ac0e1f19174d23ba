"""Input pictures of a mode: files, a folder, or an .npz; and the images to enlarge."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm.build.conditioning import small_size
from ddpm.build.data import decoding, held_out
from ddpm.build.data import source as data_source
from ddpm.build.experiment import Experiment
from ddpm.data import sources
from ddpm.data.folders import folder, list_images
from ddpm.data.images import Transparency, check_image_shape, read_image
from ddpm.diffusion.network_inputs import averaged
from ddpm.diffusion.pixels import to_float
from ddpm.errors import InputError


def pictures_at(
    given: str, said: str, how: Mapping[str, Any]
) -> Callable[[tuple[int, int, int]], np.ndarray]:
    """Returns a function from [H, W, C] to the pictures named by `given`, uint8[n, H, W, C].

    `how` is the decoding of `ddpm.build.data`. Raises InputError, which begins with the flag or key
    `said`, at once for a missing file.
    """
    paths = existing(given, said)
    transparency = Transparency(said, how["background"])

    def read(shape: tuple[int, int, int]) -> np.ndarray:
        return np.concatenate([_read(path, shape, said, how, transparency) for path in paths])

    return read


class Named(NamedTuple):
    """Pictures by name, a path without suffix: `read` takes a number and the channels, and returns
    a picture of any size, uint8[H, W, C]."""

    names: list[Path]
    read: Callable[[int, int], np.ndarray]


def named_pictures(given: str, said: str, how: Mapping[str, Any]) -> Named:
    """Returns the pictures of files FILE[,FILE..], a folder, or an .npz, in their own sizes.

    Raises InputError, which begins with the flag or key `said`, for what is not there.
    """
    places = existing(given, said)
    transparency = Transparency(said, how["background"])
    found: list[tuple[Path, Callable[[int], np.ndarray]]] = []
    for path in places:
        if path.suffix.lower() == ".npz":
            source = sources.npz(path)
            for i in range(len(source)):
                one = functools.partial(_of_source, source, i, path)
                found.append((Path(f"{path.stem}_{i:05}"), one))
            continue
        files = [(path / f, f) for f in list_images(path)] if path.is_dir() else [(path, path.name)]
        for file, name in files:
            read = functools.partial(_whole, file, transparency, how)
            found.append((Path(name).with_suffix(""), read))
    return Named([name for name, _ in found], lambda i, channels: found[i][1](channels))


def _whole(
    file: Path, transparency: Transparency, how: Mapping[str, Any], channels: int
) -> np.ndarray:
    return read_image(file, channels=channels, image_size=None, transparent=transparency, **how)


def _of_source(source: Any, number: int, path: Path, channels: int) -> np.ndarray:
    image: np.ndarray = source.read(np.asarray([number])).image[0]
    if image.shape[-1] != channels:
        raise InputError(
            f"{path}: its images have {image.shape[-1]} channels, the model's {channels}"
        )
    return image


def existing(given: str, said: str) -> list[Path]:
    """Returns the paths of FILE[,FILE..] or a folder; InputError for one that is not there."""
    paths = [Path(p).expanduser() for p in ([given] if Path(given).exists() else given.split(","))]
    for path in paths:
        if not path.exists():
            raise InputError(f"{said}: {path}: there is no such file or folder")
    return paths


def by(shape: tuple[int, ...]) -> str:
    """Returns (8, 8, 1) as '8x8x1'."""
    return "x".join(map(str, shape))


def with_small_images(built: Experiment, most: int) -> Experiment:
    """Returns the experiment with the images to enlarge, at most `most`; unchanged for a model
    without super-resolution.

    They are config.sampling.low_resolution_images; if empty, the first images of the held-out data,
    or without any of the training data, averaged down. Raises InputError for unreadable files.
    """
    config = built.config
    if not config.model.low_resolution:
        return built
    size = small_size(config, built.image_shape)
    given = config.sampling.low_resolution_images
    if given:
        said = "config.sampling.low_resolution_images"
        read = pictures_at(given, said, decoding(config))
        small = to_float(read((*size, built.image_shape[-1]))[:most])
    else:
        source = held_out(config) or data_source(config)
        check_image_shape(
            source.image_shape,
            built.image_shape,
            "the run is on images of",
            "those to enlarge, held out or of training, are",
            advice=": set config.sampling.low_resolution_images",
        )
        first = source.read(np.arange(min(most, len(source)))).image
        small = averaged(to_float(first), size)
    return built._replace(small_images=small)


def _read(
    path: Path,
    shape: tuple[int, int, int],
    said: str,
    how: Mapping[str, Any],
    transparency: Transparency,
) -> np.ndarray:
    size, channels = shape[:2], shape[2]
    if path.is_dir():
        source: Any = folder(path, size, channels=channels, memory_budget=0, **how)
    elif path.suffix.lower() == ".npz":
        source = sources.npz(path)
        check_image_shape(
            source.image_shape,
            shape,
            f"{said}: the model is for images of",
            f"those of {path} are",
            advice="; only pictures and folders are resized",
        )
    else:
        return read_image(
            path, channels=channels, image_size=size, transparent=transparency, **how
        )[None]
    return source.read(np.arange(len(source))).image
