"""Sweeps: configs, each trained and evaluated with several seeds, and one table of results.

Every run has its own process and folder, and is what the single commands main.py --mode=train and
--mode=evaluate would have made. Finished runs are not run again.
"""

import contextlib
import datetime
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from ddpm.build.checks import check, validate
from ddpm.build.schedule import noise_schedule
from ddpm.build.variance import UNMEASURED
from ddpm.config import nearest, to_json
from ddpm.config.command import find_file, make_importable, parse
from ddpm.config.same_run import check_same_run
from ddpm.errors import InputError, NotFinite
from ddpm.evaluation import report
from ddpm.files.atomic import check_writable, write_atomically
from ddpm.files.progress import say
from ddpm.files.reading import read_json
from ddpm.modes.evaluate import FAILED
from ddpm.modes.measures.job import check_parts
from ddpm.modes.measures.likelihoods import DEQUANTISED
from ddpm.training.checkpoints import saved_meta
from ddpm.training.stopping import STOPPED, handed_on

DIVERGED = "diverged"


class Entry(NamedTuple):
    """A row: its name, the arguments of its commands, and the config that they give."""

    name: str
    arguments: list[str]
    config: ConfigDict


class Column(NamedTuple):
    """A figure of evaluation.json: its title, the direction that is better, and a function that
    reads it."""

    title: str
    better: str
    of: Callable[[dict[str, Any]], float]
    digits: int = 3


def _sampled(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda found: found["distances"]["samples"][name]["mean"]


COLUMNS = (
    Column("bits/dim, held out", "↓", lambda found: _bits(found["bound"]["held out"])),
    Column("bits/dim, train", "↓", lambda found: _bits(found["bound"]["train"])),
    Column("bits/dim of the flow", "↓", lambda found: found["flow"][DEQUANTISED]["bits_per_dim"]),
    Column("Fréchet distance", "↓", _sampled("frechet_distance")),
    Column("Inception score", "↑", _sampled("inception_score")),
    Column("precision", "↑", _sampled("precision")),
    Column("recall", "↑", _sampled("recall")),
)


def entries(names: Sequence[str], overrides: Sequence[str]) -> list[Entry]:
    """Returns the entries for FILE.py or NAME, with all its variants if it has any, and for
    FILE.py:VARIANT.

    The config flags in `overrides` apply to each. Raises InputError for a wrong one.
    """
    found = []
    for name in names:
        file, _, variant = find_file("configs", name).partition(":")
        known = _variants(file)
        if variant and variant not in known:
            there = f"its variants are {', '.join(known)}" if known else "it has no variants"
            raise InputError(f"--configs={name}: {there}{nearest(variant, known)}")
        for one in [variant] if variant or not known else known:
            chosen = f"--config={file}:{one}" if one else f"--config={file}"
            row = "_".join(filter(None, (Path(file).stem, one)))
            found.append(Entry(row, [chosen, *overrides], _config([chosen, *overrides])))
    if len({entry.name for entry in found}) < len(found):
        raise InputError(f"--configs={','.join(names)}: names one of them twice")
    return found


def sweep(rows: Sequence[Entry], seeds: Sequence[int], folder: Path, command: Path) -> None:
    """Trains and evaluates each entry with each seed, in `folder`/NAME_seedN, with `command`.

    Prints the table and writes it, with all values, to sweep.json in `folder`. A run whose loss is
    not finite is reported as diverged. Raises InputError if a run fails otherwise or a folder holds
    another run, KeyboardInterrupt if stopped; the same call resumes from there.
    """
    check_writable(folder, "sweep.json")
    left = []
    for seed in seeds:
        for entry in rows:
            workdir = folder / f"{entry.name}_seed{seed}"
            config = entry.config.copy_and_resolve_references()
            config.seed = seed
            if _result(workdir, config) is None:
                _check_folder(workdir, config)
                left.append((entry, seed, workdir, config))
    for entry, seed, workdir, config in left:
        arguments = [*entry.arguments, f"--config.seed={seed}", f"--workdir={workdir}"]
        say(f"{entry.name}, seed {seed}: training and evaluation, in {workdir}")
        code = _run([sys.executable, str(command), *arguments])
        if code == NotFinite.EXIT_CODE:
            _note_divergence(workdir, config)
            continue
        if code == 0 and _step(workdir) < config.training.steps:
            raise KeyboardInterrupt
        code = code or _run([sys.executable, str(command), "--mode=evaluate", *arguments])
        if code:
            raise InputError(f"{entry.name}, seed {seed}: failed with code {code}, see above")
    _write(rows, seeds, folder)


def _check_folder(workdir: Path, config: ConfigDict) -> None:
    """Raises InputError if the folder's run had another config, even one that a single run may
    resume with, such as another learning rate: a row of a table has one config."""
    saved = saved_meta(workdir / "checkpoints")
    if saved is None:
        return
    changed, steps = check_same_run(config, saved["config"], workdir), config.training.steps
    if saved["step"] > steps:
        changed.append(f"config.training.steps = {steps}, and it is at step {saved['step']}")
    if changed:
        raise InputError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}): choose another "
            "--workdir"
        )


