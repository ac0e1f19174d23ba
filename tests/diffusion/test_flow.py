"""Likelihood by the probability-flow ODE, against the true densities of closed-form denoisers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp

from ddpm import DiT, Prediction, denoiser, fixed_small, flow, sample_keys, schedules
from tests.exact import close, gaussian_denoiser, levels, mixture_denoiser, pair

LN2 = np.log(2)
MEAN, STD = 0.1, 0.3
WEIGHTS, MEANS, SPREAD = [0.2, 0.5, 0.3], [[-0.7, 0.2], [0.1, -0.4], [0.8, 0.6]], 0.02


def pixels(n, dimensions=2):
    x = np.random.default_rng(0).normal(MEAN, STD, (n, dimensions))
    return np.float32(np.round((x + 1) * 127.5).clip(1, 254) / 127.5 - 1)


def density(schedule, denoise, x_1, key=None, **options):
    return jax.jit(lambda x, key: flow.log_density(schedule, denoise, x, key, **options))(x_1, key)


def log_mixture(x, alpha, variance):
    """At the noise level of alpha, in nats."""
    scale = np.sqrt(alpha**2 * SPREAD + variance)
    parts = [stats.norm.logpdf(x, alpha * np.array(m), scale).sum(-1) for m in MEANS]
    return logsumexp(np.stack(parts), axis=0, b=np.reshape(WEIGHTS, (3, 1)))


@jax.jit
def gaussian_density(schedule, exact_levels, x_1):
    """Compiled once for all schedules of a length."""
    return flow.log_density(schedule, gaussian_denoiser(exact_levels, MEAN, STD**2), x_1)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("num_steps", [50, 1000])
def test_density_of_gaussian_data(name, num_steps):
    """The flow stretches a Gaussian onto another, up to T, where N(0, I) is taken for it."""
    schedule, exact = pair(name, num_steps)
    mean, std = exact.alpha * MEAN, np.sqrt(exact.alpha_bar * STD**2 + exact.variance)
    x_1 = np.float32(np.random.default_rng(1).normal(mean[1], 2 * std[1], (20, 3)))
    found = gaussian_density(schedule, levels(exact), x_1)
    x_last = mean[-1] + std[-1] / std[1] * (np.float64(x_1) - mean[1])
    expected = (stats.norm.logpdf(x_last) + np.log(std[-1] / std[1])).sum(-1)
    close(found.x_last, x_last, rtol=0, atol=2e-4)
    close(found.log_density / LN2, expected / LN2, rtol=0, atol=1.5e-3)


@pytest.mark.parametrize("estimated", [False, True])
def test_density_of_a_mixture(estimated):
    """Where the trace depends on x; Hutchinson's estimate is right in the mean."""
    n = 2000 if estimated else 50
    schedule, exact = pair("linear", 1000)
    denoise = mixture_denoiser(exact, WEIGHTS, MEANS, SPREAD)
    rng = np.random.default_rng(2)
    centres = np.array(MEANS)[rng.choice(3, n, p=WEIGHTS)]
    x_1 = np.float32(rng.normal(centres, np.sqrt(1.5 * SPREAD)))
    found = density(schedule, denoise, x_1, jax.random.key(0) if estimated else None)
    expected = log_mixture(np.float64(x_1), exact.alpha[1], exact.variance[1])
    difference = (np.float64(found.log_density) - expected) / 2 / LN2
    if estimated:
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)
        assert difference.std() / np.sqrt(n) < 0.05
    else:
        assert np.abs(difference).max() < 2e-3
        assert abs(difference.mean()) < 1e-3


def true_bits(x):
    """Of 8-bit data that are N(MEAN, STD^2) cut into bins."""
    edges = [stats.norm.cdf(np.float64(x) + h, MEAN, STD) for h in (-1 / 255, 1 / 255)]
    return -np.log2(edges[1] - edges[0]).mean(-1)


