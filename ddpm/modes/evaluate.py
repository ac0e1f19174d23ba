"""Evaluation of a run: a table on the terminal, evaluation.json, and report.html."""

import datetime
import json
import math
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm.build.data import held_out as held_out_data
from ddpm.build.data import source as train_data
from ddpm.config import PARTS, to_json
from ddpm.data.images import check_image_shape
from ddpm.errors import InputError
from ddpm.evaluation import report
from ddpm.files.atomic import check_writable, write_atomically
from ddpm.files.progress import doing, say
from ddpm.modes.inputs import with_small_images
from ddpm.modes.loading import RUN_ON, announce, load_run
from ddpm.modes.measures import chains, energies, fidelity, likelihoods
from ddpm.modes.measures.about import about_run, sample_grid
from ddpm.modes.measures.job import prepare

FAILED = "failed"  # in evaluation.json: the reason, by part
HEADER = ("figure", "of", "value", "how")
_MEASURES = dict(
    zip(
        PARTS,
        (
            likelihoods.bound,
            likelihoods.flow_likelihood,
            fidelity.distances_to_data,
            fidelity.neighbours,
            chains.pictures_of_chains,
            energies.energies,
        ),
        strict=True,
    )
)


def evaluate(config: ConfigDict, workdir: Path, init_from: str = "", out: str = "") -> None:
    """Measures config.evaluation.parts on the latest good checkpoint in `workdir`, or on the
    pretrained weights that `init_from` names.

    Writes both files to `out`, or else `workdir`, at the end, atomically. Raises InputError for
    what the user can fix, mostly before anything is computed; if one part fails, after the others
    are written.
    """
    run = load_run(config, workdir, "evaluate", init_from)
    config = run.built.config
    train, held_out = train_data(config), held_out_data(config)
    for source in (train, held_out):
        if source is not None:
            check_image_shape(source.image_shape, run.built.image_shape, RUN_ON)
    run = run._replace(built=with_small_images(run.built, config.evaluation.num_samples))
    wanted = [part for part in PARTS if part in config.evaluation.parts]
    folder = Path(out).expanduser() if out else workdir
    check_writable(folder, "evaluation.json", "report.html")
    job = prepare(run, folder / "samples", train, held_out, wanted)
    announce(run, workdir)
    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    rows: list[tuple[str, ...]] = []
    sections: list[tuple[str, list[str]]] = []
    for part in wanted:
        say(f"{part} ..")
        try:
            with doing(part):
                measured = _MEASURES[part](job)
        except ValueError as error:
            failed[part] = str(error)
            say(f"{part}: {error}")
            continue
        found[part] = measured.figures
        rows += measured.rows
        if measured.rows:
            measured.fragments.insert(0, report.table(HEADER, measured.rows))
        sections.append((measured.title, measured.fragments))
    said = "; ".join(f"{part}: {why}" for part, why in failed.items())
    if not found:
        raise InputError(said)

    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    about = f"{run.origin}; {config.data.name}; {device}, {day}"
    result = {
        "step": run.step,
        "weights": run.origin if run.step is None else "ema" if config.sampling.ema else "raw",
        "date": day,
        "device": device,
        "jax": jax.__version__,
        "config": to_json(config),
        **found,
        **({FAILED: failed} if failed else {}),
    }
    text = json.dumps(_without_nan(result), indent=1, allow_nan=False) + "\n"
    seeds = () if config.evaluation.samples else config.evaluation.seeds
    when = f"{day}, on {device}, jax {jax.__version__}"
    first = [about_run(run, workdir, seeds, when, [("sampler", run.built)])]
    first += sample_grid(job, workdir, drawn=bool({"distances", "neighbours"} & found.keys()))
    page = report.page(f"Evaluation of {workdir.resolve().name}", about, [*first, *sections])
    write_atomically(folder / "evaluation.json", lambda path: path.write_text(text))
    write_atomically(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    print(about)
    if rows:
        print(report.plain_table(HEADER, rows))
    print(folder / "evaluation.json")
    print(folder / "report.html")
    if failed:
        raise InputError(said)


def _without_nan(value: Any) -> Any:
    """Replaces NaN, which JSON does not have, with null."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
