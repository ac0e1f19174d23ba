"""The run folder: whose run is in it, a lock against a second training, and the time that
compiling took."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm.build.experiment import Experiment
from ddpm.config.same_run import check_same_run
from ddpm.data.images import check_image_shape
from ddpm.data.sources import Source
from ddpm.errors import InputError
from ddpm.files.atomic import check_writable, write_atomically
from ddpm.files.progress import doing, say
from ddpm.training import memory
from ddpm.training.checkpoints import parameter_count, saved_meta


def check_run(config: ConfigDict, workdir: Path, source: Source | None = None) -> None:
    """Raises InputError if the folder has the run of another experiment, or of images of other
    shape.

    With `source`, reports in a line what differs from the run and is allowed to.
    """
    saved = saved_meta(workdir / "checkpoints")
    if saved is None:
        return
    changed = check_same_run(config, saved["config"], workdir)
    if source is None:
        return
    check_image_shape(
        source.image_shape,
        tuple(saved["image_shape"]),
        f"{workdir} holds a run on images of",
        "these are",
        advice=": choose another --workdir",
    )
    count = saved["num_images"]
    if count != len(source):
        changed.append(f"{len(source):,} images, before {count:,}")
    if changed and jax.process_index() == 0:
        say(f"changed since the last checkpoint: {'; '.join(changed)}")


def described(built: Experiment, workdir: Path, params: Any, batch_size: int) -> str:
    """Returns the start line of a command: run, network, batch, sampler, devices, memory."""
    s = built.config.sampling
    steps = "" if built.sampler.adaptive else f" {len(built.times) - 1} steps"
    device = jax.local_devices()[0]
    there = memory.memory(device)
    parts = [
        f"run {workdir}: {parameter_count(params):,} parameters",
        built.config.model.dtype,
        f"batch {batch_size}",
        f"sampler {s.sampler}{steps}",
        f"{jax.device_count()} x {device.device_kind}"
        + (f" with {there.total / 2**30:.0f} GiB" if there else ""),
    ]
    return ", ".join(parts)


@contextlib.contextmanager
def run_folder(workdir: Path) -> Iterator[None]:
    """Makes the folder if need be and locks it; OSError if what a training writes there cannot be
    written, InputError if it is in use."""
    check_writable(workdir, "config.json", "metrics.jsonl", "losses.png")
    for name in ("checkpoints", "samples", "tensorboard"):
        check_writable(workdir / name)
    with (workdir / ".lock").open("w") as lock:
        if jax.process_index() == 0:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back however this ends
            except BlockingIOError as error:
                raise InputError(
                    f"another process is training in {workdir}: choose another --workdir"
                ) from error
            except (ImportError, OSError):
                pass  # a system, or a network's file system, without locks
        yield


@contextlib.contextmanager
def compiling(what: str, workdir: Path) -> Iterator[None]:
    """Says that `what` is being compiled, before and while it is, with the time it took the last
    time in this run folder."""
    speaks, path = jax.process_index() == 0, workdir / "compile_seconds.json"
    known: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # damaged
        known = {str(name): float(s) for name, s in json.loads(path.read_text()).items()}
    if speaks:
        before = f" ({known[what]:.1f} s the last time)" if what in known else ""
        say(f"compiling {what}{before} ..")
    began = time.perf_counter()
    with doing(f"compiling {what}", speaks=speaks):
        yield
    if speaks:
        known[what] = round(time.perf_counter() - began, 1)
        with contextlib.suppress(OSError):
            write_atomically(path, lambda p: p.write_text(json.dumps(known) + "\n"))
