"""The real `main.py --mode=sweep`, and on a stand-in for main.py what becomes of runs that fail."""

import json
import sys

import numpy as np
import pytest

from ddpm.config import to_json
from ddpm.config.command import overrides as overrides_of
from ddpm.errors import InputError
from ddpm.modes import sweep
from ddpm.training.stopping import ANSWER, NUMBERS, answered
from tests.runs import ROOT, command, process, run

# ml_collections reads config files in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
TABLE_2 = "configs/ablations/table2.py"


def test_a_run_and_its_row(tmp_path):
    """The real thing; and again, when there is nothing left to do."""
    arguments = command(
        tmp_path,
        "--mode=sweep",
        f"--configs={TABLE_2}:eps_mse",
        "--seeds=3",
        evaluation__parts="('bound',)",
        evaluation__bound_images=5,
    )
    found = process(arguments, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    folder = tmp_path / "table2_eps_mse_seed3"
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["config"]["seed"] == 3
    assert result["config"]["diffusion"]["num_steps"] == 20
    bits = result["bound"]["held out"]["total"]["bits_per_dim"]
    assert f"table2_eps_mse  {bits:.3f}" in found.stdout
    figures = json.loads((tmp_path / "sweep.json").read_text())["runs"]["table2_eps_mse"]["figures"]
    assert figures["bits/dim, held out"] == [bits]
    assert figures.keys() == {"bits/dim, held out", "bits/dim, train"}

    before = (folder / "evaluation.json").stat().st_mtime_ns
    again = process(arguments, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert again.stdout == found.stdout[-len(again.stdout) :]
    assert "training" not in again.stderr
    assert (folder / "evaluation.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--mode=sweep"], "--mode=sweep needs --configs"),
        ([f"--configs={TABLE_2}"], "--configs=configs/ablations/table2.py goes with --mode=sweep"),
        (["--seeds=1"], "--seeds goes with --mode=sweep alone"),
        (["--mode=sweep", f"--configs={TABLE_2}", "--profile=3"], "--mode=train alone"),
        (["--mode=sample", "--profile=3"], "--profile=3 goes with --mode=train alone"),
        (["--profile=0"], "--profile=0: must be a number of steps"),
        (["--profile=x"], "--profile=x: must be a number of steps"),
        (["--mode=sweep", f"--configs={TABLE_2}", "--seeds=0,0"], "must be different whole"),
        (["--mode=sweep", f"--configs={TABLE_2}", "--config.seed=1"], "--config.seed does not go"),
        (["--mode=sweep", f"--configs={TABLE_2}", "--config=configs/digits.py"], "--config does"),
        (["--mode=sweep", f"--configs={TABLE_2}:eps"], "did you mean 'eps_mse'?"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, monkeypatch, extra, said):
    monkeypatch.chdir(ROOT)
    found = run([sys.executable, "main.py", f"--workdir={tmp_path / 'run'}", *extra])
    assert found.returncode == 2
    assert said in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_entries(monkeypatch):
    """A file stands for all its variants; a file without variants for itself."""
    monkeypatch.chdir(ROOT)
    overrides = ["--config.training.steps=7", "--config.data.flip=True"]
    found = sweep.entries([TABLE_2, "configs/digits.py"], overrides)
    assert [entry.name for entry in found][-2:] == ["table2_eps_mse", "digits"]
    assert len(found) == 7
    for entry in found:
        assert entry.config.training.steps == 7
        assert entry.config.data.flip
        assert entry.arguments[1:] == overrides
    assert found[0].arguments[0] == f"--config={TABLE_2}:mean_bound_learned"
    assert found[0].config.diffusion.variance == "learned"


@pytest.mark.parametrize(
    ("names", "overrides", "said"),
    [
        (["configs/ablations/table3.py"], [], "did you mean 'configs/ablations/table2.py'"),
        ([f"{TABLE_2}:eps_mse", TABLE_2], [], "names one of them twice"),
        (["configs/digits.py:eps"], [], "it has no variants"),
        ([TABLE_2], ["--config.training.steps=0"], "mean_bound_learned: config.training.steps = 0"),
        ([TABLE_2], ["--config.training.step=1"], "training.step"),
        # What each alone would be refused for, before the first of them is trained.
        (
            ["configs/ablations/schedules.py"],
            ["--config.diffusion.zero_terminal_snr=True"],
            "schedules.py:linear: config.diffusion.prediction = 'eps': the schedule leaves no",
        ),
        (
            [TABLE_2],
            ["--config.sampling.steps=10"],
            "mean_bound_learned: config.sampling.steps = 10",
        ),
        (
            [TABLE_2],
            ["--config.evaluation.parts=('bound','flow')"],
            "config.diffusion.prediction = 'posterior_mean': it is of whole times",
        ),
        (["configs/digits.py", "configs/cifar10.py"], [], "config.evaluation.inception_path"),
        ([TABLE_2], ["--config.sampling.guidance_scale=2.0"], "the model has no labels"),
        ([TABLE_2], ["--config.sampling.variance=analytic"], "is measured on a trained run"),
    ],
)
def test_entries_that_are_wrong(monkeypatch, names, overrides, said):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError) as error:
        sweep.entries(names, overrides)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/ablations").glob("*.py")), ids=lambda path: path.stem
)
def test_every_ablation_can_be_trained_and_evaluated_as_it_is(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    assert sweep.entries([str(path.relative_to(ROOT))], [])


def test_overrides_of():
    argv = ["main.py", "--mode=sweep", "--config.a.b=1", "--config.c", "2", "--noconfig.d", "--e=3"]
    assert overrides_of(argv) == ["--config.a.b=1", "--config.c=2", "--noconfig.d"]
    assert overrides_of(["main.py", "--config.flag"]) == ["--config.flag"]


def stand_in(tmp_path, text):
    """A main.py that has `mode` and `folder`, and an Entry that is run by it."""
    path = tmp_path / "stand_in.py"
    path.write_text(
        "import pathlib, signal, sys, time\n"
        "given = dict(a.lstrip('-').partition('=')[::2] for a in sys.argv[1:])\n"
        "mode, folder = given.get('mode', 'train'), pathlib.Path(given['workdir'])\n"
        f"folder.mkdir(parents=True, exist_ok=True)\n{text}\n"
    )
    return path


def one_entry():
    return sweep.entries([str(ROOT / "configs/digits.py")], [])


def test_mean_and_spread(tmp_path, capsys):
    """Of values that are known: runs that are finished already."""
    rows, values = one_entry(), [2.0, 3.0, 7.0]
    for seed, value in enumerate(values):
        config = rows[0].config.copy_and_resolve_references()
        config.seed = seed
        folder = tmp_path / f"digits_seed{seed}"
        folder.mkdir()
        split = {"total": {"bits_per_dim": value}}
        found = {"config": to_json(config), "step": config.training.steps}
        found["bound"] = {"held out": split, "train": split}
        found["flow"] = {"uniform dequantisation": {"bits_per_dim": 2 * value}}
        (folder / "evaluation.json").write_text(json.dumps(found))
    sweep.sweep(rows, [0, 1, 2], tmp_path, tmp_path / "none.py")
    out = capsys.readouterr().out
    assert f"4.000 ± {np.std(values, ddof=1):.3f}" in out
    assert "bits/dim of the flow" in out
    assert f"8.000 ± {2 * np.std(values, ddof=1):.3f}" in out


def stopped_at(step, config, folder, **changes):
    """A run folder with a checkpoint of which nothing but the meta is there."""
    saved = to_json(config) | {"seed": 0}
    for key, value in changes.items():
        saved["training"][key] = value
    meta = {"config": saved, "image_shape": [8, 8, 1], "num_images": 1438, "step": step}
    path = folder / "digits_seed0" / "checkpoints" / str(step) / "meta" / "metadata"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("step", "changes", "said"),
    [
        (2400, {"learning_rate": 1.0}, "config.training.learning_rate = .*, before 1.0"),
        (2401, {"steps": 5000}, "config.training.steps = 2400, and it is at step 2401"),
        (100, {"loss": "l1"}, "with config.training.loss = 'l1'"),
    ],
)
def test_weights_of_another_config_are_no_row(tmp_path, step, changes, said):
    """Which a run alone would go on from, or be done with."""
    rows = one_entry()
    stopped_at(step, rows[0].config, tmp_path, **changes)
    with pytest.raises(InputError, match=f"digits_seed0 holds a run .*{said}"):
        sweep.sweep(rows, [1, 0], tmp_path, tmp_path / "none.py")
    assert not (tmp_path / "digits_seed1").exists()  # before the first is trained


