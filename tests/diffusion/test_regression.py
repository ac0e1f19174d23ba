"""Every loss at its known minimum, where its gradient vanishes; the bounds' expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import Prediction, fixed_large, fixed_small, likelihood, loss_weights, losses, schedules
from ddpm.diffusion import continuous, predictions
from ddpm.diffusion.streams import normal, sample_keys
from tests.exact import close, gaussian_denoiser, mixture_denoiser, pair

STEPS, MEAN, VARIANCE = 20, 0.4, 0.25
ALL = np.arange(1, STEPS + 1)


def quadrature(n):
    """Nodes (z, eps) of two standard normals and their weights."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    z, eps = (x.ravel() for x in np.meshgrid(nodes, nodes))
    return z, eps, np.outer(weights, weights).ravel() / (2 * np.pi)


def expectation(loss, n=6, x_0=lambda z: MEAN + VARIANCE**0.5 * z, t=ALL):
    """At every t, over x_0 and eps, of loss(x_0, t, eps) -> [B]: exact for low polynomials."""
    z, eps, weights = quadrature(n)
    tiled = lambda x: np.tile(np.float32(x), len(t))[:, None]  # noqa: E731
    each = loss(tiled(x_0(z)), np.repeat(t, len(z)), tiled(eps))
    return each.reshape(len(t), -1) @ jnp.float32(weights)


def exact_pair(name="cosine"):
    schedule, exact = pair(name, STEPS)
    return schedule, exact, gaussian_denoiser(exact, MEAN, VARIANCE)


def moved(denoiser, schedule, change):
    """The denoiser with v off by an affine function of x_t of its own at every t: change [2, T]."""

    def denoise(x_t, t):
        slope, intercept = change[:, t - 1]
        best = denoiser(x_t, t)
        v = predictions.to_v(schedule, t, best) + slope[:, None] * x_t + intercept[:, None]
        x_0, eps, *_ = predictions.from_v(schedule, x_t, t, v)
        return best._replace(x_0=x_0, eps=eps)

    return denoise


def left(exact, t=ALL):
    """The variance of x_0 given x_t, of the Gaussian data."""
    a, v = exact.alpha_bar[t], exact.variance[t]
    return VARIANCE * v / (a * VARIANCE + v)


a, s = (lambda e: e.alpha[1:]), (lambda e: e.sigma[1:])
CRITERIA = {
    "eps": (losses.distance(losses.of_eps), lambda e: (a(e) / s(e)) ** 2),
    "x_0": (losses.distance(losses.of_x_0), lambda e: 1.0),
    "v": (losses.distance(losses.of_v), lambda e: 1 / s(e) ** 2),
    "score": (losses.distance(losses.of_score), lambda e: (a(e) / s(e) ** 2) ** 2),
    "posterior_mean": (
        losses.distance(losses.of_posterior_mean),
        lambda e: e.posterior(ALL - 1, ALL)[0] ** 2,
    ),
    "min_snr": (
        losses.weighted(loss_weights.min_snr()),
        lambda e: np.minimum((a(e) / s(e)) ** 2, 5),
    ),
    "edm": (losses.weighted(loss_weights.edm()), lambda e: (a(e) / s(e)) ** 2 + 4),
    "likelihood": (
        losses.weighted(loss_weights.simple, over_log_snr=True),
        lambda e: (a(e) / s(e)) ** 2 * cells(e) * STEPS,
    ),
}


def cells(exact):
    """What the trapezoidal rule over log-SNR gives each t = 1..T."""
    log_snr = np.log(exact.alpha_bar[1:] / exact.variance[1:])
    return -np.diff((log_snr[1:] + log_snr[:-1]) / 2, prepend=log_snr[0], append=log_snr[-1])


