"""The command and its configs without a checkout: by name, from any folder, in the wheel."""

import runpy
import sys
import tomllib
from pathlib import Path

import pytest

import ddpm
from ddpm import cli
from ddpm.config.command import CONFIGS, find_file, make_importable, names, parse
from ddpm.errors import InputError
from tests.runs import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # of ml_collections


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """An empty folder to work in, as where the library is installed: `configs` is not on the
    path."""
    monkeypatch.chdir(tmp_path)
    here = {str(ROOT), "", "."}
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if p not in here)])
    for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
        del sys.modules[name]


def test_every_config_is_found_by_its_name(elsewhere):
    """Also those that import another, and their variants."""
    found = names()
    assert len(found) == len(list((ROOT / "configs").rglob("*.py"))) > 20
    for name in found:
        file = find_file("config", name)
        variant = ""
        if name.startswith("ablations/"):
            make_importable()
            variant = ":" + next(iter(runpy.run_path(file)["VARIANTS"]))
        for given in (name, f"configs/{name}.py"):
            values = parse(["ddpm", f"--config={given}{variant}", "--config.seed=7"])
            assert values.config.seed == 7
    assert find_file("config", "ablations/table2:eps") == f"{CONFIGS}/ablations/table2.py:eps"


def test_a_file_of_ones_own_is_preferred_and_may_import_ours(elsewhere):
    (elsewhere / "configs").mkdir()
    own = "from configs import digits\ndef get_config():\n    config = digits.get_config()\n"
    own += "    config.seed = 11\n    return config\n"
    for name in ("configs/cifar10.py", "mine.py"):
        (elsewhere / name).write_text(own)
        values = parse(["ddpm", f"--config={name}"])
        assert (values.config.seed, values.config.data.name) == (11, "digits")
    (elsewhere / "configs" / "second.py").write_text(own.replace("digits", "cifar10"))
    assert parse(["ddpm", "--config=configs/second.py"]).config.seed == 11  # of cifar10.py here


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("digts", "--config=digts: must be a file or celebahq256, cifar10, cifar10_conditional"),
        ("digts:variant", "fashion_mnist_gpu, fashion_mnist_long, folder"),
        ("ablations/table3", "did you mean 'ablations/table2'?"),
        ("configs/digts.py", "did you mean 'configs/digits.py'?"),
        ("elsewhere/digits.py", "--config=elsewhere/digits.py: there is no such file"),
    ],
)
def test_a_wrong_name_is_answered_with_those_there_are(elsewhere, given, said):
    with pytest.raises(InputError) as error:
        find_file("config", given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


def test_the_run_folder_is_named_after_the_config(elsewhere, capsys):
    for given, folder in (("digits_conditional", "digits_conditional"),
                          ("configs/digits.py", "digits"),
                          ("ablations/table2:eps_mse", "table2_eps_mse")):  # fmt: skip
        assert cli.run(["ddpm", f"--config={given}", "--mode=sample"]) == cli.WRONG
        assert f"error: no checkpoint in runs/{folder}: train first" in capsys.readouterr().err


def test_module_and_script_are_the_command(monkeypatch, capsys):
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # or it would start again
    monkeypatch.setattr(sys, "argv", ["ddpm", "--help"])
    said = []
    for start in (lambda: runpy.run_module("ddpm", run_name="__main__", alter_sys=True),
                  lambda: runpy.run_path(str(ROOT / "main.py"), run_name="__main__"),
                  lambda: runpy.run_path(str(cli.COMMAND), run_name="__main__")):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            start()
        assert end.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]
    assert "python -m ddpm --config=NAME" in said[0]
    assert "ablations/table2" in said[0]


def test_started_by_its_path_it_hides_no_other_package(monkeypatch, capsys):
    """A sweep starts its runs by this path: `import data`, say, must not find ddpm/data."""
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr(sys, "argv", [str(cli.COMMAND), "--help"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "ddpm"), *sys.path])
    with pytest.raises(SystemExit):
        runpy.run_path(str(cli.COMMAND), run_name="__main__")
    assert sys.path[0] == str(ROOT)


def test_the_wheel_has_every_module_and_every_config(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {f.parent.relative_to(ROOT) for room in ("ddpm", "configs")
               for f in (ROOT / room).rglob("*.py")}  # fmt: skip
    of_folder = {Path("ddpm", f) if f.parts[0] == "configs" else f for f in folders}
    packages = set(given["packages"])
    assert {".".join(f.parts) for f in of_folder} <= packages
    # Data, and folders of others; nothing at the top but the library itself.
    assert {name.split(".")[0] for name in packages} == {"ddpm"}
    assert given["package_dir"] == {"ddpm.configs": "configs"}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (
        settings["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "ddpm.version.__version__"
    )
    assert ddpm.__version__.count(".") == 2
