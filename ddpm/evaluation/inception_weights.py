"""The published weights of FID's Inception from a local file, and converted to one without PyTorch:

python -m ddpm.evaluation.inception_weights pt_inception-2015-12-05-6726825d.pth OUT.safetensors
"""

import functools
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ddpm.errors import InputError, path_error
from ddpm.evaluation.inception import SIDE, Inception
from ddpm.files.atomic import write_atomically
from ddpm.files.tensors import Tensors, finite_float32, read_tensors

WHERE = (
    "the weights are pt_inception-2015-12-05-6726825d.pth, of the releases of "
    "github.com/mseitzer/pytorch-fid"
)
_LEAVES = {
    "conv.weight": ("params", "conv", "kernel"),
    "bn.weight": ("params", "bn", "scale"),
    "bn.bias": ("params", "bn", "bias"),
    "bn.running_mean": ("batch_stats", "bn", "mean"),
    "bn.running_var": ("batch_stats", "bn", "var"),
}


class Loaded(NamedTuple):
    """variables of `Inception`; sha256 of the weights, the same whatever file they come in."""

    variables: Any
    sha256: str


def load_inception(path: str | Path) -> Loaded:
    """Loads a .pth (which needs PyTorch), or a .safetensors or .npz with the tensors of the .pth.

    Raises InputError for a file that cannot be read or holds another network.
    """
    path = Path(path).expanduser()
    tensors = _checked(path, _read(path))
    digest = hashlib.sha256()
    flat = {}
    for name, place in _places().items():
        digest.update(name.encode() + tensors[name].tobytes())
        flat[place] = _turned(tensors[name])
    return Loaded(unflatten_dict(flat), digest.hexdigest())


def convert(source: str | Path, target: str | Path) -> None:
    """Writes a file of weights as .safetensors, with the same names; InputError as above."""
    from safetensors.numpy import save

    source, target = Path(source).expanduser(), Path(target).expanduser()
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: the name must end in .safetensors")
    tensors = _checked(source, _read(source))
    try:
        write_atomically(target, lambda p: p.write_bytes(save(tensors)))
    except OSError as error:
        raise path_error(error) from error


@functools.cache
def _places() -> dict[str, tuple[str, ...]]:
    """Returns where each tensor of the .pth stands in the variables, by name and in one order."""
    found = {}
    for module in sorted({place[1:-2] for place in _shapes() if place[-1] != "fc"} - {()}):
        for leaf, (collection, *rest) in _LEAVES.items():
            found[".".join((*module, leaf))] = (collection, *module, *rest)
    # Its bias is left out: the Inception score is defined without it.
    return found | {"fc.weight": ("params", "fc", "kernel")}


@functools.cache
def _shapes() -> dict[tuple[str, ...], tuple[int, ...]]:
    x = jnp.zeros((1, SIDE, SIDE, 3), jnp.float32)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), x)
    return {k: v.shape for k, v in flatten_dict(shapes).items()}


def _turned(x: np.ndarray) -> np.ndarray:
    """Converts PyTorch's order of axes to ours."""
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def _checked(path: Path, tensors: Tensors) -> Tensors:
    """Returns the network's tensors as float32; InputError for whatever is missing or wrong."""
    shapes = _shapes()
    places = _places()
    missing = [name for name in places if name not in tensors]
    if missing:
        raise InputError(
            f"{path}: not FID's Inception: {len(missing)} tensors are missing, the first "
            f"{missing[0]}; {WHERE}"
        )
    found = {}
    for name, place in places.items():
        x = tensors[name]
        if x.dtype.kind != "f" or _turned(x).shape != shapes[place]:
            raise InputError(
                f"{path}: {name} is {x.dtype}{list(x.shape)}, not that of FID's Inception (that of "
                f"torchvision is another); {WHERE}"
            )
        values = finite_float32(x)
        if values is None or (name.endswith("running_var") and values.min() < 0):
            raise InputError(f"{path}: {name} holds values that no trained network has; {WHERE}")
        found[name] = values
    return found


def _read(path: Path) -> Tensors:
    convert = (
        "pip install torch, or convert it where there is one: "
        f"python -m ddpm.evaluation.inception_weights {path.name} inception.safetensors"
    )
    return read_tensors(path, hint=WHERE, without_torch=convert)


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if len(argv) != 2:
        print(
            "usage: python -m ddpm.evaluation.inception_weights IN OUT.safetensors", file=sys.stderr
        )
        return 2
    try:
        convert(*argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{argv[1]}  weights sha256 {load_inception(argv[1]).sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
