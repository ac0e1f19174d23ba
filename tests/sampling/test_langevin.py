"""Langevin dynamics against its stationary distribution in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import ancestral, ddim, sample_chain, schedules, score
from ddpm.diffusion.streams import LANGEVIN, sample_keys
from ddpm.sampling import grids, mcmc
from ddpm.sampling.langevin import annealed_langevin, predictor_corrector, tune
from ddpm.sampling.mcmc import langevin_step
from ddpm.sampling.samplers import StepInfo
from tests.exact import gaussian_denoiser, pair


@pytest.mark.parametrize(("variance", "step_size"), [(0.5, 0.1), (0.5, 0.6), (2.0, 1.5)])
def test_stationary_variance(variance, step_size):
    """On N(0, v) steps of size h keep v / (1 - h / (2 v)), exactly."""

    @jax.jit
    def run(key):
        def step(x, key):
            return langevin_step(-x / variance, x, step_size, jax.random.normal(key, x.shape)), None

        start = jnp.zeros(40_000)
        return jax.lax.scan(step, start, jax.random.split(key, 60))[0]

    x = np.asarray(run(jax.random.key(0)), np.float64)
    wanted = variance / (1 - step_size / (2 * variance))
    assert abs(x.var() / wanted - 1) < 4 * np.sqrt(2 / x.size)
    assert abs(x.mean()) < 4 * np.sqrt(wanted / x.size)


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match="shapes must be equal"):
        langevin_step(jnp.zeros((3, 1)), jnp.zeros((3, 2)), 0.1, jnp.zeros((3, 2)))


def test_the_corrector_keeps_the_marginal_it_is_at():
    """Many steps at one time, from another x_t: N(0, V), V of the discrete steps."""
    schedule, exact = pair("linear", 1000)
    t, variance, snr = 400, 0.25, 0.3
    denoise = gaussian_denoiser(exact, 0.0, variance)
    stay = ddim()  # from t to t it is the identity
    sampler = predictor_corrector(stay, corrector_steps=200, snr=snr)
    x = jnp.full((2000, 4), 3.0)

    @jax.jit
    def run(key):
        noise = lambda k=0: jax.random.normal(jax.random.fold_in(key, k), x.shape)  # noqa: E731
        step_info = StepInfo(jnp.asarray(t), jnp.asarray(t), jnp.asarray(0), jnp.asarray([t, t]))
        return sampler.step(schedule, denoise, x, step_info, noise, ()).x

    found = np.asarray(run(jax.random.key(1)), np.float64)
    marginal = exact.alpha_bar[t] * variance + exact.variance[t]
    h = 2 * snr**2 * exact.variance[t]
    wanted = marginal / (1 - h / (2 * marginal))
    assert abs(found.var() / wanted - 1) < 4 * np.sqrt(2 / found.size)
    assert abs(found.mean()) < 4 * np.sqrt(wanted / found.size)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (annealed_langevin(3), 5 * 3 + 1),  # the last one denoises
        (predictor_corrector(corrector_steps=2), 5 * 3),
        (predictor_corrector(ddim(), steps=5), 5 * 2),
    ],
)
def test_calls_of_the_denoiser_are_counted(sampler, calls):
    schedule, exact = pair("linear", 1000)
    asked = []

    def denoise(x_t, t):
        jax.debug.callback(lambda t: asked.append(float(t[0])), t)
        return gaussian_denoiser(exact)(x_t, t)

    t = grids.uniform(schedule, 5)
    chain = sample_chain(jax.random.key(0), schedule, denoise, (2, 1), sampler=sampler, times=t)
    jax.effects_barrier()
    assert chain.evaluations == len(asked) == calls
    assert set(asked) == set(t[:-1].tolist())


def test_annealed_langevin_is_ncsns_in_the_exploding_view():
    """Algorithm 1 of Song & Ermon (2020) in y, by NumPy in float64, with the same noise."""
    levels, steps, epsilon = 6, 3, 6.2e-6
    sigmas = np.geomspace(0.01, 2.0, levels)
    schedule = schedules.geometric(levels, 0.01, 2.0)
    centres = np.array([[-0.8, 0.3], [0.5, 0.5]])
    rng = np.random.default_rng(4)
    start, noises = rng.normal(size=(5, 2)), rng.normal(size=(levels + 1, steps, 5, 2))

    def score_of(y, sigma, xp=np):  # of two points, as likely as each other
        apart = centres - y[:, None]
        logs = -0.5 * (apart**2).sum(-1) / sigma**2
        share = xp.exp(logs - logs.max(axis=1, keepdims=True))
        return ((share / share.sum(1, keepdims=True))[..., None] * apart).sum(1) / sigma**2

    y = start * np.sqrt(1 + sigmas[-1] ** 2)  # x_T is standard normal
    for i in reversed(range(levels)):
        alpha = epsilon * sigmas[i] ** 2 / sigmas[0] ** 2
        for z in noises[i + 1]:
            y = y + alpha * score_of(y, sigmas[i]) + np.sqrt(2 * alpha) * z
    y = y + sigmas[0] ** 2 * score_of(y, sigmas[0])

    def of_y(y, t):
        sigma = schedule.at(t).sigma / schedule.at(t).alpha
        return score_of(y, sigma[:, None], jnp)

    denoise = score.denoiser(schedule, score.preserving(schedule, of_y))
    sampler = annealed_langevin(steps, step_size=epsilon / 0.01**2)

    @jax.jit
    def step(x, t):
        info = StepInfo(t, t - 1, levels - t, jnp.arange(levels, -1, -1))
        table = jnp.asarray(noises, jnp.float32)[t]
        return sampler.step(schedule, denoise, x, info, lambda k: table[k - LANGEVIN], ())

    x, calls = jnp.asarray(start, jnp.float32), 0
    for t in range(levels, 0, -1):
        found = step(x, jnp.asarray(t))
        x, calls = found.x, calls + int(found.evaluations)
    np.testing.assert_allclose(x, y, atol=1e-4)
    assert calls == levels * steps + 1


def test_steps_of_the_predictor_are_those_of_both():
    assert predictor_corrector(ancestral(steps=7)).steps == 7
    assert predictor_corrector(ancestral(steps=7), steps=3).steps == 3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (functools.partial(annealed_langevin, 0), "steps_per_level = 0"),
        (functools.partial(annealed_langevin, step_size=2.0), "step_size = 2.0"),
        (functools.partial(annealed_langevin, step_size=float("nan")), "step_size = nan"),
        (functools.partial(predictor_corrector, corrector_steps=0), "corrector_steps = 0"),
        (functools.partial(predictor_corrector, snr=1.0), "snr = 1.0"),
        (functools.partial(predictor_corrector, kernel=mcmc.mala), "goes with a log_density"),
        (
            functools.partial(
                predictor_corrector, kernel=mcmc.mala, log_density=lambda x, t: t, snr=[0.1, 0.0]
            ),
            "must be > 0",
        ),
        (
            lambda: drawn_by_kernel(mcmc.mala, sample_keys(jax.random.key(0), [0]), snr=[0.1] * 3),
            r"one for each of the 4 steps",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def at_level(exact, mean, variance):
    """log q(x_t) of data N(mean, variance) in every dimension, for kernels."""

    def log_density(x_t, t):
        alpha, spread = (jnp.float32(x)[t] for x in (exact.alpha, exact.variance))
        spread = alpha**2 * variance + spread
        away = x_t - (alpha * mean)[:, None]
        return -0.5 * (away**2).sum(-1) / spread

    return log_density


def drawn_by_kernel(kernel, keys, *, snr, steps=30):
    """Chains of data N(0.4, 0.3) in 3 dimensions from T = 30 down to 1, and their acceptances."""
    schedule, exact = pair("cosine", 30)
    sampler = predictor_corrector(
        ddim(),
        corrector_steps=steps,
        snr=snr,
        kernel=kernel,
        log_density=at_level(exact, 0.4, 0.3),
    )
    denoise = gaussian_denoiser(exact, 0.4, 0.3)
    return jax.jit(
        lambda keys: sample_chain(
            keys, schedule, denoise, (len(keys), 3), sampler=sampler, times=[30, 12, 6, 3, 1]
        )
    )(keys)


@pytest.mark.parametrize("kernel", [mcmc.mala, mcmc.hmc(3)], ids=["mala", "hmc"])
def test_a_kernel_corrects_exactly_and_each_chain_on_its_own(kernel):
    """Down to t = 1 with steps so long that many are refused: N(0.4, 0.3) noised, which ULA with
    that step would have wider by half. Alike in whatever batch."""
    keys = sample_keys(jax.random.key(0), np.arange(3000))
    found = drawn_by_kernel(kernel, keys, snr=0.6)
    _, exact = pair("cosine", 30)
    variance = exact.alpha_bar[1] * 0.3 + exact.variance[1]
    x = np.asarray(found.x_0, np.float64)
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / x.size)
    assert abs(x.mean() - exact.alpha[1] * 0.4) < 4 * np.sqrt(variance / x.size)
    assert found.reports.shape == (4, 3000)
    assert ((found.reports > 0) & (found.reports <= 1)).all()
    assert found.reports[0].mean() < 0.9
    assert found.evaluations == 4  # the predictor's
    few = drawn_by_kernel(kernel, keys[7:9], snr=0.6)
    np.testing.assert_allclose(few.x_0, x[7:9], atol=1e-4)
    np.testing.assert_allclose(few.reports, found.reports[:, 7:9], atol=1e-4)


def test_pilot_chains_find_the_snr_of_each_level():
    schedule, exact = pair("cosine", 30)
    denoise, log_density = gaussian_denoiser(exact, 0.4, 0.3), at_level(exact, 0.4, 0.3)
    times = [30, 12, 6, 3, 1]
    tuned = jax.jit(
        lambda key: tune(
            key, schedule, denoise, (64, 3), mcmc.mala, log_density, predictor=ddim(), times=times
        )
    )(jax.random.key(5))
    assert tuned.snr.shape == tuned.acceptance.shape == (4,)
    assert np.abs(tuned.acceptance - 0.574).max() < 0.08
    # Sizes go with the variance of x_t, which at t = 1 is many times sigma_t^2.
    variance = exact.alpha_bar * 0.3 + exact.variance
    ratio = 2 * np.asarray(tuned.snr) ** 2 * exact.variance[times[:-1]] / variance[times[:-1]]
    np.testing.assert_allclose(ratio, ratio[0], rtol=0.15)
    keys = sample_keys(jax.random.key(0), np.arange(500))
    chain = drawn_by_kernel(mcmc.mala, keys, snr=tuned.snr, steps=5)
    assert np.abs(chain.reports.mean(axis=1) - 0.574).max() < 0.1
