"""One side of the comparison in a process of its own: reads requests, a JSON a line, and answers.

Started by compare.py. What a side does not time, it does not do: it waits for the next request.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from networks import NETWORKS


def bench_of(side: str, name: str, dtype: str) -> Any:
    """Returns the side's Bench of a network that computes in `dtype`."""
    network = NETWORKS[name]
    if side == "ours":
        from ddpm import backend

        backend.configure()
        import ours

        return ours.Bench(network, dtype=dtype)
    import theirs
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    kind, _, how = side.partition("-")
    if kind == "lucidrains":
        model = theirs.lucidrains(network, theirs.size(theirs.unet2d(network)))
    else:
        model = theirs.unet2d(network)
    return theirs.Bench(
        network, model, dtype=dtype, channels_last="channels_last" in how, compiled="compile" in how
    )


def main() -> None:
    """Runs worker.py SIDE NETWORK DTYPE."""
    side, name, dtype = sys.argv[1:]
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    bench = bench_of(side, name, dtype)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(bench, request)), file=answer_to, flush=True)


def answer(bench: Any, request: dict[str, Any]) -> Any:
    """Returns what is asked for: times of calls, an output, figures."""
    match request["ask"]:
        case "time":  # seconds of each of so many calls
            call = getattr(bench, request["what"])
            if request.get("warm"):
                call()  # after a rest: its memory and caches have gone to others
            return timed(call, request["calls"])
        case "weights":
            np.savez(request["file"], **bench.weights())
            return None
        case "output":
            with np.load(request["weights"]) as file:
                weights = dict(file)
            with np.load(request["input"]) as file:
                x, t = file["x"], file["t"]
            np.save(request["file"], bench.output(x, t, weights))
            return None
        case "flops":
            return bench.flops()
        case "parameters":
            return bench.parameters()
        case "memory":  # of the process on a CPU: ru_maxrss is in KiB on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            return bench.peak_memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        case "peak":  # FLOP/s of a large matrix product, at best
            multiply = bench.product(request["n"])
            return 2 * request["n"] ** 3 / min(timed(multiply, 6))
    raise ValueError(request)


def timed(call: Callable[[], object], calls: int) -> list[float]:
    """Seconds of each of so many calls."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
