"""The shipped classifiers of small grey images: their weights, checked by their hash."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load

from ddpm.errors import InputError

FOLDER = Path(__file__).with_name("classifiers")


class Shipped(NamedTuple):
    """What a weights file holds, and how often it is right on the test split."""

    sha256: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    accuracy: float


SHIPPED = {
    "digits": Shipped(
        "403f8c797042fb392c316ee15cc57984140448c1698cd4130d927d8f25679773",
        (8, 8, 1),
        tuple("0123456789"),
        355 / 359,
    ),
}  # fmt: skip


def load_classifier(name: str, folder: Path = FOLDER) -> Any:
    """The parameters of a shipped `Classifier`; InputError if its file is not the one shipped."""
    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); install ddpm anew") from error
    if hashlib.sha256(data).hexdigest() != SHIPPED[name].sha256:
        raise InputError(
            f"{path}: not the file that was shipped (its sha256 differs); install ddpm anew"
        )
    return unflatten_dict({tuple(k.split(".")): v for k, v in load(data).items()})


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by their names with dots, as they are saved."""
    return {".".join(k): np.asarray(v) for k, v in flatten_dict(params).items()}
