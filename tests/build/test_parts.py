"""What parts say of each other, and what adding one takes: a function and a registry line."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import ddim, losses, schedules
from ddpm.build import data, network, objective, parts, sampler, schedule
from ddpm.build.checks import CHOICES
from ddpm.build.experiment import build
from ddpm.build.parts import Blame, Part
from ddpm.config import default
from ddpm.data.sources import ArraySource
from ddpm.errors import InputError
from tests import runs

FACT = "of this test"


def test_reasons_are_said_of_the_key_that_can_be_changed():
    config = default()
    brings = ("linear", Part(facts={FACT}))
    for other, facts, expected in (
        (Part(excludes={FACT: "why"}), {}, "config.training.loss = 'mse': why"),
        (Part(excludes={FACT: "with {diffusion_prediction}"}), {}, "'mse': with 'eps'"),
        (
            Part(excludes={FACT: Blame("sampling.steps", "why")}),
            {},
            "config.sampling.steps = 0: why",
        ),
        (Part(excludes={"other": "why"}), {"other": "sampling.grid"}, "grid = 'uniform': why"),
        (Part(excludes={"other": "why"}), {"other": ""}, "config.training.loss = 'mse': why"),
        (Part(needs={"other": "missing"}), {}, "config.training.loss = 'mse': missing"),
        (Part(needs={"other": "missing"}), {"other": ""}, None),
        (Part(needs={FACT: "missing"}, excludes={"other": "why"}), {}, None),
    ):
        chosen = {"diffusion.schedule": brings, "training.loss": ("mse", other)}
        if expected is None:
            parts.check(config, chosen, facts)
            continue
        with pytest.raises(InputError) as error:
            parts.check(config, chosen, facts)
        assert str(error.value).endswith(expected), expected


def test_every_reason_can_be_said():
    """Each names keys that there are, and ends what begins with config.KEY = VALUE."""
    config = default()
    registries = {key: r for key, r in CHOICES.items() if isinstance(r, dict)}
    assert len(registries) > 10
    said = 0
    for key, registry in registries.items():
        for name, part in registry.items():
            if not isinstance(part, Part):
                continue
            for reasons, there in ((part.excludes, True), (part.needs, False)):
                for fact in reasons:
                    facts = {fact: ""} if there else dict.fromkeys(set(part.needs) - {fact}, "")
                    alone = Part(**{"excludes" if there else "needs": {fact: reasons[fact]}})
                    with pytest.raises(InputError) as error:
                        parts.check(config, {key: (name, alone)}, facts if there else {})
                    assert "{" not in str(error.value).split("=", 1)[1].split(":", 1)[1]
                    said += 1
    assert said > 25


def test_an_added_part_is_allowed_built_and_run(monkeypatch, tmp_path):
    """A sampler, a schedule, a weight, a loss, a way to draw t, a network and a data set."""

    def added(config, schedule):
        return lambda denoiser, x_0, t, eps: 2 * losses.simple(schedule, denoiser, x_0, t, eps)

    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    ours = "ours"
    for registry, part in (
        (sampler.SAMPLERS, Part(lambda s, variance: ddim(0.0)._replace(label="own"))),
        (schedule.SCHEDULES, Part(lambda d: schedules.linear(d.num_steps, 1e-3, 0.3))),
        (objective.LOSSES, Part(added, facts={parts.SQUARED})),
        (objective.WEIGHTS, Part(lambda config: losses.weighted(jnp.ones_like))),
        (objective.TIMES, Part(objective.TIMES["uniform"].make)),
        (network.NETWORKS, network.NETWORKS["unet"]),
        (data.SOURCES, lambda config: ArraySource(images, None, None)),
    ):
        monkeypatch.setitem(registry, ours, part)
    keys = ("sampling__sampler", "diffusion__schedule", "training__loss", "training__times",
            "model__name", "data__name")  # fmt: skip
    overrides = dict.fromkeys(keys, ours) | {"training__steps": 1, "evaluation__split": ""}
    done = runs.run(runs.command(tmp_path, **overrides))
    assert done.returncode == 0, done.stderr
    assert "20 images of 8x8x1" in done.stderr
    done = runs.run(runs.command(tmp_path, "--mode=sample", **overrides))
    assert done.returncode == 0, done.stderr
    assert "step_00000001_ours20_own_seed0_n5.npz" in done.stdout
    config = default()
    config.training.loss_weight = ours
    found, x_0 = build(config, (16, 16, 3)).objective, np.ones((2, 4), np.float32)
    t, eps = np.array([3, 900]), np.zeros((2, 4), np.float32)
    denoiser = found.denoiser(lambda x, t: 0 * x)
    expected = losses.regression(
        schedules.linear(), denoiser, x_0, t, eps, losses.weighted(jnp.ones_like)
    )
    np.testing.assert_array_equal(found.loss_at(denoiser, x_0, t, eps), expected)
