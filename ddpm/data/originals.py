"""The original files of MNIST, Fashion-MNIST and CIFAR, read for tfds without TensorFlow."""

import gzip
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
from PIL import Image

_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def without_tensorflow(official: Any) -> Any | None:
    """Returns tfds' own builder class with other readers of the original files; None where there
    are none.

    tfds extracts archives, and encodes arrays as PNG, by TensorFlow; it takes PIL images as they
    are. Everything else is inherited. `urls(builder)` are the files that it downloads.
    """
    if official.name in ("mnist", "fashion_mnist"):
        urls, splits = _mnist_urls, _mnist_splits
    elif official.name in ("cifar10", "cifar100"):
        urls, splits = _cifar_urls, _cifar_splits
    else:
        return None

    class Free(official, skip_registration=True):  # type: ignore[call-arg]
        name = official.name
        url_infos = official.url_infos  # tfds looks next to the class, where there are none

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            wanted = urls(self)
            return splits(self, {file_name(u): p for u, p in dl_manager.download(wanted).items()})

    Free.urls = staticmethod(lambda builder: list(urls(builder).values()))
    return Free


def _mnist_urls(builder: Any) -> dict[str, str]:
    return {f: urljoin(builder.URL, f) for pair in _MNIST_FILES.values() for f in pair}


def _mnist_splits(builder: Any, files: Mapping[str, Path]) -> dict[str, Any]:
    return {s: _mnist_examples(files[i], files[j]) for s, (i, j) in _MNIST_FILES.items()}


def _mnist_examples(images: Path, labels: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, (image, label) in enumerate(zip(_idx(images), _idx(labels), strict=True)):
        yield index, {"image": Image.fromarray(image), "label": int(label)}


def _idx(path: Path) -> np.ndarray:
    """Reads an IDX file: two zeros, the dtype (8: uint8), the number of axes, their lengths, the
    data."""
    data = gzip.decompress(Path(path).read_bytes())
    if data[:3] != b"\0\0\x08":
        raise EOFError(f"{path} is not a gzipped IDX file of bytes")
    axes = data[3]
    shape = np.frombuffer(data, ">u4", axes, 4)
    return np.frombuffer(data, np.uint8, int(shape.prod()), 4 + 4 * axes).reshape(shape)


def _cifar_urls(builder: Any) -> dict[str, str]:
    return {"archive": builder._cifar_info.url}


def _cifar_splits(builder: Any, files: Mapping[str, Path]) -> dict[str, Any]:
    info = builder._cifar_info
    (archive,) = files.values()
    with tarfile.open(archive) as tar:
        for key, file in zip(info.label_keys, info.label_files, strict=True):
            names = _member(tar, info.prefix + file).decode().split("\n")
            builder.info.features[key].names = [n for n in names if n]
    return {
        "train": _cifar_examples(archive, info, info.train_files, "train_"),
        "test": _cifar_examples(archive, info, info.test_files, "test_"),
    }


def _cifar_examples(
    archive: Path, info: Any, files: list[str], prefix: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records of one byte for each kind of label, then 32x32 red, green and blue pixels."""
    kinds = len(info.label_keys)
    index = 0
    with tarfile.open(archive) as tar:
        for file in files:
            data = np.frombuffer(_member(tar, info.prefix + file), np.uint8)
            for record in data.reshape(-1, kinds + 3072):
                pixels = record[kinds:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield (
                    index,
                    {
                        **dict(zip(info.label_keys, record[:kinds].tolist(), strict=True)),
                        "id": f"{prefix}{index:05d}",
                        "image": Image.fromarray(np.ascontiguousarray(pixels)),
                    },
                )
                index += 1


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise EOFError(f"the archive has no file {name}")
    return file.read()


def file_name(url: str) -> str:
    """Returns the last part of a URL, by which a user knows the file."""
    return Path(urlsplit(url).path).name
