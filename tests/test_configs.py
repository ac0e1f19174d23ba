"""Every config file: loaded, valid, its network built in full, and one step taken at toy size."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import experiment, networks, objectives
from ddpm.config import default, flatten
from ddpm.errors import InputError
from ddpm.training.checkpoints import parameter_count
from ddpm.training.state import Metrics, init, make_train_step
from ddpm.validation import validate

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
ABLATIONS = sorted((Path(__file__).parents[1] / "configs" / "ablations").glob("*.py"))
SHAPES = {"digits": (8, 8, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
PARAMETERS = {"cifar10": 35_746_307, "celebahq256": 113_673_219, "lsun_church256": 113_673_219,
              "lsun_bedroom256": 113_673_219, "lsun_cat256": 113_673_219,
              "cifar10_iddpm": 52_546_438}  # fmt: skip


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
    shapes = networks.check_model(built.model, built.image_shape)
    assert parameter_count(shapes) == PARAMETERS.get(file.stem, parameter_count(shapes))
    assert f"--config=configs/{file.name}" in file.read_text(), "its docstring gives the command"


def of_its_own(config):
    """Whether the step is another than the paper's, but for the network's levels."""
    usual = default()
    usual.diffusion.schedule = config.diffusion.schedule
    keys = ("loss", "loss_weight", "times", "augmentation", "self_conditioning")
    return (
        config.diffusion.to_dict() != usual.diffusion.to_dict()
        or any(config.training[key] != usual.training[key] for key in keys)
        or bool(config.model.low_resolution or config.model.num_classes)
    )


def of_distinct_networks():
    """One file for each network: the others would compile the same step again."""

    def network(file):
        config = load(file)
        return config.model.to_json().replace(str(config.model.dropout), "") + str(shape_of(config))

    return {network(f): f for f in FILES}.values()


@pytest.mark.parametrize("file", of_distinct_networks(), ids=lambda f: f.stem)
def test_config_takes_a_step_at_toy_size(file):
    config = load(file)
    height, width, channels = shape_of(config)
    # The smallest image that has all the levels, with attention where it was.
    shrink = min(height, width) // 2 ** (len(config.model.channel_multipliers) - 1)
    shrink = max(d for d in range(1, shrink + 1) if not height % d and not width % d and d <= shrink
                 and all(r % d == 0 for r in config.model.attention_resolutions))  # fmt: skip
    config.model.attention_resolutions = tuple(
        r // shrink for r in config.model.attention_resolutions
    )
    heads = config.model.head_channels * 8 // config.model.channels
    config.model.low_resolution //= shrink
    config.model.update(channels=8, num_groups=8, num_res_blocks=1, head_channels=heads)
    config.training.warmup_steps = 0
    shape = (height // shrink, width // shrink, channels)
    built = experiment.build(config, shape)
    step = jax.jit(make_train_step(
        built.model, built.schedule, built.optimizer, ema_decay=0.9, seed=0,
        objective=built.objective, prepare=built.prepare,
    ))  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, *shape), dtype=np.uint8)
    # Filled by NumPy: compiling the initialisation would take as long as the step.
    learned = built.objective.schedule_parameters()
    shapes = jax.eval_shape(
        lambda: init(built.model, built.optimizer, shape, 0, schedule_parameters=learned)
    )
    # Of the types that it comes out as, or the second step would be compiled anew.
    nothing = jax.eval_shape(jax.jit(Metrics.zero))
    assert jax.eval_shape(step, shapes, nothing, images) == (shapes, nothing)
    start = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    params = jax.tree.map(lambda x: np.float32(0.1 * rng.normal(size=x.shape)), start.params)
    start = start._replace(params=params | learned)
    if not of_its_own(config):  # as the paper's, which others train with: not compiled again
        return
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
        objectives.objective(config, experiment.noise_schedule(config))
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