@pytest.mark.parametrize("way", [flow.dequantised_bits_per_dim, flow.decoded_bits_per_dim])
@pytest.mark.parametrize("exact_trace", [True, False])
def test_bits_of_gaussian_data(way, exact_trace):
    """To 1e-3 bits/dim in the mean: dequantisation, entropy and gap are all in their place."""
    n = 20_000
    schedule, exact = pair("linear", 1000)
    denoise, x_0 = gaussian_denoiser(exact, MEAN, STD**2), pixels(n)
    found = jax.jit(lambda x, key: way(schedule, denoise, x, key, exact_trace=exact_trace))(
        x_0, jax.random.key(0)
    )
    difference = np.float64(found.bits_per_dim) - true_bits(x_0)
    if way is flow.decoded_bits_per_dim:
        # What its decoder loses by a variance that is not that of x_0 given x_1, by quadrature.
        v = exact.variance[1]
        left = np.sqrt(STD**2 * v / (exact.alpha_bar[1] * STD**2 + v))
        e, width = np.linspace(-5 * left, 5 * left, 4001), np.exp(0.5 * exact.log_small(1, 2))
        mass = stats.norm.cdf((e + 1 / 255) / width) - stats.norm.cdf((e - 1 / 255) / width)
        weight = stats.norm.pdf(e, 0, left) * (e[1] - e[0])
        best = stats.norm(0, left).entropy() / LN2 - np.log2(2 / 255)
        difference -= -(weight * np.log2(mass)).sum() - best
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n) < 0.02
    else:
        assert abs(difference.mean()) < 1e-3
    assert 20 < found.evaluations < 500


@pytest.mark.parametrize("way", [flow.dequantised_bits_per_dim, flow.decoded_bits_per_dim])
def test_sharp_data_cost_no_less_than_they_must(way):
    """Data of a single value need 0 bits; what goes through noise of sigma_1 = 0.01 costs more.

    The decoder knows the gap; plain dequantisation pays for the width of the density at t = 1.
    """
    schedule, exact = pair("linear", 1000)
    denoise = gaussian_denoiser(exact, 1 / 255, 1e-8)
    x_0 = np.full((500, 2), 1 / 255, np.float32)
    bits = jax.jit(lambda x, key: way(schedule, denoise, x, key))(x_0, jax.random.key(1))
    mean = float(bits.bits_per_dim.mean())
    width = stats.norm(0, exact.sigma[1]).cdf(1 / 255) * 2 - 1
    if way is flow.dequantised_bits_per_dim:
        assert -np.log2(width) < mean < -np.log2(width) + 0.1
    else:
        narrow = stats.norm(0, np.exp(0.5 * exact.log_small(1, 2))).cdf(1 / 255) * 2 - 1
        close(mean, -np.log2(narrow), rtol=0, atol=0.01)


def test_calls_of_the_denoiser_are_counted():
    schedule, exact = pair("linear", 50)
    calls = []

    def counted(x_t, t):
        jax.debug.callback(lambda: calls.append(0))
        return gaussian_denoiser(exact, MEAN, STD**2)(x_t, t)

    x_1, key = np.zeros((2, 3), np.float32), jax.random.key(0)
    found = density(schedule, counted, x_1, key)
    jax.effects_barrier()
    assert int(found.evaluations) == len(calls)
    loose = density(schedule, counted, x_1, key, tolerance=1e-2)
    assert loose.evaluations < found.evaluations


def test_an_example_that_goes_astray_is_seen():
    """The step is chosen for the worst of a batch, not for the mean."""
    schedule, exact = pair("linear", 1000)
    denoise = mixture_denoiser(exact, WEIGHTS, MEANS, 1e-3)
    saddle = (np.array(MEANS[0]) + MEANS[1]) / 2
    hard = np.float32(saddle + 0.01)[None]
    easy = np.zeros((200, 2), np.float32) + np.float32(MEANS[2])
    alone = density(schedule, denoise, hard)
    among = density(schedule, denoise, np.concatenate([hard, easy]))
    close(among.log_density[0], alone.log_density[0], rtol=0, atol=4e-3)


