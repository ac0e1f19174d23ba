"""config.sampling's steering as an Experiment builds it, at random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import classifier_free, clipped, thresholded
from ddpm.build import experiment
from ddpm.build.network import check_model
from ddpm.config import default
from ddpm.evaluation.shipped import log_probability
from tests.exact import close

SHAPE = (8, 8, 1)


def built(classes, **sampling):
    config = default()
    config.data.name = "digits"
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1)
    config.model.update(attention_resolutions=(), num_classes=classes)
    config.sampling.update(sampling)
    return experiment.build(config, SHAPE)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    x_t = np.float32(rng.normal(size=(4, *SHAPE)))
    return x_t, np.array([40, 250, 400, 600]), np.arange(7, 11)  # samples 7..10


def params_of(model):
    rng = np.random.default_rng(1)
    shapes = check_model(model, SHAPE)
    return jax.tree.map(lambda p: np.float32(0.2 * rng.normal(size=p.shape)), shapes)


def x_0(denoiser, x_t, t):
    return np.asarray(jax.jit(denoiser)(x_t, t).x_0)


@pytest.mark.parametrize(("label", "expected"), [(-1, [1, 2, 0, 1]), (2, [2, 2, 2, 2])])
def test_samples_are_of_their_class_guided_and_thresholded(batch, label, expected):
    x_t, t, indices = batch
    how = {"guidance_interval": (0.2, 1.0), "guidance_rescale": 0.5}
    e = built(3, label=label, guidance_scale=2.5, dynamic_threshold=0.9, **how)
    params = params_of(e.model)
    network = e.unclipped_denoiser
    free = classifier_free(
        e.schedule,
        network(params, jnp.array(expected)),
        network(params, jnp.full(4, 3)),
        2.5,
        interval=(0.2, 1.0),
        rescale=0.5,
    )
    found = x_0(e.steered_denoiser(params, jnp.array(indices)), x_t, t)
    close(found, x_0(thresholded(e.schedule, free, 0.9), x_t, t), rtol=1e-4, atol=1e-4)
    assert np.abs(found - x_0(e.denoiser(params), x_t, t)).max() > 1e-2  # that has no label


def test_unsteered_it_is_the_denoiser_of_the_bound(batch):
    x_t, t, indices = batch
    e = built(0)
    params = params_of(e.model)
    found = x_0(e.steered_denoiser(params, jnp.array(indices)), x_t, t)
    assert (found == x_0(clipped(e.schedule, e.unclipped_denoiser(params)), x_t, t)).all()


def test_classifier_of_the_data_steers_a_network_without_labels(batch):
    """The predicted x_0 moves by scale sigma^2 / alpha times the gradient, through the network."""
    x_t, t, indices = batch
    e = built(0, label=3, classifier_scale=1e-3, clip=False)
    params = params_of(e.model)
    network, judge = e.unclipped_denoiser(params), log_probability("digits", SHAPE, 3)
    change = np.float64(x_0(e.steered_denoiser(params, jnp.array(indices)), x_t, t))
    change -= x_0(network, x_t, t)
    gradient = jax.jit(jax.grad(lambda x: judge(network(x, t).x_0).sum()))(x_t)
    level = e.schedule.at(t)
    factor = 1e-3 * np.asarray(level.sigma_squared / level.alpha)[:, None, None, None]
    size = np.abs(factor * gradient).max()
    assert size > 1e-6
    close(change, factor * gradient, rtol=0.05, atol=0.02 * size)
