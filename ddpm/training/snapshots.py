"""Averages of the weights kept along a training, and others made of them when it is over.

Each is one file, averages/step_N_std0.05.npz in the run's folder, of a power-function average
(`ema.power`) at step N. Any other width follows from them (Karras et al. 2024).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from ddpm.errors import InputError
from ddpm.files.atomic import write_atomically
from ddpm.files.tensors import read_tensors
from ddpm.training import ema

WORST = 0.1  # misfit of an average that is still made


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

        write_atomically(folder / f"step_{step:08}_std{float(std)!r}.npz", write)


def cut(folder: Path, step: int) -> None:
    """Removes what was kept of later steps, which a training that resumes from here makes anew.

    Made otherwise now, they would not be of one training with the others.
    """
    for path, time, _ in _found(folder):
        if time > step:
            path.unlink()


def reconstruct(folder: Path, step: int, relative_std: float, like: Any) -> Average:
    """Returns the average of this width at the last snapshot up to `step`, of all snapshots until
    there.

    Summed in float64, one file in memory at a time. `like` is a tree of the weights' shapes. Raises
    InputError without a snapshot, for one that cannot be read or is of other weights, or for a
    width that those there do not make (`WORST`).
    """
    found = [file for file in _found(folder) if 0 < file[1] <= step]
    if not found:
        raise InputError(
            f"no averages in {folder} up to step {step}: train with config.training.ema = 'power' "
            "and config.training.ema_snapshot_every, or leave config.sampling.ema_relative_std at 0"
        )
    last = max(time for _, time, _ in found)
    profiles = [ema.Profile(time, ema.power_of(std)) for _, time, std in found]
    wanted = ema.Profile(last, ema.power_of(relative_std))
    off = ema.misfit(profiles, wanted, ema.reconstruction(profiles, wanted))
    if off > WORST:
        kept = ", ".join(f"{std:g}" for std in sorted({std for *_, std in found}))
        raise InputError(
            f"config.sampling.ema_relative_std = {relative_std:g}: the snapshots in {folder}, "
            f"{len(found)} up to step {last}, make it no better than to {off:.0%}: take a width "
            f"nearer to {kept}, or train with more of them (config.training.ema_snapshot_every)"
        )
    shapes = {k: np.shape(v) for k, v in traverse_util.flatten_dict(like, sep="/").items()}
    read = (_read(path, shapes) for path, _, _ in found)
    flat = ema.reconstruct(read, profiles, last, relative_std)
    return Average(traverse_util.unflatten_dict(flat, sep="/"), last, len(found))


def _found(folder: Path) -> list[tuple[Path, int, float]]:
    """Returns the files, with the step and the width in their names."""
    names = ((p, re.fullmatch(r"step_(\d+)_std([\d.e-]+)\.npz", p.name)) for p in folder.glob("*"))
    return sorted((path, int(name[1]), float(name[2])) for path, name in names if name)


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    arrays = read_tensors(path, hint="remove it")
    if {key: array.shape for key, array in arrays.items()} != shapes:
        raise InputError(f"{path}: of another network than the checkpoint; remove it")
    return arrays
