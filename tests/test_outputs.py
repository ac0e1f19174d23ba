"""What the commands write: where, by whom it was made, and one line where it cannot be written."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.data import digits
from ddpm.files import atomic
from ddpm.version import __version__
from tests.runs import ROOT, command, run
from tests.test_main import contents, fails


def in_the_way(path):
    """A file where a folder is needed, or the reverse: not even the superuser can write there."""
    if path.suffix in (".json", ".jsonl", ".png", ".html", ".npz", ".lock"):
        path.mkdir(parents=True)
    else:
        path.write_text("in the way")


@pytest.mark.parametrize(
    "name", ["checkpoints", "samples", "tensorboard", "config.json", "metrics.jsonl", "losses.png"]
)
def test_training_says_at_once_what_cannot_be_written(tmp_path, name):
    in_the_way(tmp_path / name)
    before = contents(tmp_path)
    fails(command(tmp_path), f"{tmp_path / name}: cannot be written, as", "move", "--workdir")
    assert not list(tmp_path.glob("checkpoints/*"))
    assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("sample", "samples"),
        ("sample", "samples/step_00000008_ancestral20_fixed_large_seed0_n5.gif"),
        ("evaluate", "evaluation.json"),
        ("evaluate", "report.html"),
        ("compare", "comparison.html"),
        ("edit", "edits"),
    ],
)
def test_modes_say_before_the_work_what_cannot_be_written(own_run, mode, name):
    for path in own_run.glob("samples/*"):
        path.unlink()
    if name == "samples":
        (own_run / name).rmdir()
    in_the_way(own_run / name) if "." not in name else (own_run / name).mkdir()
    given = [f"--input={ROOT / 'docs' / 'digits.png'}"] if mode == "edit" else []
    before = contents(own_run)
    few = {"comparison__steps": "(5,)"}
    fails(command(own_run, f"--mode={mode}", *given, **few), f"{own_run / name}: cannot be written")
    assert contents(own_run) == before


def test_sweep_says_before_the_work_what_cannot_be_written(tmp_path):
    (tmp_path / "sweep.json").mkdir()
    flags = ["--mode=sweep", "--configs=configs/digits.py", f"--workdir={tmp_path}"]
    fails([sys.executable, "main.py", *flags], "sweep.json: cannot be written, as it is a folder")


def test_place_where_nobody_can_write(tmp_path):
    """The kernel's own folders, which refuse the superuser too."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    fails(command("/proc/run"), "/proc/run", "cannot be written or read", "--workdir")


def test_a_full_disk_is_one_line_too(own_run, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")  # as of a write: which file, it does not say

    monkeypatch.setattr(atomic.Path, "replace", lambda self, to: full(self))
    fails(command(own_run, "--mode=sample"), f"{own_run / 'samples'}", "No space left on device")


def test_samples_of_a_run_folder_that_is_read_only_go_elsewhere(own_run, tmp_path):
    """They name what made them."""
    for path in own_run.glob("samples/*"):
        path.unlink()
    (own_run / "samples").rmdir()
    in_the_way(own_run / "samples")
    before = contents(own_run, but="compile_seconds.json")  # kept where it can be
    out = tmp_path / "new" / "out"
    overrides = {"sampling__seed": 3, "sampling__steps": 4, "sampling__sampler": "ddim"}
    found = {}
    for ema in (True, False):
        done = run(
            command(own_run, "--mode=sample", f"--out={out}", sampling__ema=ema, **overrides)
        )
        assert done.returncode == 0, done.stderr
        file, grid, _ = map(Path, done.stdout.split())
        assert file.parent == out
        with np.load(file) as arrays, Image.open(grid) as picture:
            assert len(arrays["images"]) == 5
            found[ema] = json.loads(arrays["provenance"].item())
            assert json.loads(picture.text["provenance"]) == found[ema]
    assert contents(own_run, but="compile_seconds.json") == before
    about = found[True]
    assert about["run"] == str(own_run)
    assert (about["step"], about["seed"], about["ddpm"]) == (8, 3, __version__)
    assert about["sampler"].startswith("ddim4")
    assert about["config"]["sampling"]["steps"] == 4
    assert about["config"]["model"]["channels"] == 8
    assert about["weights_digest"] != found[False]["weights_digest"]


def test_edits_go_elsewhere_and_name_what_made_them(own_run, tmp_path):
    Image.fromarray(digits("test").image[0, ..., 0]).save(tmp_path / "digit.png")
    given = [f"--input={tmp_path / 'digit.png'}", f"--out={tmp_path / 'out'}"]
    options = {"editing__num_variations": 2, "editing__t": 3, "sampling__steps": 4}
    before = contents(own_run)
    done = run(command(own_run, "--mode=edit", *given, sampling__sampler="ddim", **options))
    assert done.returncode == 0, done.stderr
    assert contents(own_run) == before
    (file,) = (tmp_path / "out").glob("*.npz")
    with np.load(file) as arrays:
        assert json.loads(arrays["provenance"].item())["config"]["editing"]["t"] == 3
