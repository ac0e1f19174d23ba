"""Samples against data, by features of both: every distance, and its floor of data against data."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ddpm.evaluation import distances
from ddpm.evaluation.features import Features

MOST_PAIRED = 10_000  # of each set, for what compares all pairs
BLOCK = 4096


def compare(data: Features, samples: Features) -> dict[str, float]:
    """Returns every distance between two sets of features; the Inception score is of the samples
    alone.

    What compares pairs takes subsets, by one seed.

    Raises ValueError for features that are not finite, or too few.
    """
    rng = np.random.default_rng(0)
    a, b = _some(data.vectors, MOST_PAIRED, rng), _some(samples.vectors, MOST_PAIRED, rng)
    n = min(len(a), len(b))
    kid = distances.kernel_distance(a, b)
    near, wide = distances.overlap(a, b, k=3), distances.overlap(a, b, k=5)
    return {
        "frechet_distance": distances.frechet_distance(
            distances.moments(blocks(data.vectors)), distances.moments(blocks(samples.vectors))
        ),
        "kernel_distance": kid.value,
        "precision": near.precision,
        "recall": near.recall,
        "density": wide.density,
        "coverage": wide.coverage,
        "two_sample_accuracy": distances.two_sample_accuracy(a[:n], b[:n]),
        "inception_score": distances.inception_score(samples.probabilities).value,
        "class_distance": float(0.5 * np.abs(np.subtract(shares(data), shares(samples))).sum()),
    }


class Floor(NamedTuple):
    """The distances of real images in place of samples: which images, how many, every distance."""

    of: str
    images: int
    values: dict[str, float]


def floor(data: Features, held_out: Features | None, most: int) -> Floor:
    """Returns the distances of at most `most` held-out images to the data; without any, of one half
    of the data to the other, by one seed."""
    of = "held-out images"
    if held_out is None:
        order = np.random.default_rng(0).permutation(len(data.vectors))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        held_out, data = (Features(*(x[half] for x in data)) for half in halves)
        of = f"training images against {len(data.vectors):,} others"
    n = min(len(held_out.vectors), most)
    return Floor(of, n, compare(data, Features(*(x[:n] for x in held_out))))


def shares(features: Features) -> list[float]:
    """Returns the share of images that fall to each class."""
    classes = features.probabilities.argmax(axis=1)
    counts = np.bincount(classes, minlength=features.probabilities.shape[1])
    return (counts / len(classes)).tolist()


def spread(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Returns each figure's mean over several seeds and, of two or more, its standard deviation."""
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        found[name] = {"mean": float(np.mean(values)), "std": std, "values": values}
    return found


def _some(x: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    if len(x) <= most:
        return np.asarray(x)[rng.permutation(len(x))]
    return np.asarray(x[np.sort(rng.choice(len(x), most, replace=False))])[rng.permutation(most)]


def blocks(x: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of so many rows that float64 copies of them are small."""
    return (x[start : start + BLOCK] for start in range(0, len(x), BLOCK))
