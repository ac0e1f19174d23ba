"""Dual score matching on mixtures: exact energies by closed forms, and small ones that are trained.

The oracle of both derivatives is a posterior mean over the components, which no gradient is in.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddpm import continuous, flow, schedules
from ddpm.energy import dual
from tests.exact import close

MEANS = np.array([[-0.9, -0.3], [0.6, 0.8], [0.5, -0.7]])
WEIGHTS = np.array([0.2, 0.3, 0.5])
VARIANCE = 0.09
THREE = WEIGHTS, MEANS, VARIANCE
TABLE = schedules.cosine(50)
CONTINUOUS = continuous.linear(5.0, -5.0)
KEY = jax.random.key(0)


def parts(x_t, log_snr, of):
    """x_t's distance to each component's mean, log of weight times density, and their variance."""
    weights, means, variance = of
    alpha = jnp.sqrt(jax.nn.sigmoid(log_snr))
    spread = alpha**2 * variance + jax.nn.sigmoid(-log_snr)
    apart = x_t[:, None] - alpha[:, None, None] * jnp.asarray(means, x_t.dtype)
    logs = jnp.log(jnp.asarray(weights, x_t.dtype)) - 0.5 * (apart**2).sum(-1) / spread[:, None]
    size = x_t.shape[-1] / 2 * jnp.log(2 * jnp.pi * spread)
    return apart, logs - size[:, None], spread


def exact(of):
    """The energy -log q of a mixture of any dimension."""
    return lambda x_t, log_snr: -jax.nn.logsumexp(parts(x_t, log_snr, of)[1], axis=-1)


def posterior(x_t, log_snr, of):
    """E[eps | x_t], E[(|eps|^2 - D)/2 | x_t], and the variances that are left, per dimension.

    Of component k, eps is normal: with mean sigma (x_t - alpha m_k)/spread and variance
    alpha^2 variance/spread.
    """
    apart, logs, spread = parts(x_t, log_snr, of)
    size, share = x_t.shape[-1], jax.nn.softmax(logs)
    noise = jax.nn.sigmoid(-log_snr)
    mean = jnp.sqrt(noise / spread**2)[:, None, None] * apart
    left = (1 - noise / spread)[:, None]
    square = (mean**2).sum(-1)
    eps = (share[..., None] * mean).sum(1)
    expected = (share * (square + size * left)).sum(-1)
    of_square = 2 * size * left**2 + 4 * left * square + (square + size * left) ** 2
    of_eps = (expected - (eps**2).sum(-1)) / size
    return (
        eps,
        (expected - size) / 2,
        of_eps,
        ((share * of_square).sum(-1) - expected**2) / (2 * size) ** 2,
    )


def draws(key, n, of):
    """x_0 of a mixture, [n, D]."""
    weights, means, variance = (jnp.asarray(x, jnp.float32) for x in of)
    which, noise = jax.random.split(key)
    k = jax.random.choice(which, len(weights), (n,), p=weights)
    return means[k] + jnp.sqrt(variance) * jax.random.normal(noise, (n, means.shape[1]))


def noised(schedule, key, n, of, t):
    """x_t and its log-SNR at one t."""
    level, (a, b) = schedule.at(t), jax.random.split(key)
    x_0 = draws(a, n, of)
    return level.alpha * x_0 + level.sigma * jax.random.normal(b, x_0.shape), jnp.full(
        n, level.high
    )


@pytest.mark.parametrize("dimensions", [1, 2, 16])
def test_both_derivatives_are_posterior_means_and_obey_the_diffusion_equation(dimensions):
    """In float64, and d/d lambda of the exploding view by differentiating that view's energy."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(dimensions)
        of = WEIGHTS, rng.normal(size=(3, dimensions)), VARIANCE
        log_snr = jnp.asarray(np.linspace(-8, 8, 33))
        x_t = jnp.asarray(rng.normal(size=(33, dimensions)))
        energy = exact(of)

        def exploding(y, log_snr):
            """-log q(y), a mixture with variance + s^2: no alpha in it."""
            spread = of[2] + jnp.exp(-log_snr)
            logs = jnp.log(of[0]) - 0.5 * ((y - of[1]) ** 2).sum(-1) / spread
            return dimensions / 2 * jnp.log(2 * jnp.pi * spread) - jax.nn.logsumexp(logs)

        @jax.jit
        def all_of(x_t, log_snr):
            found = dual.derivatives(energy, x_t, log_snr)
            y = x_t / jnp.sqrt(jax.nn.sigmoid(log_snr))[:, None]
            by_y, slope = jax.vmap(jax.grad(exploding, (0, 1)))(y, log_snr)
            hessian = jax.vmap(jax.hessian(exploding))(y, log_snr)
            divergence = jnp.trace(hessian, axis1=1, axis2=2)
            diffused = jnp.exp(-log_snr) / 2 * ((by_y**2).sum(-1) - divergence)
            return found, slope, diffused, posterior(x_t, log_snr, of)

        found, slope, diffused, (eps, rate, _, _) = all_of(x_t, log_snr)
        assert found.rate.dtype == np.float64
        close(found.rate, slope, rtol=1e-9, atol=1e-9)
        close(found.rate, diffused, rtol=1e-9, atol=1e-9)
        close(found.rate, rate, rtol=1e-9, atol=1e-9)
        close(found.eps, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "times"), [(TABLE, (1, 25, 50)), (CONTINUOUS, (0.0, 0.5, 1.0))]
)
def test_the_exact_energy_pays_what_eps_leaves_open_and_no_less_is_possible(schedule, times):
    """Both errors are their floors on average, and their derivatives along other energies vanish;
    not so at a wrong energy."""
    n, energy = 20_000, exact(THREE)
    change = lambda x, log_snr: jnp.sin(2 * x).sum(-1) * jnp.exp(log_snr / 4)  # noqa: E731

    @jax.jit
    def at(t, key):
        a, b = jax.random.split(key)
        x_0, eps = draws(a, n, THREE), jax.random.normal(b, (n, 2))
        level = schedule.at(t)
        x_t, log_snr = level.alpha * x_0 + level.sigma * eps, jnp.full(n, level.high)
        _, _, *floors = posterior(x_t, log_snr, THREE)

        def moved(d):
            return dual.errors(schedule, lambda x, s: energy(x, s) + d * change(x, s), x_0, t, eps)

        one = jnp.float32(1)
        (found, slope), (_, wrong) = (jax.jvp(moved, (one * d,), (one,)) for d in (0.0, 0.3))
        return [(a - b, s, w) for a, b, s, w in zip(found, floors, slope, wrong, strict=True)]

    for t in times:
        for number, per_part in enumerate(at(t, KEY)):
            over, slope, wrong = (np.asarray(x, np.float64) for x in per_part)
            for name, x in (("floor", over), ("slope", slope)):
                assert abs(x.mean()) < 4.5 * x.std() / n**0.5 + 1e-6, (t, number, name)
            if t != times[-1]:  # where little is left that would show the change
                assert wrong.mean() > 10 * wrong.std() / n**0.5, (t, number)


