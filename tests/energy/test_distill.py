"""Energies distilled from exact scores of a mixture, and a product by MCMC from them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import ddpm
from ddpm.diffusion.streams import normal, sample_keys
from ddpm.energy import composition, distill
from tests.energy.test_composition import log_gaussian
from tests.exact import close, mixture_denoiser, pair

T = 30
SCHEDULE, EXACT = pair("cosine", T)
WEIGHTS, MEANS, VARIANCE = np.array([0.3, 0.7]), np.array([[-0.8, 0.1], [0.6, 0.4]]), 0.12
LOG_Q = composition.log_mixture([log_gaussian(m, VARIANCE) for m in MEANS], list(WEIGHTS))
TEACHER = mixture_denoiser(EXACT, WEIGHTS, MEANS, VARIANCE)


class Energy(nn.Module):
    """A small network (x_t, t) -> [B], minus the log-density up to a function of t."""

    @nn.compact
    def __call__(self, x, t):
        level = SCHEDULE.at(t)
        h = jnp.concatenate([x, jnp.stack([level.alpha, level.high / 8], -1)], -1)
        for _ in range(2):
            h = nn.swish(nn.Dense(64)(h))
        return 0.5 * (x**2).sum(-1) + nn.Dense(1)(h)[:, 0]


def data(key, n):
    """x_0, t and eps of a batch."""
    which, of_x, of_t, of_eps = jax.random.split(key, 4)
    means = jnp.float32(MEANS)[jax.random.choice(which, 2, (n,), p=jnp.asarray(WEIGHTS))]
    x_0 = means + VARIANCE**0.5 * jax.random.normal(of_x, (n, 2))
    return x_0, jax.random.randint(of_t, (n,), 1, T + 1), jax.random.normal(of_eps, (n, 2))


@functools.cache
def distilled():
    """The log-density of a trained network."""
    model, steps = Energy(), 400
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    params = model.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1, int))

    def log_density(params):
        return lambda x, t: -model.apply(params, x, t)

    def step(carry, key):
        params, state = carry
        value, gradient = jax.value_and_grad(
            lambda p: distill.loss(SCHEDULE, log_density(p), TEACHER, *data(key, 256)).mean()
        )(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    keys = jax.random.split(jax.random.key(1), steps)
    train = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), keys))
    (params, _), losses = train(params)
    return log_density(params), np.asarray(losses)


def test_the_loss_is_that_of_denoising_less_what_the_exact_score_pays():
    """0 for the exact log-density; for another the mean of `losses.simple` less the teacher's."""
    batch = data(jax.random.key(3), 20_000)
    off = lambda x, t: LOG_Q(x, t) + 0.3 * x[:, 0] + t  # noqa: E731
    exact, other = (distill.loss(SCHEDULE, q, TEACHER, *batch) for q in (LOG_Q, off))
    assert exact.shape == (20_000,)
    assert exact.max() < 1e-5
    sigma_squared = np.float32(EXACT.variance)[batch[1]]
    close(other, 0.3**2 * sigma_squared / 2, rtol=2e-3, atol=1e-5)
    simple = [
        ddpm.losses.simple(SCHEDULE, d, *batch)
        for d in (composition.of_log_density(SCHEDULE, off), TEACHER)
    ]
    paired = np.float64(simple[0] - simple[1])
    assert abs(paired.mean() - other.mean()) < 4 * paired.std() / np.sqrt(20_000)


def test_a_distilled_energy_has_the_density_and_composes():
    log_density, losses = distilled()
    assert losses[-50:].mean() < 0.005 < losses[:5].mean()
    # The density of the noised mixture, up to a constant, where its samples are.
    x_0, _, eps = data(jax.random.key(4), 500)
    for at, tolerance in ((2, 0.2), (8, 0.1), (20, 0.1)):
        t = jnp.full(500, at)
        x_t = ddpm.q_sample(SCHEDULE, x_0, t, eps)
        apart = np.std(log_density(x_t, t) - LOG_Q(x_t, t))
        assert apart < tolerance < np.std(LOG_Q(x_t, t)) / 4, at
    # Times N(0.2, 0.2): again a mixture, with shares by how far the means are from 0.2.
    log_densities = [log_density, log_gaussian(0.2, 0.2)]
    log_product = composition.log_product(log_densities)
    denoisers = [composition.of_log_density(SCHEDULE, q) for q in log_densities]
    keys = sample_keys(jax.random.key(5), np.arange(1500))
    sampler = ddpm.predictor_corrector(
        ddpm.ddim(), corrector_steps=15, snr=0.4, kernel=ddpm.mcmc.mala, log_density=log_product
    )
    x = jax.jit(
        lambda x_t: ddpm.sample(
            keys,
            SCHEDULE,
            composition.product(SCHEDULE, denoisers),
            (1500, 2),
            sampler=sampler,
            x_t=x_t,
        )
    )(normal(keys, T, (2,)) / np.sqrt(2))
    shrunk = (MEANS * 0.2 + 0.2 * VARIANCE) / (0.2 + VARIANCE)
    shares = WEIGHTS * np.exp(-0.5 * ((MEANS - 0.2) ** 2).sum(-1) / (0.2 + VARIANCE))
    shares /= shares.sum()
    mean = shares @ shrunk
    variance = 0.2 * VARIANCE / (0.2 + VARIANCE) + shares @ (shrunk - mean) ** 2
    close(np.mean(x, axis=0), mean, atol=0.05)
    close(np.var(x, axis=0), variance, rtol=0.12)
