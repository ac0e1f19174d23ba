"""Samples against data in feature space: distances and their floor, nearest training images."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ddpm.data.pipeline import evaluation_batches
from ddpm.data.sources import Source
from ddpm.evaluation import comparison, distances, features, report
from ddpm.evaluation.report import number
from ddpm.modes.measures.job import Job, Measured

NEIGHBOURS = 12
NAMES = {  # with the direction that is better
    "frechet_distance": "Fréchet distance ↓",
    "kernel_distance": "kernel distance (KID) ↓",
    "precision": "precision, k = 3 ↑",
    "recall": "recall, k = 3 ↑",
    "density": "density, k = 5 ↑",
    "coverage": "coverage, k = 5 ↑",
    "two_sample_accuracy": "two-sample test, 1-NN → 0.5",
    "inception_score": "Inception score ↑",
    "class_distance": "distance of class shares ↓",
}


def distances_to_data(job: Job) -> Measured:
    """Measures distances of samples to training data, with the floor: those of held-out data."""
    assert job.extractor is not None
    e = job.run.built.config.evaluation
    train = job.features("train")
    values, shares = [], {"train": comparison.shares(train)}
    for seed in e.seeds[:1] if e.samples else e.seeds:
        found = features.of_samples(job.extractor, _blocks(job.samples(seed), e))
        values.append(comparison.compare(train, found))
        shares.setdefault("samples", comparison.shares(found))
    spread = comparison.spread(values)
    held_out = None if job.held_out is None else job.features("held out")
    floor = comparison.floor(train, held_out, e.num_samples)
    seeds = "given samples" if e.samples else f"seeds {', '.join(map(str, e.seeds))}"
    n = f"{e.num_samples:,} samples against {len(train.vectors):,} training images"
    rows = []
    for name, value in spread.items():
        std = f" ± {number(value['std'])}" if value["std"] is not None else ""
        rows.append((NAMES[name], n, number(value["mean"]) + std, seeds))
        rows.append(("   floor", f"{floor.images:,} {floor.of}", number(floor.values[name]), ""))
    network = job.extractor.network
    figures = {
        "features": network.key,
        "num_samples": e.num_samples,
        "reference": {"split": "train", "images": len(train.vectors)},
        "seeds": [] if e.samples else list(e.seeds),
        "samples": spread,
        "floor": floor._asdict(),
    }
    about = ", ".join(f"{name} {value}" for name, value in network.key.items())
    words = (
        f"Features: {about}. The floor is what real images get in the place "
        "of samples, as many where there are as many. What compares all pairs takes at most "
        f"{comparison.MOST_PAIRED:,} of each set. The two-sample test is best at 0.5."
    )
    fragments = [report.text(words)]
    if network.classes:
        figures["class_shares"] = shares
        fragments.append(_histogram(network.classes, shares))
    return Measured("Distances of samples to data", figures, rows, fragments)


def _histogram(classes: tuple[str, ...], shares: dict[str, list[float]]) -> str:
    figure, axes = report.axes()
    place = np.arange(len(classes))
    for i, (name, share) in enumerate(shares.items()):
        axes.bar(place + 0.4 * i - 0.2, share, 0.4, label=name)
    axes.set_xticks(place, classes)
    axes.set(ylabel="share of images")
    figure.legend(loc="outside upper right", ncols=2)
    return report.plot(figure, "Classes, by the same classifier.")


def neighbours(job: Job) -> Measured:
    """Finds the training images nearest to some samples, to detect copies."""
    assert job.extractor is not None
    e = job.run.built.config.evaluation
    samples = job.samples(e.seeds[0])[:NEIGHBOURS]
    train = job.features("train")
    spaces = {
        "pixels": (_flat(samples), lambda: map(_flat, _images(job.train, e.batch_size))),
        "features": (job.extractor(samples).vectors, lambda: _blocks(train.vectors, e)),
    }
    real = None
    if job.held_out is not None:
        real = job.held_out.read(np.arange(min(100, len(job.held_out)))).image
    figures, rows, shown = {}, [], [samples]
    for space, (queries, batches) in spaces.items():
        place, distance = distances.nearest(queries, batches())
        shown.append(job.train.read(place).image)
        figures[space] = {"index": place.tolist(), "distance": distance.tolist()}
        row = f"nearest training image, {space}"
        rows.append(
            (row, f"{len(samples)} samples", number(float(np.median(distance)), 3), "median")
        )
        if real is not None:
            of_real = _flat(real) if space == "pixels" else job.extractor(real).vectors
            floor = float(np.median(distances.nearest(of_real, batches())[1]))
            figures[space]["held_out_median"] = floor
            rows.append(("   floor", f"{len(real)} held-out images", number(floor, 3), "median"))
    caption = "Above: samples. Middle: the nearest training image by pixels. Below: by features."
    fragments = [report.images(np.concatenate(shown), caption, columns=len(samples))]
    return Measured("Nearest training images", figures, rows, fragments)


def _images(source: Source, batch_size: int) -> Iterator[np.ndarray]:
    for batch in evaluation_batches(source, batch_size):
        yield batch.examples.image[batch.mask]


def _blocks(x: np.ndarray, e: Any) -> Iterator[np.ndarray]:
    return (x[start : start + e.batch_size] for start in range(0, len(x), e.batch_size))


def _flat(images: np.ndarray) -> np.ndarray:
    """Flattens images to [n, d] on [0, 255]."""
    return images.reshape(len(images), -1).astype(np.float64)
