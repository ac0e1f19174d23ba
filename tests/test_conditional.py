"""A small network with labels, by the real commands: its samples are of the class asked for."""

import json

import numpy as np
import pytest

from ddpm.evaluation import features
from ddpm.training import sharding
from tests.runs import UNET, command, run

SMALL = UNET | {
    "model__num_classes": 10,
    "model__channels": 16,
    "model__channel_multipliers": "(1,2)",
    "model__dropout": 0.0,
    "diffusion__num_steps": 100,
    "training__steps": 200,
    "training__batch_size": 64,
    "training__learning_rate": 3e-3,
    "training__ema_decay": 0.98,
    "training__log_every": 50,
    "training__checkpoint_every": 1000,
    "sampling__sampler": "ddim",
    "sampling__steps": 20,
    "sampling__num_samples": 100,
    "sampling__batch_size": 50,
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    ok(command(folder, **SMALL))
    return folder


def ok(arguments):
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    return done


def classes(workdir, **sampling):
    """What the shipped classifier takes 100 samples for, and the file's name."""
    done = ok(command(workdir, "--mode=sample", **(SMALL | sampling)))
    path = done.stdout.split()[0]
    network = features.of_classifier("digits", (8, 8, 1))
    extractor = features.Extractor(network, sharding.data_mesh(), batch_size=100)
    with np.load(path) as file:
        return extractor(file["images"]).probabilities.argmax(axis=1), path


def test_guided_samples_are_of_their_labels(workdir):
    """By chance it would be a tenth; of 100 samples more than 25 are not by chance."""
    found, path = classes(workdir, sampling__guidance_scale=4.0)
    assert path.endswith("_ddim20_eta0_guided4_seed0_n100.npz")
    guided = (found == np.arange(100) % 10).mean()
    assert guided > 0.8
    found, _ = classes(workdir)
    unguided = (found == np.arange(100) % 10).mean()
    assert 0.4 < unguided < guided


def test_one_class_for_all_and_a_negative_scale_avoids_it(workdir):
    found, path = classes(workdir, sampling__label=0, sampling__guidance_scale=3.0)
    assert "_label0_guided3_" in path
    assert (found == 0).mean() > 0.7
    found, _ = classes(workdir, sampling__label=0, sampling__guidance_scale=-2.0)
    assert (found == 0).mean() < 0.1


def test_edits_are_guided_towards_a_class_or_not_at_all(workdir, tmp_path):
    np.savez(tmp_path / "one.npz", images=np.zeros((1, 8, 8, 1), np.uint8))
    given = ["--mode=edit", f"--input={tmp_path / 'one.npz'}"]
    done = run(command(workdir, *given, **SMALL, sampling__guidance_scale=2.0))
    assert done.returncode == 2
    assert "say towards which class the pictures are edited" in done.stderr
    assert not (workdir / "edits").exists()


def test_bound_is_that_without_label(workdir):
    small = {"evaluation__parts": "('bound',)", "evaluation__bound_images": 20}
    done = ok(command(workdir, "--mode=evaluate", **(SMALL | small), evaluation__bound_times=2))
    assert done.stdout.count("; without label") == 2
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["bound"]["train"]["how"].endswith("; without label")
