"""Bad input: one line that says what and where, exit code 2, nothing overwritten or lost."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import digits
from ddpm.build.experiment import build
from ddpm.data import sources
from ddpm.modes import start
from ddpm.training.logbook import Logbook
from ddpm.training.loop import Progress
from ddpm.training.state import TrainState
from tests import runs


def fails(arguments, *said, code=2):
    done = runs.run(arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    for words in said:
        assert words in lines[0]


def contents(folder, but=""):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != but}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.model.chanels=8"], ["model.chanels", "did you mean 'model.channels'"]),
        (["--config.training.batch_size=many"], ["batch_size=many: must be of type int"]),
        (["--config.diffusion.schedule=liner"], ["did you mean 'linear'"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py"]),
        (["--config=configs/ablations/table2.py:eps_ms"], ["did you mean 'eps_mse'"]),
        (["--mode=trian"], ["must be one of train, sample", "did you mean 'train'"]),
        (["--wrkdir=x"], ["wrkdir"]),
        (["runs/new"], ["unexpected argument 'runs/new'"]),
        (["--distributed=auto"], ["--distributed=auto: JAX cannot find the processes"]),
        (["--distributed=localhost:1,2"], ["must be 'auto' or HOST:PORT,COUNT,INDEX"]),
        (["--distributed=localhost:1,2,2"], ["INDEX must be in 0..COUNT - 1"]),
    ],
)
def test_wrong_flag(tmp_path, flags, said):
    fails(runs.command(tmp_path / "run", *flags), *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data__name": "cifar11"}, ["cifar11", "cifar10"]),
        (
            runs.UNET | {"model__channel_multipliers": "(1,1,1,1,1)"},
            ["8x8 cannot be halved 4 times"],
        ),
        ({"diffusion__schedule": "betas", "diffusion__betas": "(0.1,1.0,0.2)"}, ["beta_2 = 1"]),
        ({"data__name": "folder"}, ["config.data.path is empty"]),
        ({"data__image_size": "(9,9)"}, ["image_size = (9, 9)", "digits", "(8, 8)"]),
        ({"model__num_classes": 7}, ["num_classes = 7", "'digits' has 10 classes; set it to 10"]),
        ({"sampling__guidance_scale": 2.0}, ["guidance_scale = 2.0", "model has no labels"]),
        ({"data__split": "valid"}, ["no split 'valid'", "train, test"]),
    ],
)
def test_wrong_value(tmp_path, overrides, said):
    fails(runs.command(tmp_path / "run", **overrides), *said)
    assert not (tmp_path / "run").exists()


def folder_run(tmp_path, pictures, **overrides):
    options = {"data__name": "folder", "data__path": pictures, "data__image_size": "(8,8)"}
    options["data__channels"] = 1  # as the digits, of which the step is compiled
    return runs.command(tmp_path / "run", **(options | overrides))


def test_empty_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    fails(folder_run(tmp_path, tmp_path / "pictures"), str(tmp_path / "pictures"))


def test_broken_picture_is_named_or_skipped(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{i}.png")
    (pictures / "torn.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    fails(folder_run(tmp_path, pictures), "torn.png")
    done = runs.run(folder_run(tmp_path, pictures, data__broken_images="skip", training__steps=2))
    assert done.returncode == 0, done.stderr
    assert "torn.png" in done.stderr
    assert "3 images of 8x8x1" in done.stderr


def test_run_folder_of_another_network_is_left_alone(shared_run):
    before = contents(shared_run)
    fails(
        runs.command(shared_run, model__channels=12), "config.model.channels = 8, this one says 12"
    )
    assert contents(shared_run) == before


def test_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    fails(runs.command(tmp_path / "file" / "run"), "cannot be written", "--workdir")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    fails(
        runs.command(tmp_path),
        f"{tmp_path / 'metrics.jsonl'}: cannot be written, as it is a folder",
    )


def test_sampling_without_a_checkpoint(tmp_path):
    fails(runs.command(tmp_path / "run", "--mode=sample"), "no checkpoint in", "train first")
    assert not (tmp_path / "run").exists()


def test_chain_as_a_video(own_run):
    done = runs.run(runs.command(own_run, "--mode=sample", sampling__mp4=True))
    assert done.returncode == 0, done.stderr
    written = [line.rsplit(".", 1) for line in done.stdout.split()]
    assert [suffix for _, suffix in written] == ["npz", "png", "gif", "mp4"]
    for path, suffix in written:
        assert os.path.getsize(f"{path}.{suffix}") > 500


def test_diverging_run_stops_and_names_step_and_checkpoint(tmp_path):
    # Warmed up over so many steps that the first ones are harmless, to a rate that overflows.
    overrides = {
        "training__learning_rate": 1e38,
        "training__warmup_steps": 10**7,
        "training__grad_clip": 0.0,
        "training__steps": 100,
        "training__checkpoint_every": 1,
    }
    fails(runs.command(tmp_path, **overrides), "is not finite at step", "checkpoints/", code=3)
    step, arrays = runs.final_state(tmp_path)
    assert step >= 1
    assert all(np.isfinite(a).all() for a in arrays)
    # The advice can be followed; here from one step earlier, for the first one was of rate 0.
    shutil.rmtree(tmp_path / "checkpoints" / str(step))
    step -= 1
    calmer = {"training__grad_clip": 1.0, "training__steps": step + 2}  # and all else as usual
    done = runs.run(runs.command(tmp_path, **calmer))
    assert done.returncode == 0, done.stderr
    assert "changed since the last checkpoint: config.training.grad_clip = 1.0" in done.stderr
    assert f"resuming at step {step}" in done.stderr


def save_npz(path, n, size=8):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 1), dtype=np.uint8)
    np.savez(path, x_train=images, x_small=images[:5])
    return {"data__name": "npz", "data__path": path, "data__split": "train"}


def test_other_images_in_the_same_run_folder(tmp_path):
    first = save_npz(tmp_path / "first.npz", 20)
    run = tmp_path / "run"
    done = runs.run(runs.command(run, training__steps=2, **first))
    assert done.returncode == 0, done.stderr
    assert "20 images of 8x8x1" in done.stderr

    larger = save_npz(tmp_path / "larger.npz", 20, size=16)
    fails(runs.command(run, **larger), "on images of (8, 8, 1), these are (16, 16, 1)")
    fails(runs.command(run, **(first | {"data__split": "small"})), "config.data.split = 'train'")
    more = save_npz(tmp_path / "more.npz", 30)
    done = runs.run(runs.command(run, training__steps=4, **more))
    assert done.returncode == 0, done.stderr
    assert "more.npz" in done.stderr
    assert "30 images, before 20" in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.loss_weight": "x_0"}, "'x_0' counts an error of 'eps' at t = T as 1e+05 at"),
        ({"diffusion.schedule": "linear"}, "alpha_bar_T = 0.82: x_T still shows the data"),
        *(
            (
                {"diffusion.zero_terminal_snr": True, "diffusion.prediction": prediction,
                 "training.loss_weight": weight},
                f"loss_weight = '{weight}' is 0 at t = T" if untrained else "",
            )
            for prediction in ("v", "x_0")
            for weight, untrained in (("simple", True), ("min_snr", True), ("p2", True),
                                      ("none", False), ("v", False), ("truncated_snr", False))
        ),
    ],
)  # fmt: skip
def test_what_looks_like_a_mistake_is_reported_at_the_start(tmp_path, capsys, changes, said):
    config = digits.get_config()
    config.diffusion.num_steps = 20
    config.update_from_flattened_dict(changes)
    data = sources.digits("train")
    logbook = Logbook(tmp_path, step=0, steps=8)
    state = TrainState(0, {"kernel": np.zeros((2, 3))}, None, None)
    start.announce(build(config, (8, 8, 1)), data, logbook, Progress(0, state, None), None)
    logbook.close()
    printed = capsys.readouterr().err
    assert said in printed
    assert ": 6 parameters, float32, batch 64, sampler ancestral 20 steps, " in printed
    assert "1,438 images of 8x8x1; from the start, to step 2400" in printed
    assert printed.count("\n") == 1 + bool(said)


def test_compiled_programs_are_kept_and_reported_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    command = runs.command(tmp_path / "run", training__steps=1)
    first = runs.process(command)
    assert first.returncode == 0, first.stderr
    kept = tmp_path / "cache" / "ddpm" / "compiled"
    assert first.stderr.count(f"compiled programs are kept in {kept}") == 1
    before = contents(kept)
    assert any("train_step" in path.name for path in before)
    again = runs.process(runs.command(tmp_path / "again", training__steps=1))
    assert again.returncode == 0, again.stderr
    assert "compiled programs" not in again.stderr
    # JAX's own files of when each was last used aside, nothing is compiled anew.
    assert {p for p in contents(kept) if p.name.endswith("-cache")} == {
        p for p in before if p.name.endswith("-cache")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "glibc.malloc.hugetlb=1"), ("glibc.malloc.arena_max=1", "glibc.malloc.arena_max=1")],
)
def test_starts_in_large_pages_unless_set_otherwise(tmp_path, before, after):
    (tmp_path / "config.py").write_text(
        "import os, sys\n"
        "def get_config():\n"
        "    raise ValueError(f'{os.environ[\"GLIBC_TUNABLES\"]} {sys.flags.utf8_mode}')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if before:
        environment["GLIBC_TUNABLES"] = before
    program = [sys.executable, "-X", "utf8", str(runs.ROOT / "main.py")]  # options are kept
    done = subprocess.run(
        [*program, f"--config={tmp_path / 'config.py'}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"ValueError: {after} 1"), done.stderr