@pytest.mark.parametrize("name", CRITERIA)
def test_regression_is_at_its_minimum(name):
    """The factor of the error's square in x_0, times what of x_0 is not known."""
    criterion, factor = CRITERIA[name]
    schedule, exact, best = exact_pair()
    expected = factor(exact) * left(exact)

    @jax.jit
    def share(change):
        """Of the minimum at every t, so that each weighs alike in the gradient."""
        denoise = moved(best, schedule, change)
        of = lambda *xs: losses.regression(schedule, denoise, *xs, criterion)  # noqa: E731
        return expectation(of) / np.float32(expected)

    none = jnp.zeros((2, STEPS))
    close(share(none), 1, rtol=1e-4)
    away = none + 0.1
    gradient = jax.jit(jax.grad(lambda change: share(change).sum()))
    assert abs(gradient(none)).max() < 1e-3 * abs(gradient(away)).max()
    assert (share(away) > share(none)).all()


@pytest.mark.parametrize("name", ["absolute", "huber"])
def test_other_distances_are_least_at_the_middle_of_what_is_possible(name):
    """Of a Gaussian's the median is the mean; E|e| = sqrt(2/pi) std."""
    schedule, exact, best = exact_pair()
    of = {"absolute": jnp.abs, "huber": losses.huber(0.2)}[name]
    criterion = losses.distance(losses.of_x_0, of)
    t = ALL[4::5]

    @jax.jit
    def mean(change):
        denoise = moved(best, schedule, change)
        loss = lambda *xs: losses.regression(schedule, denoise, *xs, criterion)  # noqa: E731
        return expectation(loss, n=60, t=t)

    std, e = np.sqrt(left(exact, t))[:, None], np.linspace(-8, 8, 4001)
    size = abs(e * std)
    value = size if name == "absolute" else np.where(size < 0.2, size**2 / 2, 0.2 * (size - 0.1))
    density = np.exp(-(e**2) / 2) / np.sqrt(2 * np.pi)
    none = jnp.zeros((2, STEPS))
    close(mean(none), np.trapezoid(value * density, e), rtol=2e-2)
    for change in np.array([[[0.1], [0]], [[-0.1], [0]], [[0], [0.1]], [[0], [-0.1]]]):
        assert (mean(none + change) > mean(none)).all()


def test_huber_is_half_the_square_and_then_a_line():
    e = jnp.array([-3.0, -0.5, 0.0, 0.2, 2.0])
    close(losses.huber(1.0)(e), [2.5, 0.125, 0, 0.02, 1.5])
    close(jax.vmap(jax.grad(losses.huber(1.0)))(e), [-1, -0.5, 0, 0.2, 1])
    with pytest.raises(ValueError, match="must be > 0"):
        losses.huber(0.0)


@pytest.mark.parametrize("name", ["eps", "v", "min_snr", "likelihood"])
def test_regression_on_a_mixture_is_at_its_minimum(name):
    """Not linear in x_t: no small change of the denoiser, of many shapes, lowers the loss."""
    criterion, _ = CRITERIA[name]
    schedule, exact = pair("cosine", STEPS)
    means, parts = np.array([-0.6, 0.1, 0.8]), np.array([0.5, 0.2, 0.3])
    best = mixture_denoiser(exact, parts, means[:, None], 0.01)
    t = ALL[1::6]
    shapes = [jnp.ones_like, jnp.tanh, jnp.cos, lambda x: jnp.exp(-(x**2) * 4)]

    def mean(change):
        def denoise(x_t, t):
            off = sum(c * f(x_t) for c, f in zip(change, shapes, strict=True))
            v = predictions.to_v(schedule, t, best(x_t, t)) + off
            return predictions.from_v(schedule, x_t, t, v)

        loss = lambda *xs: losses.regression(schedule, denoise, *xs, criterion)  # noqa: E731
        of_part = [
            expectation(loss, n=40, x_0=lambda z, m=m: m + 0.1 * z, t=t) * p
            for m, p in zip(means, parts, strict=True)
        ]
        return sum(of_part)

    slopes = jax.jit(jax.jacfwd(mean))
    none = jnp.zeros(len(shapes))
    assert (abs(slopes(none)) < 2e-3 * abs(slopes(none + 0.3)).max(axis=1, keepdims=True)).all()


