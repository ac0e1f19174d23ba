"""Checkpoints by Orbax: asynchronous, atomic, a few kept; and what Orbax leaves to its user.

Orbax writes no checksums, calls an empty folder the latest step, and never falls back to an older
one. So each checkpoint carries a digest of every array, and restoring tries the newest first, moves
one that is damaged aside, says so in one line, and goes on with the one before.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ddpm.errors import InputError
from ddpm.training.state import TrainState

_ARRAYS = ("params", "ema_params", "opt_state")


class Damaged(Exception):
    """A checkpoint that cannot be used; the text says why."""


class Checkpoints:
    """The checkpoints of one run, in `folder`/<step>."""

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        self.folder = folder.absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in _ARRAYS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=tuple(handlers), item_handlers=handlers
        )
        self._read_only = read_only

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Starts writing; training goes on. An error of the last write is raised here.

        `about` is what the checkpoint's meta says besides: the config, the images' shape.
        """
        items = {name: getattr(state, name) for name in _ARRAYS}
        meta = about | {
            "step": int(state.step),
            "digests": {name: digest(tree) for name, tree in items.items()},
        }
        arguments: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in items.items()}
        self._manager.save(
            meta["step"], args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta))
        )

    def latest_step(self) -> int | None:
        """The newest step written or being written."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self._manager.close()

    def restore(
        self,
        abstract: dict[str, Any],
        say: Callable[[str], None],
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The newest good checkpoint, the items asked for and its meta; None without any.

        Args:
          abstract: {"params" | "ema_params" | "opt_state": tree of ShapeDtypeStruct with sharding}.
          say: takes a one-line warning.

        Raises InputError if the arrays are of another shape, or if every checkpoint is damaged.
        """
        damaged: list[str] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored, meta = self._restore_step(step, abstract)
            except Damaged as error:
                damaged.append(f"{step} ({error})")
                aside = "" if self._read_only else f", moved to {self._move_aside(step)}"
                say(f"checkpoint {step} in {self.folder} is damaged: {error}{aside}")
                continue
            return restored, meta
        if damaged:
            raise InputError(
                f"no checkpoint in {self.folder} is good: {', '.join(damaged)}; "
                "start anew with another --workdir"
            )
        return None

    def _restore_step(
        self, step: int, abstract: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        meta = self._read_meta(step)
        self._check_shapes(step, abstract)
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # whatever the layers below make of a broken file
            raise Damaged(f"it cannot be read, {type(error).__name__}") from error
        for name in abstract:
            if digest(restored[name]) != meta["digests"][name]:
                raise Damaged(f"the digest of its {name} does not match")
        return {name: restored[name] for name in abstract}, meta

    def _read_meta(self, step: int) -> dict[str, Any]:
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            meta = restored["meta"]
            if meta["step"] != step or set(meta["digests"]) != set(_ARRAYS):
                raise Damaged("its meta is of another checkpoint")
        except Damaged:
            raise
        except Exception as error:
            raise Damaged("its meta cannot be read") from error
        return meta

    def _check_shapes(self, step: int, abstract: dict[str, Any]) -> None:
        try:
            stored = self._manager.item_metadata(step)
            found = {name: _shapes(stored[name]) for name in abstract}
        except Exception as error:
            raise Damaged("its array metadata cannot be read") from error
        for name, tree in abstract.items():
            wanted = _shapes(tree)
            if not found[name]:
                raise Damaged(f"its {name} is missing")
            for path in sorted(wanted.keys() | found[name].keys()):
                if wanted.get(path) != found[name].get(path):
                    there, here = (d.get(path, "missing") for d in (found[name], wanted))
                    raise InputError(
                        f"checkpoint {step} in {self.folder} is of another architecture: {path} is "
                        f"{there} there and {here} by this config; "
                        "give the run's own config, or another --workdir"
                    )

    def _move_aside(self, step: int) -> Path:
        target = self.folder.parent / "damaged_checkpoints" / str(step)
        target.parent.mkdir(exist_ok=True)
        while target.exists():
            target = target.with_name(target.name + "_")
        shutil.move(self.folder / str(step), target)
        self._manager.reload()
        return target


def saved_meta(folder: Path) -> dict[str, Any] | None:
    """The meta of the newest checkpoint in `folder` that has a readable one, without opening it."""
    steps = sorted((int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit()), reverse=True)
    for step in steps:
        try:
            return json.loads((folder / str(step) / "meta" / "metadata").read_text())
        except (OSError, ValueError):
            continue
    return None


def digest(tree: Any) -> list[int]:
    """One 32-bit number per array, in the tree's order, that changes with any bit of the array.

    Computed where the arrays are, as integer sums: no copy to the host, any sharding alike.
    """
    return [int(n) for n in np.asarray(_digest(jax.tree.leaves(tree)))]


@jax.jit
def _digest(leaves: list[jax.Array]) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        if x.dtype.itemsize != 4:
            x = x.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        # Odd weights are invertible mod 2^32, so a change of one element never cancels.
        weights = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        return jnp.sum(bits * weights * jnp.uint32(2654435761), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in leaves])


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the arrays in a tree, by names that any container gives."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    flat = {}
    for path, leaf in leaves:
        if hasattr(leaf, "shape"):
            names = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]
            flat["/".join(names)] = tuple(leaf.shape)
    return flat


def parameter_count(params: Any) -> int:
    """How many numbers a tree holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