@pytest.mark.parametrize("damaged", ['{"step": 24', "[]", "\0"])
def test_a_damaged_result_is_named(tmp_path, damaged):
    (tmp_path / "digits_seed0").mkdir()
    (tmp_path / "digits_seed0/evaluation.json").write_text(damaged)
    with pytest.raises(InputError, match=r"digits_seed0/evaluation\.json: its JSON "):
        sweep.sweep(one_entry(), [0], tmp_path, stand_in(tmp_path, "sys.exit(4)"))


@pytest.mark.parametrize("about", [{"step": 1200}, {"step": 2400, "failed": {"flow": "why"}}])
def test_what_is_evaluated_half_is_not_finished(tmp_path, about):
    """A look at the run on its way, or a part that failed: trained on, and evaluated again."""
    rows = one_entry()
    config = to_json(rows[0].config)
    folder = tmp_path / "digits_seed0"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({"config": config, "bound": {}} | about))
    script = stand_in(tmp_path, "sys.exit(4)")
    with pytest.raises(InputError, match="failed with code 4"):
        sweep.sweep(rows, [0], tmp_path, script)


def test_a_run_that_diverges_is_reported(tmp_path, capsys):
    """And the sweep goes on; nor is it run again."""
    calls = "(folder.parent / 'calls').open('a').write(mode + '\\n'); sys.exit(3)"
    script = stand_in(tmp_path, calls)
    for _ in range(2):
        sweep.sweep(one_entry(), [0, 1], tmp_path / "runs", script)
    out = capsys.readouterr().out
    assert "2 of 2" in out
    assert (tmp_path / "runs" / "calls").read_text() == "train\ntrain\n"


