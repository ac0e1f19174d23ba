"""A wrong key or value stops at start, in one line, with what is allowed."""

import re

import pytest

from ddpm import experiment
from ddpm.config import default, flatten, to_json, validate
from ddpm.errors import InputError


def changed(**values):
    config = default().to_dict()
    for key, value in values.items():
        *path, last = key.split("__")
        node = config
        for name in path:
            node = node[name]
        node[last] = value
    return config


def test_defaults_are_valid_and_survive_json():
    validate(default())
    validate(to_json(default()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model__chanels": 8}, r"config.model.chanels: there is no such key.*'model.channels'"),
        ({"training__batch_size": "64"}, r"training.batch_size = '64': must be of type int"),
        ({"training__batch_size": True}, r"must be of type int"),
        ({"training__batch_size": 0}, r"must be a whole number >= 1"),
        ({"training__learning_rate": -1.0}, r"must be a number > 0"),
        ({"training__ema_decay": 1.0}, r"must be in \[0, 1\)"),
        ({"model__dropout": 1.5}, r"must be in \[0, 1\)"),
        ({"model__channel_multipliers": ()}, r"must be a tuple of whole numbers > 0"),
        ({"model__attention_resolutions": (16.5,)}, r"must be a tuple of whole numbers > 0"),
        ({"diffusion__schedule": "liner"}, r"one of linear, .*did you mean 'linear'"),
        ({"diffusion__beta_end": 1.0}, r"beta_end = 1.0: must be in \(0, 1\)"),
        ({"diffusion__schedule": "betas"}, r"betas goes with schedule 'betas'"),
        ({"diffusion__betas": (0.1,)}, r"betas goes with schedule 'betas'"),
        ({"sampling__sampler": "dim"}, r"did you mean 'ddim'"),
        ({"sampling__steps": 1001}, r"must be at most T = 1000"),
        ({"sampling__eta": 2.0}, r"must be in \[0, 1\]"),
        ({"data__image_size": (32,)}, r"must be \(\) or \(height, width\)"),
        ({"data__broken_images": "ignore"}, r"must be one of error, skip"),
        ({"seed": -1}, r"config.seed = -1"),
    ],
)
def test_wrong_value_is_named(change, said):
    with pytest.raises(InputError, match=said) as error:
        validate(changed(**change))
    assert "\n" not in str(error.value)


def test_missing_key_is_named():
    config = default().to_dict()
    del config["model"]["dropout"]
    with pytest.raises(InputError, match=r"config.model.dropout is missing"):
        validate(config)


@pytest.mark.parametrize(
    ("change", "shape", "said"),
    [
        ({}, (30, 30, 3), r"config.model: images of 30x30 cannot be halved 3 times"),
        ({}, (32, 36, 3), r"32x36 cannot be halved"),
        ({"model.attention_resolutions": (16, 5)}, (32, 32, 3), r"\[5\] never reached.*\[32, 16"),
        ({"model.num_groups": 24}, (32, 32, 3), r"128 channels do not divide into num_groups = 24"),
        ({"diffusion.schedule": "jsd"}, (32, 32, 3), r"schedule leaves no signal at t = T"),
        (
            {"diffusion.schedule": "betas", "diffusion.betas": (0.1, 1.5)},
            (32, 32, 3),
            r"beta_2 = 1.5.*must lie in \(0, 1\)",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_before_any_work(change, shape, said):
    config = default()
    config.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=said) as error:
        experiment.build(config, shape)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(set(experiment.SCHEDULES) - {"jsd", "betas"}))
def test_every_schedule_has_its_name(name):
    config = default()
    config.diffusion.schedule = name
    assert experiment.noise_schedule(config).num_steps == 1000


def test_a_run_folder_of_other_settings_is_refused_but_may_train_longer():
    config = default()
    saved = to_json(config)
    config.training.steps += 1000
    config.sampling.steps = 50
    assert experiment.check_same_run(config, saved, "runs/x") == []
    config.training.learning_rate = 1e-4
    changed = experiment.check_same_run(config, saved, "runs/x")
    assert changed == ["config.training.learning_rate = 0.0001, before 0.0002"]
    del saved["model"]["dropout"]  # of a version that did not have it
    assert len(experiment.check_same_run(config, saved, "runs/x")) == 1
    config.model.channels = 64
    said = "runs/x holds a run with config.model.channels = 128, this one says 64"
    with pytest.raises(InputError, match=re.escape(said)):
        experiment.check_same_run(config, saved, "runs/x")


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": (3,)}) == {"a.b": 1, "a.c.d": 2, "e": (3,)}
