"""A run by an older version is restored bit for bit, and resumes as it would have."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ddpm.build.experiment import build
from ddpm.build.network import check_model
from ddpm.config import default, flatten
from ddpm.modes.train import train
from tests import runs

FIXTURE = Path(__file__).parent / "fixtures" / "old_run.tar.gz"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE) as file:
        file.extractall(folder, filter="data")
    with np.load(folder / "expected.npz") as file:
        assert file["step"] == 8
        expected = [file[name] for name in sorted(file) if name != "step"]
    return folder / "run", expected


def test_old_run_resumes_to_the_weights_it_would_have_had(unpacked):
    workdir, expected = unpacked
    step, before = runs.final_state(workdir)  # whose digests are checked as it is read
    assert step == 4
    config = runs.saved_config(workdir)
    config.training.steps = 8
    train(config, workdir)
    step, found = runs.final_state(workdir)
    assert step == 8
    assert len(found) == len(expected) > 100
    moved = 0
    for a, b, c in zip(found, expected, before, strict=True):
        assert a.dtype == b.dtype
        # The old run's last bits are of another machine.
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
        moved += (a != c).any()
    assert moved > 100


def test_old_config_has_all_its_keys_and_builds_the_same_objects(unpacked):
    workdir, _ = unpacked
    saved = json.loads((workdir / "config.json").read_text())
    newer = flatten(default()).keys() - flatten(saved).keys()
    assert newer <= {"data.background", "data.max_pixels"}
    config = runs.saved_config(workdir)
    assert flatten(config).keys() == flatten(default()).keys()
    built = build(config, (8, 8, 1))
    shapes = check_model(built.model, built.image_shape)
    assert shapes["conv_out"]["kernel"].shape == (3, 3, 8, 2)  # eps, and the variance
    assert built.objective.history.losses.shape == (20, 10)
    assert built.sampler_name == "ancestral20_learned_range"