def test_loss_is_the_weighted_sum_and_constants_are_free():
    n = 8
    x_0, eps = draws(KEY, n, THREE), jax.random.normal(jax.random.key(1), (n, 2))
    t, energy = np.arange(1, 50, 7)[:n].astype(np.int32), exact(THREE)
    x_0, eps = x_0[: len(t)], eps[: len(t)]

    @jax.jit
    def all_of(x_0, t, eps):
        found = dual.errors(TABLE, energy, x_0, t, eps)
        shifted = dual.errors(TABLE, lambda x, s: energy(x, s) + 3.0, x_0, t, eps)
        return found, shifted, dual.loss(TABLE, energy, x_0, t, eps, time_weight=3.0)

    found, shifted, total = all_of(x_0, t, eps)
    for part, same in zip(found, shifted, strict=True):
        close(part, same, rtol=1e-4, atol=1e-6)
    close(total, found.space + 3 * found.time, rtol=1e-6)
    with pytest.raises(ValueError, match="time_weight = -1"):
        dual.loss(TABLE, energy, x_0, t, eps, time_weight=-1)
    with pytest.raises(ValueError, match="energy"):
        dual.loss(TABLE, lambda x, s: energy(x, s)[:, None], x_0, t, eps)


def test_normalizer_of_exact_energies_and_that_of_a_constant():
    """Also of one that is not N(0, I) at the last time: what is measured is no assumption on it."""
    raw, ends_early = exact(THREE), continuous.linear(5.0, -1.0)
    energy = lambda x, s: raw(x, s) - 7.5  # noqa: E731

    @jax.jit
    def all_of():
        found = [
            dual.log_normalizer(schedule, energy, (2,), KEY, num_samples=4096)
            for schedule in (CONTINUOUS, ends_early)
        ]
        ready = dual.normalized(CONTINUOUS, energy, (2,), KEY)
        x_1, log_snr = noised(CONTINUOUS, KEY, 16, THREE, 0.0)
        return found, dual.log_density(CONTINUOUS, ready, x_1), -raw(x_1, log_snr)

    found, density, expected = all_of()
    for value, error in zip(found, (2e-3, 0.03), strict=True):
        assert value.standard_error < error
        close(value.value, 7.5, atol=4 * value.standard_error)
    close(density, expected, atol=0.01)


def test_bits_per_dim_and_denoiser_are_those_of_the_flow():
    """The exact energy by one evaluation, against the ODE with the exact trace; same key."""
    energy = exact(THREE)

    @jax.jit
    def both():
        x_0 = jnp.round((draws(KEY, 5, THREE) + 1) * 127.5) / 127.5 - 1
        denoise = dual.denoiser(TABLE, energy)
        by_ode = flow.dequantised_bits_per_dim(TABLE, denoise, x_0, KEY, exact_trace=True)
        return dual.dequantised_bits_per_dim(TABLE, energy, x_0, KEY), by_ode.bits_per_dim

    found, by_ode = both()
    close(found, by_ode, atol=2e-3)


