"""A wrong key or value stops at start, in one line, with what is allowed."""

import re
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from ddpm.build import experiment
from ddpm.build.checks import validate
from ddpm.build.data import check_labels
from ddpm.build.schedule import SCHEDULES, noise_schedule
from ddpm.config import default, flatten, to_json
from ddpm.config.command import config_file, overrides, parse
from ddpm.config.rules import check_values
from ddpm.config.same_run import check_same_run
from ddpm.data.sources import ArraySource
from ddpm.errors import InputError
from ddpm.modes.loading import steering_name


def changed(**values):
    config = default().to_dict()
    for key, value in values.items():
        *path, last = key.split("__")
        node = config
        for name in path:
            node = node[name]
        node[last] = value
    return config


NUMBERS = [k for k, v in flatten(default()).items() if not isinstance(v, bool | str)]


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_no_memory_holds_are_refused(key):
    """An OverflowError, or nothing at all, before."""
    example = flatten(default())[key]
    if isinstance(example, tuple):
        if key in ("sampling.times", "diffusion.betas", "evaluation.parts", "comparison.samplers"):
            return
        wrong = (10**12,) * max(1, len(example))
    else:
        wrong = 10**12 if isinstance(example, int) else 10**400
    said = f"config.{key}( = .*: must be .*[0-9]|: a number of 1329 bits: at most 63)"
    with pytest.raises(InputError, match=said):
        check_values(changed(**{key.replace(".", "__"): wrong}), {})


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize("key", NUMBERS)
def test_an_override_of_another_type_is_told_its_key_and_type(key):
    kind = type(flatten(default())[key])
    if kind is tuple:  # whose values are checked with the config
        return
    for argv in ([f"--config.{key}=abc"], [f"--config.{key}", "1.5.2"]):
        value = argv[-1].split("=")[-1]
        said = f"^--config.{key}={value}: must be of type {kind.__name__}$"
        with pytest.raises(InputError, match=said):
            parse(["main.py", "--config=configs/digits.py", *argv])


@pytest.mark.filterwarnings("ignore:the load_module")
def test_an_error_in_a_config_file_is_one_line(tmp_path):
    file = tmp_path / "mine.py"
    begin = "from ddpm.config import default\n\n\ndef get_config():\n    config = default()\n"
    for line, said in (
        ("config.training.batch_size = 'abc'", "line 6: TypeError: .*'batch_size'.*'int'"),
        ("config.update_from_flattened_dict({'seed': 'x'})", "line 6: TypeError: .*'seed'"),
    ):
        file.write_text(f"{begin}    {line}\n    return config\n")
        with pytest.raises(InputError, match=f"^--config={file}, {said}") as error:
            parse(["main.py", f"--config={file}"])
        assert "\n" not in str(error.value)


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
        ({"sampling__label": -2}, r"label = -2: must be a whole number >= -1"),
        ({"sampling__label": 1.0}, r"must be of type int"),
        ({"sampling__guidance_scale": float("nan")}, r"guidance_scale = nan: must be a finite"),
        ({"sampling__guidance_interval": (1.0,)}, r"must be \(\) or \(lo, hi\) with 0 <= lo < hi"),
        ({"sampling__guidance_interval": (2.0, 1.0)}, r"must be \(\) or \(lo, hi\)"),
        ({"sampling__guidance_interval": ("a", "b")}, r"must be \(\) or \(lo, hi\)"),
        ({"sampling__guidance_rescale": 1.5}, r"must be in \[0, 1\]"),
        ({"sampling__dynamic_threshold": 99.5}, r"must be 0 or a quantile in \(0, 1\]"),
        ({"sampling__classifier_scale": float("inf")}, r"must be a finite number"),
        ({"model__num_classes": -1}, r"must be a whole number >= 0"),
        ({"training__label_dropout": 1.0}, r"must be in \[0, 1\)"),
        ({"data__image_size": (32,)}, r"must be \(\) or \(height, width\)"),
        ({"data__broken_images": "ignore"}, r"must be one of error, skip"),
        ({"data__background": "whit"}, r"must be a colour, such as 'white', 'black' or '#808080'"),
        ({"data__background": "#ffffff00"}, r"must be a colour"),
        ({"data__max_pixels": 0}, r"must be a whole number >= 1"),
        ({"seed": -1}, r"config.seed = -1"),
        ({"training__steps": 10**400}, r"training\.steps: a number of 1329 bits: at most 63"),
        ({"comparison__steps": (5, 2**64)}, r"comparison\.steps: a number of 65 bits: at most 63"),
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
            {"sampling.guidance_scale": 2.0},
            (32, 32, 3),
            r"guidance_scale = 2.0: the model has no la",
        ),
        ({"sampling.label": 3}, (32, 32, 3), r"label = 3: the model has no labels"),
        (
            {"model.num_classes": 10, "sampling.label": 10},
            (32, 32, 3),
            r"label = 10: must be -1 or in 0\.\.9",
        ),
        (
            {
                "model.num_classes": 10,
                "sampling.guidance_scale": 0.0,
                "training.label_dropout": 0.0,
            },
            (32, 32, 3),
            r"label_dropout = 0, so the model never learns to do without",
        ),
        ({"sampling.classifier_scale": 1.0}, (32, 32, 3), r"say towards which class"),
        (
            {"sampling.classifier_scale": 1.0, "sampling.label": 3},
            (32, 32, 3),
            r"classifier_scale = 1.0: no classifier 'cifar10' is shipped: there are digits",
        ),
        (
            {"sampling.classifier_scale": 1.0, "sampling.label": 3, "data.name": "digits"},
            (32, 32, 3),
            r"classifier 'digits' is for images of \(8, 8, 1\), these are \(32, 32, 3\)",
        ),
        (
            {"sampling.dynamic_threshold": 0.9, "sampling.clip": False},
            (32, 32, 3),
            r"dynamic_threshold = 0.9: goes with config.sampling.clip = True",
        ),
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