def learns(denoiser, log_variance=None, fraction=None):
    return lambda x_t, t: denoiser(x_t, t)._replace(
        log_variance=log_variance, variance_fraction=fraction
    )


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_small", "diagonal", "range"])
def test_mean_over_t_of_the_bound_is_the_bound(variance):
    """Of the same noise, all T terms: what is left is rounding."""
    schedule, _, best = exact_pair("linear")
    rng, n = np.random.default_rng(0), 3
    x_0 = np.float32(rng.integers(0, 256, (n, 4)) / 127.5 - 1)
    raw = np.float32(rng.uniform(-3, 0, (n, 4)))
    denoise = {"diagonal": learns(best, raw), "range": learns(best, None, raw)}.get(variance, best)
    options = {"variance": fixed_small if variance == "fixed_small" else fixed_large}
    keys = sample_keys(jax.random.key(1), np.arange(n))

    @jax.jit
    def both():
        whole = likelihood.bits_per_dim(schedule, denoise, x_0, keys, **options)

        def at(t):
            eps = normal(keys, t, (4,))
            return losses.bound(schedule, denoise, x_0, t, eps, **options)

        return whole, jax.lax.map(at, jnp.asarray(ALL))

    whole, terms = both()
    close(terms.mean(0), whole.total, rtol=1e-5)
    close((terms[0] - whole.prior) / STEPS, whole.decoder, rtol=1e-5)
    close((terms[7] - whole.prior) / STEPS, whole.steps[:, 6], rtol=1e-4)


def test_bound_is_least_at_the_matched_variance_and_the_exact_mean():
    """Then a step's KL is half the log of the matched variance over beta-tilde (Analytic-DPM)."""
    schedule, exact, best = exact_pair("linear")
    t = ALL[1:]
    of_x_0, _, small = exact.posterior(t - 1, t)
    matched = small + of_x_0**2 * left(exact, t)

    @jax.jit
    def mean(change, log_variance):
        def denoise(x_t, t):
            said = moved(best, schedule, change)(x_t, t)
            return said._replace(log_variance=log_variance[t - 2][:, None] + 0 * x_t)

        loss = lambda *xs: losses.bound(schedule, denoise, *xs)  # noqa: E731
        prior = expectation(lambda x, *_: likelihood.prior_kl(schedule, x), t=t)
        return (expectation(loss, t=t) - prior) / STEPS

    none, best_variance = jnp.zeros((2, STEPS)), jnp.float32(np.log(matched))
    close(mean(none, best_variance), 0.5 * np.log2(matched / small), rtol=2e-3, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda *xs: mean(*xs).sum(), argnums=(0, 1)))
    at_best, away = gradient(none, best_variance), gradient(none + 0.1, best_variance + 0.1)
    for here, there in zip(at_best, away, strict=True):
        assert abs(here).max() < 2e-3 * abs(there).max()
    for changed in (best_variance + 0.1, best_variance - 0.1):
        assert (mean(none, changed) > mean(none, best_variance)).all()


def test_gradients_of_the_bound_are_finite_however_wrong_the_prediction():
    schedule = schedules.linear(STEPS)
    x_0 = jnp.tile(jnp.float32([[-1.0, -0.99607843, 0.0039215686, 1.0]]), (STEPS, 1))

    def total(off, raw, field):
        def denoise(x_t, t):
            said = predictions.from_x_0(schedule, x_t, t, x_0 + off)
            return said._replace(**{field: raw + 0 * x_t})

        return losses.bound(schedule, denoise, x_0, jnp.asarray(ALL), 0.1 * x_0).sum()

    for field, extremes in (("log_variance", (-12.0, 3.0)), ("variance_fraction", (-1.0, 2.0))):
        gradient = jax.jit(jax.grad(total, argnums=(0, 1)), static_argnums=2)
        for off in (0.0, 1e-3, 3.0, -50.0):
            for raw in extremes:
                assert all(jnp.isfinite(g) for g in gradient(off, raw, field)), (off, raw)


