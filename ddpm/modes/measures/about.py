"""The parts of a page that say what was measured: the run, its sampler and samples, its loss."""

import html
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ddpm.build import sampler
from ddpm.build.experiment import Experiment
from ddpm.config import default, flatten
from ddpm.evaluation import report
from ddpm.modes.inputs import by
from ddpm.modes.loading import Run
from ddpm.modes.measures.job import Job
from ddpm.training.checkpoints import parameter_count
from ddpm.training.logbook import plot_losses

SHOWN = 64  # samples in the grid


def about_run(
    run: Run,
    workdir: Path,
    seeds: Sequence[int],
    measured: str,
    samplers: Sequence[tuple[str, Experiment]],
) -> tuple[str, list[str]]:
    """Returns the section of the run: what it is, its samplers with all settings, its loss, and the
    config, folded. `measured` says when and on what."""
    built = run.built
    config, usual = built.config, flatten(default())
    facts = {
        "weights": run.origin,
        "network": f"{config.model.name}, {parameter_count(run.params):,} parameters, "
        f"images of {by(built.image_shape)}",
        "process": f"schedule {config.diffusion.schedule}, T = {built.schedule.num_steps}, "
        f"predicts {config.diffusion.prediction}",
        "data": f"{config.data.name} {config.data.path}".strip(),
        "seeds": f"training {config.seed}; samples {', '.join(map(str, seeds)) or 'none'}",
        "measured": measured,
    }
    every = flatten(config)
    changed = [key for key, value in every.items() if value != usual.get(key)]
    facts_table = report.table(
        ("run", workdir.resolve().name), list(facts.items()), words=html.escape
    )
    chosen = "".join(_settings(name, sampled) for name, sampled in samplers)
    if len(samplers) > 1:
        chosen = report.folded("The samplers with all settings", chosen)
    whole = report.folded(
        "The whole config; bold where it differs from the default",
        report.settings("key", every, changed),
    )
    return "The run", [facts_table, chosen, _loss_curve(run, workdir), whole]


def _settings(name: str, built: Experiment) -> str:
    found = sampler.settings(built.config, built.schedule, built.variance)
    return report.settings(name, {f"sampling.{key}": value for key, value in found.items()})


def sample_grid(job: Job, workdir: Path, drawn: bool) -> list[tuple[str, list[str]]]:
    """Returns the section of samples: the first that were evaluated, else if none were `drawn` the
    grid that training left of these weights; no section without either."""
    run, e = job.run, job.run.built.config.evaluation
    kept = workdir / "samples" / f"step_{run.step or 0:08}.png"
    if drawn:
        pixels = job.samples(e.seeds[0])[:SHOWN]
        whose = f"images of {Path(e.samples).name}" if e.samples else f"samples, seed {e.seeds[0]}"
        grid = report.images(pixels, f"The first {len(pixels)} {whose}, not selected.")
    elif run.step is not None and kept.exists():
        grid = report.picture(kept.read_bytes(), "Samples drawn in training.", "pixels")
    else:
        return []
    return [("Samples", [grid])]


def _loss_curve(run: Run, workdir: Path) -> str:
    """Returns the training's loss, where these are the weights of a run with a log."""
    if run.step is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "losses.png"
        plot_losses(workdir / "metrics.jsonl", path)
        if not path.exists():
            return ""
        return report.picture(path.read_bytes(), "The loss in training, by ranges of t.", "plot")
