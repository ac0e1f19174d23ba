"""Features and class probabilities of images, by a network, in batches split over the devices.

Those of a data set are computed once and kept in the cache.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm.data import cache
from ddpm.data.images import check_image_shape
from ddpm.data.pipeline import evaluation_batches
from ddpm.data.sources import Source
from ddpm.diffusion.pixels import to_float
from ddpm.evaluation.classifier import Classifier
from ddpm.evaluation.inception import Inception, preprocess
from ddpm.evaluation.inception_weights import load_inception
from ddpm.evaluation.shipped import SHIPPED, load_classifier
from ddpm.files.progress import doing
from ddpm.training import sharding


class Features(NamedTuple):
    """vectors float32[n, d]; probabilities of the classes, float32[n, classes]."""

    vectors: np.ndarray
    probabilities: np.ndarray


class Network(NamedTuple):
    """A network that gives features: apply(params, images uint8[n, H, W, C]) -> (vectors,
    probabilities).

    `key` names the network and its weights for the cache; `classes` are named where they are few.
    """

    name: str
    classes: tuple[str, ...]
    key: dict[str, Any]
    params: Any
    apply: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]


def of_classifier(name: str, image_shape: tuple[int, int, int]) -> Network:
    """Returns a shipped classifier. InputError for images of another shape than its own."""
    params = load_classifier(name)
    shipped = SHIPPED[name]
    check_image_shape(
        image_shape,
        shipped.image_shape,
        f"the classifier {name!r} is for images of",
        advice="; see config.evaluation.features",
    )
    model = Classifier(len(shipped.classes))

    def apply(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found: Any = model.apply({"params": params}, to_float(images))
        return found.features, jax.nn.softmax(found.logits)

    key = {"network": f"classifier {name}", "sha256": shipped.sha256}
    return Network(name, shipped.classes, key, params, apply)


def of_inception(path: str | Path, resize: str) -> Network:
    """Returns FID's Inception by a local file of its weights; InputError where that is not one."""
    loaded = load_inception(path)

    def apply(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        found: Any = Inception().apply(variables, preprocess(images, resize))
        return found.pool, jax.nn.softmax(found.logits)

    key = {"network": "inception", "sha256": loaded.sha256, "resize": resize}
    return Network("inception", (), key, loaded.variables, apply)


class Extractor:
    """A network over the devices, for any number of images."""

    def __init__(self, network: Network, mesh: Mesh, *, batch_size: int) -> None:
        self.network = network
        self.batch_size = sharding.rounded_up(batch_size, mesh)
        self._mesh = mesh
        self._params = jax.device_put(network.params, sharding.replicated(mesh))
        self._apply = jax.jit(network.apply)

    def __call__(self, images: np.ndarray) -> Features:
        """Returns the features of images uint8[n, H, W, C]."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            part = images[start : start + self.batch_size]
            filled = np.resize(part, (self.batch_size, *part.shape[1:]))
            found = self._apply(self._params, sharding.to_devices(self._mesh, filled))
            parts.append([np.asarray(x)[: len(part)] for x in found])
        return Features(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def of_source(extractor: Extractor, source: Source, about: Mapping[str, Any]) -> Features:
    """Returns the features of all images of a source in order, memory-mapped from the cache if it
    has them.

    `about` says which data they are (set, split, size); with the network, their number and a digest
    of 64 of them it makes the cache's key.
    """
    places = np.linspace(0, len(source) - 1, min(64, len(source))).astype(int)
    digest = hashlib.sha256(source.read(places).image.tobytes()).hexdigest()
    key = {"data": dict(about), "images": len(source), "digest": digest, **extractor.network.key}

    def blocks() -> Iterator[cache.Arrays]:
        with doing("features", total=len(source)) as bar:
            for batch in evaluation_batches(source, extractor.batch_size):
                found = extractor(batch.examples.image[batch.mask])
                yield {"vectors": found.vectors, "probabilities": found.probabilities}
                bar.update(len(found.vectors))

    arrays = cache.cached(f"features-{extractor.network.name}", key, blocks)
    if arrays is None:
        parts = list(blocks())
        arrays = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return Features(arrays["vectors"], arrays["probabilities"])


def of_samples(extractor: Extractor, batches: Iterable[np.ndarray]) -> Features:
    """Returns the features of samples that come in batches uint8[n, H, W, C]."""
    parts = [extractor(images) for images in batches]
    return Features(*(np.concatenate(x) for x in zip(*parts, strict=True)))