@pytest.mark.parametrize("criterion", [None, losses.weighted(loss_weights.min_snr())])
def test_hybrid_is_a_regression_of_the_mean_and_the_bound_of_the_variance(criterion):
    schedule, _, best = exact_pair("linear")
    x_0, eps = jax.random.normal(jax.random.key(2), (2, STEPS, 3)).clip(-1, 1)
    t = jnp.asarray(ALL)

    def denoiser(mean, fraction):
        change = jnp.broadcast_to(mean, (2, STEPS))
        return lambda x_t, t: moved(best, schedule, change)(x_t, t)._replace(
            variance_fraction=jnp.full_like(x_t, fraction)
        )

    def of(loss, *args, **options):
        f = lambda m, v: loss(schedule, denoiser(m, v), x_0, t, eps, *args, **options).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(0.1, 0.3)

    value, (mean, variance) = of(losses.hybrid, criterion, bound_weight=0.01)
    main, (of_mean, nothing) = of(losses.regression, criterion)
    bound, (also_mean, of_variance) = of(losses.bound)
    close(value, main + 0.01 * bound, rtol=1e-5)
    close(mean, of_mean, rtol=1e-5)
    close(variance, 0.01 * of_variance, rtol=1e-5)
    assert nothing == 0
    assert abs(of_variance) > 0
    assert abs(0.01 * also_mean) > 1e-2 * abs(of_mean)  # what is held back would be seen


def test_hybrid_needs_a_learned_variance():
    schedule, _, best = exact_pair("linear")
    x_0 = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="learns its variance"):
        losses.hybrid(schedule, best, x_0, jnp.array([1, 2]), x_0)


class Exact:
    """The Gaussian denoiser on any schedule, by its alpha and sigma."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, x_t, t):
        level = self.schedule.at(t)
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        centred = (x_t - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)
        return Prediction(MEAN + alpha * VARIANCE * centred, sigma * centred)


ENDS = (8.0, -6.0)
RATE = 0.5 * np.diff(np.log1p(VARIANCE * np.exp(ENDS[::-1])))[0] / np.log(2)


@pytest.mark.parametrize("kind", ["linear", "cosine", "table"])
def test_continuous_bound_of_gaussian_data(kind):
    """1/2 log(1 + SNR VARIANCE) between the ends, in bits, whatever is between; and its minimum."""
    schedule = {
        "linear": continuous.linear(*ENDS),
        "cosine": continuous.cosine(*ENDS),
        "table": continuous.table(continuous.cosine(*ENDS), 100),
    }[kind]
    n = 990
    first, last = schedule.ends
    t = np.float32(first + (last - first) * (np.arange(n) + 0.5) / n)

    @jax.jit
    def mean(gain):
        best = Exact(schedule)

        def denoise(x_t, t):
            return predictions.from_x_0(schedule, x_t, t, best(x_t, t).x_0 * gain)

        bound = lambda *xs: losses.continuous_bound(schedule, denoise, *xs)  # noqa: E731
        return expectation(bound, n=3, t=t).mean()

    close(mean(1.0), RATE, rtol=1e-3)
    slope = jax.jit(jax.grad(mean))
    assert abs(slope(1.0)) < 1e-3 * abs(slope(1.1))
    assert mean(1.1) > mean(1.0)


def test_continuous_bound_is_the_limit_of_the_discrete_one():
    """The sum of L_1 .. L_{T-1} is greater, by an amount that falls as 1/T."""

    def steps(num_steps):
        schedule = continuous.table(continuous.linear(*ENDS), num_steps)
        best, t = Exact(schedule), np.arange(2, num_steps + 1)

        @jax.jit
        def terms():
            bound = lambda *xs: losses.bound(schedule, best, *xs, variance=fixed_small)  # noqa: E731
            prior = lambda x, *_: likelihood.prior_kl(schedule, x)  # noqa: E731
            return expectation(bound, n=3, t=t) - expectation(prior, n=3, t=t)

        return float(terms().sum()) / num_steps

    excess = [steps(1 + num) / RATE - 1 for num in (10, 100, 1000)]
    assert excess[0] > 0.2
    assert 0 < excess[2] < 0.01
    close(excess[1] / excess[2], 10, rtol=0.1)
