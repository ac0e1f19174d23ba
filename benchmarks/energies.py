"""The time of a training step of an energy, by its form, over that of the network alone.

    python benchmarks/energies.py --config=configs/digits.py

The steps take turns on one batch of random images, as little else on the machine disturbs ratios
within a round.
"""

import argparse
import sys
import time
from typing import Any

import checkout  # noqa: F401
import jax
import numpy as np

from ddpm import backend
from ddpm.build.experiment import build
from ddpm.build.network import ENERGIES
from ddpm.config import with_settings
from ddpm.config.command import parse
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--side", type=int, default=8, help="of the images, which are grey")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of each form in a round")
    parser.add_argument("--forms", nargs="*", default=list(ENERGIES)[1:])
    args, overrides = parser.parse_known_args()
    backend.configure()
    config = parse([sys.argv[0], f"--config={args.config}", *overrides]).config
    loops = {form: stepper(config, form, args.side) for form in ("none", *args.forms)}
    seconds: dict[str, list[float]] = {form: [] for form in loops}
    for turn in range(args.rounds):
        order = list(loops)
        for form in order if turn % 2 else reversed(order):
            seconds[form].append(loops[form](args.steps))
    print(f"{args.config}: medians of {args.rounds} rounds of {args.steps} steps")
    for form, times in seconds.items():
        low, mid, high = np.percentile(np.divide(times, seconds["none"]), (0, 50, 100))
        print(f"{form:14}{np.median(times) * 1e3:9.1f} ms  {mid:.2f} ({low:.2f} to {high:.2f})")


def stepper(config: Any, form: str, side: int) -> Any:
    """Returns n -> the seconds of one of n training steps, compiled and warm."""
    config, _ = with_settings(config, model={"energy": form})
    shape = (side, side, 1)
    built = build(config, shape)
    step = jax.jit(
        make_train_step(
            built.model, built.objective, built.optimizer, ema_decay=built.ema_rate, seed=0
        ),
        donate_argnums=(0, 1),
    )
    images = np.random.default_rng(0).integers(0, 256, (config.training.batch_size, *shape))
    batch = jax.device_put(images.astype(np.uint8))
    start = jax.jit(lambda: init(built.model, built.optimizer, shape, 0, built.objective))
    carried = [start(), jax.jit(Metrics.zero)()]

    def run(n: int) -> float:
        begin = time.perf_counter()
        for _ in range(n):
            carried[:] = step(*carried, batch)
        jax.block_until_ready(carried)
        return (time.perf_counter() - begin) / n

    run(2)
    return run


if __name__ == "__main__":
    main()
