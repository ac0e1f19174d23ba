"""The one-page recipes under examples/ are bit for bit what the config files build."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from ddpm.build.experiment import build
from ddpm.training.objectives import LEARNED_SCHEDULE

ROOT = Path(__file__).parents[1]
SHAPE = (3, 2, 2, 3)
X_0 = np.float32(np.random.default_rng(0).integers(0, 256, SHAPE) / 127.5 - 1)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def recipe_and_built(name, config_name):
    config = load(ROOT / "configs" / f"{config_name}.py").get_config()
    return load(ROOT / "examples" / f"recipe_{name}.py"), build(config, (32, 32, 3))


def network(x, t, estimate=None):
    """Any function of the inputs, of x's shape."""
    return 0.7 * x + 0.1 * jnp.sin(t / 300)[:, None, None, None] * jnp.tanh(x)


def network_with_variance(x, t, estimate=None):
    return jnp.concatenate([network(x, t), 0.3 * jnp.tanh(x)], axis=-1)


def built_samples(built, network, key):
    """Samples of the config's sampler, at its times, clipped if it says so."""
    denoiser = built.objective.denoiser(network)
    if built.config.sampling.clip:
        denoiser = ddpm.clipped(built.schedule, denoiser)
    how = {"sampler": built.sampler, "times": built.times}
    return jax.jit(lambda key: ddpm.sample(key, built.schedule, denoiser, SHAPE, **how))(key)


def same(found, expected):
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize(
    ("name", "config", "of"),
    [
        ("ddpm", "cifar10", network),
        ("iddpm", "cifar10_iddpm", network_with_variance),
        ("edm", "cifar10_edm", network),
    ],
)
def test_recipe_is_what_the_config_builds(name, config, of):
    recipe, built = recipe_and_built(name, config)
    key = jax.random.key(3)
    for found, expected in zip(recipe.schedule, built.schedule, strict=True):
        same(found, expected)
    if hasattr(recipe, "model"):
        assert recipe.model == built.model
    for seed in range(3):
        found = recipe.loss(of, X_0, jax.random.key(seed))
        losses = built.objective.loss(of, X_0, jax.random.key(seed))
        assert found.shape == (3,)
        assert losses.factor is None
        same(found, losses.losses)
    found = jax.jit(lambda key: recipe.sample(of, key, SHAPE))(key)
    same(found, built_samples(built, of, key))
    assert np.isfinite(found).all()


def test_recipe_of_a_learned_schedule_is_what_the_config_builds():
    recipe, built = recipe_and_built("vdm", "cifar10_vdm")
    key, objective = jax.random.key(3), built.objective
    params = objective.schedule_parameters()
    for found, expected in zip(recipe.begin, params[LEARNED_SCHEDULE].values(), strict=True):
        same(found, expected)
    steps, ends = recipe.loss(network, recipe.begin, X_0, key)
    same(steps, objective.loss(network, X_0, key).losses)
    loss, _, _ = objective.gradient(lambda params: network, params, X_0, key, ())
    same(steps.mean() + ends.mean(), loss)
    found = jax.jit(lambda key: recipe.sample(network, recipe.begin, key, SHAPE))(key)
    same(found, built_samples(built, network, key))
