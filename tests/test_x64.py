"""JAX_ENABLE_X64=1: the library stays in float32 and int32, with the same numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from ddpm import continuous, denoiser, flow, losses, predictions, schedules
from ddpm.build import experiment
from ddpm.config import default
from ddpm.diffusion import timesteps
from ddpm.sampling import grids
from ddpm.training import augmentation, ema
from ddpm.training.state import Metrics, init
from ddpm.training.step import make_train_step
from tests import runs
from tests.exact import close

SCHEDULE = schedules.linear(20, 1e-3, 0.3)
X = np.float32([[0.1, -0.5], [0.9, 0.2], [-0.3, 0.7]])
T = np.int32([3, 20, 1])
KEY = jax.random.key(0)


def network(x, t):
    """Answers in float64, as one of NumPy's constants would make it."""
    return jnp.tanh(x) + 0.01 * jnp.asarray(t, float)[:, None]


DENOISE = denoiser(SCHEDULE, network)


def draw(sampler, times=None):
    times = grids.karras(SCHEDULE, 6) if times is None else times
    return ddpm.sample_chain(KEY, SCHEDULE, DENOISE, X.shape, sampler=sampler, times=times)


def moments():
    return ddpm.second_moments(SCHEDULE, DENOISE, X, KEY)


def learned():
    parameters = continuous.init_learned()
    loss = lambda n, log_snr, slope: n * log_snr * slope  # noqa: E731
    return continuous.learned_gradients(loss, jnp.float32(2), parameters, jnp.float32([0.3, 0.4]))


CALLS = {
    "ancestral": lambda: draw(ddpm.ancestral(), grids.uniform(SCHEDULE, 20)),
    "analytic": lambda: draw(ddpm.ancestral(ddpm.analytic(moments()))),
    "ddim": lambda: draw(ddpm.ddim(0.5)),
    "dpm_solver": lambda: draw(ddpm.dpm_solver(3)),
    "stochastic": lambda: draw(ddpm.dpm_solver(2, stochastic=True)),
    "unipc": lambda: draw(ddpm.unipc(3)),
    "euler": lambda: draw(ddpm.euler()),
    "heun": lambda: draw(ddpm.heun()),
    "churn": lambda: draw(ddpm.heun(churn=5.0), grids.uniform(SCHEDULE, 6)),
    "probability_flow": lambda: draw(ddpm.probability_flow(), [20, 0]),
    "langevin": lambda: draw(ddpm.annealed_langevin()),
    "corrected": lambda: draw(ddpm.predictor_corrector(ddpm.heun())),
    "guided": lambda: ddpm.classifier_free(
        SCHEDULE, DENOISE, DENOISE, 2.0, interval=(0.1, 3.0), rescale=0.5
    )(X, T),
    "classifier": lambda: ddpm.classifier_guided(SCHEDULE, DENOISE, lambda x, t: -x.sum(1), 2.0)(
        X, T
    ),
    "thresholded": lambda: ddpm.thresholded(SCHEDULE, DENOISE)(X, T),
    "edm": lambda: predictions.preconditioned(SCHEDULE, lambda x, t: x)(X, T),
    "vary": lambda: ddpm.editing.vary(KEY, SCHEDULE, DENOISE, X, 10),
    "interpolate": lambda: ddpm.editing.interpolate(KEY, SCHEDULE, DENOISE, X, -X, [0.2, 1], 10),
    "share": lambda: ddpm.editing.share(KEY, SCHEDULE, DENOISE, X.shape, 10),
    "inpaint": lambda: ddpm.editing.inpaint(KEY, SCHEDULE, DENOISE, X, X > 0, resamplings=2),
    "invert": lambda: ddpm.editing.invert(SCHEDULE, DENOISE, X, times=[20, 5, 0]),
    "transport": lambda: flow.transport(SCHEDULE, DENOISE, X, 1, 20),
    "dequantised": lambda: flow.dequantised_bits_per_dim(SCHEDULE, DENOISE, X, KEY),
    "decoded": lambda: flow.decoded_bits_per_dim(SCHEDULE, DENOISE, X, KEY, exact_trace=True),
    "bound": lambda: ddpm.likelihood.bits_per_dim(SCHEDULE, DENOISE, X, KEY),
    "sampled_bound": lambda: ddpm.likelihood.sampled_bits_per_dim(
        SCHEDULE, DENOISE, X, KEY, num_times=3
    ),
    "simple": lambda: losses.simple(SCHEDULE, DENOISE, X, T, X),
    "bound_loss": lambda: losses.bound(SCHEDULE, DENOISE, X, T, X),
    "continuous_bound": lambda: losses.continuous_bound(SCHEDULE, DENOISE, X, T, X),
    "weighted": lambda: losses.regression(
        SCHEDULE, DENOISE, X, T, X, losses.weighted(ddpm.loss_weights.simple, over_log_snr=True)
    ),
    "ends_of_bound": lambda: losses.ends_of_bound(SCHEDULE, X, X),
    "beta": lambda: SCHEDULE.beta,
    "learned": learned,
    "continuous": lambda: [
        (s.at(jnp.float32(0.3)), s.slope(0.3), s.time_of(1.0), continuous.table(s, 5))
        for s in (continuous.cosine(), continuous.linear_beta(), continuous.edm())
    ],
}
# Of random numbers the type decides what is drawn, too.
DRAWS = {
    "uniform": lambda: timesteps.uniform(SCHEDULE, KEY, 9),
    "low_discrepancy": lambda: timesteps.low_discrepancy(KEY, 9),
    "logit_normal": lambda: timesteps.logit_normal(KEY, 9),
    "log_normal": lambda: timesteps.log_normal(SCHEDULE, KEY, 9),
    "importance": lambda: timesteps.draw_important(timesteps.LossHistory.empty(20), KEY, 9),
    "augmentation": lambda: augmentation.draw(KEY, 9, 0.5),
    "half_life": lambda: ema.half_life(500.0, 8)(jnp.int32(7)),
    "warm_up": lambda: ema.warm_up(0.999)(jnp.int32(7)),
    "power": lambda: ema.power(0.1)(jnp.int32(7)),
}


