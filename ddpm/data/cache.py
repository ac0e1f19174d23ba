"""Decoded arrays on disk, memory-mapped: written once, complete or not there at all."""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]
VERSION = 1  # of what is cached: one more whenever decoding, cropping or resizing changes


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/ddpm, or ~/.cache/ddpm. It may be deleted when nothing trains."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def cached(
    name: str, key: Mapping[str, Any], blocks: Callable[[], Iterable[Arrays]]
) -> Arrays | None:
    """Returns the arrays that `blocks` gives piece by piece, joined on axis 0, as read-only memory
    maps.

    They are made only if the cache does not hold them under this key (anything JSON can write,
    all that the arrays depend on). The name is for people who look into the cache folder. Where
    the cache cannot be written: None. Either way there is one line in the log. Errors of `blocks`
    pass through, except OSError, which is taken for a full or read-only disk.
    """
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    label = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")[:60]
    folder = cache_folder() / f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    found = _open(folder)
    if found is not None:
        return found
    try:
        _build(folder, blocks())
        _log.info("%s: kept for the next start in %s", name, folder)
    except OSError as error:
        _log.warning(
            "%s: decoded images cannot be cached there (%s), so they are decoded at each use; "
            "XDG_CACHE_HOME chooses another place",
            folder.parent,
            error.strerror or error,
        )
        return None
    return _open(folder)


def _open(folder: Path) -> Arrays | None:
    files = sorted(folder.glob("*.npy"))
    try:
        # Without the subclass np.memmap, whose every slice pays for being one.
        return {f.stem: np.load(f, mmap_mode="r").view(np.ndarray) for f in files} or None
    except (OSError, ValueError):  # cut short after it was written: not by us, but unusable
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _build(folder: Path, blocks: Iterable[Arrays]) -> None:
    """Writes next to the folder and renames: whoever sees the folder sees all of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        _write(unfinished, blocks)
        with contextlib.suppress(OSError):  # another process was first: its folder is as good
            unfinished.rename(folder)
        if not folder.is_dir():
            raise OSError(f"cannot be renamed to {folder.name}")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(folder: Path, blocks: Iterable[Arrays]) -> None:
    files: dict[str, BinaryIO] = {}
    written: dict[str, np.ndarray] = {}  # per array one element, for its dtype and shape
    counts: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        for block in blocks:
            for name, array in block.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.npy").open("wb"))
                    files[name].write(_header(array, 0))
                    written[name], counts[name] = array[:1], 0
                files[name].write(array.tobytes())
                counts[name] += len(array)
        for name, file in files.items():
            file.seek(0)
            file.write(_header(written[name], counts[name]))
            file.flush()
            os.fsync(file.fileno())


def _header(like: np.ndarray, count: int) -> bytes:
    """Returns the header of an .npy of `count` elements like these. NumPy pads it, so its length is
    constant."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out,
        {
            "descr": np.lib.format.dtype_to_descr(like.dtype),
            "fortran_order": False,
            "shape": (count, *like.shape[1:]),
        },
    )
    return out.getvalue()


def _remove_leftovers(folder: Path, older_than: float = 24 * 3600) -> None:
    """Removes what killed processes left half written; a younger one may still be at work."""
    for path in folder.glob(".unfinished-*"):
        with contextlib.suppress(OSError):
            if time.time() - max(_changed(path)) > older_than:
                shutil.rmtree(path, ignore_errors=True)


def _changed(path: Path) -> Iterator[float]:
    yield path.stat().st_mtime
    for file in path.iterdir():
        yield file.stat().st_mtime