def _run(arguments: list[str]) -> int:
    """Returns the exit code of a process that gets the signals to stop, and answers them."""
    # In a group of its own, or a terminal's Ctrl-C would come to it twice.
    with subprocess.Popen(arguments, process_group=0) as process, handed_on(process):
        code = process.wait()
    if code < 0 or code == STOPPED:
        raise KeyboardInterrupt
    return code


def _result(workdir: Path, config: ConfigDict) -> dict[str, Any] | None:
    """Returns the run's result, with the key DIVERGED if it did; None if it is not finished."""
    for name in ("evaluation.json", f"{DIVERGED}.json"):
        path = workdir / name
        if path.exists():
            found = read_json(path)
            finished = DIVERGED in found or found.get("step") == config.training.steps
            if finished and not found.get(FAILED) and found.get("config") == to_json(config):
                return found
    return None


def _note_divergence(workdir: Path, config: ConfigDict) -> None:
    text = json.dumps({DIVERGED: True, "config": to_json(config)}) + "\n"
    write_atomically(workdir / f"{DIVERGED}.json", lambda path: path.write_text(text))


def _step(workdir: Path) -> int:
    saved = saved_meta(workdir / "checkpoints")
    return -1 if saved is None else saved["step"]


def _write(rows: Sequence[Entry], seeds: Sequence[int], folder: Path) -> None:
    values: dict[str, dict[str, list[float]]] = {}
    diverged: dict[str, int] = {}
    for entry in rows:
        values[entry.name] = {column.title: [] for column in COLUMNS}
        diverged[entry.name] = 0
        for seed in seeds:
            config = entry.config.copy_and_resolve_references()
            config.seed = seed
            found = _result(folder / f"{entry.name}_seed{seed}", config)
            assert found is not None
            diverged[entry.name] += DIVERGED in found
            for column in COLUMNS:
                with contextlib.suppress(KeyError):  # a part that was not evaluated
                    values[entry.name][column.title].append(column.of(found))
    shown = [c for c in COLUMNS if any(values[entry.name][c.title] for entry in rows)]
    table = [
        (entry.name, *(_spread(values[entry.name][c.title], c.digits) for c in shown))
        + ((f"{diverged[entry.name]} of {len(seeds)}",) if any(diverged.values()) else ())
        for entry in rows
    ]
    header = ("run", *(f"{c.title} {c.better}" for c in shown)) + (
        (DIVERGED,) if any(diverged.values()) else ()
    )
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {
        "date": day,
        "seeds": list(seeds),
        "runs": {
            entry.name: {
                "figures": {k: v for k, v in values[entry.name].items() if v},
                DIVERGED: diverged[entry.name],
                "config": to_json(entry.config),
            }
            for entry in rows
        },
    }
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(folder / "sweep.json", lambda path: path.write_text(text))
    print(f"{len(rows)} runs with {len(seeds)} seeds, mean ± standard deviation; {day}")
    print(report.plain_table(header, table))
    print(folder / "sweep.json")


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "n/a"
    mean = report.number(float(np.mean(values)), digits)
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def _bits(found: dict[str, Any]) -> float:
    return found["total"]["bits_per_dim"]


def _variants(file: str) -> list[str]:
    """Returns the names in VARIANTS of a config file; [] without VARIANTS."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        make_importable()
        spec.loader.exec_module(module)
    except Exception as error:  # a config file may raise anything
        raise InputError(f"--configs={file}: {type(error).__name__}: {error}") from error
    return list(getattr(module, "VARIANTS", {}))


def _config(arguments: list[str]) -> ConfigDict:
    """Returns the config that main.py would read from these arguments, checked as at the start of a
    run, except for what depends on the data."""
    try:
        config: ConfigDict = parse([sys.argv[0], *arguments]).config
        validate(config)
        if config.sampling.variance == "analytic":
            raise InputError(UNMEASURED)
        check(config)  # now, not hours later when its turn comes
        check_parts(config, noise_schedule(config), config.evaluation.parts)
    except InputError as error:
        raise InputError(f"{arguments[0]}: {error}") from error
    return config
