"""Checkpoints by Orbax: asynchronous, atomic, a few kept; and what Orbax leaves to its user.

Orbax writes no checksums, calls an empty folder the latest step, and never falls back to an older
one. So each checkpoint carries a digest of every array, and restoring tries the newest first, steps
over those that are damaged, and says so; once a good one is found, it moves the others aside.
"""

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts  # of Orbax, which writes by it

from ddpm.errors import InputError, is_of_memory
from ddpm.training.state import TrainState

_ARRAYS = ("params", "ema_params", "opt_state")
_IF_ANY = ("loss_history", "other_ema_params")


def items_of(state: TrainState) -> dict[str, Any]:
    """Returns the arrays of a checkpoint by name; those that not all states have where there are
    any."""
    more = (name for name in _IF_ANY if jax.tree.leaves(getattr(state, name)))
    return {name: getattr(state, name) for name in (*_ARRAYS, *more)}


class Damaged(Exception):
    """A checkpoint that cannot be used; the text says why."""


class NotWritten(InputError):
    """A checkpoint that could not be written: a full disk, a quota, rights."""


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
        names = (*_ARRAYS, *_IF_ANY)
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in names}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=tuple(handlers), item_handlers=handlers
        )
        self._read_only, self._failed = read_only, False

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Starts writing, while training continues. Raises NotWritten, here or at the next call,
        if that fails.

        `about` is what the checkpoint's meta says besides: the config, the images' shape.
        """
        items = items_of(state)
        meta = about | {
            "step": int(state.step),
            "digests": {name: digest(tree) for name, tree in items.items()},
        }
        arguments: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in items.items()}
        with self._writing():
            self._manager.save(
                meta["step"], args=ocp.args.Composite(**arguments, meta=ocp.args.JsonSave(meta))
            )

    def latest_step(self) -> int | None:
        """Returns the newest step written or being written."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits until everything is on disk; raises NotWritten if it cannot be."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the threads, after what is being written; raises NotWritten unless that was."""
        if self._failed:
            with contextlib.suppress(Exception):  # the same again
                self._manager.close()
            return
        with self._writing():
            self._manager.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises NotWritten for what the system refuses, in whatever Orbax wraps it."""
        try:
            yield
        except Exception as error:
            self._failed = True
            why = _refusal(error)
            if why is None:
                raise
            saved = saved_meta(self.folder)
            left = f"resumes from step {saved['step']}" if saved else "starts again"
            raise NotWritten(
                f"no checkpoint can be written to {self.folder}: {why}; once it can, the same "
                f"command {left}"
            ) from error

    def restore(
        self,
        abstract: dict[str, Any],
        say: Callable[[str], None],
    ) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Returns the newest good checkpoint, the items asked for and its meta; None without any.

        Args:
          abstract: some of `items_of` a state, as trees of ShapeDtypeStruct with sharding.
          say: takes a one-line warning.

        Raises InputError if the arrays are of another shape, or if every checkpoint is damaged:
        then all stay where they are. What is no damage, such as too little memory, passes through.
        """
        damaged: dict[int, Damaged] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._restore_step(step, abstract)
            except Damaged as error:
                damaged[step] = error
                continue
            for bad, why in damaged.items():
                say(f"checkpoint {bad} in {self.folder} is damaged: {why}")
            if damaged and not self._read_only:
                say(f"moved to {self._move_aside(list(damaged))}")
            return found
        if damaged:
            which = ", ".join(f"{step} ({error})" for step, error in damaged.items())
            raise InputError(
                f"no checkpoint in {self.folder} is good: {which}; put a good copy there, or "
                "start anew with another --workdir"
            )
        return None

    def _restore_step(
        self, step: int, abstract: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        meta = self._read_meta(step)
        for name in abstract:
            try:
                _read_through(self.folder / str(step) / name)
            except Exception as error:
                _raise_damaged(f"its {name} cannot be read", error)
        self._check_shapes(step, abstract)
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**arguments))
        except Exception as error:  # whatever the layers below make of a broken file
            _raise_damaged("it cannot be read", error)
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
            right = meta["step"] == step and set(meta["digests"]) - set(_IF_ANY) == set(_ARRAYS)
        except Exception as error:
            _raise_damaged("its meta cannot be read", error)
        if not right:
            raise Damaged("its meta is of another checkpoint")
        return meta

    def _check_shapes(self, step: int, abstract: dict[str, Any]) -> None:
        try:
            stored = self._manager.item_metadata(step)
            found = {name: _shapes(stored[name]) for name in abstract}
        except Exception as error:
            _raise_damaged("its array metadata cannot be read", error)
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

    def _move_aside(self, steps: list[int]) -> Path:
        """Moves a checkpoint to damaged_checkpoints/; of several processes the first does it, when
        all have read."""
        aside = self.folder.parent / "damaged_checkpoints"
        _meet("before moving damaged checkpoints")
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / str(step)
                while target.exists():
                    target = target.with_name(target.name + "_")
                shutil.move(self.folder / str(step), target)
        _meet("after moving damaged checkpoints")
        self._manager.reload()
        return aside


def _refusal(error: BaseException | None) -> str | None:
    """Returns what the system refused to write with; None for another error."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        said = re.search(r"(?:os_error_code='|OS error )(\d+)", str(error))  # by TensorStore
        if said:
            return os.strerror(int(said[1]))
        error = error.__cause__ or error.__context__
    return None


def _raise_damaged(text: str, error: Exception) -> NoReturn:
    """Raises Damaged for an error of the layers below, if the files are to blame."""
    chain: BaseException | None = error
    while chain is not None:
        if is_of_memory(chain):
            raise error
        if isinstance(chain, PermissionError):
            raise InputError(f"{chain.filename or 'a checkpoint'}: {chain.strerror}") from error
        chain = chain.__cause__ or chain.__context__
    raise Damaged(f"{text}, {type(error).__name__}") from error


def _read_through(item: Path) -> None:
    """Reads every array once, one by one. Orbax, reading all at a time, leaves a broken one's
    neighbours to complain on standard error, in thousands of lines."""
    base = f"file://{item}/"
    keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
    for key in (k.decode() for k in keys):
        if key.endswith(".zarray"):
            array = {"driver": "ocdbt", "base": base, "path": key.removesuffix(".zarray")}
            ts.open({"driver": "zarr", "kvstore": array}).result().read().result()


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(where)


def saved_meta(folder: Path) -> dict[str, Any] | None:
    """Returns the meta of the newest checkpoint in `folder` that has a readable one, without
    opening it."""
    names = [p.name for p in folder.glob("[0-9]*")]
    # isdecimal alone takes the digits of other scripts, isdigit exponents that int() refuses.
    steps = sorted((int(n) for n in names if n.isascii() and n.isdecimal()), reverse=True)
    for step in steps:
        try:
            meta = json.loads((folder / str(step) / "meta" / "metadata").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(meta, dict) and {"config", "image_shape", "num_images"} <= meta.keys():
            return meta
    return None


def digest(tree: Any) -> list[int]:
    """Returns one 32-bit number per array, in the tree's order, that changes with any bit of the
    array.

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
    """Returns {path: shape} of the arrays in a tree, by names that any container gives."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    flat = {}
    for path, leaf in leaves:
        if hasattr(leaf, "shape"):
            names = [str(getattr(p, "key", getattr(p, "idx", getattr(p, "name", p)))) for p in path]
            flat["/".join(names)] = tuple(leaf.shape)
    return flat


def parameter_count(params: Any) -> int:
    """Returns how many numbers a tree holds."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
