"""Forms of the training step for fast devices: several steps in a dispatch, and batches by index.

Each takes a step of `make_train_step` and returns one whose batches come in another way: the states
that follow one another are the same.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ddpm.training.state import Metrics, TrainState
from ddpm.training.step import TrainStep


def by_index(step: TrainStep) -> TrainStep:
    """Returns the step (state, metrics, images uint8[n, H, W, C], indices int32[B], mirrored
    bool[B] or None, labels int[B] or None) of the images with these indices in a set."""

    def train_step(
        state: TrainState,
        metrics: Metrics,
        images: jax.Array,
        indices: jax.Array,
        mirrored: jax.Array | None = None,
        labels: jax.Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        batch = images[indices]
        if mirrored is not None:
            batch = jnp.where(mirrored[:, None, None, None], batch[:, :, ::-1], batch)
        return step(state, metrics, batch, labels)

    return train_step


def several(step: TrainStep, *, fixed: int = 0) -> TrainStep:
    """Returns the function (state, metrics, count int32[], *given) that takes `count` steps.

    The first `fixed` of `given` are the same for each step, the others arrays [k, ...] for k steps,
    of which `count` are taken: one program for any number up to k.
    """

    def train_steps(
        state: TrainState, metrics: Metrics, count: jax.Array, *given: Any
    ) -> tuple[TrainState, Metrics]:
        def body(i: jax.Array, carried: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            batch = jax.tree.map(lambda x: x[i], given[fixed:])
            return step(*carried, *given[:fixed], *batch)

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    return train_steps


def dispatches(first: int, last: int, most: int, due: Sequence[int]) -> Iterator[range]:
    """Yields the steps first .. last - 1 in parts of at most `most`, which end wherever the number
    of steps is a multiple of one of `due` (0: never)."""
    while first < last:
        ends = [first + most, last, *(first - first % n + n for n in due if n)]
        yield range(first, min(ends))
        first = min(ends)
