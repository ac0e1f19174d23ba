"""The shipped classifiers of small grey images: their weights, checked by their hash."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load

from ddpm.data.images import check_image_shape
from ddpm.errors import InputError
from ddpm.evaluation.classifier import Classifier

FOLDER = Path(__file__).with_name("classifiers")


class Shipped(NamedTuple):
    """The contents of a weights file, and how often it is right on the test split."""

    sha256: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    accuracy: float


SHIPPED = {
    "digits": Shipped(
        "e1d72bd1c9047a0530e09edd853ef61148212c61fe53e01e490b6718038e05d7",
        (8, 8, 1),
        tuple("0123456789"),
        357 / 359,
    ),
    "fashion_mnist": Shipped(
        "43c06dc35b3540b21c6473daec1ea9fc3d63660ce8779a92106cc8c37d43efbb",
        (28, 28, 1),
        ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
         "boot"),
        0.9242,
    ),
}  # fmt: skip


def load_classifier(name: str, folder: Path = FOLDER) -> Any:
    """Returns the parameters of a shipped `Classifier`; InputError if its file is not the one
    shipped."""
    if name not in SHIPPED:
        raise InputError(f"no classifier {name!r} is shipped: there are {', '.join(SHIPPED)}")
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


def log_probability(
    name: str, image_shape: tuple[int, int, int], label: int
) -> Callable[[jax.Array], jax.Array]:
    """Returns log p(label | x_0) in nats by a shipped classifier: x_0 [B, H, W, C] in [-1, 1] ->
    [B].

    Raises InputError for a name, a shape of images or a label that it does not know.
    """
    params, shipped = load_classifier(name), SHIPPED.get(name)
    assert shipped is not None
    check_image_shape(image_shape, shipped.image_shape, f"the classifier {name!r} is for images of")
    if not 0 <= label < len(shipped.classes):
        raise InputError(
            f"the classifier {name!r} knows no class {label}: must be in "
            f"0..{len(shipped.classes) - 1}"
        )
    model = Classifier(len(shipped.classes))

    def apply(x_0: jax.Array) -> jax.Array:
        found: Any = model.apply({"params": params}, x_0)
        return jax.nn.log_softmax(found.logits)[:, label]

    return apply


def flat(params: Any) -> dict[str, np.ndarray]:
    """Parameters by their names with dots, as they are saved."""
    return {".".join(k): np.asarray(v) for k, v in flatten_dict(params).items()}
