"""Files of tensors by name, in every format that weights come in; none of their code is run."""

import hashlib
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ddpm.errors import InputError, first_line

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
    if not path.is_file():
        raise InputError(f"{path}: there is no such file{end}")
    if path.suffix not in READERS:
        raise InputError(f"{path}: the name must end in one of {', '.join(READERS)}{end}")
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError("it only points to the file: fetch that with git lfs pull")
        return READERS[path.suffix](path)
    except ImportError as error:
        raise InputError(f"{path}: a {path.suffix} is read by PyTorch: {without_torch}") from error
    except Exception as error:  # cut short, mislabelled, pickled code: each reader has its own
        raise InputError(
            f"{path}: cannot be read as {path.suffix} ({first_line(error)}){end}"
        ) from error


def sha256(tensors: Tensors) -> str:
    """Returns the digest of names and values in the order of the names: the same whatever file they
    come in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _safetensors(path: Path) -> Tensors:
    from safetensors.numpy import load_file

    return load_file(path)


def _npz(path: Path) -> Tensors:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _torch(path: Path) -> Tensors:
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles by other protocols
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # PyTorch's own text says how to run the code
        raise ValueError("it is no file of tensors by PyTorch, or has code in it") from error
    if not isinstance(found, dict) or not all(torch.is_tensor(x) for x in found.values()):
        raise ValueError("it does not hold tensors by name")
    found = {name: tensor.detach() for name, tensor in found.items()}
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
