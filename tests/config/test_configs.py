"""Every config file: loaded, valid, its network built in full, and one step taken at toy size."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm.build import experiment
from ddpm.build.checks import validate
from ddpm.build.network import check_model
from ddpm.build.objective import objective as objective_of
from ddpm.build.schedule import noise_schedule
from ddpm.config import default, flatten
from ddpm.errors import InputError
from ddpm.training.checkpoints import parameter_count
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
ABLATIONS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.py"))
SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
PARAMETERS = {"cifar10": 35_746_307, "celebahq256": 113_673_219, "lsun_church256": 113_673_219,
              "lsun_bedroom256": 113_673_219, "lsun_cat256": 113_673_219,
              "cifar10_iddpm": 52_546_438}  # fmt: skip
OF_A_STEP = ("loss", "loss_weight", "times", "augmentation", "self_conditioning")


def module(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(file):
    return module(file).get_config()


def shape_of(config):
    if config.data.image_size:
        return (*config.data.image_size, 3)
    return SHAPES[config.data.name]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_config_is_valid_and_its_network_can_be_built(file):
    config = load(file)
    validate(config)
    built = experiment.build(config, shape_of(config))
    shapes = check_model(built.model, built.image_shape)
    assert parameter_count(shapes) == PARAMETERS.get(file.stem, parameter_count(shapes))
    assert f"--config=configs/{file.name}" in file.read_text(), "its docstring gives the command"


def of_its_own(config):
    """Whether the step is another than the paper's, but for the network's levels."""
    usual = default()
    for key in ("schedule", "num_steps", "sigma_min", "sigma_max"):
        usual.diffusion[key] = config.diffusion[key]
    return (
        config.diffusion.to_dict() != usual.diffusion.to_dict()
        or any(config.training[key] != usual.training[key] for key in OF_A_STEP)
        or bool(config.model.low_resolution or config.model.num_classes)
    )


def toy(config, levels):
    """The config of a network of at most so many levels, on the smallest image that has them."""
    config, (height, width, channels) = config.copy_and_resolve_references(), shape_of(config)
    model = config.model
    model.channel_multipliers = tuple(model.channel_multipliers)[:levels]
    side = 2 ** (len(model.channel_multipliers) - 1)
    shrink = min(height, width) // side
    attends = [r // shrink for r in model.attention_resolutions if r // shrink]
    model.attention_resolutions = tuple(attends or ([1] if model.attention_resolutions else []))
    heads = model.head_channels * 8 // model.channels
    model.low_resolution = side // 2 if model.low_resolution else 0
    model.update(channels=8, num_groups=8, num_res_blocks=1, head_channels=heads)
    config.training.warmup_steps = 0
    return config, (height // shrink, width // shrink, channels)


def of_distinct_steps():
    """One file for each step at toy size: the others would compile the same again."""

    def step(file):
        config, (height, width, _) = toy(load(file), levels=2)
        usual = default().model.dropout
        config.model.dropout, config.diffusion.schedule = usual, "linear"
        parts = config.model, config.diffusion, [config.training[key] for key in OF_A_STEP]
        return str((height, width, *map(str, parts)))

    return {step(f): f for f in FILES}.values()


def step_and_state(config, shape):
    """The step, jitted, what it takes as shapes, and the schedule's parameters."""
    built = experiment.build(config, shape)
    step = jax.jit(make_train_step(
        built.model, built.objective, built.optimizer, ema_decay=0.9, seed=0,
        prepare=built.prepare,
    ))  # fmt: skip
    images = jax.ShapeDtypeStruct((2, *shape), np.uint8)
    state = jax.eval_shape(lambda: init(built.model, built.optimizer, shape, 0, built.objective))
    shapes = state, jax.eval_shape(jax.jit(Metrics.zero)), images
    return step, shapes, built.objective.schedule_parameters()


@pytest.mark.parametrize("file", [f for f in FILES if "folder" in f.stem], ids=lambda f: f.stem)
def test_a_folder_is_evaluated_without_weights_to_download(file):
    assert not {"distances", "neighbours"} & set(load(file).evaluation.parts)


@pytest.mark.parametrize("file", of_distinct_steps(), ids=lambda f: f.stem)
def test_config_takes_a_step_at_toy_size(file):
    """The step is taken by shapes, compiled where it is one of its own. Full networks are built by
    `test_config_is_valid_and_its_network_can_be_built`."""
    config = load(file)
    step, (state, nothing, images), learned = step_and_state(*toy(config, levels=2))
    # Of the types that it comes out as, or the second step would be compiled anew.
    assert jax.eval_shape(step, state, nothing, images) == (state, nothing)
    if not of_its_own(config):  # as the paper's, which others train with: not compiled again
        return
    rng = np.random.default_rng(0)
    # Filled by NumPy: compiling the initialisation would take as long as the step.
    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    params = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), start.params)
    start = start._replace(params=params | learned)
    images = rng.integers(0, 256, images.shape, dtype=np.uint8)
    state, metrics = step(start, Metrics.zero(), images)
    assert np.isfinite(metrics.loss)
    assert int(metrics.first_bad_step) == -1
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), start.params, state.params)
    assert moved["conv_out"]["kernel"]
    assert all(all(moved[key].values()) for key in learned)


@pytest.mark.parametrize("file", ABLATIONS, ids=lambda f: f.stem)
def test_ablations_are_valid_by_their_names_and_differ(file):
    ablation, seen = module(file), []
    for name, changes in ablation.VARIANTS.items():
        config = ablation.get_config(name)
        validate(config)
        objective_of(config, noise_schedule(config))
        assert changes.items() <= flatten(config).items()
        seen.append(config.to_json())
    assert len(set(seen)) == len(seen)
    command = f"python main.py --config=configs/ablations/{file.name}:"
    example = file.read_text().split(command)[1].split()[0]
    assert example in ablation.VARIANTS
    for wrong, said in (("", "name one of its variants"), (example + "s", f"mean {example!r}")):
        with pytest.raises(InputError, match=said):
            ablation.get_config(wrong)


def test_rows_of_table_2():
    rows = module(next(f for f in ABLATIONS if f.stem == "table2"))
    of = {name: rows.get_config(name) for name in rows.VARIANTS}
    found = [(c.diffusion.prediction, c.training.loss, c.diffusion.variance) for c in of.values()]
    assert found == [
        ("posterior_mean", "bound", "learned"),
        ("posterior_mean", "bound", "fixed_large"),
        ("posterior_mean", "mse", "fixed_large"),
        ("eps", "bound", "learned"),
        ("eps", "bound", "fixed_large"),
        ("eps", "mse", "fixed_large"),
    ]