@pytest.mark.parametrize("code", [1, 2])
def test_a_run_that_fails_ends_the_sweep(tmp_path, code):
    script = stand_in(tmp_path, f"sys.exit({code})")
    with pytest.raises(InputError, match=f"digits, seed 0: failed with code {code}"):
        sweep.sweep(one_entry(), [0, 1], tmp_path / "runs", script)
    assert not (tmp_path / "runs" / "sweep.json").exists()
    assert not (tmp_path / "runs" / "digits_seed1").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_signals_are_handed_on(tmp_path, capsys, number):
    """The run that is under way saves and ends by itself, and no other begins. It alone answers,
    and gets a signal once, in a group of its own."""
    script = stand_in(
        tmp_path,
        "import os\ncame, number = [], int(os.environ['NUMBER'])\n"
        "signal.signal(number, lambda *_: came.append(1))\n"
        "os.kill(os.getppid(), number)\n"
        "for _ in range(6000):\n    came or time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "assert len(came) == 1 and os.getpgid(0) != os.getpgid(os.getppid())\n"
        "(folder / 'saved').touch()",
    )

    def stopped():
        with answered():
            sweep.sweep(one_entry(), [0, 1], tmp_path / "runs", script)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBER", str(int(number)))
        with pytest.raises(KeyboardInterrupt):
            stopped()
    assert (tmp_path / "runs" / "digits_seed0" / "saved").exists()
    assert not (tmp_path / "runs" / "digits_seed1").exists()
    assert ANSWER not in capsys.readouterr().err