def types(call):
    return jax.tree.map(lambda x: x.dtype, jax.eval_shape(call))


@pytest.mark.parametrize("name", CALLS)
def test_results_are_of_the_same_types(name):
    wanted = types(CALLS[name])
    with jax.enable_x64(True):
        assert types(CALLS[name]) == wanted


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same(name):
    wanted = DRAWS[name]()
    with jax.enable_x64(True):
        found = DRAWS[name]()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        close(a, b, rtol=1e-6)


@pytest.mark.parametrize("sampler", [ddpm.heun(churn=5.0), ddpm.dpm_solver(2, stochastic=True)])
def test_samples_are_the_same(sampler):
    times = grids.uniform(SCHEDULE, 6)
    wanted = jax.jit(lambda: draw(sampler, times).x_0)()
    with jax.enable_x64(True):
        close(jax.jit(lambda: draw(sampler, times).x_0)(), wanted, atol=1e-4)


def test_commands_sample_and_evaluate(own_run):
    overrides = {
        "evaluation__parts": "('flow',)",
        "evaluation__num_samples": 10,
        "evaluation__flow_images": 2,
        "evaluation__flow_tolerance": 1e-2,
    }
    with jax.enable_x64(True):
        for mode in ("sample", "evaluate"):
            done = runs.run(runs.command(own_run, f"--mode={mode}", **overrides))
            assert done.returncode == 0, done.stderr
    assert json.loads((own_run / "evaluation.json").read_text())
    assert next((own_run / "samples").glob("*_n5.npz"))


def test_a_training_step_keeps_the_types_of_its_state():
    """Of a network with every input, losses that are remembered, and averages of all kinds."""
    rates = ema.warm_up(0.9), ema.half_life(9.0, 2)
    config = default()
    config.model.update(channels=8, channel_multipliers=(1,), num_groups=4, num_classes=3)
    config.model.update(attention_resolutions=(), low_resolution=4)
    config.training.update(augmentation=0.1, times="importance")
    with jax.enable_x64(True):
        built = experiment.build(config, (8, 8, 1))
        state = jax.eval_shape(
            lambda: init(
                built.model, built.optimizer, (8, 8, 1), 0, built.objective, other_averages=2
            )
        )
        step = make_train_step(
            built.model,
            built.objective,
            built.optimizer,
            ema_decay=0.9,
            other_ema_rates=rates,
            seed=0,
            num_classes=3,
            label_dropout=0.1,
            prepare=built.prepare,
        )
        images, labels = np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int32)
        metrics = jax.eval_shape(Metrics.zero)
        found = jax.eval_shape(step, state, metrics, images, labels)
    types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]  # noqa: E731
    assert types(found) == types((state, metrics))
    assert np.float64 not in types(found)


def test_float64_is_kept_where_x_t_comes_in_it():
    with jax.enable_x64(True):
        x_t = np.float64(X)
        found = jax.eval_shape(
            lambda: ddpm.sample(KEY, SCHEDULE, DENOISE, X.shape, times=[20, 10, 0], x_t=x_t)
        )
    assert found.dtype == np.float64
