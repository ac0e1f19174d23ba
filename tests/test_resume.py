"""Stopping and starting again loses nothing: the real command, killed, resumed, asked to stop."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from configs import digits
from ddpm.modes.train import train
from ddpm.training import logbook, stopping
from tests import runs

KILLS = int(os.environ.get("DDPM_KILLS", "3"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, shared_run):
    """The shared run, its copy by a process of its own, and the seconds that took."""
    workdir = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    done = runs.process(runs.command(workdir))
    assert done.returncode == 0, done.stderr
    seconds = time.monotonic() - began
    assert_same(workdir, (shared_run, seconds))
    return workdir, seconds


def assert_same(workdir, uninterrupted):
    step, arrays = runs.final_state(workdir)
    expected_step, expected = runs.final_state(uninterrupted[0])
    assert step == expected_step == 8
    for a, b in zip(arrays, expected, strict=True):
        assert a.tobytes() == b.tobytes()


def test_run_leaves_samples_curves_metrics_and_checkpoints(uninterrupted):
    workdir, _ = uninterrupted
    assert (workdir / "samples" / "step_00000008.png").stat().st_size > 500
    assert (workdir / "losses.png").stat().st_size > 5000
    assert list((workdir / "tensorboard").iterdir())
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["6", "8"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        parts = [value for key, value in row.items() if key.startswith("loss_t")]
        assert len(parts) > 3
        assert min(parts) <= row["loss"] <= max(parts)


def test_killed_at_random_moments_ends_in_the_same_weights(uninterrupted, tmp_path):
    """DDPM_KILLS=20 kills twenty times; a run that ends before that is compared, then another.

    Every other time several steps are taken in a dispatch, and images by index.
    """
    at_once = {"training__steps_per_dispatch": 2, "data__on_device": "always"}
    rng = random.Random(int(os.environ.get("DDPM_KILL_SEED", time.time_ns())))
    kills, workdir = 0, tmp_path / "0"
    while kills < KILLS:
        # From before the first step to after the last one.
        seconds = rng.uniform(0.1, 1.0) * uninterrupted[1]
        overrides = at_once if kills % 2 == 0 else {}
        if runs.kill_after(runs.command(workdir, **overrides), seconds) == 0:
            assert_same(workdir, uninterrupted)
            workdir = tmp_path / str(kills + 1)
        else:
            kills += 1
    done = runs.run(runs.command(workdir))
    assert done.returncode == 0, done.stderr
    assert_same(workdir, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_stop_saves_and_the_same_command_resumes(uninterrupted, tmp_path, number):
    many = runs.command(tmp_path, training__steps=100_000, training__checkpoint_every=100_000)
    process = runs.start(many)
    metrics = tmp_path / "metrics.jsonl"
    runs.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert stopping.ANSWER in said.splitlines()
    last = said.splitlines()[-1]
    assert last.startswith(f"{signal.Signals(number).name}: saved at step ")
    stopped = int(last.split("saved at step ")[1].split()[0])
    step, _ = runs.final_state(tmp_path)
    assert step == stopped >= 4
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == stopped
    assert (tmp_path / "losses.png").stat().st_size > 5000

    done = runs.run(runs.command(tmp_path, training__steps=stopped + 2))
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {stopped}" in done.stderr
    assert "compiling the training step (" in done.stderr  # by the time it took before
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == stopped + 2


def test_a_signal_to_stop_while_drawing_the_samples(uninterrupted, tmp_path):
    slow = runs.command(tmp_path, sampling__num_samples=100_000, sampling__batch_size=4)
    process = runs.start(slow)
    runs.wait_for(lambda: (tmp_path / "checkpoints" / "8").exists())
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.splitlines()[-1].startswith("SIGTERM: saved at step 8 of 8")
    assert not list((tmp_path / "samples").iterdir())
    assert runs.run(runs.command(tmp_path)).returncode == 0
    assert_same(tmp_path, uninterrupted)


@pytest.mark.parametrize("mode", ["train", "sample"])
def test_ctrl_c_with_nothing_to_save_is_one_line(uninterrupted, tmp_path, mode):
    if mode == "train":  # while its pictures are decoded
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        image = Image.fromarray(np.zeros((1000, 1000, 3), np.uint8))
        image.save(pictures / "0.png")
        for i in range(1, 3000):
            os.link(pictures / "0.png", pictures / f"{i}.png")
        process = runs.start(
            runs.command(
                tmp_path / "run", data__name="folder", data__path=pictures, data__image_size="(8,8)"
            ),
            XDG_CACHE_HOME=str(tmp_path / "cache"),
        )
        runs.wait_for(lambda: list((tmp_path / "cache").glob("ddpm/.unfinished-*")))
    else:
        process = runs.start(
            runs.command(uninterrupted[0], "--mode=sample", sampling__num_samples=100_000)
        )
        runs.wait_for(lambda: list((uninterrupted[0] / "samples").glob(".*.partial")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "error: stopped"
    assert not list(uninterrupted[0].glob("samples/.*"))


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    many = runs.command(tmp_path, training__steps=100_000, training__checkpoint_every=100_000)
    process = runs.start(many)
    metrics = tmp_path / "metrics.jsonl"
    runs.wait_for(lambda: metrics.exists() and metrics.read_text())
    other = runs.run(many)
    assert other.returncode == 2
    assert "another process is training in" in other.stderr
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


def test_truncated_checkpoint_falls_back_and_ends_in_the_same_weights(
    uninterrupted, tmp_path, monkeypatch
):
    plotted, plot = [], logbook.plot_losses

    def spy(metrics, picture):
        plotted.append(logbook.read_metrics(metrics)[-1]["step"])
        plot(metrics, picture)

    monkeypatch.setattr(logbook, "plot_losses", spy)
    done = runs.run(runs.command(tmp_path, training__steps=6))
    assert done.returncode == 0, done.stderr
    assert plotted == [2, 4, 6]  # at every checkpoint
    # All of them: Orbax leaves some there that it has merged into others and reads no more.
    for file in (tmp_path / "checkpoints" / "6" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    done = runs.run(runs.command(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "checkpoint 6 in" in done.stderr
    assert len(done.stderr.splitlines()) < 10
    assert "resuming at step 4" in done.stderr
    assert (tmp_path / "damaged_checkpoints" / "6").exists()
    assert_same(tmp_path, uninterrupted)


def test_samples_do_not_depend_on_the_batch_size(uninterrupted):
    workdir, _ = uninterrupted
    images = []
    for batch_size in (5, 2):
        done = runs.run(runs.command(workdir, "--mode=sample", sampling__batch_size=batch_size))
        assert done.returncode == 0, done.stderr
        npz, png, gif = done.stdout.split()
        assert png.endswith("seed0_n5.png")
        assert gif.endswith(".gif")
        with np.load(npz) as file:
            images.append(file["images"].astype(int))
    assert images[0].shape == (5, 8, 8, 1)
    assert images[0].std() > 10
    # To rounding: a network's last bits may depend on the batch it runs in.
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_history_of_losses_is_resumed(tmp_path):
    """Importance sampling of t, a learned variance and an average by a power of the step."""
    config = digits.get_config()
    config.model.update(name="dit", depth=1, channels=8)
    config.diffusion.update(num_steps=2, variance="learned_range")  # each t soon has ten losses
    config.training.update(loss="hybrid", times="importance", ema="power", batch_size=8)
    config.sampling.update(num_samples=1, batch_size=1)
    for name, steps in (("stopped", 4), ("stopped", 8), ("whole", 8)):
        config.training.steps = steps
        train(config, tmp_path / name)
    found, expected = (runs.final_state(tmp_path / name) for name in ("stopped", "whole"))
    assert found[0] == expected[0] == 8
    assert any(a.shape == (2, 10) and (a > 0).all() for a in expected[1])  # all losses came
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.tobytes() == b.tobytes()
