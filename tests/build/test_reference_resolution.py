"""config.diffusion.reference_resolution: the schedule that is trained, sampled by, and exported."""

import numpy as np
import pytest

from ddpm.build import experiment
from ddpm.build.schedule import noise_schedule
from ddpm.config import default, with_settings
from ddpm.diffusion import continuous, schedules
from ddpm.interop import settings
from tests.exact import close

SMALL = {
    "model.channels": 8,
    "model.num_groups": 4,
    "model.channel_multipliers": (1,),
    "model.attention_resolutions": (),
    "diffusion.num_steps": 20,
    "diffusion.reference_resolution": 32,
}


def configured(**changes):
    config = default()
    config.update_from_flattened_dict(SMALL | {k.replace("__", "."): v for k, v in changes.items()})
    return config


@pytest.mark.parametrize("name", ["linear", "cosine", "jsd", "edm"])
@pytest.mark.parametrize(("shape", "side"), [((8, 8, 1), 8), ((16, 64, 3), 16), ((32, 32, 3), 32)])
def test_by_the_shorter_side_of_the_images(name, shape, side):
    changes = {"diffusion__schedule": name, "diffusion__prediction": "x_0"}
    built = experiment.build(configured(**changes), shape)
    plain = experiment.build(configured(**changes, diffusion__reference_resolution=0), shape)
    before, after = (np.asarray(b.schedule.log_snr, np.float64)[1:] for b in (plain, built))
    there = np.isfinite(before)
    close(after[there] - before[there], 2 * np.log(32 / side), atol=2e-6)
    assert (after[~there] == before[~there]).all()


def test_the_objective_is_of_the_shifted_schedule():
    """Whatever is read of a network is by it."""
    built = experiment.build(configured(), (8, 8, 1))
    x_t = np.float32(np.random.default_rng(0).normal(size=(2, 3)))
    t = np.array([4, 20])
    found = built.objective.denoiser(lambda x, t: 0.3 * x)(x_t, t)
    level = schedules.linear(20, 1e-4, 0.02).at(t)
    ratio = np.exp(-np.asarray(level.high) / 2)[:, None] * 8 / 32  # sigma/alpha, by the pixels
    alpha = 1 / np.sqrt(1 + ratio**2)
    close(found.x_0, x_t / alpha - ratio * 0.3 * x_t, rtol=1e-4)


def test_continuous_time_is_shifted_alike():
    table = continuous.table(continuous.shifted(continuous.edm(), 8, reference=32), 20)
    config = configured(diffusion__schedule="edm", diffusion__prediction="edm")
    found = noise_schedule(config, (8, 8, 1))
    close(found.log_snr[1:], table.log_snr[1:], rtol=1e-6)


@pytest.mark.parametrize("name", ["linear", "cosine", "betas"])
def test_exported_as_it_is_and_read_back_without_a_shift(name):
    betas = tuple(np.linspace(0.01, 0.3, 20)) if name == "betas" else ()
    config = configured(diffusion__schedule=name, diffusion__betas=betas)
    schedule = noise_schedule(config, (8, 8, 1))
    written = settings.to_scheduler_config(config, schedule)
    close(written["trained_betas"], schedule.beta[1:], rtol=1e-6)
    theirs = settings.noise_settings(written, "here")
    config, messages = with_settings(config, diffusion=theirs.diffusion)
    assert "config.diffusion.reference_resolution = 0" in messages
    close(noise_schedule(config, (8, 8, 1)).beta, schedule.beta, rtol=1e-4)
