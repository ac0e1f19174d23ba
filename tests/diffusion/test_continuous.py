"""Schedules in continuous time: closed forms, their limits, and what VDM says of a learned one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import predictions, q_sample, schedules
from ddpm.diffusion import continuous
from tests.exact import NAMES, close, pair

SCHEDULES = {
    "linear": continuous.linear(),
    "linear_beta": continuous.linear_beta(),
    "cosine": continuous.cosine(),
    "edm": continuous.edm(),
    "shifted": continuous.shifted(continuous.cosine(), 256),
    "learned": continuous.learned(continuous.init_learned()),
}
TIMES = np.linspace(0.01, 1, 100)


@pytest.mark.parametrize("name", SCHEDULES)
def test_falls_and_its_slope_is_its_derivative(name):
    schedule = SCHEDULES[name]
    log_snr, slope = jax.jit(lambda t: (schedule.at(t).high, schedule.slope(t)))(TIMES)
    assert (np.diff(log_snr) < 0).all()
    h = 1e-5
    near = [schedule.log_snr(x) for x in (TIMES - h / 2, TIMES + h / 2)]
    assert near[0].dtype == np.float64
    close(slope, (near[1] - near[0]) / h, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_of_inverts(name):
    schedule = SCHEDULES[name]
    log_snr, found = jax.jit(
        lambda t: (schedule.at(t).high, schedule.time_of(schedule.at(t).high))
    )(TIMES)
    close(schedule.at(found).high, log_snr, atol=2e-5)
    close(schedule.time_of(jnp.array([1e4, -1e4])), [0, 1], atol=1e-6)


def test_closed_forms():
    t = TIMES
    alpha_bar = {
        "linear": 1 / (1 + np.exp(-(13.3 - 18.3 * t))),
        "linear_beta": np.exp(-(0.1 * t + 19.9 * t**2 / 2)),
        "edm": 1 / (1 + (0.002 ** (1 / 7) + t * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 14),
    }
    for name, expected in alpha_bar.items():
        close(jax.nn.sigmoid(SCHEDULES[name].at(t).high), expected, rtol=2e-4)
    # The cosine itself, but for the cut ends; they are where they should be.
    middle = t[20:80]
    close(jax.nn.sigmoid(SCHEDULES["cosine"].at(middle).high), np.cos(np.pi / 2 * middle) ** 2,
          rtol=3e-3)  # fmt: skip
    close(SCHEDULES["cosine"].log_snr(np.array([0.0, 1.0])), [15, -15], rtol=1e-9)


def test_shifted_noise_is_that_of_the_reference_once_averaged_down():
    """Means of 4x4 pixels have a fourth of the noise's deviation: sigma/alpha four times it."""
    plain, shifted = (SCHEDULES[name].at(0.3) for name in ("cosine", "shifted"))
    close(shifted.sigma / shifted.alpha, 4 * plain.sigma / plain.alpha, rtol=1e-5)
    down = continuous.shifted(SCHEDULES["cosine"], 32).at(0.3)
    close(down.sigma / down.alpha, plain.sigma / plain.alpha / 2, rtol=1e-5)


def test_papers_table_tends_to_the_linear_beta():
    """beta_t = beta(t/T)/T, with beta from 0.1 to 20 for T = 1000 (Song et al. 2021)."""
    table = schedules.linear(1000)
    close(
        table.log_snr[10:], continuous.linear_beta().at(np.arange(10, 1001) / 1000).high, atol=0.1
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_table_has_the_log_snr_of_its_times(name):
    schedule = SCHEDULES[name]
    table = continuous.table(schedule, 10)
    assert table.num_steps == 10
    t = np.arange(1, 11) / 10 if name == "linear_beta" else np.arange(10) / 9
    close(table.log_snr[1:], schedule.at(t).high, rtol=1e-5, atol=1e-5)
    close(table.at(2.5).high, (table.log_snr[2] + table.log_snr[3]) / 2, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_slope_of_a_table_is_the_drop_of_the_step(name):
    schedule, exact = pair(name, 7)
    log_snr = np.log(exact.alpha_bar[1:-1] / exact.variance[1:-1])
    found = schedule.slope(np.float32([1, 1.5, 2, 2.1, 6]))
    close(found, np.diff(log_snr)[[0, 0, 0, 1, 4]], rtol=1e-4)
    assert schedule.slope(3) == schedule.slope(3.0)


def test_readings_and_noise_take_continuous_time():
    schedule = SCHEDULES["cosine"]
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 5, 3))
    t = jnp.linspace(0.1, 0.9, 5)
    x_t = q_sample(schedule, x_0, t, eps)
    angle = np.arctan(np.exp(-7.5)) + (np.arctan(np.exp(7.5)) - np.arctan(np.exp(-7.5))) * t
    close(x_t, np.cos(angle)[:, None] * x_0 + np.sin(angle)[:, None] * eps, rtol=1e-4, atol=1e-5)
    v = np.cos(angle)[:, None] * eps - np.sin(angle)[:, None] * x_0
    denoise = predictions.denoiser(schedule, lambda x_t, t: v, predictions.from_v)
    close(denoise(x_t, t).x_0, x_0, atol=1e-5)
    close(denoise(x_t, t).eps, eps, atol=1e-5)


