"""The kernels of a profile that jax.profiler wrote, read from its trace, without TensorFlow."""

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any


def kernels(folder: Path) -> dict[str, list[float]]:
    """Returns the durations of each kernel in the profile under `folder`, seconds, by name.

    On a GPU those of its streams, on a TPU its XLA operations; on a CPU the operations of all
    threads, where one that contains another counts with it.
    """
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        raise FileNotFoundError(f"{folder}: there is no *.trace.json.gz in it")
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        return of_events(json.load(file)["traceEvents"])


def of_events(events: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns the same of a trace's events."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]

    def where(event: dict[str, Any]) -> str:
        """Returns the kind of line that an event is on."""
        if not processes.get(event["pid"], "").startswith("/device:"):
            return "host"
        return threads.get((event["pid"], event["tid"]), "")

    found: dict[str, dict[str, list[float]]] = {
        kind: defaultdict(list) for kind in ("Stream", "XLA Ops", "host")
    }
    for event in events:
        if event.get("ph") != "X" or "dur" not in event:
            continue
        kind = where(event)
        # The lines beside these repeat the same time: by module, by step, by name in the source.
        line = next((k for k in found if kind.startswith(k)), None)
        if line is not None and (line != "host" or "hlo_op" in event.get("args", {})):
            found[line][event["name"]].append(event["dur"] / 1e6)
    return next((dict(names) for names in found.values() if names), {})


def most_expensive(found: dict[str, list[float]], n: int = 10) -> list[tuple[str, float, int]]:
    """Returns the n kernels that take most time: name, share of all kernels' time, calls."""
    total = sum(map(sum, found.values()))
    first = sorted(found.items(), key=lambda item: -sum(item[1]))[:n]
    return [(name, sum(times) / total, len(times)) for name, times in first]
