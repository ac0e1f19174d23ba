"""Batches as functions of (seed, step): epochs, resuming, processes, flips. Prefetch, scaling."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.data import (
    ArraySource,
    batch_indices,
    evaluation_batches,
    prefetch,
    to_float,
    to_uint8,
    train_batch,
)
from ddpm.errors import InputError


def source_of(n, shape=(4, 6, 3)):
    """Images and labels that tell which example they are; no image is its own mirror image."""
    image = np.random.default_rng(7).integers(0, 256, (n, *shape), np.uint8)
    image[:, 0, 0, 0] = np.arange(n) % 100
    image[:, 0, -1, 0] = 200
    return ArraySource(image, np.arange(n, dtype=np.int32), n)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 5), (7, 7)])
def test_each_epoch_visits_each_example_once(n, batch_size):
    steps = 5 * n  # a whole number of epochs, whatever the batch size
    row = np.concatenate([batch_indices(3, step, batch_size, n) for step in range(steps)])
    epochs = row.reshape(-1, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if n > 6:
        assert len(np.unique(epochs, axis=0)) > len(epochs) - 2  # and each in an order of its own


def test_an_epoch_is_numpys_permutation_of_seed_and_epoch():
    row = np.concatenate([batch_indices(11, step, 6, 9) for step in range(6)])
    assert row.dtype == np.int64
    for epoch in range(4):
        expected = np.random.default_rng((11, epoch)).permutation(9)
        assert (row[9 * epoch : 9 * epoch + 9] == expected).all()


def test_another_seed_gives_another_order():
    assert (batch_indices(0, 0, 50, 50) != batch_indices(1, 0, 50, 50)).any()


def test_a_far_step_needs_no_earlier_one():
    step = 10**12
    assert (np.sort(batch_indices(0, step, 10, 10)) == np.arange(10)).all()


def test_a_resumed_run_sees_the_same_batches():
    source = source_of(23)
    whole = [train_batch(source, 5, step, 8, flip=True) for step in range(12)]
    for step in (7, 11, 3):  # in any order
        again = train_batch(source, 5, step, 8, flip=True)
        assert (again.image == whole[step].image).all()
        assert (again.label == whole[step].label).all()


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_slices_of_the_processes_make_up_the_batch_of_one(process_count):
    source = source_of(10)
    for step in range(5):
        one = train_batch(source, 1, step, 12, flip=True)
        slices = [
            train_batch(
                source, 1, step, 12, flip=True, process_index=i, process_count=process_count
            )
            for i in range(process_count)
        ]
        assert (np.concatenate([s.image for s in slices]) == one.image).all()
        assert (np.concatenate([s.label for s in slices]) == one.label).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_flips_mirror_half_of_the_images_and_nothing_else(channels):
    source = source_of(100, (4, 6, channels))
    before = source.image.copy()
    flipped = []
    for step in range(40):
        batch = train_batch(source, 2, step, 50, flip=True)
        plain = train_batch(source, 2, step, 50)
        same = (batch.image == plain.image).all(axis=(1, 2, 3))
        mirrored = (batch.image == plain.image[:, :, ::-1]).all(axis=(1, 2, 3))
        assert (same ^ mirrored).all()
        assert (batch.label == plain.label).all()
        flipped.append(mirrored)
    assert (source.image == before).all()
    rate = np.mean(flipped)
    assert abs(rate - 0.5) < 5 * 0.5 / np.sqrt(40 * 50)
    assert np.std(np.mean(flipped, axis=0)) > 0.03  # not the same places in every step


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="multiple of the number of processes, 3"):
        batch_indices(0, 0, 8, 100, process_count=3)
    with pytest.raises(InputError, match="no examples"):
        batch_indices(0, 0, 8, 0)
    with pytest.raises(InputError, match="process_index"):
        batch_indices(0, 0, 8, 5, process_index=2, process_count=2)
    with pytest.raises(InputError, match="negative"):
        batch_indices(0, -1, 8, 5)


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 8)])
def test_evaluation_sees_all_once_in_order_in_equal_batches(n, batch_size):
    source = source_of(n)
    batches = list(evaluation_batches(source, batch_size))
    assert {len(b.examples.image) for b in batches} == {batch_size}
    seen = np.concatenate([b.examples.image[b.mask] for b in batches])
    assert (seen == source.image).all()
    labels = np.concatenate([b.examples.label[b.mask] for b in batches])
    assert (labels == np.arange(n)).all()


def test_evaluation_by_two_processes_sees_the_same():
    source = source_of(9)
    parts = [list(evaluation_batches(source, 4, process_index=i, process_count=2)) for i in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 3
    labels = [b.examples.label[b.mask] for part in parts for b in part]
    assert sorted(np.concatenate(labels)) == list(range(9))


def prefetching():
    return [t for t in threading.enumerate() if t.name == "ddpm-prefetch"]


def test_prefetch_gives_all_in_order_and_ends_its_thread():
    assert list(prefetch(lambda step: step**2, range(3, 9))) == [9, 16, 25, 36, 49, 64]
    assert list(prefetch(lambda step: step, range(4, 4))) == []
    assert not prefetching()


def test_prefetch_works_ahead_but_not_further_than_its_depth():
    made = []
    batches = prefetch(lambda step: made.append(step), range(100), depth=3)
    next(batches)
    time.sleep(0.2)
    assert 4 <= len(made) <= 5  # one given, three waiting, one in the thread's hand
    batches.close()
    assert not prefetching()
    assert len(made) <= 6


def test_prefetch_raises_what_make_raised_at_its_step():
    def make(step):
        if step == 2:
            raise InputError("broken image")
        return step

    batches = prefetch(make, range(5))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(InputError, match="broken image"):
        next(batches)
    assert not prefetching()


def test_a_dropped_prefetch_leaves_no_thread():
    for step in prefetch(lambda step: np.zeros(1000), range(10**9)):
        assert step is not None
        break
    deadline = time.time() + 2
    while prefetching() and time.time() < deadline:
        time.sleep(0.01)
    assert not prefetching()


def test_closing_does_not_wait_for_a_make_that_hangs():
    hang = threading.Event()

    def make(step):
        if step:
            hang.wait(20)
        return step

    batches = prefetch(make, range(5))
    next(batches)
    start = time.time()
    batches.close()
    assert time.time() - start < 3
    hang.set()
    while prefetching():
        time.sleep(0.01)


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_all_256_values_survive_there_and_back(convert):
    values = np.arange(256, dtype=np.uint8)
    floats = to_float(convert(values))
    assert floats.dtype == np.float32
    assert floats.min() == -1
    assert floats.max() == 1
    assert (np.asarray(to_uint8(floats)) == values).all()
    assert to_uint8(floats).dtype == np.uint8
    both = jax.jit(lambda x: to_uint8(to_float(x)))
    assert (np.asarray(both(values)) == values).all()


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_to_uint8_rounds_to_the_nearest_and_clips(convert):
    off = np.array([-0.49, 0.49]) / 127.5  # not quite half a step away
    values = np.arange(256, dtype=np.uint8)
    for floats in (to_float(values) + off[0], to_float(values) + off[1]):
        assert (np.asarray(to_uint8(convert(floats.astype(np.float32)))) == values).all()
    outside = convert(np.array([-7.0, 1.01, 1e9, -np.inf, np.inf], np.float32))
    assert np.asarray(to_uint8(outside)).tolist() == [0, 255, 255, 0, 255]
