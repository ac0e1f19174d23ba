"""The real command on a network small enough to compile in seconds.

`run` calls it in this process, `process` in one of its own; both give what it printed and its exit
code. `shared_run` in conftest.py is one such run, trained once for all tests.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ddpm import cli
from ddpm.build import experiment
from ddpm.config import default
from ddpm.training import sharding
from ddpm.training.checkpoints import Checkpoints, items_of
from ddpm.training.state import init

ROOT = Path(__file__).parents[1]
# Eight steps over the digits; T = 20 keeps sampling short. A transformer of one block compiles in
# half of the time of the smallest UNet, for which see `UNET`.
TINY = {
    "model.name": "dit",
    "model.channels": 8,
    "model.depth": 1,
    "model.num_groups": 4,
    "model.channel_multipliers": "(1,)",
    "model.attention_resolutions": "()",
    "model.dropout": 0.1,
    "diffusion.num_steps": 20,
    "training.steps": 8,
    "training.batch_size": 8,
    "training.warmup_steps": 0,
    "training.log_every": 2,
    "training.checkpoint_every": 2,
    "sampling.num_samples": 5,
    "sampling.batch_size": 4,
}
UNET = {"model__name": "unet"}  # overrides of `command`


class Done(NamedTuple):
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


def command(workdir, *extra, **overrides):
    """The command line of a tiny run; overrides as model__channels=4."""
    config = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    flags = [f"--config.{key}={value}" for key, value in config.items()]
    return [sys.executable, str(ROOT / "main.py"), f"--workdir={workdir}", *flags, *extra]


def run(arguments):
    """Runs a command line of `command` in this process, where JAX has started already."""
    out, err, hook = io.StringIO(), io.StringIO(), sys.unraisablehook
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # as in a process of its own, where none is an error
            code = cli.run(arguments[1:])
    finally:
        sys.unraisablehook = hook
    return Done(code, out.getvalue(), err.getvalue())


def environment(**extra):
    return os.environ | {"JAX_PLATFORMS": "cpu"} | extra


def process(arguments, **options):
    """Runs a command line in a process of its own, and waits for the end."""
    return subprocess.run(
        arguments, capture_output=True, text=True, env=environment(), timeout=300, **options
    )


def start(arguments, **extra):
    """In the background, in a process of its own."""
    return subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**extra),
    )


def kill_after(arguments, seconds):
    """SIGKILL after that long, unless it ended before; its exit code."""
    process = start(arguments)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode


def wait_for(condition, seconds=120.0):
    """Polls until condition() holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def saved_config(workdir):
    """The config in a run folder; keys that are newer than the run have their default."""
    config = default()
    with config.ignore_type():
        config.update(json.loads((workdir / "config.json").read_text()))
    return config


def final_state(workdir):
    """(step, every array of the newest checkpoint), read by the config in the run folder."""
    built = experiment.build(saved_config(workdir), (8, 8, 1))
    shapes = jax.eval_shape(
        lambda: init(
            built.model,
            built.optimizer,
            built.image_shape,
            0,
            built.objective,
            other_averages=len(built.other_ema_rates),
        )
    )
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    placed = sharding.replicated(sharding.data_mesh())
    found = checkpoints.restore(sharding.abstract_like(items_of(shapes), placed), print)
    checkpoints.close()
    assert found is not None
    return found[1]["step"], [np.asarray(x) for x in jax.tree.leaves(found[0])]
