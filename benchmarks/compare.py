"""Times this library against PyTorch, on one machine, in turn.

    pip install -r benchmarks/requirements.txt
    python benchmarks/compare.py --network=small

Every side is a process of its own that waits while another works. In each round each side is timed
once; the table has the rounds' median, and the median, least and greatest ratio of a round.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from networks import NETWORKS, WHAT

HERE = Path(__file__).parent
SIDES = (
    "ours",
    "diffusers",
    "diffusers-channels_last",
    "diffusers-large_pages",
    "diffusers-compile",
    "lucidrains",
)


class OutOfMemory(RuntimeError):
    """A worker could not have the memory that it was asked to use; it may be asked for less."""


class Side:
    """A worker, and what was measured of it; `options` are those of `worker.bench_of`."""

    def __init__(
        self,
        name: str,
        network: str,
        dtype: str,
        given: Mapping[str, str] = os.environ,
        **options: Any,
    ) -> None:
        self.name = name
        self.born = time.perf_counter()
        environment = {**given, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
        if name == "ours" or name.endswith("large_pages"):
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"  # as main.py does
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), name, network, dtype, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, ask: str, **more: Any) -> Any:
        """Returns the worker's answer to one request; raises OutOfMemory, or RuntimeError if it
        ended instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"ask": ask, **more}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        reply = json.loads(line)
        if "out_of_memory" in reply:
            raise OutOfMemory(f"{self.name}: {reply['out_of_memory']}")
        return reply["answer"]

    def end(self) -> None:
        """Lets it finish."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    unets = [name for name, network in NETWORKS.items() if network.kind == "unet"]
    parser.add_argument("--network", choices=unets, default="small")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    usual = [s for s in SIDES if s != "diffusers-compile"]  # which wants a C compiler
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=usual)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each timing, about")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="where to write all figures too")
    args = parser.parse_args()

    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
    }
    sides = []
    for name in args.sides:  # one after the other, so that the time to the first step is its own
        side = Side(name, args.network, args.dtype)
        try:
            (first,) = side.ask("time", what="train", calls=1)
        except RuntimeError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        to_first_step = time.perf_counter() - side.born
        print(f"{name}: first step after {to_first_step:.1f} s, {first:.1f} s of it in the step")
        result[name] = {"to_first_step": to_first_step, "first_call": first}
        sides.append(side)
    try:
        measure(sides, args, result)
    finally:
        for side in sides:
            side.end()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(sides: list[Side], args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fills `result` and prints the tables."""
    batch = NETWORKS[args.network].batch_size
    flops = next((s.ask("flops") for s in sides if s.name == "diffusers"), None)
    peaks = {s.name: max(s.ask("peak", n=4096)) for s in sides}
    peak = max(peaks.values())
    result |= {"flops": flops, "peaks": peaks}
    print(f"\n{result['machine']}, {result['date']}: {args.network}, batch {batch}, {args.dtype}")
    print(f"a 4096 x 4096 matrix product at best: {peak / 1e9:,.0f} GFLOP/s")
    if {"ours", "diffusers"} <= {s.name for s in sides}:
        error = agreement(sides, args.network)
        result["output_error"] = error
        print(f"outputs of the same weights differ by {error:.1e} of their greatest")

    for what in args.what:
        rounds = in_turns(sides, what, args.rounds, args.seconds)
        print(
            f"\n{what:24} {'ms':>9} {'ours / it':>10} {'(least to most)':>16} {'images/s':>9}",
            end="",
        )
        share = flops is not None and what in ("train", "forward")
        print(f" {'GFLOP/s':>8} {'of peak':>7}" if share else "")
        for side in sides:
            seconds = float(np.median(rounds[side.name]))
            row = f"{side.name:24} {seconds * 1e3:9.1f}"
            if "ours" in rounds:
                ratio = np.array(rounds["ours"]) / np.array(rounds[side.name])
                spread = f"({ratio.min():.2f} to {ratio.max():.2f})"
                row += f" {np.median(ratio):10.2f} {spread:>16}"
            row += f" {batch / seconds:9.1f}"
            if share and side.name != "lucidrains":
                # A training step is three forward passes, as FLOPs go.
                rate = flops / (3 if what == "forward" else 1) / seconds
                row += f" {rate / 1e9:8.1f} {rate / peak:7.0%}"
            print(row, flush=True)
        result[what] = rounds

    print(f"\n{'':24} {'parameters':>12} {'peak memory':>12}")
    for side in sides:
        memory, parameters = side.ask("memory"), side.ask("parameters")
        result[side.name] |= {"memory": memory, "parameters": parameters}
        print(f"{side.name:24} {parameters:12,} {memory / 2**20:8,.0f} MiB")


def in_turns(
    sides: list[Side],
    what: str,
    rounds: int,
    seconds: float,
    *,
    chained: bool = False,
    longest: float = float("inf"),
) -> dict[str, list[float]]:
    """Returns the seconds of a call, by side and round: the median of those that fill `seconds`;
    if chained, the mean of as many, none of which waits for the one before.

    Where the first call of a side takes longer than `longest`, that alone is returned of each.
    """
    first = {s.name: s.ask("time", what=what, calls=1) for s in sides}
    if max(once for (once,) in first.values()) > longest:
        return first
    calls = {}
    for side in sides:
        side.ask("time", what=what, calls=1)
        (once,) = side.ask("time", what=what, calls=1)
        calls[side.name] = max(2, round(seconds / once))
    found: dict[str, list[float]] = {s.name: [] for s in sides}
    for turn in range(rounds):
        for side in sides if turn % 2 else reversed(sides):
            n = calls[side.name]
            how = {"calls": 1, "chained": n} if chained else {"calls": n}
            times = side.ask("time", what=what, warm=True, **how)
            found[side.name].append(float(np.median(times)))
    return found


def agreement(sides: list[Side], network: str) -> float:
    """Returns how far ours and diffusers' outputs differ, as a share of the greatest."""
    ours, theirs = (next(s for s in sides if s.name == n) for n in ("ours", "diffusers"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *NETWORKS[network].image_shape)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        files = {n: f"{folder}/{n}" for n in ("weights.npz", "input.npz", "ours.npy", "theirs.npy")}
        np.savez(files["input.npz"], x=x, t=np.array([0, 700]))
        ours.ask("weights", file=files["weights.npz"])
        for side, file in ((ours, "ours.npy"), (theirs, "theirs.npy")):
            side.ask(
                "output", weights=files["weights.npz"], input=files["input.npz"], file=files[file]
            )
        a, b = np.load(files["ours.npy"]), np.load(files["theirs.npy"])
    return float(np.abs(a - b).max() / np.abs(b).max())


if __name__ == "__main__":
    main()
