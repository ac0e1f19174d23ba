"""A run of a normalised energy, by the command: trained, resumed, evaluated; others refused."""

import json

import jax
import numpy as np
import pytest

import ddpm
from ddpm.build import data
from ddpm.build.experiment import build
from ddpm.data import digits
from ddpm.diffusion.pixels import to_float
from ddpm.diffusion.streams import sample_keys
from ddpm.energy import dual
from ddpm.errors import InputError
from ddpm.modes.loading import load_run
from tests.exact import close
from tests.runs import command, run, saved_config

DUAL = {
    "model__energy": "denoising",
    "model__noise_input": "log_snr",
    "model__dropout": 0.0,
    "diffusion__schedule": "linear_log_snr",
    "diffusion__log_snr_0": 6.0,
    "diffusion__log_snr_1": -6.0,
    "training__loss": "dual",
    "training__time_weight": 2.0,
    "training__learning_rate": 1e-2,
    "sampling__sampler": "ddim",
    "sampling__steps": 2,
}
ENERGY = {"evaluation__parts": "('energy',)", "evaluation__bound_images": 40}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Four steps, and four more by the same command."""
    folder = tmp_path_factory.mktemp("dual") / "run"
    for steps in (4, 8):
        done = run(command(folder, training__steps=steps, **DUAL))
        assert done.returncode == 0, done.stderr
    return folder


def test_training_goes_on_with_the_offset_and_its_average(workdir):
    """Eight steps, with the slopes and their average; `test_resume` has that it is exact."""
    found = {}
    for average in (True, False):
        config = saved_config(workdir)
        config.sampling.ema = average
        loaded = load_run(config, workdir, "evaluate")
        assert loaded.step == 8
        found[average] = np.asarray(loaded.params["energy_offset"]["rates"])
        assert found[average].shape == (32,)
        assert np.abs(found[average]).max() > 1e-4
    assert (found[True] != found[False]).any()


def test_energy_is_evaluated_by_split_and_against_foreign_images(workdir):
    """The digits as if they were foreign: the same images twice, and so an area of one half."""
    done = run(command(workdir, "--mode=evaluate", evaluation__foreign="digits", **ENERGY, **DUAL))
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / "evaluation.json").read_text())["energy"]
    assert found["roc_area"] == 0.5
    assert found["digits"] == found["held out"] != found["train"]
    assert 0 < found["log_normalizer_standard_error"] < 1
    assert "ROC area, digits" in done.stdout
    config = saved_config(workdir)
    loaded = load_run(config, workdir, "evaluate")
    built, x_0 = loaded.built, to_float(digits("train").image[:40])
    key = jax.random.key(config.seed)

    @jax.jit
    def bits(params):
        energy = dual.normalized(built.schedule, built.raw_energy(params), (8, 8, 1), key)
        keys = sample_keys(key, np.arange(40))
        return dual.dequantised_bits_per_dim(built.schedule, energy, x_0, keys)

    expected = np.asarray(bits(loaded.params))
    close(found["train"]["bits_per_dim"], expected.mean(), rtol=1e-5)
    close(found["train"]["standard_error"], expected.std(ddof=1) / 40**0.5, rtol=1e-4)
    close(found["train"]["nats"], expected.mean() * 64 * np.log(2), rtol=1e-5)
    keys = sample_keys(key, np.arange(40))
    close(ddpm.load(workdir).bits_per_dim(x_0, keys), expected, rtol=1e-5)


def test_energy_of_other_models_is_refused(shared_run):
    before = sorted(shared_run.iterdir())
    done = run(command(shared_run, "--mode=evaluate", **ENERGY))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        "the energy is normalised by config.training.loss = 'dual' alone, not 'mse'" in done.stderr
    )
    assert sorted(shared_run.iterdir()) == before


def test_foreign_images_come_in_the_models_shape(workdir):
    config = saved_config(workdir)
    config.evaluation.foreign = "digits"
    found = data.foreign(config, (12, 16, 1))
    assert found.image_shape == (12, 16, 1)
    assert len(found) == len(digits("test")) == 359
    assert (data.foreign(config, (8, 8, 1)).image == digits("test").image).all()
    with pytest.raises(InputError, match="its images have 1 channels, the model's 3"):
        data.foreign(config, (8, 8, 3))
    config.evaluation.foreign = "folder"
    with pytest.raises(InputError, match="must be 'digits' or an image set of tfds"):
        data.foreign(config, (8, 8, 1))
    config.model.low_resolution = 4
    with pytest.raises(InputError, match="low_resolution = 4: the energy depends"):
        build(config, (8, 8, 1)).raw_energy({"energy_offset": {"rates": np.zeros(32)}})
