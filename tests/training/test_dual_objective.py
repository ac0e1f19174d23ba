"""The objective of a normalised energy: its offset, and the gradient that training takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm import EnergyNetwork
from ddpm.build.experiment import build
from ddpm.config import default
from ddpm.diffusion.network_inputs import Conditioning
from ddpm.diffusion.predictions import log_snr_input
from ddpm.diffusion.streams import StepKey
from ddpm.energy import dual
from ddpm.errors import InputError
from ddpm.models.energy import denoising
from ddpm.training.objectives import LEARNED_SCHEDULE, OFFSET, noise_like, times
from ddpm.training.optimizer import adam
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step, training_network
from tests.exact import close

SHAPE = (4, 4, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (8, *SHAPE), dtype=np.uint8)


class Network(nn.Module):
    """Small, of x_t and the network's input for the log-SNR."""

    @nn.compact
    def __call__(self, x, t, *, train=False):
        h = jnp.concatenate([x.reshape(len(x), -1), jnp.broadcast_to(t, len(x))[:, None] / 500], 1)
        return nn.Dense(16)(nn.tanh(nn.Dense(8)(h))).reshape(x.shape)


MODEL = EnergyNetwork(Network(), denoising)


def config(**overrides):
    found = default()
    found.diffusion.update(schedule="linear_log_snr", num_steps=20, log_snr_0=6.0, log_snr_1=-6.0)
    found.model.update(name="dit", channels=8, depth=1, dropout=0.0)
    found.model.update(energy="denoising", noise_input="log_snr")
    found.training.update(loss="dual", time_weight=3.0)
    found.update_from_flattened_dict(overrides)
    return found


def test_offset_is_the_integral_of_its_rates_and_the_start_is_noise():
    rates, ends = jnp.float32([0.1, -0.4, 0.3]), (6.0, -6.0)
    zero = lambda x, s: jnp.zeros(len(x))  # noqa: E731
    x = jnp.ones((7, 5))
    log_snr = jnp.float32([-6, -4, -2, 0, 2, 4, 6])
    found = dual.of_gradient(zero, rates, ends)(x, log_snr)
    expected = np.array([0, 0.2, 0.4, -0.4, -1.2, -0.6, 0])
    close(found / 5 - np.log(2 * np.pi) / 2, expected, atol=1e-6)
    # Network at zero, E = |x|^2 / 2: at T the energy of N(0, I), and its gradient by x is eps.
    half = lambda x, s: (x**2).sum(-1) / 2  # noqa: E731
    start = dual.of_gradient(half, jnp.zeros(3), ends)
    last = jnp.full(7, -20.0)
    close(start(x, last), dual.gaussian(1.0)(x, last), rtol=1e-6)
    close(dual.derivatives(start, x, log_snr).eps, x, rtol=1e-6)


def test_gradient_is_that_of_the_dual_loss_by_network_and_offset_and_parts_add_up():
    objective = build(config(), SHAPE).objective
    schedule, key = build(config(), SHAPE).schedule, StepKey(jax.random.key(1), jnp.int32(3))
    x_0 = jnp.asarray(IMAGES, jnp.float32) / 127.5 - 1
    params = MODEL.init(jax.random.key(0), x_0, jnp.ones(8))["params"]
    params |= {OFFSET: {"rates": jnp.linspace(-0.3, 0.2, 32)}}

    def by_hand(params):
        def energy(x, log_snr):
            scalar = MODEL.apply({"params": params}, x, log_snr_input(log_snr), method="energy")
            edges = np.linspace(-6, 6, 33)
            passed = jnp.clip(log_snr[:, None] - edges[:-1], 0, 12 / 32)
            offset = (passed * params[OFFSET]["rates"]).sum(1) + np.log(2 * np.pi) / 2
            return scalar * jnp.sqrt(1 + jnp.exp(log_snr)) + 16 * offset

        t, _ = times(objective.draw, (), key, 8)
        eps = noise_like(x_0, key)
        return dual.loss(schedule, energy, x_0, t, eps, time_weight=3.0).mean()

    def ours(params):
        network = training_network(MODEL, key, Conditioning(), ())
        return objective.gradient(network, params, x_0, key, ())

    loss, found, grads = jax.jit(ours)(params)
    value, expected = jax.jit(jax.value_and_grad(by_hand))(params)
    close(loss, value, rtol=1e-4)
    close(found.mean(), loss, rtol=1e-6)
    assert np.abs(expected[OFFSET]["rates"]).max() > 1e-3
    jax.tree.map(lambda a, b: close(a, b, rtol=2e-3, atol=1e-4), grads, dict(expected))

    optimizer = adam(1e-2, weight_decay=0.5)
    state = init(MODEL, optimizer, SHAPE, 0, objective)
    step = jax.jit(make_train_step(
        MODEL, objective, optimizer, ema_decay=0.9, seed=1, accumulation=2
    ))  # fmt: skip
    state = state._replace(params=params, step=jnp.int32(3))
    after, metrics = step(state, Metrics.zero(), IMAGES)
    close(metrics.loss, loss, rtol=1e-4)
    close(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-3)
    assert np.abs(after.params[OFFSET]["rates"] - params[OFFSET]["rates"]).max() > 0
    assert LEARNED_SCHEDULE not in after.params
    # AdamW takes nothing off the offset: with no gradient it stays.
    ones = {OFFSET: {"rates": jnp.ones(32)}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
    assert not np.any(optax.apply_updates(ones, updates)[OFFSET]["rates"] - 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.energy": "none"}, "config.model.energy = 'none'"),
        ({"model.noise_input": "t"}, "config.model.noise_input = 't'"),
        ({"diffusion.schedule": "jsd"}, "alpha_T = 0"),
        ({"diffusion.num_steps": 1, "diffusion.schedule": "constant"}, "schedule has one"),
        ({"training.loss_weight": "min_snr"}, "config.training.loss_weight = 'min_snr'"),
        ({"training.times": "importance"}, "config.training.times = 'importance'"),
        ({"training.time_weight": -1.0}, "config.training.time_weight = -1.0"),
        ({"diffusion.schedule": "learned"}, "config.training.loss = 'dual'"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_one_line(overrides, words):
    with pytest.raises(InputError) as error:
        build(config(**overrides), SHAPE)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_only_a_dual_model_has_a_normalised_energy():
    built = build(config(**{"training.loss": "mse"}), SHAPE)
    with pytest.raises(InputError, match="'mse': the energy is not normalised"):
        built.raw_energy({})
    assert build(config(), SHAPE).objective.ends == (6.0, -6.0)
