"""Several steps in a dispatch, and batches by index: the same training as one step at a time."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from ddpm.config import default
from ddpm.data import sources
from ddpm.data.sources import EncodedSource
from ddpm.errors import InputError
from ddpm.modes.feed import feed
from ddpm.training import sharding
from ddpm.training.dispatch import dispatches
from ddpm.training.loop import Progress, every, run
from tests import runs

# Labels and flips, which come with the images or the indices.
SETTINGS = {
    "model__num_classes": 10,
    "data__flip": True,
    "training__log_every": 3,
    "training__checkpoint_every": 100,
}
FAST = {"training__steps_per_dispatch": 4, "data__on_device": "always"}


def test_dispatches_end_where_something_is_due():
    parts = [list(part) for part in dispatches(5, 23, 4, (10, 6, 0))]
    assert parts == [
        [5],
        [6, 7, 8, 9],
        [10, 11],
        [12, 13, 14, 15],
        [16, 17],
        [18, 19],
        [20, 21, 22],
    ]
    assert list(dispatches(7, 7, 4, (3,))) == []
    assert [len(part) for part in dispatches(0, 10**6, 1, (100,))] == [1] * 10**6


@pytest.mark.parametrize(
    "overrides",
    [{"training__steps_per_dispatch": 4}, {"data__on_device": "always"}, FAST],
    ids=["several", "by index", "both"],
)
def test_trains_to_the_same_bits(one_at_a_time, tmp_path, overrides):
    """And logs on the same steps the same figures, though some dispatches are short."""
    done = runs.run(runs.command(tmp_path, **SETTINGS | overrides))
    assert done.returncode == 0, done.stderr
    for found, expected in zip(*map(runs.final_state, (tmp_path, one_at_a_time)), strict=True):
        for a, b in zip(found, expected, strict=True) if isinstance(found, list) else ():
            assert a.tobytes() == b.tobytes()
        assert isinstance(found, list) or found == expected == 8
    assert logged(tmp_path) == logged(one_at_a_time)


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory):
    """The run as it is on a CPU by default."""
    folder = tmp_path_factory.mktemp("one")
    done = runs.run(runs.command(folder, **SETTINGS))
    assert done.returncode == 0, done.stderr
    return folder


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 8]
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows]


def test_a_signal_ends_training_after_the_dispatch_under_way():
    class Stop:
        def __init__(self):
            self.asked = []

        def requested(self, number):
            self.asked.append(number)
            return number == 1  # of numbers that follow one another, as several processes need

    progress, seen, stop = Progress(0, 0, 0), [], Stop()
    batches = [(part, (len(part),)) for part in dispatches(0, 20, 4, (6,))]
    step = lambda state, metrics, count: (state + count, metrics)  # noqa: E731
    run(progress, step, batches, [every(6, lambda progress: seen.append(progress.step))], stop)
    assert (progress.step, progress.state, seen, stop.asked) == (6, 6, [6], [0, 1])


def test_only_a_set_in_memory_can_be_on_the_devices():
    config, mesh = default(), sharding.data_mesh()
    built = SimpleNamespace(config=config)
    encoded = EncodedSource((8, 8, 1), None, 3, lambda indices: (indices, None), np.uint8)
    assert feed(built, encoded, mesh).images is None
    config.data.on_device = "always"
    with pytest.raises(InputError, match=r"config\.data\.on_device = 'always': .* take 'auto'"):
        feed(built, encoded, mesh)
    images = sources.digits("test").image
    assert (feed(built, sources.digits("test"), mesh).images == images).all()
    config.data.on_device = "auto"
    assert feed(built, sources.digits("test"), mesh).images is None  # a CPU has it at hand
