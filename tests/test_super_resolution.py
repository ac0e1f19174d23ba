"""Digits from 4x4 to 8x8 by the real commands: large images that average down to the small ones."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from ddpm.data import digits
from ddpm.diffusion.network_inputs import averaged
from ddpm.diffusion.pixels import to_float
from ddpm.modes.loading import load_run
from tests.runs import command, run
from tests.test_edit import config
from tests.test_main import fails

SMALL = {
    "model__low_resolution": 4,
    "model__channels": 16,
    "model__dropout": 0.0,
    "diffusion__num_steps": 100,
    "training__steps": 250,
    "training__batch_size": 64,
    "training__learning_rate": 3e-3,
    "training__ema_decay": 0.98,
    "training__low_resolution_noise": 0.3,
    "training__log_every": 50,
    "training__checkpoint_every": 1000,
    "sampling__sampler": "ddim",
    "sampling__steps": 20,
    "sampling__num_samples": 40,
    "sampling__batch_size": 40,
}
TEST = digits("test").image


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("super_resolution")
    done = run(command(folder, **SMALL))
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "samples").glob("step_*.png"))) == 1
    return folder


def sampled(workdir, **sampling):
    """The samples, float in [-1, 1], and the file's name."""
    done = run(command(workdir, "--mode=sample", **(SMALL | sampling)))
    assert done.returncode == 0, done.stderr
    path = done.stdout.split()[0]
    with np.load(path) as file:
        return to_float(file["images"]), path


def apart(samples, small):
    """RMSE on [-1, 1] of each sample averaged down to each small image: [n, m]."""
    found = averaged(samples, (4, 4))
    return np.sqrt(((found[:, None] - small) ** 2).mean(axis=(2, 3, 4)))


def test_samples_are_of_their_own_small_images(workdir):
    """Sample i of held-out image i; to all others it is farther."""
    samples, path = sampled(workdir)
    assert "_ddim20_eta0_from" in path
    distance = apart(samples, averaged(to_float(TEST[:40]), (4, 4)))
    own = distance.diagonal()
    assert own.mean() < distance.mean() / 2
    assert (distance.argmin(axis=1) == np.arange(40)).mean() > 0.5  # by chance 1 in 40


def test_images_to_enlarge_are_given_and_noised(workdir, tmp_path):
    """Two small pictures, in turn; the name tells which, and how much noise was added."""
    small = np.rint(averaged(TEST[[3, 10]].astype(float), (4, 4))).astype(np.uint8)
    for i, image in enumerate(small):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i}.png")
    samples, path = sampled(workdir, sampling__low_resolution_images=tmp_path)
    distance = apart(samples, to_float(small))
    assert (distance.argmin(axis=1) == np.arange(40) % 2).all()
    assert (samples[0] != samples[2]).any()  # of one small image, by other noise
    np.savez(tmp_path / "small.npz", images=small)
    npz = {"sampling__low_resolution_images": tmp_path / "small.npz"}
    same, of_npz = sampled(workdir, **npz)
    assert of_npz == path
    assert (same == samples).all()
    noised, name = sampled(workdir, sampling__low_resolution_noise=0.3, **npz)
    assert name == path.replace("_seed0", "noised0.3_seed0")
    assert apart(noised, to_float(small)).min(axis=1).mean() > distance.min(axis=1).mean()


def test_bound_is_given_the_small_image_and_lower_for_it(workdir):
    """Conditioning that of the same network given the small image of another."""
    built, params = loaded(workdir)
    x_0 = to_float(TEST[:40])
    t, x_t = np.full(40, 60), np.float32(np.random.default_rng(0).normal(size=x_0.shape))
    x_t = built.schedule.at(60).alpha * x_0 + built.schedule.at(60).sigma * x_t
    predict = jax.jit(lambda x_t, of: built.denoiser(params, of)(x_t, t).x_0)
    own, others = (np.mean((predict(x_t, of) - x_0) ** 2) for of in (x_0, np.roll(x_0, 1, 0)))
    assert own < 0.5 * others
    small = {"evaluation__parts": "('bound','flow')", "evaluation__bound_images": 8,
             "evaluation__bound_times": 2, "evaluation__flow_images": 4,
             "evaluation__flow_tolerance": 0.01}  # fmt: skip
    done = run(command(workdir, "--mode=evaluate", **(SMALL | small)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; given its low resolution") == 4
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["bound"]["held out"]["how"].endswith("; given its low resolution")


def loaded(workdir):
    found = load_run(config(**SMALL), workdir, "evaluate")
    return found.built, found.params


def test_what_cannot_be_is_refused(workdir, tmp_path):
    np.savez(tmp_path / "large.npz", images=TEST[:3])
    large = SMALL | {"sampling__low_resolution_images": tmp_path / "large.npz"}
    said = "low_resolution_images: ", "for images of (4, 4, 1)", "are (8, 8, 1)"
    fails(command(workdir, "--mode=sample", **large), *said)
    fails(command(workdir, "--mode=edit", "--input=x.png", **SMALL), "enlarges, and does not edit")
