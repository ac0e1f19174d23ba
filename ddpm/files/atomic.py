"""Files that are whole or not there."""

import contextlib
import errno
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_LEFTOVER_S = 24 * 3600  # a younger one may still be written


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes atomically: `write` makes a file next to `path`, which is then renamed. The old file
    or the complete new one is there; of several processes, all of one and nothing of the others.

    Raises OSError, whose filename is `path`, if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_no_folder(path)
    _remove_leftovers(path.parent)
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, temporary, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder: Path, *names: str) -> None:
    """Makes the folder if need be; raises OSError if it, or files of these names in it, cannot be
    written: at once, instead of after the work."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        _check_no_folder(folder / name)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        error.filename = str(folder)
        raise


def _check_no_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left half written."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):  # another process was first
            if time.time() - path.stat().st_mtime > _LEFTOVER_S:
                path.unlink()
