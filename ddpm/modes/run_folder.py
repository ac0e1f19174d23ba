"""The run folder of a training: whose run is in it, and a lock against a second one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ddpm.config.same_run import check_same_run
from ddpm.data.images import check_image_shape
from ddpm.data.sources import Source
from ddpm.errors import InputError
from ddpm.files.atomic import check_writable
from ddpm.training.checkpoints import saved_meta
from ddpm.training.logbook import say


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
