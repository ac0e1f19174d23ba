"""The sections of accelerator.py that are the real command: its loop, and a training with its
evaluation."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
from figures import figure
from sections import Rows, Setup

from ddpm.training.logbook import read_metrics

ROOT = Path(__file__).parents[1]
# A loop is measured without what a run does now and then, and as at its end.
LOOP = {
    "data.name": "npz",
    "training.sample_every": 0,
    "sampling.num_samples": 1,
    "sampling.batch_size": 1,
    "sampling.sampler": "ddim",
    "sampling.steps": 2,
}
# Ten minutes do not suffice for the 50,000 samples, and the bound of 70,000 images, of a table.
EVALUATION = {
    "sampling.sampler": "ddim",
    "sampling.steps": 50,
    "evaluation.parts": "('bound','distances')",
    "evaluation.num_samples": 10_000,
    "evaluation.bound_images": 2000,
}
TINY = {
    "model.name": "dit",
    "model.channels": 8,
    "model.depth": 1,
    "model.attention_resolutions": "()",
    "model.channel_multipliers": "(1,)",
    "training.batch_size": 8,
    "training.warmup_steps": 0,
}
TINY_TRAINING = {"data.name": "digits", "diffusion.num_steps": 20, "training.steps": 20,
                 "training.log_every": 5, "sampling.num_samples": 4,
                 "sampling.batch_size": 64}  # fmt: skip
TINY_EVALUATION = {"sampling.steps": 2, "evaluation.num_samples": 100, "evaluation.bound_times": 2,
                   "evaluation.bound_images": 64}  # fmt: skip


def flags(*settings: Mapping[str, Any]) -> list[str]:
    """Returns the overrides of a config, later ones in the place of earlier ones."""
    joined: dict[str, Any] = {}
    for one in settings:
        joined |= one
    return [f"--config.{key}={value}" for key, value in joined.items()]


def parsed(text: str) -> dict[str, str]:
    """Returns the overrides that 'training.batch_size=64 data.flip=False' names; ValueError for
    another text."""
    pairs = [word.partition("=") for word in text.split()]
    if not pairs or not all(key and equals for key, equals, _ in pairs):
        raise ValueError(f"{text!r}: must be KEY=VALUE, or several with spaces between")
    return {key: value for key, _, value in pairs}


def main_py(config: str, workdir: Path, overrides: Sequence[str], *more: str) -> list[str]:
    """Returns the command line of main.py."""
    file = f"--config={ROOT / 'configs' / config}.py"
    return [sys.executable, str(ROOT / "main.py"), file, f"--workdir={workdir}", *more, *overrides]


def finished(command: list[str]) -> str:
    """Runs a command; returns what it printed. Raises RuntimeError with its last line if it
    failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    check(done.returncode, command, done.stderr)
    return done.stdout


def check(code: int, command: list[str], said: str) -> None:
    """Raises RuntimeError for a command that failed, with the last line that it printed."""
    if code:
        last = (said.strip().splitlines() or [""])[-1]
        raise RuntimeError(f"{Path(command[1]).name} ended with exit code {code}: {last[:300]}")


@contextmanager
def _pictures(setup: Setup) -> Iterator[dict[str, Any]]:
    """Makes a set of random pictures of CIFAR-10's shape and number, in a folder for the time
    being; yields the overrides that train on it."""
    shape = (256, 8, 8, 3) if setup.tiny else (50_000, 32, 32, 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.npz"
        np.savez(path, images=np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        yield LOOP | {"data.path": path, "model.dtype": "bfloat16"} | (TINY if setup.tiny else {})


def bare_step(setup: Setup) -> Rows:
    """Returns the time of CIFAR-10's step in bfloat16, by overheads.py: alone, and with parts of
    the loop around it."""
    steps = 5 if setup.tiny else 30
    with _pictures(setup) as overrides:
        found = Path(overrides["data.path"]).with_name("overheads.json")
        how = [f"--rounds={setup.rounds}", f"--steps={steps}", f"--json={found}"]
        file = f"--config={ROOT / 'configs' / 'cifar10.py'}"
        script = str(Path(__file__).parent / "overheads.py")
        finished([sys.executable, script, file, *how, *flags(overrides)])
        seconds = json.loads(found.read_text())
    alone = np.array(seconds["the step alone"])
    return {
        name: {
            "time of a step": figure([1e3 * x for x in s], "ms"),
            "over the step alone": figure(list(100 * (np.array(s) / alone - 1)), "%"),
        }
        for name, s in seconds.items()
    }


def real_loop(setup: Setup, bare: Rows, extra: Mapping[str, str]) -> Rows:
    """Returns the speed of main.py on CIFAR-10 in bfloat16, by its own log, and its overhead over
    the step alone, which `bare_step` measured. `extra` overrides keys of the config."""
    alone = bare["the step alone"]["time of a step"]["median"] / 1e3
    every = 10 if setup.tiny else max(10, round(1 / alone))  # lines of the log are a second apart
    rows = 4 if setup.tiny else 15
    steps = {"training.steps": rows * every, "training.log_every": every}
    with _pictures(setup) as overrides, tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "run"
        asked = flags(overrides, {"training.checkpoint_every": rows * every}, steps, extra)
        finished(main_py("cifar10", workdir, asked))
        log = read_metrics(workdir / "metrics.jsonl")[1:]  # the first has the start in it
    speeds = [row["steps_per_second"] for row in log]
    return {
        "main.py": {
            "steps a second": figure(speeds, "1/s"),
            "time of a step": figure([1e3 / s for s in speeds], "ms"),
            "over the step alone": figure([100 * (1 / s / alone - 1) for s in speeds], "%"),
        }
    }


def training(setup: Setup, minutes: float, workdir: Path, extra: Mapping[str, str]) -> Rows:
    """Returns the figures of configs/fashion_mnist_gpu.py, trained for so many minutes in
    `workdir`, which a later call resumes, and evaluated; starting and compiling included."""
    base = {"model.dtype": "bfloat16"} | (TINY | TINY_TRAINING if setup.tiny else {})
    command = main_py("fashion_mnist_gpu", workdir, flags(base, extra))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # upon which it saves
            process.wait()
        finally:  # of what ends this command too
            if process.poll() is None:
                process.terminate()
                process.wait()
        errors.seek(0)
        check(process.returncode, command, errors.read())
    log = read_metrics(workdir / "metrics.jsonl")
    rows: Rows = {
        f"{minutes:g} minutes": {
            "steps": figure([log[-1]["step"]], "1"),
            "steps a second": figure([r["steps_per_second"] for r in log[1:]] or [0.0], "1/s"),
            "loss at the end": figure([r["loss"] for r in log[-10:]], "1"),
        }
    }
    how = EVALUATION | (TINY_EVALUATION if setup.tiny else {})
    asked = flags(base, how, extra)
    finished(main_py("fashion_mnist_gpu", workdir, asked, "--mode=evaluate"))
    found = json.loads((workdir / "evaluation.json").read_text())
    about = {"date", "step", "weights", "device", "jax", "config", "failed"}
    for part in sorted(found.keys() - about):
        rows |= {f"{part} {name}": {"value": figure([x], "1")} for name, x in _numbers(found[part])}
    return rows


def _numbers(tree: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in a tree of dictionaries, each with its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _numbers(value, f"{name} {key}".strip())
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield name, float(tree)


def default_workdir(out: Path) -> Path:
    """Returns where the training of the results in `out` is kept, next to them."""
    return Path(os.path.abspath(out.with_suffix(""))).with_name(f"{out.stem}_training")
