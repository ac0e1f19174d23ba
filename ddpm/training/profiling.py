"""A profile of some training steps, for TensorBoard, XProf or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from ddpm.errors import InputError
from ddpm.training.loop import Callback, Progress

WARM_UP = 3  # steps after compiling that are not traced


@contextlib.contextmanager
def profiled(
    folder: Path, steps: int, *, first: int, last: int, say: Callable[[str], None]
) -> Iterator[Callback]:
    """Provides the callback that traces `steps` steps into `folder`, after a few of warm-up from
    step `first`; none for 0.

    Says how to open the profile. A stop before that ends it early. Of several processes only the
    first traces. Raises InputError if fewer steps are left before `last`.
    """
    if steps and last - first < WARM_UP + steps:
        raise InputError(
            f"--profile={steps}: needs {WARM_UP + steps} steps, {WARM_UP} of them to warm up; "
            f"{max(last - first, 0)} are left to step {last}; raise config.training.steps"
        )
    begun: list[int] = []  # the step at which the trace began

    def end(step: int) -> None:
        jax.profiler.stop_trace()
        traced = step - begun.pop()
        say(
            f"profile of {traced} steps in {folder}: open its newest *.trace.json.gz at "
            f"https://ui.perfetto.dev, or `pip install xprof` and `xprof --logdir={folder}`"
        )

    reached = first

    def callback(progress: Progress) -> None:
        nonlocal reached
        before, reached = reached, progress.step
        if begun and progress.step >= begun[0] + steps:
            jax.block_until_ready(progress.metrics)
            end(progress.step)
        elif before < first + WARM_UP <= progress.step:
            jax.block_until_ready(progress.metrics)
            begun.append(progress.step)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python's would drown the rest
            jax.profiler.start_trace(folder, profiler_options=options)

    try:
        yield callback if steps and jax.process_index() == 0 else lambda progress: None
    finally:
        if begun:
            end(reached)
