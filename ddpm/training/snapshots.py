"""Averages of the weights kept along a training, and others made of them when it is over.

Each is one file, averages/step_N_std0.05.npz in the run's folder, of a power-function average
(`ema.power`) at step N. Any other width follows from them (Karras et al. 2024).
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ddpm.errors import InputError, first_line
from ddpm.files import write_whole
from ddpm.training import ema


class Average(NamedTuple):
    """A tree of float32 weights, of the training up to `step`, made of `snapshots` snapshots."""

    params: Any
    step: int
    snapshots: int


def save(folder: Path, step: int, averages: Sequence[Any], relative_stds: Sequence[float]) -> None:
    """Writes the averages after `step` steps, each with its width."""
    for params, std in zip(averages, relative_stds, strict=True):
        flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}

        def write(temporary: Path, flat: dict[str, np.ndarray] = flat) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **flat)  # type: ignore[arg-type]

        write_whole(folder / f"step_{step:08}_std{std:g}.npz", write)


def reconstruct(folder: Path, step: int, relative_std: float) -> Average:
    """The average of this width at the last snapshot up to `step`, of all snapshots until there.

    Summed in float64, one file in memory at a time. Raises InputError without a snapshot, or for
    one that cannot be read.
    """
    found = []
    for path in sorted(folder.glob("step_*_std*.npz")):
        name = re.fullmatch(r"step_(\d+)_std([\d.e-]+)\.npz", path.name)
        if name and 0 < int(name[1]) <= step:
            found.append((path, int(name[1]), float(name[2])))
    if not found:
        raise InputError(
            f"no averages in {folder} up to step {step}: train with config.training.ema = 'power' "
            "and config.training.ema_snapshot_every, or leave config.sampling.ema_relative_std at 0"
        )
    last = max(time for _, time, _ in found)
    profiles = [ema.Profile(time, ema.power_of(std)) for _, time, std in found]
    read = (_read(path) for path, _, _ in found)
    flat = ema.reconstruct(read, profiles, last, relative_std)
    return Average(traverse_util.unflatten_dict(flat, sep="/"), last, len(found))


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); remove it") from error
