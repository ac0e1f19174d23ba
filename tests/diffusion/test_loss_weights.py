"""The table of weights by its formulas, and the same objective through every prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import denoiser, loss_weights, losses, predictions, schedules
from ddpm.diffusion import continuous
from tests.exact import close

# On eps, on x_0, on v: by the papers' formulas, SNR in float64.
TABLE = {
    "simple": (loss_weights.simple, lambda s: (1 + 0 * s, s, s / (s + 1))),
    "x_0": (loss_weights.x_0, lambda s: (1 / s, 1 + 0 * s, 1 / (s + 1))),
    "v": (loss_weights.v, lambda s: ((s + 1) / s, s + 1, 1 + 0 * s)),
    "min_snr": (
        loss_weights.min_snr(),
        lambda s: [np.minimum(s, 5) / d for d in (s, 1, s + 1)],
    ),
    "truncated_snr": (
        loss_weights.truncated_snr,
        lambda s: [np.maximum(s, 1) / d for d in (s, 1, s + 1)],
    ),
    "p2": (
        loss_weights.p2(0.5, 2.0),
        lambda s: [(2 + s) ** -0.5 * m for m in (1, s, s / (s + 1))],
    ),
    "sigmoid": (
        loss_weights.sigmoid(-1.5),
        lambda s: [m / (1 + np.exp(1.5) * s) for m in (1, s, s / (s + 1))],
    ),
    "edm": (
        loss_weights.edm(0.5),
        lambda s: [(1 / s + 0.25) / (0.25 / s) / d for d in (s, 1, s + 1)],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_weights_on_eps_x_0_and_v(name):
    weight, formula = TABLE[name]
    log_snr = np.linspace(-12, 12, 49)
    on_eps, on_x_0, on_v = formula(np.exp(log_snr))
    log_snr = jnp.float32(log_snr)
    close(weight(log_snr), on_x_0, rtol=1e-5)
    close(loss_weights.on_eps(weight, log_snr), on_eps, rtol=1e-5)
    close(loss_weights.on_v(weight, log_snr), on_v, rtol=1e-5)
    assert jnp.isfinite(weight(jnp.float32([-jnp.inf, 60.0]))).all()


def test_weights_of_edm_and_v_are_one_for_unit_data():
    log_snr = jnp.linspace(-8, 8, 17)
    close(loss_weights.edm(1.0)(log_snr), loss_weights.v(log_snr), rtol=1e-6)


def test_wrong_settings_are_refused():
    for make in (loss_weights.min_snr, loss_weights.edm, lambda k: loss_weights.p2(1.0, k)):
        with pytest.raises(ValueError, match="must be > 0"):
            make(0.0)


SCHEDULE = schedules.linear(1000)
T = jnp.array([1, 2, 10, 100, 400, 700, 950, 1000])
READINGS = ["eps", "x_0", "v", "score", "posterior_mean"]


def said_by(name, parameters):
    """The denoiser of one and the same affine guess of v, by a network that puts out `name`."""

    def network(x_t, t):
        v = parameters[0] * x_t + parameters[1]
        x_0, eps, *_ = guess = predictions.from_v(SCHEDULE, x_t, t, v)
        if name == "posterior_mean":
            return predictions.to_posterior_mean(SCHEDULE, x_t, t, guess)
        score = predictions.to_score(SCHEDULE, t, guess)
        return {"eps": eps, "x_0": x_0, "v": v, "score": score}[name]

    return denoiser(SCHEDULE, network, getattr(predictions, f"from_{name}"))


@pytest.mark.parametrize("name", TABLE)
def test_same_objective_and_gradients_through_every_prediction(name):
    x_0, eps = jax.random.normal(jax.random.key(0), (2, len(T), 4))
    weight, formula = TABLE[name]

    @jax.jit
    def both(parameters):
        def loss(parameters, reading):
            of = losses.weighted(weight)
            each = losses.regression(SCHEDULE, said_by(reading, parameters), x_0, T, eps, of)
            return each / loss_weights.on_v(weight, SCHEDULE.at(T).high)  # all of one size

        return {r: (loss(parameters, r), jax.jacrev(loss)(parameters, r)) for r in READINGS}

    parameters = jnp.array([0.3, -0.2])
    found = both(parameters)
    for reading in READINGS:
        for here, there in zip(found[reading], found["v"], strict=True):
            # Near the data x_0 and the mean tell eps, and far from it eps tells x_0, but badly.
            close(here, there, rtol=1e-3, atol=1e-3)
    # And it is the weight times the error, on each of the three.
    snr = np.exp(np.float64(SCHEDULE.log_snr[T]))
    on_eps, on_x_0, on_v = formula(snr)
    guess = said_by("v", parameters)
    error = lambda target: np.float64(  # noqa: E731
        losses.regression(SCHEDULE, guess, x_0, T, eps, losses.distance(target))
    )
    whole = found["v"][0] * on_v
    close(on_v * error(losses.of_v), whole, rtol=1e-5)
    close(on_eps * error(losses.of_eps), whole, rtol=1e-3)
    close(on_x_0 * error(losses.of_x_0), whole, rtol=1e-3)


VARIANCE = 0.3


@pytest.mark.parametrize(
    "weight", [loss_weights.simple, loss_weights.sigmoid(1.0), loss_weights.min_snr()]
)
def test_over_log_snr_the_schedule_has_no_say(weight):
    """The integral of the weight over log-SNR, of Gaussian data: all by quadrature."""
    n, ends = 2000, (6.0, -6.0)
    grid = np.linspace(*ends, 20_001)
    left = VARIANCE / (1 + np.exp(grid) * VARIANCE)  # of x_0, given x_t
    expected = -np.trapezoid(np.asarray(weight(jnp.float32(grid)), np.float64) * left, grid)
    t = jnp.float32((np.arange(n) + 0.5) / n)
    smooth, table = continuous.cosine(*ends), continuous.table(continuous.linear(*ends), 40)
    whole = jnp.tile(jnp.arange(1, 41), n // 40)  # the trapezoidal rule, of 40 places
    for schedule, times, rtol in (
        (smooth, t, 1e-3),
        (continuous.linear(*ends), t, 1e-3),
        (table, 1 + 39 * t, 1e-3),
        (table, whole, 4e-3),
    ):
        error = jnp.sqrt(VARIANCE / (1 + jnp.exp(schedule.at(times).high) * VARIANCE))[:, None]
        knows = lambda x_t, t: predictions.from_x_0(schedule, x_t, t, error)  # noqa: B023, E731
        zero = jnp.zeros((n, 1))
        found = losses.regression(
            schedule, knows, zero, times, zero, losses.weighted(weight, over_log_snr=True)
        )
        close(found.mean(), expected, rtol=rtol)


def test_half_of_l_simple_over_log_snr_is_the_continuous_bound():
    x_0, eps = jax.random.normal(jax.random.key(1), (2, 5, 3))
    t = jnp.float32([1, 1.5, 30, 700.25, 1000])
    guess = said_by("v", jnp.array([0.1, 0.2]))
    likelihood = losses.weighted(loss_weights.simple, over_log_snr=True)
    nats = losses.regression(SCHEDULE, guess, x_0, t, eps, likelihood) / 2
    close(losses.continuous_bound(SCHEDULE, guess, x_0, t, eps) * np.log(2), nats, rtol=1e-3)


@pytest.mark.parametrize("weight", [loss_weights.min_snr(), loss_weights.simple, loss_weights.p2()])
def test_a_weight_that_vanishes_is_of_no_error_however_large(weight):
    """eps tells x_0 by 1/alpha_T, which is 1e20 here: its square is beyond float32."""
    schedule = schedules.constant(1000, 0.09)
    x_0, t = jnp.ones((2, 3)), jnp.full(2, 1000)

    def loss(eps):
        denoise = denoiser(schedule, lambda x_t, t: eps)
        criterion = losses.weighted(weight)
        return losses.regression(schedule, denoise, x_0, t, jnp.zeros_like(x_0), criterion).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.ones_like(x_0))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
