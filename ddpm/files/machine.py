"""The memory of this machine, and what is free of it, by Linux and its control groups."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Of a control group: limit, use, and the pages of files in that, which are given up when needed.
_VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_VERSION_2 = "memory.max", "memory.current", "inactive_file"


class Memory(NamedTuple):
    """Bytes: all there is, and what is free of it."""

    total: int
    free: int


def machine_memory() -> Memory | None:
    """Returns the memory that this process can have, swap included; None where nothing says."""
    try:
        found = [_of_machine(), *_of_groups()]
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    return Memory(min(m.total for m in found), max(0, min(m.free for m in found)))


def _of_machine() -> Memory:
    file = _PROC / "meminfo"
    if not file.exists():
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total, total)
    kilobytes = _numbers(file)
    total = kilobytes["MemTotal"] + kilobytes["SwapTotal"]
    return Memory(1024 * total, 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"]))


def _of_groups() -> Iterator[Memory]:
    """Yields that of this process's control groups (version 1 or 2) that have a limit, if any."""
    groups = _PROC / "self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        root = _GROUPS / "memory" if kinds else _GROUPS
        limit, use, cached = _VERSION_1 if kinds else _VERSION_2
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root) and (place / limit).is_file():
                text = (place / limit).read_text().strip()
                if text.isdecimal():  # not 'max'
                    held = int((place / use).read_text()) - _numbers(place / "memory.stat")[cached]
                    yield Memory(int(text), int(text) - held)


def _numbers(file: Path) -> dict[str, int]:
    """Returns the first number of each line, by its name."""
    lines = (line.split() for line in file.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}
