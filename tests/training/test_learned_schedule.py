"""The train step of a learned schedule against finite differences of the bound in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special, stats

from ddpm.build import experiment
from ddpm.build.objective import objective as objective_of
from ddpm.build.schedule import noise_schedule
from ddpm.config import default
from ddpm.diffusion import continuous
from ddpm.errors import InputError
from ddpm.training import ema
from ddpm.training.objectives import LEARNED_SCHEDULE
from ddpm.training.optimizer import adam
from ddpm.training.state import NUM_BUCKETS, Metrics, init
from ddpm.training.step import make_train_step
from tests.exact import close

IMAGE, BATCH, STEP, T = (4, 4, 1), 24, 3, 20
IMAGES = np.random.default_rng(0).choice([0, 3, 100, 200, 255], (BATCH, *IMAGE)).astype(np.uint8)
WEIGHTS = np.array([0.3, 0.5, -0.2])
SHAPE = ("height", "sharpness", "place")
ENDS = ("log_snr_0", "log_snr_1")


def network(xp, w, x, t):
    """Any function of its inputs."""
    return w[0] * x + w[1] * xp.tanh(x) * xp.sin(t / 300)[:, None, None, None] + w[2]


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, t, *, train=False):
        return network(jnp, self.param("w", nn.initializers.zeros, (3,)), x, t)


def configured(**changes):
    config = default()
    config.diffusion.update(schedule="learned", num_steps=T, log_snr_0=4.0, log_snr_1=-3.0)
    config.model.update(noise_input="log_snr", channels=8, num_groups=4, num_res_blocks=1,
                        channel_multipliers=(1,), attention_resolutions=())  # fmt: skip
    config.training.loss = "continuous_bound"
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def step_of(config, optimizer, **options):
    """The compiled step and the state to begin with, at weights that are not zero."""
    schedule = noise_schedule(config)
    aim, model = options.pop("objective", None) or objective_of(config, schedule), Network()
    start = init(model, optimizer, IMAGE, 0, aim,
                 other_averages=len(options.get("other_ema_rates", ())))  # fmt: skip
    step = jax.jit(make_train_step(
        model, aim, optimizer, **({"ema_decay": 0.9, "seed": 0} | options)
    ))  # fmt: skip
    params = start.params | {"w": jnp.asarray(WEIGHTS, jnp.float32)}
    return step, start._replace(params=params)


def some_shape():
    rng = np.random.default_rng(1)
    return {
        "log_snr_0": np.array(4.0),
        "log_snr_1": np.array(-3.0),
        "height": rng.normal(size=5),
        "sharpness": rng.normal(5, 2, 5),
        "place": rng.uniform(size=5),
    }


# --- The bound in NumPy, by its formulas


def levels(p, t):
    """log-SNR and its derivative."""
    height, sharpness = np.logaddexp(p["height"], 0), np.logaddexp(p["sharpness"], 0)

    def rise(t):
        units = special.expit(sharpness * (t[:, None] - p["place"]))
        return t + units @ height, 1 + (units * (1 - units)) @ (height * sharpness)

    (start, end), _ = rise(np.array([0.0, 1.0]))
    value, slope = rise(t)
    span = (p["log_snr_1"] - p["log_snr_0"]) / (end - start)
    return p["log_snr_0"] + span * (value - start), span * slope


def steps_losses(prediction, p, w, x_0, t, eps):
    """Of each example the diffusion loss at its time, bits/dim."""
    log_snr, slope = levels(p, t)
    alpha, sigma = (np.sqrt(special.expit(sign * log_snr))[:, None, None, None] for sign in (1, -1))
    x_t, time = alpha * x_0 + sigma * eps, 25 * (20 - log_snr)
    if prediction == "eps":
        found = network(np, w, x_t, time)
    elif prediction == "v":
        found = sigma * x_t + alpha * network(np, w, x_t, time)
    else:  # Karras et al. (2022), Table 1
        noise, data = sigma / alpha, 0.5
        total = np.sqrt(noise**2 + data**2)
        output = network(np, w, x_t / alpha / total, np.log(sigma / alpha).ravel() / 4)
        denoised = data**2 / total**2 * x_t / alpha + noise * data / total * output
        found = (x_t - alpha * denoised) / sigma
    return -slope / 2 * ((eps - found) ** 2).mean(axis=(1, 2, 3)) / np.log(2)


def ends_losses(p, x_0, eps):
    """L_T + L_0 of each example, bits/dim."""
    alpha, sigma = (special.expit(sign * p["log_snr_1"]) ** 0.5 for sign in (1, -1))
    prior = (alpha**2 * x_0**2 + sigma**2 - 1) / 2 - np.log(sigma)
    spread = np.exp(-p["log_snr_0"] / 2)
    decoder = stats.norm(x_0 + spread * eps, spread)
    low = np.where(x_0 < -0.999, -np.inf, x_0 - 1 / 255)
    high = np.where(x_0 > 0.999, np.inf, x_0 + 1 / 255)
    decoded = np.log(decoder.cdf(high) - decoder.cdf(low))
    return (prior - decoded).mean(axis=(1, 2, 3)) / np.log(2)


def difference(function, x, h=1e-5):
    """Central, by each element of x."""
    x = np.asarray(x, np.float64)
    found = np.zeros(x.size)
    for i in range(x.size):
        moved = [x.flatten(), x.flatten()]
        moved[0][i] += h
        moved[1][i] -= h
        found[i] = np.subtract(*(function(m.reshape(x.shape)) for m in moved)) / (2 * h)
    return found.reshape(x.shape)


@pytest.mark.parametrize(
    ("prediction", "noise_input", "times"),
    [("eps", "log_snr", "uniform"), ("v", "log_snr", "low_discrepancy"), ("edm", "t", "uniform")],
)
def test_each_parameter_descends_what_it_should(prediction, noise_input, times):
    """The network and the end points the whole bound, the shape the mean of the squared loss."""
    config = configured(diffusion__prediction=prediction, model__noise_input=noise_input,
                        training__times=times)  # fmt: skip
    step, state = step_of(config, optax.trace(decay=0.0))  # whose state is the gradient
    p, w = some_shape(), WEIGHTS
    learned = {LEARNED_SCHEDULE: {k: jnp.asarray(v, jnp.float32) for k, v in p.items()}}
    params = state.params | learned
    state = state._replace(params=params, ema_params=params, step=jnp.int32(STEP))
    state = state._replace(opt_state=optax.trace(decay=0.0).init(params))
    new, metrics = step(state, Metrics.zero(), IMAGES)
    gradient = new.opt_state.trace

    def key(stream):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(0), stream), STEP)

    u = jax.random.uniform(key(1), (BATCH,) if times == "uniform" else ())
    even = np.arange(BATCH) / BATCH if times == "low_discrepancy" else 0
    t = (np.asarray(u, np.float64) + even) % 1
    eps = np.asarray(jax.random.normal(key(2), IMAGES.shape), np.float64)
    x_0 = IMAGES / 127.5 - 1

    def bound(p, w):
        losses = steps_losses(prediction, p, w, x_0, t, eps) + ends_losses(p, x_0, eps)
        return losses.mean()

    losses = steps_losses(prediction, p, w, x_0, t, eps)
    close(metrics.loss, bound(p, w), rtol=1e-4)
    buckets = np.ceil(t * T).astype(int) - 1
    expected = np.bincount(buckets * NUM_BUCKETS // T, losses, minlength=NUM_BUCKETS)
    close(metrics.bucket_loss, expected, rtol=1e-3, atol=1e-5)

    close(gradient["w"], difference(lambda w: bound(p, w), w), rtol=1e-3, atol=1e-4)
    found = gradient[LEARNED_SCHEDULE]
    for name in ENDS:
        close(found[name], difference(lambda x: bound(p | {name: x}, w), p[name]),  # noqa: B023
              rtol=2e-3)  # fmt: skip

    def square(p):
        return np.mean(steps_losses(prediction, p, w, x_0, t, eps) ** 2)

    for name in SHAPE:
        expected = difference(lambda x: square(p | {name: x}), p[name])  # noqa: B023
        close(found[name], expected, rtol=2e-3, atol=1e-3 * abs(expected).max())


def test_the_step_moves_the_schedule_and_all_averages_of_it():
    rates = [ema.power(0.05), ema.power(0.2), ema.constant(0.7)]
    step, state = step_of(configured(), adam(0.05), ema_decay=rates[0], other_ema_rates=rates[1:])
    begin = state.params[LEARNED_SCHEDULE]
    assert begin["log_snr_0"] == 4
    assert begin["log_snr_1"] == -3
    averages = [jax.tree.map(np.float64, state.ema_params) for _ in rates]
    metrics = Metrics.zero()
    for number in range(1, 6):
        state, metrics = step(state, metrics, IMAGES)
        for i, rate in enumerate(rates):
            part = float(rate(jnp.int32(number)))
            averages[i] = jax.tree.map(
                lambda a, p: a + part * (np.float64(p) - a),  # noqa: B023
                averages[i], state.params,
            )  # fmt: skip
    now = state.params[LEARNED_SCHEDULE]
    for name in (*ENDS, *SHAPE):
        assert np.isfinite(now[name]).all()
        assert (np.abs(now[name] - begin[name]) > 0.01).any(), name
    for found, expected in zip((state.ema_params, *state.other_ema_params), averages, strict=True):
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-5, atol=1e-6), found, expected)
    # The widths differ, so do the averages.
    first, second, third = (a[LEARNED_SCHEDULE]["log_snr_0"] for a in averages)
    assert len({round(float(x), 4) for x in (first, second, third)}) == 3
    # What is found in them is sampled by: the table is that of the weights chosen.
    built = experiment.build(configured(), IMAGE)
    for params in (state.params, state.ema_params):
        learned = built.with_schedule(params).schedule
        assert learned.num_steps == T
        ends = [params[LEARNED_SCHEDULE][name] for name in ENDS]
        close(learned.log_snr[jnp.array([1, T])], ends, rtol=1e-6)
    assert built.with_schedule({"w": 0}) is built


def test_time_zero_counts_to_the_first_bucket():
    config = configured()
    aim = objective_of(config, noise_schedule(config))
    aim = aim._replace(draw=lambda history, key, n: (jnp.zeros(n), None))
    step, state = step_of(config, adam(0.1), objective=aim)
    _, metrics = step(state, Metrics.zero(), IMAGES)
    assert metrics.bucket_count[0] == BATCH


def test_end_points_that_crossed_are_reported_in_one_line():
    built = experiment.build(configured(), IMAGE)
    crossed = continuous.init_learned(4.0, -3.0)._replace(log_snr_0=jnp.float32(-4.0))
    with pytest.raises(InputError, match=r"cannot be used: log-SNR must fall .*learning_rate"):
        built.with_schedule({LEARNED_SCHEDULE: crossed._asdict()})


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_it_falls_from_end_to_end_whatever_the_shape(size):
    """Also by the thousand steps of a table, where it is nearly flat for most of them."""
    rng = np.random.default_rng(int(size))
    for _ in range(5):
        shape = {name: np.float32(size * rng.normal(size=64)) for name in SHAPE}
        parameters = continuous.init_learned(13.3, -5.0)._replace(**shape)
        schedule = continuous.learned(parameters)
        log_snr = schedule.log_snr(np.linspace(0, 1, 1001))
        assert log_snr.dtype == np.float64
        assert (np.diff(log_snr) < 0).all()
        close(log_snr[[0, -1]], [13.3, -5], rtol=1e-7)
        table = continuous.table(schedule, 1000)
        assert (table.beta[1:] > 0).all()
        in_float32 = schedule.at(np.linspace(0, 1, 1001)).high
        assert (np.diff(in_float32) <= 2e-6).all()
        close(in_float32[jnp.array([0, -1])], [13.3, -5], atol=1e-5)
        close(in_float32, log_snr, atol=1e-3)
