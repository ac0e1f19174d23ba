"""Checks before a file is read: that it is a regular one, and that memory can hold it."""

import json
import os
from pathlib import Path
from typing import Any

from ddpm.errors import InputError, first_line
from ddpm.files.machine import machine_memory


def check_file(path: Path, *, hint: str = "") -> None:
    """Raises InputError, which `hint` ends, unless this is a regular file."""
    if reason := unreadable(path):
        raise InputError(f"{path}: {reason}" + (f"; {hint}" if hint else ""))


def unreadable(path: Path) -> str:
    """Returns why a path is no regular file, '' for one: a pipe or a device would be waited for."""
    if os.path.isfile(path):
        return ""
    if not os.path.exists(path):
        return "there is no such file"
    return (
        "a folder, not a file"
        if os.path.isdir(path)
        else "not a regular file, but a pipe or device"
    )


def check_fits(path: Path, size: int) -> None:
    """Raises InputError for a file whose `size` bytes, unpacked, are more than the free memory."""
    free = free_memory()
    if free is not None and size > free:
        raise InputError(
            f"{path}: unpacked, it takes {size / 2**30:.3g} GB of memory; {free / 2**30:.3g} GB "
            "are free"
        )


def free_memory() -> int | None:
    """Returns the bytes that a process can still have; None where nothing says."""
    there = machine_memory()
    return there and there.free


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file; InputError for anything else."""
    check_file(path)
    try:
        return parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error


def parse_json(text: str, path: Path) -> dict[str, Any]:
    """Returns the object that a JSON text of the file is; InputError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its JSON cannot be read ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: its JSON is not an object")
    return found
