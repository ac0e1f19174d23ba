"""Batches from a source, each a pure function of the seed and the step, so nothing is carried.

Resuming at a step, or on another number of hosts, gives the batches that an uninterrupted run
would have had.
"""

import functools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ddpm.data.sources import Examples, Source
from ddpm.diffusion import streams
from ddpm.errors import InputError

S = TypeVar("S")
T = TypeVar("T")
_END: Any = object()


class EvaluationBatch(NamedTuple):
    """A batch of constant size: mask, bool[n], is False where examples only fill it up."""

    examples: Examples
    mask: np.ndarray


def batch_indices(
    seed: int,
    step: int,
    batch_size: int,
    n: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> np.ndarray:
    """This process's slice of the global batch of a step: int64[batch_size // process_count].

    The batches are cut from the endless row of epochs, each its own permutation of range(n):
    each example comes once an epoch, and a batch may span two epochs or (n < batch_size) more.
    Raises InputError where batch_size does not divide by process_count, or n is 0.
    """
    first, last = _slice(batch_size, process_index, process_count)
    if n < 1:
        raise InputError("the data set has no examples")
    if step < 0 or seed < 0:
        raise InputError(f"step = {step}, seed = {seed}: neither may be negative")
    position = step * batch_size + np.arange(first, last, dtype=np.int64)
    epoch, offset = np.divmod(position, n)
    indices = np.empty_like(position)
    for e in range(int(epoch[0]), int(epoch[-1]) + 1):
        here = epoch == e
        indices[here] = _permutation(seed, e, n)[offset[here]]
    return indices


class Plan(NamedTuple):
    """This process's slice of a training batch: indices int64[n], and which of the images are
    mirrored, bool[n], or None for none."""

    indices: np.ndarray
    mirrored: np.ndarray | None


def plan(
    seed: int,
    step: int,
    batch_size: int,
    n: int,
    *,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Plan:
    """Returns which of n images are in the batch of a step, for this process.

    With flip each is mirrored left to right with probability 1/2, decided by the seed, the step and
    its place in the global batch. Raises as batch_indices does.
    """
    indices = batch_indices(
        seed, step, batch_size, n, process_index=process_index, process_count=process_count
    )
    if not flip:
        return Plan(indices, None)
    coins = np.random.default_rng((seed, step, streams.FLIPS)).random(batch_size) < 0.5
    return Plan(indices, coins[slice(*_slice(batch_size, process_index, process_count))])


def train_batch(source: Source, seed: int, step: int, batch_size: int, **options: Any) -> Examples:
    """Returns this process's slice of the global batch of a step, as `plan` with its options says:
    uint8[batch_size // process_count, H, W, C], and labels."""
    return read(source, plan(seed, step, batch_size, len(source), **options))


def read(source: Source, plan: Plan) -> Examples:
    """Returns the images of a plan, uint8[n, H, W, C], and their labels."""
    examples = source.read(plan.indices)
    if plan.mirrored is None:
        return examples
    image = np.array(examples.image)
    pixels = image.view(f"V{image.shape[-1]}")[..., 0]  # whole pixels move faster than their bytes
    pixels[plan.mirrored] = pixels[plan.mirrored][:, :, ::-1]
    return Examples(image, examples.label)


def evaluation_batches(
    source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[EvaluationBatch]:
    """Yields all examples once and in order, not flipped, in batches of one size.

    The last batch is filled up with the last example, masked out; of several processes each gets
    its slice of every global batch, so all get the same number of batches.
    """
    first, last = _slice(batch_size, process_index, process_count)
    for start in range(0, len(source), batch_size):
        position = np.arange(start + first, start + last, dtype=np.int64)
        examples = source.read(np.minimum(position, len(source) - 1))
        yield EvaluationBatch(examples, position < len(source))


def prefetch(make: Callable[[S], T], steps: Iterable[S], depth: int = 2) -> Iterator[T]:
    """Yields make(step) of each of the steps, computed by a background thread up to `depth` ahead.

    An exception of make is raised here, when its step is asked for. Closing the iterator (or
    dropping it) ends the thread; one that is inside a long make ends when that returns.
    """
    ahead: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def work() -> None:
        for step in steps:
            if closed.is_set():
                return
            try:
                ahead.put((make(step), None))
            except BaseException as error:
                ahead.put((None, error))
                return
        ahead.put((_END, None))

    thread = threading.Thread(target=work, name="ddpm-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            value, error = ahead.get()
            if error is not None:
                raise error
            if value is _END:
                return
            yield value
    finally:
        closed.set()
        while True:  # frees the thread where it waits to put; it puts at most once more
            try:
                ahead.get_nowait()
            except queue.Empty:
                break
        thread.join(timeout=1.0)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False  # it is shared by all who ask
    return order


def _slice(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """Returns where a process's part of a global batch begins and ends."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size = {batch_size}: must be a multiple of the number of processes, "
            f"{process_count}"
        )
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index = {process_index}: must be in 0..{process_count - 1}")
    local = batch_size // process_count
    return process_index * local, (process_index + 1) * local
