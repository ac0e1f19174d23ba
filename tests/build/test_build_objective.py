"""Config -> objective: each name is the function it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import (
    denoiser,
    fixed_large,
    fixed_small,
    likelihood,
    loss_weights,
    losses,
    predictions,
    schedules,
    timesteps,
    variances,
)
from ddpm.build.checks import CHOICES
from ddpm.build.experiment import build
from ddpm.build.network import check_model
from ddpm.build.objective import EMAS, ema_rate, weight_at_end
from ddpm.build.objective import objective as build_objective
from ddpm.build.parts import CLOSELY_SPACED
from ddpm.build.schedule import SCHEDULES, noise_schedule
from ddpm.build.variance import reverse_variance
from ddpm.config import default
from ddpm.modes.start import MUCH_WEIGHT

T = 20
X_0, EPS = np.float32(np.random.default_rng(0).normal(size=(2, 5, 4)).clip(-1, 1))
TIMES = jnp.array([1, 2, 8, 19, 20])
SCHEDULE = schedules.cosine(T)


def configured(**values):
    config = default()
    config.diffusion.update(num_steps=T, schedule="cosine")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in values.items()})
    return config


def objective_of(**values):
    config = configured(**values)
    return build_objective(config, noise_schedule(config))


def single(x_t, t):
    return 0.3 * x_t + 0.01 * t[:, None]


def double(x_t, t):
    return jnp.concatenate([single(x_t, t), jnp.tanh(x_t)], axis=-1)


def loss_of(network, **values):
    objective = objective_of(**values)
    return objective.loss_at(objective.denoiser(network), X_0, TIMES, EPS)


def plainly(reading, criterion):
    return losses.regression(
        SCHEDULE, denoiser(SCHEDULE, single, reading), X_0, TIMES, EPS, criterion
    )


@pytest.mark.parametrize("name", ["eps", "x_0", "v", "score", "posterior_mean"])
def test_unweighted_loss_is_of_what_is_predicted(name):
    """The paper's Table 2: the plain squared error of mu-tilde, or of eps."""
    reading = getattr(predictions, f"from_{name}")
    expected = plainly(reading, losses.distance(getattr(losses, f"of_{name}")))
    found = loss_of(single, diffusion__prediction=name)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if name != "score":  # by the definition: the output against the truth
        x_t = SCHEDULE.at(TIMES).alpha[:, None] * X_0 + SCHEDULE.at(TIMES).sigma[:, None] * EPS
        truth = predictions.Prediction(X_0, EPS)
        target = {
            "eps": EPS,
            "x_0": X_0,
            "v": predictions.to_v(SCHEDULE, TIMES, truth),
            "posterior_mean": predictions.to_posterior_mean(SCHEDULE, x_t, TIMES, truth),
        }[name]
        direct = ((target - single(x_t, TIMES)) ** 2).mean(axis=1)
        np.testing.assert_allclose(found, direct, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "of"), [("l1", jnp.abs), ("huber", losses.huber(0.3)), ("mse", jnp.square)]
)
def test_distances(loss, of):
    found = loss_of(
        single, diffusion__prediction="v", training__loss=loss, training__huber_delta=0.3
    )
    expected = plainly(predictions.from_v, losses.distance(losses.of_v, of))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


WEIGHTS = {
    "simple": loss_weights.simple,
    "x_0": loss_weights.x_0,
    "v": loss_weights.v,
    "min_snr": loss_weights.min_snr(3.0),
    "truncated_snr": loss_weights.truncated_snr,
    "p2": loss_weights.p2(),
    "edm": loss_weights.edm(0.5),
    "sigmoid": loss_weights.sigmoid(-1.0),
    "likelihood": loss_weights.simple,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name):
    found = loss_of(
        single,
        diffusion__prediction="v",
        training__loss_weight=name,
        training__min_snr_gamma=3.0,
        training__sigmoid_bias=-1.0,
    )
    over = name in ("sigmoid", "likelihood")
    criterion = losses.weighted(WEIGHTS[name], over_log_snr=over)
    np.testing.assert_allclose(found, plainly(predictions.from_v, criterion), rtol=1e-6)
    assert {"none", *WEIGHTS} == set(CHOICES["training.loss_weight"])


