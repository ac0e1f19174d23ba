"""Where compiled programs are kept, and that the environment has the last word."""

import subprocess
import sys

import jax
import pytest

from ddpm import backend
from tests.runs import ROOT


@pytest.mark.parametrize("chosen", ["", "/elsewhere"])
def test_the_environment_has_the_last_word(tmp_path, monkeypatch, chosen):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    monkeypatch.setenv("XLA_FLAGS", "--a_flag")
    before = jax.config.jax_compilation_cache_dir
    backend.configure()
    assert jax.config.jax_compilation_cache_dir == before
    assert not list(tmp_path.iterdir())
    assert backend.os.environ["XLA_FLAGS"].endswith("--a_flag")


def test_by_default_in_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    try:
        backend.configure()
        found = jax.config.jax_compilation_cache_dir
        assert found.startswith(str(tmp_path / "ddpm" / "compiled"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_only_programs_that_can_be_written_are_kept(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()  # where a folder is needed: not even the superuser can write
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = jax.config.jax_compilation_cache_dir
    with caplog.at_level("INFO", "ddpm"):
        backend.configure()
    assert jax.config.jax_compilation_cache_dir == before
    (said,) = caplog.messages
    assert "cannot be written (Not a directory)" in said
    assert "kept" not in said


def test_training_imports_neither_pytorch_nor_tensorflow(tmp_path):
    """Seconds of every start, and of no use; tensorboardX would."""
    pytest.importorskip("torch")
    code = f"""
import sys
from pathlib import Path
from ddpm.modes import edit, evaluate, sample, train
from ddpm.training.logbook import Logbook
book = Logbook(Path({str(tmp_path)!r}), step=0, steps=1)
book.scalars(1, {{"loss": 1.0}})
book.close()
assert not {{"torch", "tensorflow"}} & sys.modules.keys()
import torch
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    assert list((tmp_path / "tensorboard").iterdir())
