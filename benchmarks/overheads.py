"""The overhead of training over its bare step: moving average; logging and progress bar; the input
pipeline.

    python benchmarks/overheads.py --config=configs/digits.py

Four loops take turns: the step on one batch, without moving average and sums for the log; the whole
step; the same with the logbook; the same on the pipeline's batches. (The bar shows on a terminal
only.)
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import jax
import numpy as np

from ddpm import backend
from ddpm.build.data import source as data_source
from ddpm.build.experiment import build
from ddpm.config.command import parse
from ddpm.data import pipeline
from ddpm.modes.feed import feed
from ddpm.modes.start import jitted_start, jitted_step
from ddpm.training import sharding
from ddpm.training.logbook import Logbook
from ddpm.training.state import Metrics, TrainState


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Keys of the config are overridden as in main.py: --config.data.name=npz",
    )
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of each loop in a round")
    parser.add_argument("--json", type=Path, help="where to write all figures too")
    args, overrides = parser.parse_known_args()
    backend.configure()
    config = parse([sys.argv[0], f"--config={args.config}", *overrides]).config
    found = measure(config, args.rounds, args.steps)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n")
    print(f"{args.config}: medians of {args.rounds} rounds of {args.steps} steps", file=sys.stderr)
    before = None
    for name, seconds in found.items():
        more = ""
        if before is not None:
            low, mid, high = np.percentile(np.array(seconds) / before - 1, (25, 50, 75))
            more = f"{mid:+.1%} on the line above (quartiles {low:+.1%} to {high:+.1%})"
        print(f"{name:34}{np.median(seconds) * 1e3:9.2f} ms  {more}")
        before = np.array(seconds)


def measure(config: Any, rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns the seconds of a step in each round, by loop."""
    source = data_source(config)
    built = build(config, source.image_shape)
    mesh = sharding.data_mesh()
    batches = feed(built, source, mesh)._replace(steps=1)  # one in a dispatch, to be timed alone
    whole: Any = jitted_step(built, batches)

    def batch(step: int) -> Any:
        return batches.batch(range(step, step + 1))

    def without_average(state: TrainState, metrics: Metrics, *images: Any) -> Any:
        new, _ = whole(state, metrics, *images)
        return new._replace(ema_params=state.ema_params), metrics

    bare: Any = jax.jit(without_average, donate_argnums=(0, 1))
    state = jitted_start(built, mesh)()
    metrics, one = jax.jit(Metrics.zero, out_shardings=sharding.replicated(mesh))(), batch(0)
    for f in (whole, bare):
        state, metrics = jax.block_until_ready(f(state, metrics, *one))

    with tempfile.TemporaryDirectory() as folder:
        logbook = Logbook(Path(folder), step=0, steps=2 * rounds * steps)
        done = 0

        def loop(step_fn: Any, batches: Iterator[Any], log: bool) -> float:
            nonlocal state, metrics, done
            start = time.perf_counter()
            for images in batches:
                state, metrics = step_fn(state, metrics, *images)
                done += log
                if log:
                    logbook.advance(done)
                if log and done % config.training.log_every == 0:
                    means = jax.device_get(metrics)
                    logbook.scalars(done, {"loss": float(means.loss / means.steps)})
            jax.block_until_ready(state)
            return time.perf_counter() - start

        loops = {
            "the step without moving average": lambda: loop(bare, iter([one] * steps), False),
            "the step alone": lambda: loop(whole, iter([one] * steps), False),
            "with log and bar": lambda: loop(whole, iter([one] * steps), True),
            "and the pipeline": lambda: loop(
                whole, pipeline.prefetch(batch, range(done, done + steps)), True
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(rounds):
            order = list(loops.items())
            for name, run in order if turn % 2 else reversed(order):
                seconds[name].append(run() / steps)
        logbook.close()
    return seconds


if __name__ == "__main__":
    main()
