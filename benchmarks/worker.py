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
from networks import NETWORKS, tiny


def bench_of(side: str, name: str, dtype: str, options: dict[str, Any]) -> Any:
    """Returns the side's Bench of a network that computes in `dtype`.

    `options` may have the network's batch_size and ddim_steps, tiny, and all else of a Bench.
    """
    network = tiny(NETWORKS[name]) if options.pop("tiny", False) else NETWORKS[name]
    changed = {key: options.pop(key) for key in ("batch_size", "ddim_steps") if key in options}
    network = network._replace(**changed)
    if side == "ours":
        import ours

        return ours.Bench(network, dtype=dtype, **options)
    import theirs
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    kind, _, how = side.partition("-")
    if kind == "lucidrains":
        model = theirs.lucidrains(network, theirs.size(theirs.unet2d(network)))
    else:
        model = theirs.unet2d(network)
    return theirs.Bench(
        network,
        model,
        dtype=dtype,
        channels_last="channels_last" in how,
        compiled="compile" in how,
        **options,
    )


def devices_of(side: str) -> dict[str, str]:
    """Returns what a side computes on."""
    if side == "ours":
        import ours

        return ours.devices()
    import theirs

    return theirs.devices()


def main() -> None:
    """Runs worker.py SIDE NETWORK DTYPE OPTIONS, options as JSON."""
    side, name, dtype, options = sys.argv[1:]
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if side == "ours":
        from ddpm import backend

        backend.configure()
    bench: Any = None
    for line in sys.stdin:
        request, reply = json.loads(line), {}
        try:
            if request["ask"] == "devices":
                reply["answer"] = devices_of(side)
            else:
                bench = bench or bench_of(side, name, dtype, json.loads(options))
                reply["answer"] = answer(bench, request)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reply["out_of_memory"] = " ".join(str(error).split())[:200] or type(error).__name__
        print(json.dumps(reply), file=answer_to, flush=True)


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a device, or the machine, had no memory left: JAX, PyTorch, NumPy."""
    text = f"{type(error).__name__} {error}"
    words = ("RESOURCE_EXHAUSTED", "OutOfMemory", "MemoryError", "out of memory")
    return any(word in text for word in words)


def answer(bench: Any, request: dict[str, Any]) -> Any:
    """Returns what is asked for: times of calls, an output, figures."""
    match request:
        case {"ask": "time", "what": what, "calls": calls}:
            call = getattr(bench, what)
            if request.get("warm"):
                call()  # after a rest: its memory and caches have gone to others
                bench.settle()
            return timed(call, bench.settle, calls, request.get("chained", 1))
        case {"ask": "weights"}:
            np.savez(request["file"], **bench.weights())
            return None
        case {"ask": "output"}:
            with np.load(request["weights"]) as file:
                weights = dict(file)
            with np.load(request["input"]) as file:
                x, t = file["x"], file["t"]
            np.save(request["file"], bench.output(x, t, weights))
            return None
        case {
            "ask": "memory"
        }:  # of the process on a CPU: ru_maxrss is in KiB on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            return bench.peak_memory() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        case {"ask": "peak", "n": n}:  # FLOP/s of a large matrix product, by call
            times = timed(bench.product(n), bench.settle, 7, request.get("chained", 1))
            return [2 * n**3 / seconds for seconds in times[1:]]
        case {"ask": "analysis"}:
            return bench.analysis
        case {
            "ask": "flops" | "parameters" | "compile" | "profile" | "gradient_errors" as ask,
            **how,
        }:
            return getattr(bench, ask)(**how)
    raise ValueError(request)


def timed(
    call: Callable[[], object], settle: Callable[[], object], calls: int, chained: int = 1
) -> list[float]:
    """Returns the seconds of each of so many calls; of `chained` that follow each other without
    waiting, their mean."""
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        for _ in range(chained):
            call()
        settle()
        seconds.append((time.perf_counter() - start) / chained)
    return seconds


if __name__ == "__main__":
    main()
