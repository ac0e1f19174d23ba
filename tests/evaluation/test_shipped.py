"""The shipped classifiers: what they were measured at, and that no other file passes for one."""

import hashlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from ddpm.data import digits, tfds
from ddpm.errors import InputError
from ddpm.evaluation.classifier import Classifier, shifted
from ddpm.evaluation.shipped import FOLDER, SHIPPED, load_classifier
from ddpm.evaluation.train_classifier import accuracy, main


def test_digits_are_recognised():
    found = accuracy(load_classifier("digits"), digits("test"))
    assert found >= 0.98
    assert found == pytest.approx(SHIPPED["digits"].accuracy, abs=1.5 / 359)


@pytest.mark.skipif(
    "DDPM_FASHION_MNIST" not in os.environ, reason="the data_dir of Fashion-MNIST is not given"
)
def test_fashion_mnist_is_recognised():
    source = tfds("fashion_mnist", "test", data_dir=os.environ["DDPM_FASHION_MNIST"])
    found = accuracy(load_classifier("fashion_mnist"), source)
    assert found >= 0.92
    assert found == pytest.approx(SHIPPED["fashion_mnist"].accuracy, abs=2e-4)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file_is_small_and_fits_its_network(name):
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    assert len(data) < 2_000_000
    assert hashlib.sha256(data).hexdigest() in (FOLDER / "README.md").read_text()
    shipped = SHIPPED[name]
    model = Classifier(len(shipped.classes))
    x = np.zeros((3, *shipped.image_shape), np.float32)
    found = model.apply({"params": load_classifier(name)}, x)
    assert found.features.shape == (3, 128)
    assert found.logits.shape == (3, 10)


def test_a_changed_or_missing_file_is_refused(tmp_path):
    data = bytearray((FOLDER / "digits.safetensors").read_bytes())
    data[-1] ^= 1
    with pytest.raises(InputError, match="cannot be read"):
        load_classifier("digits", tmp_path)
    (tmp_path / "digits.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="not the file that was shipped"):
        load_classifier("digits", tmp_path)


def train(*arguments):
    program = [sys.executable, "-m", "ddpm.evaluation.train_classifier", *arguments]
    # Optimised, unlike in other tests: here the steps take longer than compiling.
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(program, capture_output=True, text=True, timeout=300, env=environment)


def test_training_learns_and_repeats(tmp_path):
    for folder in ("a", "b"):
        done = train("digits", "--steps=40", f"--out={tmp_path / folder}")
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[2]) > 0.3
    first, again = ((tmp_path / f / "digits.safetensors").read_bytes() for f in ("a", "b"))
    assert first == again


def test_what_cannot_be_trained_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which the command adds to
    (tmp_path / "file").write_text("kept")
    for arguments, said in (
        (["mnist"], "'mnist': must be one of digits, fashion_mnist"),
        (["digits", "--steps=0"], "--steps=0: must be a whole number >= 1"),
        (["digits", "--steps=5"], "name another folder with --out"),
        (["digits", f"--out={tmp_path / 'file'}"], "is a file, not a folder"),
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(InputError, match="no classifier 'mnist' is shipped"):
        load_classifier("mnist")


def test_shifts():
    x = np.float32(np.arange(2 * 5 * 5).reshape(2, 5, 5, 1))
    found = np.asarray(shifted(jax.random.key(0), x, 1, flip=False))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    for image, source in zip(found, padded, strict=True):
        cuts = [source[i : i + 5, j : j + 5] for i in range(3) for j in range(3)]
        assert any((image == cut).all() for cut in cuts)
    many = np.repeat(x[:1], 200, axis=0)
    mirrored = np.asarray(shifted(jax.random.key(0), many, 0, flip=True))
    share = (mirrored == x[:1, :, ::-1]).all(axis=(1, 2, 3)).mean()
    assert 0.35 < share < 0.65
