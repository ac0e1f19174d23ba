"""A folder of images as a source."""

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddpm.data import cache
from ddpm.data.images import MAX_PIXELS, Transparency, checked_size, extensions, read_image
from ddpm.data.sources import MEMORY_BUDGET, EncodedSource, Source, decoded_once, in_blocks, mapped
from ddpm.errors import InputError

_log = logging.getLogger(__name__)


def folder(
    path: str | Path,
    image_size: tuple[int, int] | None = None,
    *,
    channels: int = 3,
    broken: str = "error",
    background: str = "white",
    max_pixels: int = MAX_PIXELS,
    memory_budget: int = MEMORY_BUDGET,
) -> Source:
    """Returns the images below a folder, of any size and format that Pillow reads, in order of
    their path.

    Each is cropped and resized to image_size (height, width), or, without it, must be as large as
    the first. channels is 1 or 3. Where every image is in a sub-folder, the outermost ones, in
    order of their names, are the classes. Hidden files and links to folders above are left out.
    A broken image, or one of more than max_pixels, is an error, or, with broken='skip', left out
    with one line in the log. Transparency is composited on the background, a colour of Pillow's,
    and one line in the log says so.
    Decoded images are cached on disk if they fit the budget (bytes), else decoded at each use.
    Raises InputError.
    """
    if channels not in (1, 3):
        raise InputError(f"channels = {channels}: must be 1 or 3")
    if broken not in ("error", "skip"):
        raise InputError(f"broken = {broken!r}: must be 'error' or 'skip'")
    image_size = checked_size(image_size)
    root = Path(path).expanduser()
    files = list_images(root)
    read = functools.partial(
        read_image, channels=channels, background=background, max_pixels=max_pixels
    )
    key = {"channels": channels, "size": image_size, "files": _fingerprint(root, files)}
    key |= {"background": background, "max_pixels": max_pixels}
    classes = sorted({f.parts[0] for f in files}) if all(f.parts[1:] for f in files) else None
    if broken == "skip":
        files = _readable(root, files, key, read)
    transparency = Transparency(root, background)
    first = read(root / files[0], image_size=image_size).shape
    height, width, _ = first

    def decode(file: Path) -> np.ndarray:
        image = read(root / file, image_size=image_size, transparent=transparency)
        if image.shape != first:
            raise InputError(
                f"{root / file} is {image.shape[0]}x{image.shape[1]} (height x width), "
                f"{root / files[0]} is {height}x{width}: set image_size to bring them to one size"
            )
        return image

    label = None
    if classes is not None:
        number = {name: i for i, name in enumerate(classes)}
        label = np.array([number[f.parts[0]] for f in files], np.int32)
    source = EncodedSource(
        image_shape=(height, width, channels),
        num_classes=len(classes) if classes is not None else None,
        length=len(files),
        fetch=lambda i: ([files[j] for j in i], None if label is None else label[i]),
        decode=decode,
    )
    key |= {"broken": broken}
    return decoded_once(source, root.resolve().name, key, memory_budget, transparency)


def list_images(root: Path) -> list[Path]:
    """Returns the images below root, relative to it and sorted; at least one."""
    if not root.is_dir():
        kind = "is not a folder" if root.exists() else "there is no such folder"
        raise InputError(f"{root}: {kind}; data.path must name a folder of images")
    known, files, others = extensions(), [], 0
    ancestors = {str(root): {os.path.realpath(root)}}  # of each folder, and itself
    for place, folders, names in os.walk(root, followlinks=True):
        above, below = ancestors.pop(place), {}
        for f in sorted(folders):
            real = os.path.realpath(os.path.join(place, f))
            if not f.startswith(".") and real not in above:  # a link may lead back up
                below[f] = ancestors[os.path.join(place, f)] = above | {real}
        folders[:] = below
        here = [Path(place, n).relative_to(root) for n in names if not n.startswith(".")]
        files += [f for f in here if f.suffix.lower() in known]
        others += sum(f.suffix.lower() not in known for f in here)
    if not files:
        raise InputError(
            f"{root}: no images there or in its sub-folders ({others} other files); images are "
            "known by their extension: .png, .jpg, .webp and what else Pillow reads"
        )
    return sorted(files)


def _fingerprint(root: Path, files: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed or written."""
    digest = hashlib.sha256(os.fsencode(root.resolve()))
    for file in files:
        size, changed = -1, -1
        with contextlib.suppress(OSError):  # a broken link: reading it says so
            stat = (root / file).stat()
            size, changed = stat.st_size, stat.st_mtime_ns
        digest.update(os.fsencode(f"\0{file}\0{size}\0{changed}"))
    return digest.hexdigest()


def _readable(
    root: Path, files: list[Path], key: Mapping[str, Any], read: Callable[..., np.ndarray]
) -> list[Path]:
    """Returns the files without the broken ones, found by decoding all, once, and reported."""

    def error(file: Path) -> str:
        try:
            read(root / file, image_size=None)
            return ""
        except InputError as broken:
            return str(broken)

    def blocks() -> Iterator[cache.Arrays]:
        for indices in in_blocks(len(files), "(a check)"):
            yield {"good": np.array([not e for e in mapped(error, [files[i] for i in indices])])}

    arrays = cache.cached(f"{root.resolve().name}-readable", {**key, "readable": True}, blocks)
    good = np.concatenate([b["good"] for b in blocks()]) if arrays is None else arrays["good"]
    if good.all():
        return files
    first = files[int(np.argmin(good))]
    count = f"{(~good).sum()} of {len(files)} images are broken"
    if not good.any():
        raise InputError(f"{root}: {count}, the first: {error(first)}")
    _log.warning("%s: %s and left out, the first: %s", root, count, error(first))
    return [f for f, g in zip(files, good, strict=True) if g]