def test_wrong_ends_are_refused():
    for make in (continuous.linear, continuous.cosine, continuous.init_learned):
        with pytest.raises(ValueError, match="must fall"):
            make(-5.0, 13.3)
    with pytest.raises(ValueError, match="sigma must rise"):
        continuous.edm(80, 0.002)
    with pytest.raises(ValueError, match="num_steps = 1"):
        continuous.table(continuous.linear(), 1)
    dark = continuous.linear(10.0, -200.0)
    with pytest.raises(ValueError, match="no signal"):
        predictions.denoiser(dark, lambda x_t, t: x_t)


def some_parameters(seed=0):
    start = continuous.init_learned(4.0, -3.0, num_units=6)
    keys = jax.random.split(jax.random.key(seed), 3)
    return start._replace(
        height=jax.random.normal(keys[0], (6,)),
        sharpness=5 + 3 * jax.random.normal(keys[1], (6,)),
        place=jax.random.uniform(keys[2], (6,)),
    )


def test_learned_one_starts_near_a_line_and_keeps_its_ends():
    start = continuous.learned(continuous.init_learned())
    assert abs(start.at(TIMES).high - SCHEDULES["linear"].at(TIMES).high).max() < 1.0
    for seed in range(3):
        schedule = continuous.learned(some_parameters(seed))
        close(schedule.at(jnp.array([0.0, 1.0])).high, [4, -3], atol=1e-5)
        assert (np.diff(schedule.at(TIMES).high) < 0).all()
        assert abs(schedule.at(0.5).high - 0.5) > 0.1  # not a line


VARIANCE = 0.3


def gaussian_loss(gain, log_snr, slope):
    """The continuous bound's integrand, nats, in closed form over x_t, of data N(0, VARIANCE).

    For x_0_hat = gain times the best one: |x_0 - x_0_hat|^2 is v(1 - share) + (1 - gain)^2 v share.
    """
    snr = jnp.exp(log_snr)
    share = snr * VARIANCE / (snr * VARIANCE + 1)
    return -slope / 2 * snr * VARIANCE * (1 - share + (1 - gain) ** 2 * share)


def test_learned_gradients():
    """Of the ends: of the integral, in which the shape has no say. Of that: of the variance."""
    parameters, n = some_parameters(), 4000
    t = (jnp.arange(n) + 0.5) / n

    @jax.jit
    def found(gain, parameters):
        return continuous.learned_gradients(gaussian_loss, gain, parameters, t)

    gradients = found(jnp.float32(1.0), parameters)
    # 1/2 log(1 + v SNR), between the ends.
    end = 0.5 * np.log1p(VARIANCE * np.exp([4.0, -3.0]))
    close(gradients.losses.mean(), end[0] - end[1], rtol=1e-4)
    share = VARIANCE / (VARIANCE + np.exp([-4.0, 3.0])) / 2
    close(gradients.schedule.log_snr_0, share[0], rtol=1e-3)
    close(gradients.schedule.log_snr_1, -share[1], rtol=1e-3)
    close(gradients.network, 0, atol=1e-6)
    assert found(jnp.float32(0.5), parameters).network < -0.01

    def squares(parameters):
        schedule = continuous.learned(parameters)
        return jnp.mean(gaussian_loss(1.0, schedule.log_snr(t), schedule.slope(t)) ** 2)

    direct = jax.jit(jax.grad(squares))(parameters)
    for name in ("height", "sharpness", "place"):
        close(getattr(gradients.schedule, name), getattr(direct, name), rtol=1e-3, atol=1e-5)


def test_descending_the_gradients_lowers_the_variance_and_keeps_the_mean():
    parameters, n = some_parameters(), 512
    t = (jnp.arange(n) + 0.5) / n

    @jax.jit
    def descend(parameters, _):
        g = continuous.learned_gradients(gaussian_loss, jnp.float32(1.0), parameters, t)
        still = {"log_snr_0": jnp.zeros(()), "log_snr_1": jnp.zeros(())}
        step = g.schedule._replace(**still)
        return jax.tree.map(lambda p, g: p - 0.5 * g, parameters, step), g.losses

    _, losses = jax.lax.scan(descend, parameters, length=300)
    close(losses[-1].mean(), losses[0].mean(), rtol=2e-3)
    assert losses[-1].var() < 0.2 * losses[0].var()
