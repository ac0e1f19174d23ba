"""Energies in training and in a run folder: descended from the start, resumed, loaded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from configs import digits, digits_energy
from ddpm.config import with_settings
from ddpm.errors import InputError
from ddpm.modes.train import train
from ddpm.training.objectives import simple
from tests import runs
from tests.exact import close
from tests.models.test_energy import FORMS


def test_a_step_from_the_first_weights_lowers_the_loss():
    """Each form does, on one draw of times and noise, with a last layer of zeros."""
    objective = simple(ddpm.schedules.cosine(100))
    x_0 = np.random.default_rng(0).uniform(-1, 1, (16, 4, 4, 1)).astype(np.float32)
    network = ddpm.DiT(channels=8, depth=1, head_channels=4)
    key = jax.random.key(2)

    @jax.jit
    def losses(share):
        form = lambda x, f: sum(s * e(x, f) for s, e in zip(share, FORMS.values(), strict=True))  # noqa: E731
        model = ddpm.EnergyNetwork(network, form)
        params = model.init(jax.random.key(0), x_0, 1)["params"]
        at = lambda params: functools.partial(model.apply, {"params": params})  # noqa: E731
        before, _, grads = objective.gradient(at, params, x_0, key)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)
        return before, objective.loss(at(params), x_0, key).mean()

    for name, share in zip(FORMS, np.eye(len(FORMS), dtype=np.float32), strict=True):
        before, after = losses(share)
        assert after < before - 1e-4, name


def config_of(steps):
    config = digits_energy.get_config("inner_product")
    config.model.update(name="dit", depth=1, channels=8, head_channels=4, dropout=0.1)
    config.model.num_classes = 10
    config.diffusion.num_steps = 10
    config.training.update(steps=steps, batch_size=8, warmup_steps=0)
    config.sampling.update(num_samples=1, batch_size=1)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of eight steps, stopped and resumed after four."""
    folder = tmp_path_factory.mktemp("energy")
    for steps in (4, 8):
        train(config_of(steps), folder)
    return folder


def test_a_resumed_run_ends_in_the_same_weights(run, tmp_path):
    train(config_of(8), tmp_path)
    found, expected = runs.final_state(run), runs.final_state(tmp_path)
    assert found[0] == expected[0] == 8
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.tobytes() == b.tobytes()


def test_the_energy_of_a_loaded_model_is_that_of_its_denoiser(run):
    model = ddpm.load(run, ema=False, clip=False, label=3)
    x, t = jax.random.normal(jax.random.key(0), (3, 8, 8, 1)), jnp.array([1, 5, 10])
    gradient = ddpm.energy.density.gradient(lambda x, t: model.energy(x, t, label=3))
    log_q = ddpm.energy.density.log_density(model.schedule, model.energy)

    @jax.jit
    def found(x):
        eps = gradient(x, t), model.denoiser(x, t).eps
        return eps, model.energy(x, t), model.energy(x, t, label=3), log_q(x, t)

    eps, energy, of_three, log_density = found(x)
    close(*eps, rtol=1e-5, atol=1e-6)
    assert np.abs(eps[0]).max() > 1e-4
    assert energy.shape == (3,)
    assert (energy != of_three).all()
    close(log_density, -energy / model.schedule.at(t).sigma, rtol=1e-6)


def test_a_model_without_an_energy_says_so(shared_run):
    with pytest.raises(InputError, match="energy = 'none': the network is the gradient of no"):
        ddpm.load(shared_run).energy(jnp.zeros((1, 8, 8, 1)), 1)


def test_the_config_is_that_of_the_digits_but_for_the_energy():
    for form in FORMS:
        config, _ = with_settings(digits.get_config(), model={"energy": form})
        assert digits_energy.get_config(form).to_json() == config.to_json()
