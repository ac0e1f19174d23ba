"""Sources of images, and the one pipeline over them.

source = ddpm.data.tfds("cifar10", "train")
batch = ddpm.data.train_batch(source, seed=0, step=step, batch_size=128, flip=True)
x_0 = ddpm.data.to_float(batch.image)
"""

from ddpm.data.folders import folder
from ddpm.data.pipeline import (
    EvaluationBatch,
    batch_indices,
    evaluation_batches,
    prefetch,
    train_batch,
)
from ddpm.data.sources import ArraySource, EncodedSource, Examples, Source, digits, npz
from ddpm.data.tfds_sets import tfds
from ddpm.diffusion.pixels import to_float, to_uint8

__all__ = [
    "ArraySource",
    "EncodedSource",
    "EvaluationBatch",
    "Examples",
    "Source",
    "batch_indices",
    "digits",
    "evaluation_batches",
    "folder",
    "npz",
    "prefetch",
    "tfds",
    "to_float",
    "to_uint8",
    "train_batch",
]