def test_what_cannot_be_solved_is_nan(monkeypatch):
    schedule, exact = pair("linear", 50)
    monkeypatch.setattr(flow, "MAX_STEPS", 3)
    found = density(schedule, gaussian_denoiser(exact, 0, STD**2), np.ones((2, 3), np.float32))
    assert np.isnan(found.log_density).all()
    monkeypatch.undo()
    broken = lambda x_t, t: Prediction(x_t, x_t * jnp.nan)  # noqa: E731
    assert np.isnan(density(schedule, broken, np.ones((2, 3), np.float32)).log_density).all()


def test_a_schedule_without_signal_is_refused():
    with pytest.raises(ValueError, match="no signal at t = T"):
        flow.log_density(schedules.jsd(10), gaussian_denoiser(None), jnp.zeros((2, 3)))


@functools.cache
def network():
    """A transformer with weights that are not its first ones, which say nothing of x."""
    model = DiT(patch_size=2, channels=8, depth=1, head_channels=4)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4, 4, 1)), np.ones(1))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda p: p + np.float32(0.1 * rng.normal(size=p.shape)), params)


def test_exact_trace_is_the_mean_of_the_probes_on_a_network():
    model, params = network()
    schedule = schedules.linear(20)
    denoise = denoiser(schedule, lambda x_t, t: model.apply(params, x_t, t))
    x_0 = np.float32(np.random.default_rng(4).integers(0, 256, (1, 4, 4, 1)) / 127.5 - 1)
    options = {"tolerance": 1e-2}
    exact = density(schedule, denoise, x_0, **options)
    many = np.repeat(x_0, 36, axis=0)
    found = density(schedule, denoise, many, jax.random.key(0), **options)
    difference = (np.float64(found.log_density) - exact.log_density[0]) / x_0.size
    assert difference.std() > 1e-4
    assert abs(difference.mean()) < 4 * difference.std() / 6 + 5e-3


def test_key_and_batch():
    schedule, exact = pair("linear", 50)
    denoise, x_0 = gaussian_denoiser(exact, MEAN, STD**2), pixels(4)
    bits = jax.jit(
        lambda x, key: (
            flow.decoded_bits_per_dim(schedule, denoise, x, key, variance=fixed_small).bits_per_dim
        )
    )
    whole = bits(x_0, jax.random.key(0))
    part = bits(x_0[2:], sample_keys(jax.random.key(0), np.arange(2, 4)))
    close(part, whole[2:], rtol=0, atol=1e-3)
    assert np.abs(bits(x_0, jax.random.key(1)) - whole).min() > 1e-4


def test_a_network_with_a_gradient_alone_has_a_trace():
    """Such a network has a kernel with a backward pass, and no derivative forwards."""
    rng = np.random.default_rng(0)
    matrix, x, probe = (np.float32(rng.normal(size=(3, n))) for n in (3, 3, 3))

    def eps(x):
        return jnp.sin(x @ matrix)

    gradient_alone = jax.custom_vjp(eps)
    gradient_alone.defvjp(lambda x: jax.vjp(eps, x), lambda pull, g: pull(g))
    of = [jax.jit(lambda x, p, f=f: flow._with_trace(f, x, p)) for f in (gradient_alone, eps)]
    jacobian = matrix.T * np.cos(x @ matrix)[:, :, None]  # [example, output, input]
    for direction, expected in [
        (None, np.trace(jacobian, axis1=1, axis2=2) / 3),
        (probe, np.einsum("bi,bij,bj->b", probe, jacobian, probe) / 3),
    ]:
        for f in of:
            close(f(x, direction)[1], expected, rtol=1e-4, atol=1e-5)
