"""Sources of images: random access over uint8 images, whatever holds them.

digits and npz make sources; so do folder and tfds, in modules of their own.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from ddpm.data import cache
from ddpm.data.images import Transparency, crop_and_resize
from ddpm.errors import InputError, first_line, listed
from ddpm.files.arrays import npz_headers, read_npz
from ddpm.files.progress import doing

MEMORY_BUDGET = 4 * 2**30  # bytes of decoded images; a larger set is decoded at each use
_BLOCK = 512  # images decoded between two writes to the cache


class Examples(NamedTuple):
    """image: uint8[n, H, W, C]; label: int32[n], or None where there are none."""

    image: np.ndarray
    label: np.ndarray | None


class Source(Protocol):
    """Images by index. `read` gives new arrays, in the order of the indices."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...  # height, width, channels
    @property
    def num_classes(self) -> int | None: ...
    def __len__(self) -> int: ...
    def read(self, indices: np.ndarray) -> Examples: ...


@dataclass(frozen=True)
class ArraySource:
    """A source that has its images in memory, or in a memory map."""

    image: np.ndarray  # uint8[n, H, W, C]
    label: np.ndarray | None  # int32[n]
    num_classes: int | None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.image.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.image)

    def read(self, indices: np.ndarray) -> Examples:
        return Examples(self.image[indices], None if self.label is None else self.label[indices])


@dataclass(frozen=True)
class EncodedSource:
    """A source that decodes its images at each read, by threads where there are cores for them.

    fetch(indices) gives what decode takes, one for each index, and the labels, int32[n] or None.
    """

    image_shape: tuple[int, int, int]
    num_classes: int | None
    length: int
    fetch: Callable[[np.ndarray], tuple[Sequence[Any], np.ndarray | None]]
    decode: Callable[[Any], np.ndarray]

    def __len__(self) -> int:
        return self.length

    def read(self, indices: np.ndarray) -> Examples:
        encoded, label = self.fetch(indices)
        return Examples(np.stack(list(mapped(self.decode, encoded))), label)


