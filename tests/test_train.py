"""The grid of samples in training, the time of compiling, what begins: without a training."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs import digits
from ddpm.build.experiment import build
from ddpm.modes import train
from ddpm.modes.run_folder import compiling
from ddpm.training import sharding
from ddpm.training.loop import Progress
from ddpm.training.state import TrainState


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "expected"), [(5, 64, 5), (64, 4, 4), (64, 64, 64)]
)
def test_no_more_are_drawn_than_asked_for(num_samples, batch_size, expected):
    config = digits.get_config()
    config.sampling.update(num_samples=num_samples, batch_size=batch_size)
    generator = build(config, (8, 8, 1)).generator(sharding.data_mesh(), num_samples)
    assert generator.batch_size == expected


@pytest.mark.parametrize("batch", [1, 2])
def test_a_grid_is_kept_if_the_signal_came_after_its_last_batch(tmp_path, batch):
    """Two batches, and a signal to stop during one of them."""
    stop, asked = SimpleNamespace(name=""), []

    def batches(params, num_samples, *, seed):
        for i in (1, 2):
            stop.name = "SIGTERM" if i == batch else ""
            yield np.zeros((4, 8, 8, 1), np.uint8)

    def generator(mesh, num_samples):
        asked.append(num_samples)
        return SimpleNamespace(batches=batches, compiled=True)

    config = digits.get_config()
    config.sampling.num_samples = 8
    objective = SimpleNamespace(schedule_parameters=dict)
    built = SimpleNamespace(config=config, objective=objective, generator=generator)
    expected = []
    logbook = SimpleNamespace(speaks=True, image=lambda *_: None, expect=expected.append)
    draw = train._drawing(built, None, logbook, tmp_path, stop)
    draw(Progress(3, TrainState(3, {}, {}, None), None))
    assert (tmp_path / "samples" / "step_00000003.png").exists() == (batch == 2)
    assert asked == [8]
    assert expected == (["8 samples, 0:00:00 the last time"] if batch == 2 else [])


def test_compiling_is_said_before_with_the_time_it_took_the_last_time(tmp_path, capsys):
    path = tmp_path / "compile_seconds.json"
    for damaged in ("", "[1]", '{"the sampler": []}'):
        path.write_text(damaged)
        with compiling("the sampler", tmp_path):
            assert capsys.readouterr().err == "compiling the sampler ..\n"
    with pytest.raises(KeyboardInterrupt), compiling("the training step", tmp_path):
        raise KeyboardInterrupt  # its time is not known then
    assert list(json.loads(path.read_text())) == ["the sampler"]
    path.write_text('{"the sampler": 12.3}')
    capsys.readouterr()
    with compiling("the sampler", tmp_path):
        assert capsys.readouterr().err == "compiling the sampler (12.3 s the last time) ..\n"
    blocked = tmp_path / "file"
    blocked.write_text("")
    with compiling("the sampler", blocked):  # no folder: not remembered, that is all
        pass
