"""Files of tensors by name, in every format that weights come in; none of their code is run."""

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm.errors import InputError, first_line
from ddpm.files.arrays import npz_headers, read_npz
from ddpm.files.reading import check_file, check_fits, read_json

Tensors = dict[str, np.ndarray]

_POINTER = b"version https://git-lfs"  # what git leaves in a file's place without git-lfs


def read_tensors(
    path: Path, *, hint: str = "", without_torch: str = "pip install torch"
) -> Tensors:
    """Reads the tensors of a .safetensors or .npz, or of a .pth, .ckpt or .bin, which need PyTorch.

    Raises InputError for a file that is missing, cut short, mislabelled, or that would run code;
    `hint` ends its text.
    """
    end = f"; {hint}" if hint else ""
    check_file(path, hint=hint)
    if path.suffix not in READERS:
        raise InputError(f"{path}: the name must end in one of {', '.join(READERS)}{end}")
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError("it only points to the file: fetch that with git lfs pull")
        return READERS[path.suffix](path)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: a {path.suffix} is read by PyTorch: {without_torch}") from error
    except Exception as error:  # cut short, mislabelled, pickled code: each reader has its own
        raise InputError(
            f"{path}: cannot be read as {path.suffix} ({first_line(error)}){end}"
        ) from error


def read_sharded(index: Path) -> Tensors:
    """Reads tensors that are in several files, by the index of names to files that lies next to
    them, as `diffusers` writes it; InputError as above, and where the two do not agree."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise InputError(f"{index}: there is no weight_map, of tensors to files next to it")
    files = sorted(set(places.values()))
    if foreign := [f for f in files if os.path.basename(f) != f]:
        raise InputError(f"{index}: names {foreign[0]!r}, which is no file next to it")
    if missing := [f for f in files if not os.path.isfile(index.parent / f)]:
        raise InputError(
            f"{index}: {len(missing)} of its {len(files)} files are not next to it, the first "
            f"{missing[0]}: fetch them"
        )
    found: Tensors = {}
    for file in files:
        tensors = read_tensors(index.parent / file)
        wanted = {name for name, place in places.items() if place == file}
        if others := sorted(tensors.keys() ^ wanted):
            raise InputError(
                f"{index.parent / file}: its tensors are not those that {index.name} says, the "
                f"first {others[0]}: fetch both anew"
            )
        found |= tensors
    return found


def finite_float32(x: np.ndarray) -> np.ndarray | None:
    """Returns an array as float32, in C order; None where a value is not finite, or beyond that."""
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(x, np.float32)
    return found if np.isfinite(found).all() else None


def sha256(tensors: Tensors) -> str:
    """Returns the digest of names and values in the order of the names: the same whatever file they
    come in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    check_fits(path, path.stat().st_size)
    return load_file(path)


def _npz(path: Path) -> Tensors:
    headers = npz_headers(path)
    return dict(zip(headers, read_npz(path, headers.values()), strict=True))


def _torch(path: Path) -> Tensors:
    import torch

    size = path.stat().st_size
    if zipfile.is_zipfile(path):  # whose members PyTorch unpacks
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    check_fits(path, size)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles by other protocols
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's own text says how to run the code
        raise ValueError("it is no file of tensors by PyTorch, or has code in it") from error
    named = isinstance(found, dict) and all(
        isinstance(name, str) and torch.is_tensor(x) for name, x in found.items()
    )
    if not named:
        raise ValueError("it does not hold tensors by name")
    found = {name: tensor.detach() for name, tensor in found.items()}
    check_fits(path, 4 * sum(x.numel() for x in found.values()))  # views may be of few values
    # NumPy has no bfloat16.
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in found.items()
    }


READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": _safetensors,
    ".npz": _npz,
    ".pth": _torch,
    ".ckpt": _torch,
    ".bin": _torch,
}