def digits(split: str = "all") -> ArraySource:
    """Returns the 1797 handwritten digits of UCI, 8x8 grey pixels, embedded (see DIGITS.md); 10
    classes.

    The split 'test' is every fifth of each class, 'train' the others. Raises InputError for any
    other.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        image, label = file["images"], file["labels"]
    test = np.zeros(len(image), bool)
    test[np.argsort(label, kind="stable")[4::5]] = True  # in their order, 4 and 9 would be most
    splits = {"train": ~test, "test": test, "all": np.ones_like(test)}
    if split not in splits:
        raise InputError(f"digits has no split {split!r}: choose one of {', '.join(splits)}")
    pixels = np.rint(image[splits[split], :, :, None] * (255 / 16)).astype(np.uint8)
    return ArraySource(pixels, label[splits[split]].astype(np.int32), 10)


def resized(source: ArraySource, size: tuple[int, int]) -> ArraySource:
    """Returns the images cropped and resized to (height, width), as `crop_and_resize` does."""
    images = []
    for image in source.image:
        flat = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        images.append(np.asarray(crop_and_resize(flat, size), np.uint8))
    found = np.stack(images).reshape(len(images), *size, -1)
    return dataclasses.replace(source, image=found)


def npz(path: str | Path, split: str = "") -> ArraySource:
    """Returns the arrays of an .npz: images, uint8[n, H, W] or [n, H, W, 1 or 3]; labels,
    integers[n].

    The names may be images and labels, image and label, arr_0 and arr_1, or, with a split,
    x_<split> and y_<split>; labels may be missing. Raises InputError naming what was found.
    """
    path = Path(path).expanduser()
    with _plain_arrays(path):
        headers = npz_headers(path)
    names = [("images", "labels"), ("image", "label"), ("arr_0", "arr_1")]
    if split:
        names = [(f"x_{split}", f"y_{split}")]
    found = listed([f"{name}: {header}" for name, header in headers.items()]) or "nothing"
    pair = next(((i, j) for i, j in names if i in headers), None)
    if pair is None:
        wanted = " or ".join(i for i, _ in names)
        raise InputError(
            f"{path}: there is no array {wanted} (of images, uint8[n, height, width, channels]); "
            f"it holds {found}" + ("; data.split chooses x_<split>" if not split else "")
        )
    of_image, of_label = headers[pair[0]], headers.get(pair[1])
    shape = of_image.shape if len(of_image.shape) != 3 else (*of_image.shape, 1)
    right = of_image.dtype == np.uint8 and len(shape) == 4 and shape[-1] in (1, 3)
    if not right or not all(shape):
        raise InputError(
            f"{path}: {pair[0]} must be uint8 (0..255) of shape [n, height, width] or "
            f"[n, height, width, 1 or 3], channels last; it holds {found}"
        )
    if of_label is None:
        with _plain_arrays(path):
            (image,) = read_npz(path, [of_image])
        return ArraySource(_contiguous(image), None, None)
    if of_label.shape != shape[:1] or of_label.dtype.kind not in "iu":
        raise InputError(f"{path}: {pair[1]} must be integers >= 0, [n]; it holds {found}")
    with _plain_arrays(path):
        image, label = read_npz(path, [of_image, of_label])
    if label.min() < 0 or label.max() >= np.iinfo(np.int32).max:
        raise InputError(
            f"{path}: {pair[1]} holds {label.min()}..{label.max()}: labels must be in 0..2^31 - 2"
        )
    return ArraySource(_contiguous(image), label.astype(np.int32), int(label.max()) + 1)


@contextlib.contextmanager
def _plain_arrays(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # not a zip, cut short, an .npy, pickled objects, ..
        raise InputError(
            f"{path}: cannot be read as an .npz of plain arrays ({first_line(error)})"
        ) from error


def _contiguous(image: np.ndarray) -> np.ndarray:
    """Returns images with an axis of channels, in C order."""
    image = np.ascontiguousarray(image)
    return image if image.ndim == 4 else image[..., None]


def decoded_once(
    source: Source,
    name: str,
    key: Mapping[str, Any],
    memory_budget: int,
    transparency: Transparency | None = None,
) -> Source:
    """Returns the same source over a memory-mapped cache of its decoded images, if within the
    budget.

    `transparency`, which decoding reports, is reported of cached images too.
    """
    if len(source) * int(np.prod(source.image_shape)) > memory_budget:
        return source

    def blocks() -> Iterator[cache.Arrays]:
        for indices in in_blocks(len(source), name):
            image, label = source.read(indices)
            yield {"image": image} if label is None else {"image": image, "label": label}
        if transparency is not None:
            yield {"transparent": np.array([transparency.seen])}

    arrays = cache.cached(name, key, blocks)
    if arrays is None:
        return source
    if transparency is not None and arrays["transparent"].any():
        transparency()
    return ArraySource(arrays["image"], arrays.get("label"), source.num_classes)


def in_blocks(n: int, name: str) -> Iterator[np.ndarray]:
    """Yields range(n) in blocks, and shows how far it is."""
    with doing(f"decoding {name}", total=n) as bar:
        for start in range(0, n, _BLOCK):
            indices = np.arange(start, min(start + _BLOCK, n))
            yield indices
            bar.update(len(indices))


def mapped(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    """Applies a function to all items in order, by threads where there are cores for them."""
    pool = _pool()
    return map(function, items) if pool is None else pool.map(function, items)


@functools.cache
def _pool() -> ThreadPoolExecutor | None:
    """Returns None on one or two cores, where threads only get in each other's way."""
    cores = os.cpu_count() or 1
    return ThreadPoolExecutor(min(cores, 16), "ddpm-decode") if cores > 2 else None