@pytest.mark.parametrize("name", sorted(set(SCHEDULES) - {"jsd", "betas"}))
def test_every_schedule_has_its_name(name):
    config = default()
    config.diffusion.schedule = name
    assert noise_schedule(config).num_steps == 1000


def test_a_run_folder_of_other_settings_is_refused_but_may_train_longer():
    config = default()
    saved = to_json(config)
    config.training.steps += 1000
    config.sampling.steps = 50
    assert check_same_run(config, saved, "runs/x") == []
    config.training.learning_rate = 1e-4
    changed = check_same_run(config, saved, "runs/x")
    assert changed == ["config.training.learning_rate = 0.0001, before 0.0002"]
    del saved["model"]["dropout"]  # of a version that did not have it
    assert len(check_same_run(config, saved, "runs/x")) == 1
    config.model.channels = 64
    said = "runs/x holds a run with config.model.channels = 128, this one says 64"
    with pytest.raises(InputError, match=re.escape(said)):
        check_same_run(config, saved, "runs/x")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--config.model.channel_multipliers=(1,2)", "--config.model.channel_multipliers=(1,2,2)"],
         {"model.channel_multipliers": (1, 2, 2)}),
        (["--config.evaluation.seeds", "(0,)", "--workdir=x", "--config.evaluation.seeds", "(1,)"],
         {"evaluation.seeds": (1,)}),
        (["--config.data.flip", "--config.model.channels=8", "--noconfig.data.flip"],
         {"data.flip": False, "model.channels": 8}),
        (["--config.model.channels", "8", "--config.model.channels=16"], {"model.channels": 16}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the load_module")
def test_of_a_flag_given_twice_the_last_wins(given, expected):
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "", flag_values=values)
    file = f"--config={Path(__file__).parents[2] / 'configs' / 'cifar10.py'}"
    found = parse(["main.py", file, *given], values)
    assert expected.items() <= flatten(found.config.to_dict()).items()
    # A sweep hands the overrides on to each of its runs, and reads them in the same way.
    assert parse(["main.py", file, *overrides(given)]).config.to_json() == found.config.to_json()


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize(
    "given", [["--config=cifar10", "--config=digits"], ["-config", "cifar10", "--config", "digits"]]
)
def test_of_several_config_files_the_last_is_taken(given):
    found = parse(["main.py", *given, "--config.seed=3"])
    assert found.config.data.name == "digits"
    assert found.config.seed == 3
    assert config_file(["main.py", *given]) == "digits"  # of which the run folder has its name


@pytest.mark.filterwarnings("ignore:the load_module")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--config="], r"^--config=: must be a file or celebahq256, "),
        (["--config=digits", "--config="], r"^--config=: must be a file or celebahq256, "),
        (["--config=cifar10:foo"], r"cifar10\.py: has no variants"),
        (["--config=cifar10:"], r"cifar10\.py: has no variants"),
        (["--config=digits", "--config.model=3"], r"^--config\.model is a section: override its k"),
        (["--config=digits", "--config.training", "x"], r"^--config\.training is a section"),
    ],
)
def test_no_file_no_variant_and_no_key(given, said):
    with pytest.raises(InputError, match=said):
        parse(["main.py", *given])


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": (3,)}) == {"a.b": 1, "a.c.d": 2, "e": (3,)}


@pytest.mark.parametrize(
    ("wanted", "there", "said"),
    [(10, None, "'cifar10' has no labels; set it to 0"), (10, 3, "has 3 classes; set it to 3")],
)
def test_labels_that_the_data_do_not_have(wanted, there, said):
    config = default()
    config.model.num_classes = wanted
    image = np.zeros((6, 8, 8, 1), np.uint8)
    label = None if there is None else np.zeros(6, np.int32)
    with pytest.raises(InputError, match=re.escape(f"num_classes = {wanted}: ")) as error:
        check_labels(config, ArraySource(image, label, there))
    assert said in str(error.value)
    check_labels(config, ArraySource(image, label, wanted))
    check_labels(default(), ArraySource(image, label, there))  # labels may go unused


STEERED = [
    {},
    {"label": 3},
    {"label": 4},
    {"guidance_scale": 2.0},
    {"guidance_scale": -2.0},
    {"guidance_scale": 2.0000001},
    {"guidance_scale": 2.0, "guidance_interval": (0.2, 3.0)},
    {"guidance_scale": 2.0, "guidance_interval": (0.2, 30.0)},
    {"guidance_scale": 2.0, "guidance_rescale": 0.2},
    {"label": 3, "classifier_scale": 0.5},
    {"dynamic_threshold": 0.995},
    {"label": 3, "guidance_scale": 2.0, "dynamic_threshold": 0.99},
]


def test_names_of_samples_tell_how_they_were_steered():
    names = []
    for settings in STEERED:
        config = default()
        config.sampling.update(settings)
        names.append(steering_name(config.sampling))
    assert names[0] == ""
    assert len(set(names)) == len(STEERED)
    assert names[-1] == "_label3_guided2_threshold0.99"
    config = default()  # of no effect without guidance
    config.sampling.update(guidance_interval=(0.2, 3.0), guidance_rescale=0.5)
    assert steering_name(config.sampling) == ""