def test_bounds_and_hybrid():
    exact = denoiser(SCHEDULE, single)
    small = loss_of(single, training__loss="bound", diffusion__variance="fixed_small")
    expected = losses.bound(SCHEDULE, exact, X_0, TIMES, EPS, variance=fixed_small)
    np.testing.assert_allclose(small, expected, rtol=1e-6)
    # What samples are drawn by may change on the way; what is trained may not.
    assert not np.allclose(small, loss_of(single, training__loss="bound"), rtol=1e-3)
    sampled = loss_of(single, training__loss="bound", sampling__variance="fixed_small")
    np.testing.assert_allclose(sampled, loss_of(single, training__loss="bound"))
    limit = loss_of(single, training__loss="continuous_bound")
    np.testing.assert_allclose(limit, losses.continuous_bound(SCHEDULE, exact, X_0, TIMES, EPS))
    for name, reading in (
        ("learned", variances.learned_diagonal),
        ("learned_range", variances.learned_range),
    ):
        learns = denoiser(SCHEDULE, double, predictions.from_v, learned=reading)
        options = {"diffusion__variance": name, "diffusion__prediction": "v"}
        found = loss_of(double, training__loss="bound", **options)
        np.testing.assert_allclose(found, losses.bound(SCHEDULE, learns, X_0, TIMES, EPS))
        found = loss_of(double, training__loss="hybrid", **options)
        of_v = losses.distance(losses.of_v)
        expected = losses.hybrid(SCHEDULE, learns, X_0, TIMES, EPS, of_v)
        np.testing.assert_allclose(found, expected)
        assert (
            build(configured(training__loss="hybrid", **options), (16, 16, 3)).model.out_channels
            == 6
        )


@pytest.mark.parametrize("name", ["simple", "x_0", "v", "min_snr", "truncated_snr", "p2", "edm"])
def test_weight_at_end(name):
    """The weight on each output at t = T, over the median, is reported only if vast."""
    made = {"min_snr": loss_weights.min_snr(), "p2": loss_weights.p2(), "edm": loss_weights.edm()}
    weight = made.get(name) or getattr(loss_weights, name)
    on_x_0 = lambda weight, log_snr: weight(log_snr)  # noqa: E731
    for prediction, on in (("eps", loss_weights.on_eps), ("x_0", on_x_0), ("v", loss_weights.on_v)):
        values = on(weight, SCHEDULE.log_snr[1:])
        config = configured(diffusion__prediction=prediction, training__loss_weight=name)
        found = weight_at_end(config, SCHEDULE)
        np.testing.assert_allclose(found, values[-1] / np.median(values), rtol=1e-4)
        vast = prediction == "eps" and name in ("x_0", "v", "truncated_snr", "edm")
        assert (found > MUCH_WEIGHT) == vast


def test_schedules_of_close_levels_are_those_whose_second_level_is_near_the_first():
    for name in sorted(set(CHOICES["diffusion.schedule"]) - {"betas"}):
        schedule = noise_schedule(configured(diffusion__schedule=name, diffusion__num_steps=1000))
        first, second = np.asarray(schedule.at(jnp.array([1, 2])).high, np.float64)
        near = -np.expm1(second - first) < 0.45  # beta-tilde_2 in parts of sigma_1^2/alpha_1^2
        assert near == (CLOSELY_SPACED in SCHEDULES[name].facts), name


