"""Samplers and numbers of steps on one model: quality and time against the network's calls."""

import ast
import datetime
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm.build.checks import check, with_sampling
from ddpm.build.data import held_out as held_out_data
from ddpm.build.data import source
from ddpm.build.experiment import Experiment, classifier
from ddpm.config import to_json
from ddpm.data.images import check_image_shape
from ddpm.errors import InputError
from ddpm.evaluation import comparison, distances, features, report
from ddpm.files.atomic import check_writable, write_atomically
from ddpm.files.progress import say
from ddpm.modes.inputs import with_small_images
from ddpm.modes.loading import RUN_ON, Run, announce, draw, load_run, with_variance
from ddpm.modes.measures.about import about_run
from ddpm.modes.measures.fidelity import NAMES
from ddpm.modes.measures.job import features_of_data, make_extractor

HEADER = ("sampler", "steps", "calls", NAMES["frechet_distance"], "s/image ↓")
SHOWN = 16  # samples of each entry in the picture


class Entry(NamedTuple):
    """A sampler as the config names it, and the config that samples with it."""

    name: str
    steps: int
    config: ConfigDict


class Row(NamedTuple):
    """The figures of an entry; seconds per image, without compilation, NaN for a single batch."""

    name: str
    steps: int
    evaluations: int
    frechet_distance: float
    seconds: float


def compare(config: ConfigDict, workdir: Path, init_from: str = "", out: str = "") -> None:
    """Compares config.comparison.samplers at each of .steps with the training data, in the features
    of the evaluation, from the same seed.

    Writes comparison.json and comparison.html to `out`, or else `workdir`, at the end, atomically.
    Raises InputError for what the user can fix, before anything is computed.
    """
    parse(config)  # reports wrong entries before the run is loaded
    first = load_run(config, workdir, "compare", init_from)
    small = with_small_images(first.built, config.comparison.num_samples)
    first = first._replace(built=small)
    built = first.built
    runs = [
        (entry, first._replace(built=built._replace(config=entry.config)))
        for entry in parse(built.config)
    ]
    for entry, run in runs:
        try:
            check(run.built.config, run.built.schedule)
            if run.built.config.sampling.classifier_scale:
                classifier(run.built.config, built.image_shape)
        except InputError as error:
            raise InputError(f"{_where(entry.name)}: {error}") from error
    folder = Path(out).expanduser() if out else workdir
    check_writable(folder, "comparison.json", "comparison.html")
    extractor = make_extractor(built.config, built.image_shape, first.mesh)
    train = source(config)
    check_image_shape(train.image_shape, built.image_shape, RUN_ON)
    c = config.comparison
    data = distances.moments(
        comparison.blocks(features_of_data(config, extractor, train, held_out=False).vectors)
    )
    held_out, floor = held_out_data(config), None
    if held_out is not None:
        found = features_of_data(config, extractor, held_out, held_out=True).vectors
        floor = distances.frechet_distance(
            data, distances.moments(comparison.blocks(found[: c.num_samples]))
        )

    announce(first, workdir)
    rows: list[Row] = []
    shown: list[np.ndarray] = []
    samplers: list[tuple[str, Experiment]] = []
    for entry, run in runs:
        run = with_variance(run, workdir)
        samplers.append((entry.name, run.built))
        generator = run.generator(c.num_samples)
        clock: list[float] = []  # seconds of each batch
        kept: list[np.ndarray] = []

        def timed(run: Run = run, clock: Any = clock, kept: Any = kept, of: Any = generator) -> Any:
            began = time.perf_counter()
            for images in draw(of, run.params, c.num_samples, c.seed, workdir):
                clock.append(time.perf_counter() - began)
                kept.append(images[: max(0, SHOWN - sum(map(len, kept)))])
                yield images
                began = time.perf_counter()

        try:
            vectors = features.of_samples(extractor, timed()).vectors
        except InputError as error:  # non-finite samples are a result of a sampler
            say(f"{entry.name}: {error}")
            distance = seconds = float("nan")
            kept = [np.zeros((1, *built.image_shape), np.uint8)]
        else:
            moments = distances.moments(comparison.blocks(vectors))
            distance = distances.frechet_distance(data, moments)
            # Omits the first batch, which includes compilation; the last one is drawn in full.
            seconds = float(np.mean(clock[1:])) / generator.batch_size if clock[1:] else np.nan
        rows.append(Row(entry.name, entry.steps, generator.evaluations, distance, seconds))
        shown.append(np.concatenate(kept))
        say("  ".join(map(str, shown_row(rows[-1]))))
    _write(config, workdir, folder, first, rows, floor, shown, samplers)


