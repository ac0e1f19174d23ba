"""The training loop: step, then whoever wants to log, save or sample."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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
    for number, (steps, batch) in enumerate(batches):
        progress.state, progress.metrics = train_step(progress.state, progress.metrics, *batch)
        progress.step += len(steps)
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