def test_decoder_of_schedules_with_close_levels():
    """Of continuous ones it is wide, in the bound that is trained as in that of the samples."""
    options = {"diffusion__schedule": "linear_log_snr"}
    first = jnp.ones((), int)
    for name, fixed in (("fixed_large", fixed_large), ("fixed_small", fixed_small)):
        built = build(configured(**options, sampling__variance=name), (16, 16, 3))
        found = built.variance(built.schedule, first)
        np.testing.assert_allclose(found, -built.config.diffusion.log_snr_0, rtol=1e-6)
        found, expected = (f(built.schedule, first + 1) for f in (built.variance, fixed))
        np.testing.assert_allclose(found, expected)
    wide = variances.wide_decoder(fixed_small)
    exact = denoiser(built.schedule, single)
    expected = losses.bound(built.schedule, exact, X_0, TIMES, EPS, variance=wide)
    options |= {"training__loss": "bound", "diffusion__variance": "fixed_small"}
    np.testing.assert_allclose(loss_of(single, **options), expected, rtol=1e-5)
    plain = build(configured(), (16, 16, 3))
    found, expected = (f(plain.schedule, first) for f in (plain.variance, fixed_large))
    np.testing.assert_array_equal(found, expected)


def test_preconditioned_network_is_trained_by_its_own_error():
    found = loss_of(single, diffusion__prediction="edm", diffusion__schedule="edm")
    schedule = noise_schedule(configured(diffusion__schedule="edm"))
    denoise = predictions.preconditioned(schedule, single)
    criterion = losses.weighted(loss_weights.edm())
    expected = losses.regression(schedule, denoise, X_0, TIMES, EPS, criterion)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        *((name, "mse") for name in CHOICES["training.times"]),
        ("uniform", "continuous_bound"),
        ("low_discrepancy", "continuous_bound"),
    ],
)
def test_times(name, loss):
    objective = objective_of(training__times=name, training__loss=loss)
    n, key = 400, jax.random.key(1)
    t, factor = objective.draw(objective.history, key, n)
    assert t.shape == (n,)
    assert ((t >= 1) & (t <= T)).all()
    fractional = loss == "continuous_bound" or name == "log_normal"
    assert jnp.issubdtype(t.dtype, jnp.floating if fractional else jnp.integer)
    assert (factor is not None) == (name == "importance")
    assert isinstance(objective.history, timesteps.LossHistory) == (name == "importance")
    assert len(np.unique(np.ceil(t))) > 15


def test_averages():
    rates = {name: ema_rate(configured(training__ema=name)) for name in EMAS}
    assert {*rates} == set(CHOICES["training.ema"])
    at = {name: float(rate(jnp.int32(1000))) for name, rate in rates.items()}
    assert at["constant"] == 1 - 0.9999
    np.testing.assert_allclose(at["warm_up"], 9 / 1010, rtol=1e-5)
    np.testing.assert_allclose(at["half_life"], 1 - 0.5 ** (128 / 6400), rtol=1e-5)
    np.testing.assert_allclose(at["power"], 1 - (1 - 1e-3) ** 17.97, rtol=1e-3)  # gamma = 16.97


def test_evaluation_and_samples_use_the_learned_variance():
    """All the way from the network's channels, through clipping, to the bound's terms."""
    config = configured(training__loss="hybrid", diffusion__variance="learned_range")
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1,
                        attention_resolutions=(), dropout=0.0)  # fmt: skip
    built = build(config, (4, 4, 1))
    shapes = check_model(built.model, built.image_shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), shapes)
    x_0, t = rng.integers(0, 256, (2, 4, 4, 1)) / np.float32(127.5) - 1, jnp.array([5, 20])

    @jax.jit
    def both(params):
        said = built.denoiser(params)(x_0, t)
        raw = built.model.apply({"params": params}, x_0, t)[..., 1:]
        terms = [
            likelihood.step_kl(built.schedule, x_0, t, p)
            for p in (said, said._replace(variance_fraction=None))
        ]
        return said, raw, terms

    said, raw, (learned, fixed) = both(params)
    np.testing.assert_allclose(said.variance_fraction, (raw + 1) / 2, rtol=1e-5, atol=1e-6)
    assert abs(said.x_0).max() <= 1
    assert (abs(learned / fixed - 1) > 1e-3).all()
    assert built.variance.__name__ == "learned_range"
    assert reverse_variance(configured(), None).__name__ == "fixed_large"
