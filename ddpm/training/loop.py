"""The training loop: step, then whoever wants to log, save or sample."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ddpm.training.state import Metrics, TrainState
from ddpm.training.stopping import StopSignal


@dataclass
class Progress:
    """The state of training after `step` updates. A callback that logs the metrics resets them."""

    step: int
    state: TrainState
    metrics: Metrics


Callback = Callable[[Progress], None]
Dispatch = tuple[range, tuple[Any, ...]]  # the steps that are taken at once, and their batches


def run(
    progress: Progress,
    train_step: Callable[..., tuple[TrainState, Metrics]],
    batches: Iterable[Dispatch],
    callbacks: Sequence[Callback],
    stop: StopSignal,
) -> None:
    """Runs each dispatch and then every callback in turn, until a signal asks to stop.

    `progress` is changed in place, so that it is right however this ends.
    """
    keep_up = _keeping_up()
    for number, (steps, batch) in enumerate(batches):
        progress.state, progress.metrics = train_step(progress.state, progress.metrics, *batch)
        progress.step += len(steps)
        keep_up(progress)
        for callback in callbacks:
            callback(progress)
        if stop.requested(number):
            return


def every(steps: int, callback: Callback, *, last: int = 0) -> Callback:
    """Returns the callback at every multiple of `steps` and at step `last`; 0 is never."""

    def at(progress: Progress) -> None:
        if (steps and progress.step % steps == 0) or progress.step == last:
            callback(progress)

    return at


def _keeping_up(seconds: float = 0.5) -> Callback:
    """Returns the callback that waits for the devices after at most about `seconds` of work.

    JAX only queues a step, tens of them if it may. A stop would have to wait for all of these, and
    what is said of progress would be ahead of it.
    """
    queued, most, waited = 0, 1, time.perf_counter()

    def callback(progress: Progress) -> None:
        nonlocal queued, most, waited
        queued += 1
        if queued >= most:
            jax.block_until_ready(progress.metrics)
            before, waited = waited, time.perf_counter()
            queued, most = 0, max(1, int(queued * seconds / max(waited - before, 1e-6)))

    return callback
