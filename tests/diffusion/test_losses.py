"""L_simple where its expected value is known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import Prediction, loss_weights, losses, schedules
from tests.exact import NAMES, close, gaussian_denoiser, pair

MEAN, VARIANCE = 0.4, 0.25


def quadrature():
    """Nodes (z, eps), weights: exact means over two standard normals, for low polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(6)
    z, eps = (x.ravel() for x in np.meshgrid(nodes, nodes))
    return np.float32(z), np.float32(eps), np.outer(weights, weights).ravel() / (2 * np.pi)


def expected_loss(schedule, denoiser, num_steps):
    """At every t, by quadrature over x_0 ~ N(MEAN, VARIANCE) and eps: float32[T]."""
    z, eps, weights = quadrature()
    x_0 = MEAN + VARIANCE**0.5 * z
    t = np.repeat(np.arange(1, num_steps + 1), len(z))
    tiled = lambda x: np.tile(np.float32(x), num_steps)[:, None]  # noqa: E731
    loss = losses.simple(schedule, denoiser, tiled(x_0), t, tiled(eps))
    return loss.reshape(num_steps, -1) @ jnp.float32(weights)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 3)])
def test_without_a_prediction_it_is_the_noise_squared(shape):
    nothing = lambda x, t: Prediction(x, jnp.zeros_like(x))  # noqa: E731
    x_0, eps = np.float32(np.random.default_rng(18).normal(size=(2, *shape)))
    found = losses.simple(schedules.linear(10), nothing, x_0, jnp.array([1, 2, 9, 10]), eps)
    assert found.shape == (4,)
    close(found, (np.float64(eps) ** 2).reshape(4, -1).mean(-1), rtol=1e-5)


def test_with_the_noise_itself_it_is_zero():
    x_0, eps = np.float32(np.random.default_rng(18).normal(size=(2, 4, 3)))
    knows = lambda x, t: Prediction(x, jnp.asarray(eps))  # noqa: E731
    found = losses.simple(schedules.linear(10), knows, x_0, jnp.array([1, 2, 9, 10]), eps)
    assert (found == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_exact_denoiser_leaves_the_variance_of_eps_given_x_t(name):
    schedule, exact = pair(name, 100)
    found = expected_loss(schedule, gaussian_denoiser(exact, MEAN, VARIANCE), 100)
    signal = exact.alpha_bar[1:] * VARIANCE
    close(found, signal / (signal + exact.variance[1:]), rtol=1e-4, atol=1e-6)


def test_exact_denoiser_is_where_the_gradient_vanishes():
    """Among the affine functions of x_t, one for every t, and their Hessian is positive."""
    num_steps = 50
    schedule, exact = pair("linear", num_steps)
    best = gaussian_denoiser(exact, MEAN, VARIANCE)

    def total(change):
        def denoiser(x_t, t):
            slope, intercept = change[:, t - 1]
            prediction = best(x_t, t)
            return prediction._replace(
                eps=prediction.eps + slope[:, None] * x_t + intercept[:, None]
            )

        return expected_loss(schedule, denoiser, num_steps).sum()

    none = jnp.zeros((2, num_steps))
    close(jax.grad(total)(none), 0, atol=3e-6)
    for _ in range(3):
        change = jax.random.normal(jax.random.key(0), none.shape) * 0.1
        assert total(change) > total(none)


def test_prediction_of_another_shape_is_refused():
    x_0 = jnp.zeros((4, 2, 2, 3))
    t = jnp.array([1, 2, 3, 4])
    for shape in [(4, 2, 2, 1), (1, 2, 2, 3), (4, 2, 2, 6)]:
        wrong = Prediction(jnp.zeros(shape), jnp.zeros(shape))
        with pytest.raises(ValueError, match="shapes must be equal"):
            losses.simple(schedules.linear(10), lambda x, t: wrong, x_0, t, x_0)  # noqa: B023


def test_one_time_for_each_example():
    x_0 = jnp.zeros((4, 3))
    same = lambda x, t: Prediction(x, x)  # noqa: E731
    with pytest.raises(ValueError, match="one per example"):
        losses.simple(schedules.linear(10), same, x_0, jnp.array([1, 2]), x_0)


def test_no_clipping_or_rounding_of_the_data():
    """Far outside [-1, 1] the loss is that of the formula."""
    schedule, exact = pair("linear", 10)
    x_0, eps = jnp.full((1, 1), 50.0), jnp.full((1, 1), 0.5)
    copy = lambda x, t: Prediction(x, x)  # noqa: E731
    x_t = exact.alpha[7] * 50 + exact.sigma[7] * 0.5
    close(losses.simple(schedule, copy, x_0, jnp.array([7]), eps), (0.5 - x_t) ** 2, rtol=1e-5)


def test_one_time_for_all():
    schedule, process = pair("linear", 50)
    x_0, eps = jax.random.normal(jax.random.key(0), (2, 3, 4))
    exact = gaussian_denoiser(process)
    close(
        losses.simple(schedule, exact, x_0, 7, eps),
        losses.simple(schedule, exact, x_0, jnp.full(3, 7), eps),
    )


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (schedules.zero_terminal_snr(schedules.linear(5)), "leaves no signal at t = T = 5"),
        (schedules.linear(1), "has one noise level, 1"),
    ],
)
def test_integrals_over_log_snr_have_ends(schedule, said):
    """The command refuses the same: a loss of infinity, or of 0 whatever the network says."""
    x, t = jnp.ones((2, 3)), np.ones(2, np.int32)
    denoise = lambda x_t, t: Prediction(0 * x_t, x_t)  # noqa: E731
    with pytest.raises(ValueError, match=said):
        losses.continuous_bound(schedule, denoise, x, t, x)
    criterion = losses.weighted(loss_weights.simple, over_log_snr=True)
    with pytest.raises(ValueError, match=said):
        losses.regression(schedule, denoise, x, t, x, criterion)