def parse(config: ConfigDict) -> list[Entry]:
    """Returns the entries of config.comparison, each checked; InputError names a wrong one."""
    c, entries = config.comparison, []
    # Common to all entries: the weights, the images to enlarge, the number of samples and the seed.
    of_all = ("sampler", "ema", "ema_relative_std", "low_resolution_images", "num_samples",
              "batch_size", "seed", "mp4")  # fmt: skip
    for text in c.samplers:
        where = _where(text)
        name, *options = text.split() or [""]
        if bare := [option for option in options if "=" not in option]:
            raise InputError(
                f"{where}: {bare[0]!r} is no key of config.sampling with its value, KEY=VALUE"
            )
        settings = {key: _value(value) for key, _, value in (o.partition("=") for o in options)}
        own = "steps" in settings or "times" in settings or name == "probability_flow"
        for steps in [settings.get("steps", 0)] if own else c.steps:
            try:
                named = with_sampling(config, settings, of_all)
                other = with_sampling(named, {"sampler": name, "steps": steps})
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            times = settings.get("times", ())
            entries.append(Entry(text, len(times) - 1 if times else steps, other))
    return entries


def _where(entry: str) -> str:
    return f"config.comparison.samplers, {entry!r}"


def shown_row(row: Row) -> tuple[Any, ...]:
    """Returns the row as shown in the tables."""
    steps = row.steps or "all"
    return (row.name, steps, row.evaluations, report.number(row.frechet_distance),
            report.number(row.seconds))  # fmt: skip


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _write(
    config: ConfigDict,
    workdir: Path,
    folder: Path,
    run: Run,
    rows: list[Row],
    floor: float | None,
    shown: list[np.ndarray],
    samplers: list[tuple[str, Experiment]],
) -> None:
    c = config.comparison
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = f"{run.origin}; {c.num_samples:,} samples each, seed {c.seed}; {device}, {day}"
    said = (
        f"The floor, real held-out images in the place of samples, is {report.number(floor)}."
        if floor is not None
        else "There are no held-out images, so no floor."
    )
    result = {
        "weights": run.origin,
        "date": day,
        "device": device,
        "num_samples": c.num_samples,
        "floor": floor,
        "rows": [
            {k: None if v != v else v for k, v in row._asdict().items()}  # JSON has no NaN
            for row in rows
        ],
        "config": to_json(config),
    }
    table = [shown_row(row) for row in rows]
    fragments = [
        report.text(said),
        report.table(HEADER, table),
        _plot(rows, floor),
        report.images(
            np.concatenate([np.resize(x, (SHOWN, *x.shape[1:])) for x in shown]),
            f"The first {SHOWN} samples of each, from the same noise, in the table's order.",
            columns=SHOWN,
        ),
    ]
    title = f"Samplers of {workdir.resolve().name}"
    measured = f"{day}, on {device}, jax {jax.__version__}"
    of_run = about_run(run, workdir, (c.seed,), measured, samplers)
    page = report.page(title, about, [("Samplers", fragments), of_run])
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / "comparison.json", lambda path: path.write_text(text))
    write_atomically(
        folder / "comparison.html", lambda path: path.write_text(page, encoding="utf-8")
    )
    print(about)
    print(report.plain_table(HEADER, table))
    print(said)
    print(folder / "comparison.json")
    print(folder / "comparison.html")


def _plot(rows: list[Row], floor: float | None) -> str:
    from matplotlib.ticker import LogLocator, NullFormatter

    (by_calls, left), (by_time, right) = report.axes(6, 4.5), report.axes(6, 4.5)
    for name in dict.fromkeys(row.name for row in rows):
        of = [row for row in rows if row.name == name]
        distance = [row.frechet_distance for row in of]
        left.plot([row.evaluations for row in of], distance, ".-", label=name)
        right.plot([row.seconds for row in of], distance, ".-", label=name)
    left.set(xlabel="calls of the denoiser", ylabel="Fréchet distance")
    right.set(xlabel="seconds an image", ylabel="Fréchet distance")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
        if floor is not None and floor > 0:
            axes.axhline(floor, color="0.5", ls="--", lw=1)
    for figure in (by_calls, by_time):
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return report.pair(
        report.plot(by_calls, "Quality against calls of the denoiser; dashed: the floor."),
        report.plot(by_time, "Quality against time; dashed: the floor."),
    )
