"""The parts of an evaluation: each measures one thing, and says it in figures, rows and HTML."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ddpm.data import sources
from ddpm.data.pipeline import evaluation_batches, to_float
from ddpm.data.sources import Source
from ddpm.diffusion import flow
from ddpm.diffusion.keys import sample_keys
from ddpm.diffusion.likelihood import bits_per_dim, sampled_bits_per_dim
from ddpm.errors import InputError
from ddpm.evaluation import bound as bounds
from ddpm.evaluation import comparison, distances, features, report
from ddpm.evaluation.classifier import SHIPPED
from ddpm.evaluation.report import number
from ddpm.experiment import VARIANCES
from ddpm.modes.loading import Run, draw
from ddpm.sampling import pictures
from ddpm.sampling.samplers import times
from ddpm.training import sharding

LEAST_PROBABILITY = 1e-12
NEIGHBOURS = 12
_NAMES = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "kernel distance (KID)",
    "precision": "precision, k = 3",
    "recall": "recall, k = 3",
    "density": "density, k = 5",
    "coverage": "coverage, k = 5",
    "two_sample_accuracy": "two-sample test, 1-NN",
    "class_distance": "distance of class shares",
}


class Measured(NamedTuple):
    """What a part found: for evaluation.json, for the tables, for the page."""

    title: str
    figures: dict[str, Any]
    rows: list[tuple[str, str, str, str]]
    fragments: list[str]


class Job(NamedTuple):
    """What is evaluated: the run, its training data, and the data held out, if any."""

    run: Run
    workdir: Path
    train: Source
    held_out: Source | None
    extractor: features.Extractor | None
    samples: Callable[[int], np.ndarray]  # by seed

    @property
    def splits(self) -> dict[str, Source]:
        """By name, the held-out one first."""
        found = {} if self.held_out is None else {"held out": self.held_out}
        return found | {"train": self.train}


def prepare(
    run: Run, workdir: Path, train: Source, held_out: Source | None, parts: list[str]
) -> Job:
    """The job; whatever can be wrong with it is, before anything is computed."""
    e, data = run.built.config.evaluation, run.built.config.data
    extractor, given = None, None
    if "distances" in parts or "neighbours" in parts:
        name = e.features or data.name
        if name not in SHIPPED:
            raise InputError(
                f"there are no features for {data.name!r} yet: name one of {', '.join(SHIPPED)} in "
                "config.evaluation.features, or leave 'distances' and 'neighbours' out of "
                "config.evaluation.parts"
            )
        extractor = features.Extractor(
            name, run.built.image_shape, run.mesh, batch_size=e.batch_size
        )
        if e.samples:
            given = sources.npz(e.samples)
            if given.image_shape != run.built.image_shape:
                raise InputError(
                    f"{e.samples}: images of {given.image_shape}, the data's are "
                    f"{run.built.image_shape} (height, width, channels)"
                )
            if len(given) < e.num_samples:
                raise InputError(
                    f"{e.samples}: {len(given)} images, config.evaluation.num_samples asks for "
                    f"{e.num_samples}"
                )
    if "flow" in parts and held_out is None:
        raise InputError("the flow's likelihood is of held-out data: set config.evaluation.split")

    @functools.cache
    def samples(seed: int) -> np.ndarray:
        if given is not None:
            return given.image[: e.num_samples]
        return _drawn(run, workdir / "samples", e.num_samples, seed)

    return Job(run, workdir, train, held_out, extractor, samples)


def _drawn(run: Run, folder: Path, num_samples: int, seed: int) -> np.ndarray:
    """The samples of a seed, from their file if that was written before."""
    path = folder / f"{run.sample_name(seed, num_samples)}.npz"
    shape = (num_samples, *run.built.image_shape)
    if not path.exists():
        generator = run.generator(num_samples)
        pictures.save_npz(path, draw(run, generator, num_samples, seed), shape)
    found = sources.npz(path).image
    if found.shape != shape:
        raise InputError(f"{path}: holds {found.shape}, not {shape}; remove it")
    return found


def bound(job: Job) -> Measured:
    """The variational bound on every split, its curve over t, and rate against distortion."""
    config, schedule = job.run.built.config, job.run.built.schedule
    e, last = config.evaluation, job.run.built.schedule.num_steps
    every = e.bound_times == 0 or e.bound_times >= last - 1
    options: dict[str, Any] = {
        "variance": VARIANCES[config.sampling.variance],
        "floor": LEAST_PROBABILITY,
    }

    @jax.jit
    def terms(params: Any, images: jax.Array, indices: jax.Array) -> Any:
        keys = sample_keys(jax.random.key(config.seed), indices)
        denoiser = job.run.built.denoiser(params)
        if every:
            return bits_per_dim(schedule, denoiser, to_float(images), keys, **options)
        return sampled_bits_per_dim(
            schedule, denoiser, to_float(images), keys, num_times=e.bound_times, **options
        )

    figures, rows, fragments = {}, [], []
    how = "all T terms" if every else f"{e.bound_times} of T terms for each image"
    clip = "x_0 clipped" if config.sampling.clip else "not clipped"
    about = f"{how}; {config.sampling.variance}, {clip}, decoder at least {LEAST_PROBABILITY:g}"
    for name, source in job.splits.items():
        batches = _batches(job, source, e.bound_images, f"bound, {name}")
        found = bounds.summarise(
            ((terms(job.run.params, x, i), mask) for x, i, mask in batches), last
        )
        figures[name] = {
            "images": found.images,
            "how": about,
            **{
                part: {"bits_per_dim": value.value, "standard_error": value.standard_error}
                for part, value in found._asdict().items()
                if isinstance(value, distances.Estimate)
            },
            "t": list(range(1, last + 1)),
            "L": found.step.tolist(),
            "rate": found.rate.tolist(),
            "rmse": found.rmse.tolist(),
        }
        of = f"{name}, {found.images:,} images"
        rows.append(("L <=, bits/dim", of, _pm(found.total), about))
        for label, value in (
            ("   L_0, distortion", found.decoder),
            ("   L_1 .. L_{T-1}, rate", found.steps),
            ("   L_T", found.prior),
        ):
            shown = f"{value.value:.1e}" if label.endswith("L_T") else _pm(value)
            rows.append((label, of, shown, ""))
        fragments += _curves(name, found)
    return Measured("The variational bound", figures, rows, fragments)


def _curves(name: str, found: bounds.BoundSummary) -> list[str]:
    t = np.arange(1, len(found.step) + 1)
    figure, (left, right) = report.axes(10, 3.8, columns=2)
    left.loglog(t, found.step, ".", ms=3)
    left.set(xlabel="t", ylabel="L_{t-1}, bits/dim")
    right.plot(found.rate, found.rmse, ".-", ms=3, lw=0.8)
    right.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE on [0, 255]")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    steps = len(t)
    chosen = np.unique(np.round(np.linspace(steps, 1, 11)).astype(int))[::-1]
    rows = [
        (steps - k + 1, k, number(found.rate[k - 1], 5), number(found.rmse[k - 1], 3))
        for k in chosen
    ]
    caption = (
        f"{name}: the bound's terms over t, and progressive coding (the paper's Figure 5): the "
        "distortion of x_0 as predicted from x_t, against what has been received by then."
    )
    header = ("reverse steps", "t", "rate, bits/dim", "RMSE on [0, 255]")
    return [report.plot(figure, caption), report.table(header, rows)]


def flow_likelihood(job: Job) -> Measured:
    """Bits/dim by the probability-flow ODE, the network not clipped."""
    assert job.held_out is not None
    built = job.run.built
    e = built.config.evaluation
    options = {"exact_trace": e.flow_exact_trace, "tolerance": e.flow_tolerance}
    trace = "exact trace" if e.flow_exact_trace else "Hutchinson's trace"
    ways = {
        "uniform dequantisation": flow.dequantised_bits_per_dim,
        "from x_1, with decoder": functools.partial(
            flow.decoded_bits_per_dim, variance=VARIANCES[built.config.sampling.variance]
        ),
    }
    figures, rows = {}, []
    for way, function in ways.items():

        def bits(params: Any, x: Any, i: Any, function: Any = function) -> flow.FlowBits:
            keys = sample_keys(jax.random.key(built.config.seed), i)
            return function(
                built.schedule, built.unclipped_denoiser(params), to_float(x), keys, **options
            )

        compiled, values, calls = jax.jit(bits), [], []
        for x, i, mask in _batches(job, job.held_out, e.flow_images, f"flow, {way}"):
            found = compiled(job.run.params, x, i)
            values.append(np.asarray(found.bits_per_dim, np.float64)[mask])
            calls.append(int(found.evaluations))
        of_images = np.concatenate(values)
        if not np.isfinite(of_images).all():
            raise ValueError(
                f"the ODE was not solved within {flow.MAX_STEPS} steps at tolerance "
                f"{e.flow_tolerance:g}: raise config.evaluation.flow_tolerance"
            )
        mean = bounds.mean(of_images)
        figures[way] = {
            "bits_per_dim": mean.value,
            "standard_error": mean.standard_error,
            "images": len(of_images),
            "evaluations": calls,
            "tolerance": e.flow_tolerance,
            "trace": trace,
        }
        how = f"{trace}, tolerance {e.flow_tolerance:g}, {np.mean(calls):.0f} evaluations"
        rows.append((f"flow, {way}", f"held out, {len(of_images):,} images", _pm(mean), how))
    words = (
        "Bits/dim by the probability-flow ODE between t = 1 and T. With uniform dequantisation the "
        "density at t = 1 is taken for that of the data; with the decoder, the step from x_1 to "
        "the 8-bit data is coded too. Neither is to be mixed with the bound above."
    )
    return Measured("Likelihood by the probability-flow ODE", figures, rows, [report.text(words)])


def distances_to_data(job: Job) -> Measured:
    """Of samples to training data, beside the floor: held-out data to training data."""
    assert job.extractor is not None
    config = job.run.built.config
    e = config.evaluation
    train = _features_of(job, "train")
    found = [features.of_samples(job.extractor, _blocks(job.samples(s), e)) for s in e.seeds]
    spread = comparison.spread([comparison.compare(train, f) for f in found])
    floor, floor_n = None, 0
    if job.held_out is not None:
        held_out = _features_of(job, "held out")
        floor_n = min(len(held_out.vectors), e.num_samples)
        floor = comparison.compare(train, features.Features(*(x[:floor_n] for x in held_out)))
    seeds = "given samples" if e.samples else f"seeds {', '.join(map(str, e.seeds))}"
    n = f"{e.num_samples:,} samples beside {len(train.vectors):,} training images"
    rows = []
    for name, value in spread.items():
        std = f" ± {number(value['std'])}" if value["std"] is not None else ""
        rows.append((_NAMES[name], n, number(value["mean"]) + std, seeds))
        if floor is not None:
            rows.append(("   floor", f"{floor_n:,} held-out images", number(floor[name]), ""))
    shares = {"train": comparison.shares(train), "samples": comparison.shares(found[0])}
    figure, axes = report.axes()
    place = np.arange(len(job.extractor.classes))
    for i, (name, share) in enumerate(shares.items()):
        axes.bar(place + 0.4 * i - 0.2, share, 0.4, label=name)
    axes.set_xticks(place, job.extractor.classes)
    axes.set(ylabel="share of images")
    axes.legend()
    figures = {
        "features": job.extractor.name,
        "num_samples": e.num_samples,
        "reference": {"split": "train", "images": len(train.vectors)},
        "seeds": [] if e.samples else list(e.seeds),
        "samples": spread,
        "floor": {"images": floor_n, "values": floor},
        "class_shares": shares,
    }
    words = (
        f"Features of the classifier {job.extractor.name!r}. The floor is what as many held-out "
        "images get in the place of samples. What compares all pairs takes at most "
        f"{comparison.MOST_PAIRED:,} of each set. The two-sample test is best at 0.5."
    )
    return Measured(
        "Distances of samples to data",
        figures,
        rows,
        [report.text(words), report.plot(figure, "Classes, by the same classifier.")],
    )


def neighbours(job: Job) -> Measured:
    """For some samples the nearest training images: are they copies?"""
    assert job.extractor is not None
    e = job.run.built.config.evaluation
    samples = job.samples(e.seeds[0])[:NEIGHBOURS]
    train = _features_of(job, "train")
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


def pictures_of_chains(job: Job) -> Measured:
    """Progressive generation, and samples that share a latent: the paper's Figures 6 and 7."""
    run = job.run
    seed = run.built.config.evaluation.seeds[0]
    generator = run.generator(run.built.config.sampling.batch_size)
    predicted = generator.progressive(run.params, 6, seed=seed, snapshots=12)
    columns = len(predicted)
    rows = np.swapaxes(predicted, 0, 1).reshape(-1, *predicted.shape[2:])
    fragments = [
        report.images(rows, "x_0 as predicted along the chain, from t = T to 1.", columns=columns)
    ]
    chain = times(run.built.schedule.num_steps, run.built.config.sampling.steps or None)
    shared = [int(chain[len(chain) * k // 4]) for k in range(3, -1, -1)]
    for t in shared:
        images = generator.sharing(run.params, 9, seed=seed, t=t)
        fragments.append(report.images(images, f"Samples that share x_t at t = {t}.", columns=9))
    return Measured("Chains", {"shared_at": shared}, [], fragments)


def _batches(
    job: Job, source: Source, most: int, name: str
) -> Iterator[tuple[jax.Array, np.ndarray, np.ndarray]]:
    """(images, their numbers, mask) over the devices, of the first `most` (0: all), with a bar."""
    most = min(most, len(source)) if most else len(source)
    devices, size = job.run.mesh.devices.size, job.run.built.config.evaluation.batch_size
    size = -(-most // -(-most // size))  # equal batches: what fills up the last one is computed too
    size = -(-size // devices) * devices
    with tqdm(total=most, desc=name, unit="image", leave=False, disable=None) as bar:
        for k, batch in enumerate(evaluation_batches(source, size)):
            indices = np.arange(k * size, (k + 1) * size)
            mask = batch.mask & (indices < most)
            yield sharding.to_devices(job.run.mesh, batch.examples.image), indices, mask
            bar.update(int(mask.sum()))
            if indices[-1] + 1 >= most:
                return


def _features_of(job: Job, split: str) -> features.Features:
    assert job.extractor is not None
    config, source = job.run.built.config, job.splits[split]
    about = {k: str(config.data[k]) for k in ("name", "path", "split", "image_size", "channels")}
    if source is job.held_out:
        about |= {"held_out": config.evaluation.split, "held_out_path": config.evaluation.path}
    return features.of_source(job.extractor, source, about)


def _images(source: Source, batch_size: int) -> Iterator[np.ndarray]:
    for batch in evaluation_batches(source, batch_size):
        yield batch.examples.image[batch.mask]


def _blocks(x: np.ndarray, e: Any) -> Iterator[np.ndarray]:
    return (x[start : start + e.batch_size] for start in range(0, len(x), e.batch_size))


def _flat(images: np.ndarray) -> np.ndarray:
    """On [0, 255]."""
    return images.reshape(len(images), -1).astype(np.float64)


def _pm(estimate: distances.Estimate) -> str:
    return f"{number(estimate.value)} ± {number(estimate.standard_error)}"