def test_base_is_the_exact_energy_of_gaussian_data():
    single = np.ones(1), np.zeros((1, 2)), 0.4

    @jax.jit
    def all_of():
        x_t, log_snr = noised(CONTINUOUS, KEY, 9, THREE, 0.3)
        base = dual.gaussian(0.4)
        return dual.derivatives(base, x_t, log_snr), dual.derivatives(exact(single), x_t, log_snr)

    jax.tree.map(lambda a, b: close(a, b, rtol=1e-4, atol=1e-5), *all_of())


# --- Trained


A = np.array([0.4, 0.6]), MEANS[:2], VARIANCE
B = np.array([0.5, 0.5]), MEANS[[0, 2]], VARIANCE
WIDTH = 48


def mlp(params):
    """A Gaussian's energy plus two layers on x and waves of the log-SNR."""
    base = dual.gaussian(0.5)

    def energy(x, log_snr):
        angles = log_snr[:, None] * jnp.float32([0.15, 0.3, 0.45])
        h = jnp.concatenate([2 * x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
        for weight, bias in params[:-1]:
            h = jax.nn.swish(h @ weight + bias)
        return base(x, log_snr) + (h @ params[-1][0] + params[-1][1])[:, 0]

    return energy


def trained(key, of, *, steps, batch):
    """The parameters of an MLP's energy after training by the dual loss."""
    sizes = (8, WIDTH, WIDTH, 1)
    keys = jax.random.split(key, 3)
    params = [
        (jax.random.normal(k, (m, n)) * np.float32((2 / m) ** 0.5) * (n > 1), jnp.zeros(n))
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]
    adam = optax.adam(optax.cosine_decay_schedule(1e-2, steps), b2=0.99)

    def loss(params, key):
        a, b, c = jax.random.split(key, 3)
        t = (jax.random.uniform(b) + jnp.arange(batch) / batch) % 1
        eps = jax.random.normal(c, (batch, 2))
        return dual.loss(CONTINUOUS, mlp(params), draws(a, batch, of), t, eps).mean()

    def step(carried, key):
        params, state = carried
        updates, state = adam.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), jax.random.split(key, steps))
    return params


@pytest.fixture(scope="module")
def energies():
    """Normalised energies of A and B, trained in one compiled call."""
    # Equal shapes, so that one call trains both.
    both = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y, jnp.float32) for y in x]), A, B)
    train = jax.jit(jax.vmap(functools.partial(trained, steps=1500, batch=128)))
    params = train(jax.random.split(KEY, 2), both)
    found = [mlp(jax.tree.map(lambda x, i=i: x[i], params)) for i in range(2)]
    return [dual.normalized(CONTINUOUS, e, (2,), jax.random.key(3)) for e in found]


def test_trained_log_density_is_right_to_a_tenth_of_a_nat(energies):
    """On data held out, at every noise level, normalisation included: over a grid it sums to 1."""
    axis = jnp.linspace(-4, 4, 161)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)

    @jax.jit
    def at(t):
        found = []
        for energy, of in zip(energies, (A, B), strict=True):
            x_t, log_snr = noised(CONTINUOUS, jax.random.key(9), 4000, of, t)
            total = jnp.exp(-energy(grid, jnp.full(len(grid), log_snr[0]))).sum() * 0.05**2
            found.append((exact(of)(x_t, log_snr) - energy(x_t, log_snr), total))
        return found

    for t in (0.0, 0.3, 0.6, 1.0):
        for error, total in at(t):
            assert np.abs(error).mean() < 0.1, t
            assert abs(error.mean()) < 0.06, t
            close(total, 1, atol=0.06)


def test_two_trained_energies_tell_a_mixtures_weights(energies):
    """Each point's by their log-ratio, and the whole's by maximum likelihood."""
    share = 0.3
    x = jnp.concatenate([noised(CONTINUOUS, jax.random.key(i), n, of, 0.0)[0]
                         for i, n, of in ((11, 1200, A), (12, 2800, B))])  # fmt: skip
    log_snr = jnp.full(len(x), 5.0)
    ratio = energies[0](x, log_snr) - energies[1](x, log_snr)
    true = exact(A)(x, log_snr) - exact(B)(x, log_snr)
    odds = np.log(share / (1 - share))
    of_a, of_a_true = (jax.nn.sigmoid(odds - r) for r in (ratio, true))
    assert np.abs(of_a - of_a_true).mean() < 0.05
    shares = np.linspace(0.01, 0.99, 99)
    likelihood = lambda r: np.logaddexp(np.log(shares) - r[:, None], np.log1p(-shares)).mean(0)  # noqa: E731
    best, best_true = (shares[likelihood(np.asarray(r)).argmax()] for r in (ratio, true))
    assert abs(best - share) < 0.05
    assert abs(best_true - share) < 0.03
