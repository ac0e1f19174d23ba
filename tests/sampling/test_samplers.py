"""One step of each sampler at every time, against the paper's formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import Prediction, ancestral, ddim, fixed_large, fixed_small, schedules
from ddpm.diffusion.predictions import from_x_0
from ddpm.sampling.samplers import StepInfo, times
from tests.exact import NAMES, close, pair


def steps_at(sampler, schedule, s, t, x_0, eps, x_t, noise, log_variance=None):
    """A step for each of many (s, t), which the sampler takes as scalars."""
    prediction = Prediction(*(jnp.float32(x) for x in (x_0, eps)), log_variance)
    return np.asarray(_steps_at(sampler.step)(schedule, prediction, s, t, x_t, noise))


def _steps_at(step, compiled={}):  # noqa: B006 - the point is to keep them
    def one(schedule, prediction, s, t, x_t, noise):
        step_info = StepInfo(t, s, jnp.array(0), jnp.stack([t, s]))
        denoiser = lambda x, t: jax.tree.map(lambda p: p[None], prediction)  # noqa: E731
        return step(schedule, denoiser, x_t[None], step_info, lambda k=0: noise[None], ()).x[0]

    if step not in compiled:
        compiled[step] = jax.jit(jax.vmap(one, (None, 0, 0, 0, 0, 0)))
    return compiled[step]


def cases(exact, num_steps):
    """Each t with s = t - 1, with s = 0 and with some other; x_t of a random x_0 and eps."""
    rng = np.random.default_rng(20)
    t = np.arange(1, num_steps + 1)
    s = np.concatenate([t - 1, 0 * t, rng.integers(0, t)])
    t = np.tile(t, 3)
    x_0, eps, noise = np.float32(rng.normal(size=(3, len(t), 2)))
    x_t = exact.alpha[t][:, None] * x_0 + exact.sigma[t][:, None] * eps
    return s, t, x_0, eps, x_t, noise


ANCESTRAL = {"fixed_small": ancestral(fixed_small), "fixed_large": ancestral(fixed_large)}
DDIM = {eta: ddim(eta) for eta in (0.0, 0.3, 1.0)}


@pytest.mark.parametrize("variance", ANCESTRAL)
@pytest.mark.parametrize("num_steps", [1, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_ancestral_step(name, num_steps, variance):
    schedule, exact = pair(name, num_steps)
    s, t, x_0, eps, x_t, noise = cases(exact, num_steps)
    found = steps_at(ANCESTRAL[variance], schedule, s, t, x_0, eps, np.float32(x_t), noise)
    of_x_0, of_x_t, small = (x[:, None] for x in exact.posterior(s, t))
    std = np.sqrt(small if variance == "fixed_small" else exact.step_beta(s, t)[:, None])
    std = np.where(s[:, None] == 0, 0, std)
    close(found, of_x_0 * x_0 + of_x_t * x_t + std * noise, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("eta", DDIM)
@pytest.mark.parametrize("num_steps", [1, 1000])
@pytest.mark.parametrize("name", NAMES)
def test_ddim_step(name, num_steps, eta):
    schedule, exact = pair(name, num_steps)
    s, t, x_0, eps, x_t, noise = cases(exact, num_steps)
    found = steps_at(DDIM[eta], schedule, s, t, x_0, eps, np.float32(x_t), noise)
    std = eta * np.sqrt(exact.variance[s] / exact.variance[t] * exact.step_beta(s, t))
    kept = np.sqrt((exact.variance[s] - std**2).clip(0))
    std, kept, alpha = (x[:, None] for x in (std, kept, exact.alpha[s]))
    close(found, alpha * x_0 + kept * eps + std * noise, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("sampler", [*ANCESTRAL.values(), *DDIM.values()])
def test_last_step_gives_the_predicted_x_0_without_noise(sampler):
    schedule, exact = pair("linear", 7)
    _, t, x_0, eps, x_t, noise = cases(exact, 7)
    found = steps_at(sampler, schedule, 0 * t, t, x_0, eps, np.float32(x_t), 100 * noise)
    close(found, x_0, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_step_of_no_size_is_the_identity(name):
    """Of deterministic DDIM, whatever the prediction that fits x_t."""
    schedule, exact = pair(name, 1000)
    t = np.arange(1, 1001)[exact.alpha[1:] > 0]
    x_t, guess, noise = np.float32(np.random.default_rng(21).normal(size=(3, len(t), 2)))
    eps = from_x_0(schedule, x_t, t, guess).eps
    close(steps_at(DDIM[0.0], schedule, t, t, guess, eps, x_t, noise), x_t, atol=2e-6)


def test_small_steps_change_little():
    """x_s goes to x_t as s does: with alpha_t where alpha_s belongs it would not."""
    schedule, exact = pair("linear", 1000)
    s, t, x_0, eps, x_t, noise = (x[:1000] for x in cases(exact, 1000))
    for sampler, order in ((DDIM[0.0], 1), (ANCESTRAL["fixed_small"], 0.5)):
        found = steps_at(sampler, schedule, s, t, x_0, eps, np.float32(x_t), noise)
        beta = exact.beta[t] if order == 1 else np.sqrt(exact.beta[t])
        distance = abs(found - x_t).max(-1) / beta
        assert distance[100:].max() < 10


@pytest.mark.parametrize("shape", [(5, 1, 1), (5, 2, 1), (5, 2, 3)])
def test_learned_variance_has_the_say(shape):
    schedule, exact = pair("linear", 5)
    t = np.arange(1, 6)
    x_0, eps, x_t, noise = np.float32(np.random.default_rng(22).normal(size=(4, 5, 2, 3)))
    log_variance = np.float32(np.random.default_rng(23).normal(-2, 1, shape))
    found = steps_at(
        ANCESTRAL["fixed_large"], schedule, t - 1, t, x_0, eps, x_t, noise, log_variance
    )
    of_x_0, of_x_t, _ = (x[:, None, None] for x in exact.posterior(t - 1, t))
    mean = of_x_0 * x_0 + of_x_t * x_t
    close(found[0], mean[0], rtol=1e-5)
    close(found[1:], (mean + np.exp(log_variance / 2) * noise)[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_out_of_range_is_refused(eta):
    """Above 1, sigma_s^2 - std^2 is negative at s = 0: samples of NaN."""
    with pytest.raises(ValueError, match="eta"):
        ddim(eta)


@pytest.mark.parametrize(
    ("num_steps", "steps"), [(1, 1), (7, 1), (7, 2), (7, 6), (7, 7), (1000, 999), (1000, 300)]
)
def test_times_fall_evenly_from_T_to_the_data(num_steps, steps):
    t = times(num_steps, steps)
    assert t.shape == (steps + 1,)
    assert t.dtype == np.int32
    assert t[0] == num_steps
    assert t[-1] == 0
    assert (np.diff(t) < 0).all()
    even = num_steps * (1 - np.arange(steps + 1) / steps)
    assert (abs(t - even) <= 0.5 + 1e-9).all()


def test_times_for_every_number_of_steps_fall():
    for steps in range(1, 101):
        assert (np.diff(times(100, steps)) < 0).all()


def test_all_times_by_default():
    assert (times(5) == [5, 4, 3, 2, 1, 0]).all()


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(ValueError, match="a whole number between 1 and T = 10"):
        times(10, steps)


def test_samplers_carry_their_number_of_steps():
    assert ancestral().steps is None
    assert ancestral(fixed_small, steps=3).steps == 3
    assert ddim(steps=4).steps == 4


def test_default_variance_is_fixed_large():
    schedule = schedules.linear(7)
    x = jnp.ones((1, 2))
    step_info = StepInfo(jnp.array(5), jnp.array(2), jnp.array(0), jnp.array([5, 2]))
    arguments = schedule, lambda x, t: Prediction(x, x), x, step_info, lambda k=0: x, ()
    close(ancestral().step(*arguments).x, ANCESTRAL["fixed_large"].step(*arguments).x)
