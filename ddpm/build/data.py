"""Config -> data."""

from typing import Any

from ml_collections import ConfigDict

from ddpm.data import sources
from ddpm.data.folders import folder
from ddpm.data.sources import Source
from ddpm.data.tfds_sets import tfds
from ddpm.errors import InputError

BROKEN_IMAGES = ("error", "skip")
ON_DEVICE = ("auto", "always", "never")


def _folder(config: ConfigDict) -> Source:
    d = config.data
    if not d.image_size:
        raise InputError("config.data.image_size = (): a folder needs (height, width)")
    if d.split:
        raise InputError(
            f"config.data.split = {d.split!r}: a folder has no splits; name the folder of the "
            "split with config.data.path"
        )
    size, how = tuple(d.image_size), decoding(config)
    return folder(d.path, size, channels=d.channels, broken=d.broken_images, **how)


def _tfds(config: ConfigDict) -> Source:
    d = config.data
    size = tuple(d.image_size) or None
    return tfds(d.name, d.split or "train", d.path or None, size, **decoding(config))


def decoding(config: ConfigDict) -> dict[str, Any]:
    """Returns how picture files are decoded, as options of `read_image` and the sources."""
    return {"background": config.data.background, "max_pixels": config.data.max_pixels}


# Sets with a name of their own; any other is one of tfds. make(config) -> Source
SOURCES = {
    "digits": lambda config: sources.digits(config.data.split or "train"),
    "npz": lambda config: sources.npz(config.data.path, config.data.split),
    "folder": _folder,
}


def source(config: ConfigDict) -> Source:
    """Returns the training data by name: 'digits', 'folder', 'npz', or any image set of tfds."""
    d = config.data
    if d.name in ("folder", "npz") and not d.path:
        raise InputError(
            f"config.data.path is empty: name the {d.name} with --config.data.path=..."
        )
    found = SOURCES.get(d.name, _tfds)(config)
    size = tuple(d.image_size)
    if size and size != found.image_shape[:2]:
        raise InputError(
            f"config.data.image_size = {size}: those of {d.name} are {found.image_shape[:2]}, and "
            "only folders and tfds' sets are resized"
        )
    return found


def held_out(config: ConfigDict) -> Source | None:
    """Returns the data that are not trained on, by evaluation.split and .path; None for neither."""
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


def foreign(config: ConfigDict, image_shape: tuple[int, int, int]) -> Source:
    """Returns the data set that config.evaluation.foreign names, its held-out split (or 'test'),
    cropped and resized to the images' shape. Raises InputError for one that has another number of
    channels, or no name."""
    name = config.evaluation.foreign
    if name in ("folder", "npz"):
        raise InputError(
            f"config.evaluation.foreign = {name!r}: must be 'digits' or an image set of tfds"
        )
    other, size = config.copy_and_resolve_references(), image_shape[:2]
    path = "" if config.data.name in ("folder", "npz") else config.data.path
    split = config.evaluation.split or "test"
    other.data.update(name=name, path=path, split=split, image_size=size)
    try:
        digits = name == "digits"
        found = sources.resized(sources.digits(split), size) if digits else source(other)
    except InputError as error:
        raise InputError(f"{error} (of config.evaluation.foreign = {name!r})") from error
    if found.image_shape[2] != image_shape[2]:
        raise InputError(
            f"config.evaluation.foreign = {name!r}: its images have {found.image_shape[2]} "
            f"channels, the model's {image_shape[2]}: name another set"
        )
    return found


def check_labels(config: ConfigDict, source: Source) -> None:
    """Raises InputError for a model with labels where the data have none, or other classes."""
    wanted, there = config.model.num_classes, source.num_classes
    if wanted and wanted != there:
        has = "no labels" if there is None else f"{there} classes"
        raise InputError(
            f"config.model.num_classes = {wanted}: the data set {config.data.name!r} has {has}; "
            f"set it to {there or 0}" + (", or to 0 to learn without labels" if there else "")
        )
