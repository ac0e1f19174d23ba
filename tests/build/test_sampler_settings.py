"""The settings of a sampler that a page reports: those that matter, and no others."""

import pytest

from ddpm.build import sampler
from ddpm.build.schedule import noise_schedule
from ddpm.config import default
from ddpm.diffusion.gaussian import fixed_small

ALWAYS = {"clip": True, "ema": True}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, {"sampler": "ancestral", "variance": "fixed_small", "steps": 1000, "grid": "uniform"}),
        ({"sampler": "ddim", "steps": 50},
         {"sampler": "ddim", "eta": 0.0, "steps": 50, "grid": "uniform"}),
        ({"sampler": "ddim", "times": (1000, 500, 0), "churn": 3.0},
         {"sampler": "ddim", "eta": 0.0, "steps": 2, "times": (1000, 500, 0)}),
        ({"sampler": "heun", "grid": "karras", "steps": 18, "churn": 2.0},
         {"sampler": "heun", "churn": 2.0, "churn_range": (), "churn_noise": 1.0, "steps": 18,
          "grid": "karras", "rho": 7.0, "sigma_max": 80.0}),
        ({"sampler": "probability_flow"}, {"sampler": "probability_flow", "tolerance": 1e-4}),
        ({"sampler": "langevin", "steps": 9, "dynamic_threshold": 0.9, "ema": False},
         {"sampler": "langevin", "langevin_steps": 5, "langevin_step_size": 0.2, "steps": 9,
          "grid": "uniform", "dynamic_threshold": 0.9, "ema": False, "clip": None}),
        ({"sampler": "ddim", "eta": 0.5, "steps": 4, "guidance_scale": 2.0, "corrector_steps": 1},
         {"sampler": "ddim", "eta": 0.5, "steps": 4, "grid": "uniform",
          "guidance_scale": 2.0, "guidance_interval": (), "guidance_rescale": 0.0,
          "corrector_steps": 1, "corrector_snr": 0.16, "label": -1}),
    ],
)  # fmt: skip
def test_settings_that_matter(changes, found):
    config = default()
    config.sampling.update(changes)
    config.model.num_classes = 10 if "guidance_scale" in changes else 0
    expected = {key: value for key, value in (ALWAYS | found).items() if value is not None}
    assert sampler.settings(config, noise_schedule(config), fixed_small) == expected
