"""The overhead of training over its bare step: the input pipeline; logging, moving average and
progress bar.

    python benchmarks/overheads.py --config=configs/digits.py

Three loops take turns: the step alone on one batch, without moving average and sums for the log;
the whole step with the logbook, on one batch; the same on the pipeline's batches. (The bar shows
on a terminal only.)
"""

import argparse
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm import backend
from ddpm.build.data import source as data_source
from ddpm.build.experiment import build
from ddpm.data import pipeline
from ddpm.training import sharding
from ddpm.training.logbook import Logbook
from ddpm.training.state import Metrics, TrainState, init
from ddpm.training.step import make_train_step


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="of each loop in a round")
    args = parser.parse_args()
    backend.configure()
    config = runpy.run_path(args.config)["get_config"]()
    source = data_source(config)
    built = build(config, source.image_shape)
    mesh = sharding.data_mesh()

    def batch(step: int) -> jax.Array:
        size, flip = config.training.batch_size, config.data.flip
        part = pipeline.train_batch(source, config.seed, step, size, flip=flip)
        return sharding.to_devices(mesh, part.image)

    step_fn = make_train_step(
        built.model,
        built.objective,
        built.optimizer,
        ema_decay=config.training.ema_decay,
        seed=config.seed,
    )

    def bare(state: TrainState, metrics: Metrics, images: jax.Array) -> Any:
        new, _ = step_fn(state, metrics, images)
        return new._replace(ema_params=state.ema_params), metrics

    whole, bare = (jax.jit(f, donate_argnums=(0, 1)) for f in (step_fn, bare))
    state = init(built.model, built.optimizer, source.image_shape, config.seed)
    metrics, one = jax.jit(Metrics.zero)(), batch(0)
    for f in (whole, bare):
        state, metrics = jax.block_until_ready(f(state, metrics, one))

    with tempfile.TemporaryDirectory() as folder:
        total = 3 * args.rounds * args.steps
        logbook = Logbook(Path(folder), step=0, steps=total)
        done = 0

        def loop(step_fn: Any, images: Iterator[jax.Array], log: bool) -> float:
            nonlocal state, metrics, done
            start = time.perf_counter()
            for x in images:
                state, metrics = step_fn(state, metrics, x)
                done += 1
                if log:
                    logbook.advance(done)
                if log and done % config.training.log_every == 0:
                    means = jax.device_get(metrics)
                    logbook.scalars(done, {"loss": float(means.loss / means.steps)})
            jax.block_until_ready(state)
            return time.perf_counter() - start

        n = args.steps
        loops = {
            "the step alone": lambda: loop(bare, iter([one] * n), False),
            "with moving average, log and bar": lambda: loop(whole, iter([one] * n), True),
            "and the pipeline": lambda: loop(
                whole, pipeline.prefetch(batch, range(done, done + n)), True
            ),
        }
        seconds = np.empty((args.rounds, len(loops)))
        for turn in range(args.rounds):
            order = list(enumerate(loops.values()))
            for i, run in order if turn % 2 else reversed(order):
                seconds[turn, i] = run() / n
        logbook.close()

    print(f"{args.config}: medians of {args.rounds} rounds of {n} steps", file=sys.stderr)
    for i, name in enumerate(loops):
        ratio = seconds[:, i] / seconds[:, max(0, i - 1)] - 1
        low, mid, high = np.percentile(ratio, (25, 50, 75))
        more = f"{mid:+.1%} on the line above (quartiles {low:+.1%} to {high:+.1%})" if i else ""
        print(f"{name:34}{np.median(seconds[:, i]) * 1e3:9.2f} ms  {more}")


if __name__ == "__main__":
    main()
