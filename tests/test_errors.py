"""Messages: one line of at most some 300 characters, whatever the names and values in them."""

import logging

import pytest

from ddpm import cli
from ddpm.build.checks import validate
from ddpm.build.experiment import build
from ddpm.config import default
from ddpm.errors import LONGEST, InputError, first_line, listed
from ddpm.training.logbook import say

# Of ml_collections, on loading a config file.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
REMEDY = ": must be one of these; did you mean 'that'?"


@pytest.mark.parametrize(
    "value",
    ["x" * 100_000, repr(tuple(range(50_000))), "two words " * 9999, "\n\r\x1b[2J" * 999, "\u2028"],
)
def test_a_message_is_one_line_that_keeps_its_beginning_and_the_remedy(value):
    text = str(InputError(f"config.model.name = {value}{REMEDY}"))
    assert text.startswith("config.model.name = ")
    assert text.endswith(REMEDY)
    assert text.isprintable()
    assert len(text) <= LONGEST == 300
    assert str(InputError(text)) == text  # as part of another too


def test_a_path_is_whole_where_there_is_room_and_named_as_python_writes_it():
    path = "/data/" + "folder/" * 20 + "a\nb\udcff.png"
    assert (
        str(InputError(f"{path}: no image"))
        == path.replace("\n", r"\n").replace("\udcff", r"\udcff") + ": no image"
    )
    twice = str(InputError(f"{path} and {path}: are not alike; choose one"))
    assert twice.startswith("/data/folder/")
    assert twice.endswith(r"b\udcff.png: are not alike; choose one")


def test_long_lists_are_cut_and_counted():
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(20_000), 3) == "0, 1, 2 and 19,997 more"
    assert first_line(RuntimeError("\n x\ny")) == "x"
    assert len(first_line(RuntimeError("x" * 9999))) == LONGEST // 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--config.model.name=" + "x" * 100_000],
        ["--config.model.channel_multipliers=" + str(tuple([-1] * 9999))],
        ["--config.model.channels=" + "9" * 100_000],
        ["--config.data.name=a\nb", "--config.model.dtype=a\nb"],
        ["--mode=" + "x" * 9999],
        ["--config=" + "x" * 9999 + ".py"],
        ["--config=a\nb.py"],
        ["--workdir=x", "--" + "x" * 9999 + "=1"],
        ["--mode=sweep", "--configs=" + "x" * 9999],
        ["--mode=edit", "--input=" + "x" * 9999],
        ["--mode=export", "--out=" + "x" * 9999],
        ["--mode=sample", "--init_from=" + "x" * 9999],
        ["--mode=sample", "--workdir=" + "x" * 9999],
        ["--workdir=" + "x" * 9999],
        ["--config.data.name=npz", "--config.data.path=" + "x" * 9999],
        ["--config.data.name=folder", "--config.data.image_size=(8,8)",
         "--config.data.path=" + "x" * 9999],
    ],
    ids=lambda flags: flags[-1][:30],
)  # fmt: skip
def test_a_wrong_flag_of_any_length_ends_in_one_line(tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_up", lambda distributed: None)
    assert cli.run(["main.py", *flags]) == cli.WRONG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert len(line) <= LONGEST + len("error: ")


def test_values_of_strange_types_are_named_in_one_line():
    for value in (object(), [[]] * 9999, {"a": "\n"}, b"\0" * 9999, 10**5000, -(2**63), 0.5):
        config = default()
        with config.ignore_type():
            config.model.channels = value
        with pytest.raises(InputError, match=r"config\.model\.channels") as error:
            validate(config)
        assert len(str(error.value)) <= LONGEST


def test_progress_too_is_one_line(capsys):
    say("a\nb: read")
    with cli._progress_on_stderr():
        logging.getLogger("ddpm.data").warning("%s: left out", "a\nb")
    assert capsys.readouterr().err.splitlines() == [r"a\nb: read", r"a\nb: left out"]


@pytest.mark.parametrize("returned", ["None", "{}", "3"])
def test_a_config_file_must_return_a_config(tmp_path, capsys, returned):
    (tmp_path / "a.py").write_text(f"def get_config():\n    return {returned}\n")
    assert cli.run(["main.py", f"--config={tmp_path / 'a.py'}"]) == cli.WRONG
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert [x for x in lines if "get_config() must return a config" in x] == lines != []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("channels", 2**40, "must be an even number >= 4, at most 16384"),
        ("num_res_blocks", 2**20, "must be a whole number >= 1, at most 100"),
        ("depth", 2**20, "must be a whole number >= 1, at most 1000"),
    ],
)
def test_networks_that_nothing_holds_are_refused(key, value, said):
    config = default()
    config.model[key] = value
    with pytest.raises(InputError, match=said):
        build(config, (32, 32, 3))


def test_an_error_in_a_config_file_is_its_last_line(tmp_path, capsys):
    (tmp_path / "a.py").write_text("def get_config():\n    raise ValueError('not so')\n")
    assert cli.run(["main.py", f"--config={tmp_path / 'a.py'}"]) == cli.WRONG
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: --config={tmp_path / 'a.py'}, line 2: ValueError: not so"
