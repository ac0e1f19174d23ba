"""The bound's terms against their definitions in float64, and the whole against Eq. 3 directly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm import Prediction, fixed_large, fixed_small, likelihood, q_sample, schedules
from ddpm.diffusion.gaussian import decoder_log_likelihood
from ddpm.diffusion.predictions import from_x_0
from ddpm.sampling import samplers
from tests.exact import MAKERS, NAMES, Process, close, gaussian_denoiser, pair

LENGTHS = (7, 1000)
LN2 = np.log(2)
step_kl = jax.jit(likelihood.step_kl, static_argnames="variance")


def kl(m1, v1, m2, v2):
    """Between normals, in nats, float64."""
    ratio = v1 / v2
    return 0.5 * (ratio - 1 - np.log(ratio) + (m1 - m2) ** 2 / v2)


def guesses(num_steps, dimensions=3):
    """Every t > 1 with an x_0 and some prediction of it."""
    t = np.arange(2, num_steps + 1)
    x_0, guess = np.float32(np.random.default_rng(9).uniform(-1, 1, (2, num_steps - 1, dimensions)))
    return t, x_0, guess


def says(x_0, log_variance=None):
    return Prediction(jnp.asarray(x_0), jnp.zeros_like(x_0), log_variance)


@pytest.mark.parametrize("variance", [fixed_small, fixed_large])
@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_step_is_the_kl_of_the_two_posteriors(name, num_steps, variance):
    """Also for any s < t, that is in a chain over fewer times."""
    schedule, exact = pair(name, num_steps)
    t, x_0, guess = guesses(num_steps)
    for s in (t - 1, np.random.default_rng(10).integers(1, t)):
        of_x_0, _, small = (x[:, None] for x in exact.posterior(s, t))
        reverse = small if variance is fixed_small else exact.step_beta(s, t)[:, None]
        expected = kl(of_x_0 * x_0, small, of_x_0 * np.float64(guess), reverse).mean(-1) / LN2
        found = step_kl(schedule, x_0, t, says(guess), s=s, variance=variance)
        assert found.dtype == jnp.float32
        # The two log-variances are rounded apart: what that leaves is far below L_T, 1e-5.
        close(found, expected, rtol=1e-5, atol=5e-9)


def test_step_before_is_the_default_compiled_or_not():
    schedule = schedules.linear(50)
    t, x_0, guess = guesses(50)
    given = step_kl(schedule, x_0, t, says(guess), s=t - 1)
    close(step_kl(schedule, x_0, t, says(guess)), given)
    close(likelihood.step_kl(schedule, x_0, t, says(guess)), given, rtol=1e-5)


def test_learned_variance_has_the_say():
    schedule, exact = pair("linear", 1000)
    t, x_0, guess = guesses(1000)
    log_variance = np.float32(np.random.default_rng(11).normal(-6, 1, x_0.shape))
    of_x_0, _, small = (x[:, None] for x in exact.posterior(t - 1, t))
    expected = kl(of_x_0 * x_0, small, of_x_0 * np.float64(guess), np.exp(np.float64(log_variance)))
    found = step_kl(schedule, x_0, t, says(guess, log_variance))
    close(found, expected.mean(-1) / LN2, rtol=1e-5)


@pytest.mark.parametrize("num_steps", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_step_with_fixed_small_is_the_lost_snr_times_the_error(name, num_steps):
    """VDM: L_{t-1} = (SNR_s - SNR_t)/2 |x_0 - x_0_hat|^2."""
    schedule, exact = pair(name, num_steps)
    t, x_0, guess = guesses(num_steps)
    snr = exact.alpha_bar[1:] / exact.variance[1:]
    lost = -np.diff(snr)
    error = ((np.float64(x_0) - guess) ** 2).mean(-1)
    found = step_kl(schedule, x_0, t, says(guess), variance=fixed_small)
    # Below, squares of the means underflow.
    close(found * LN2, 0.5 * lost * error, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize(
    ("variance", "weights"),
    [
        (fixed_large, [0.273, 0.0682, 0.0100, 0.0102]),
        (fixed_small, [0.600, 0.0790, 0.0102, 0.0102]),
    ],
)
def test_equation_12(variance, weights):
    """The weight of |eps - eps_hat|^2; the variances' own mismatch is left out there."""
    schedule, t = schedules.linear(), np.array([2, 11, 101, 1000])
    level = schedule.at(t)
    x_0 = np.zeros((4, 1), np.float32)
    off_by_one = np.float32(level.sigma / level.alpha)[:, None]  # in eps
    nats = [step_kl(schedule, x_0, t, says(x), variance=variance) * LN2 for x in (off_by_one, x_0)]
    close(nats[0] - nats[1], weights, rtol=5e-3)


@pytest.mark.parametrize("num_steps", [1, *LENGTHS])
@pytest.mark.parametrize("name", NAMES)
def test_prior(name, num_steps):
    schedule, exact = pair(name, num_steps)
    x_0 = np.float32(np.random.default_rng(12).uniform(-1, 1, (3, 4, 2)))
    for t in (num_steps, 1):
        # -log(1 - abar) - abar, by its series where float64 cannot.
        a = exact.alpha_bar[t]
        spread = -np.log1p(-a) - a if a > 1e-3 else a**2 / 2 + a**3 / 3 + a**4 / 4
        expected = 0.5 * (spread + a * np.float64(x_0) ** 2).mean((1, 2)) / LN2 if a < 1 else np.inf
        close(likelihood.prior_kl(schedule, x_0, t=t), expected, rtol=1e-5, atol=1e-37)
    close(likelihood.prior_kl(schedule, x_0), likelihood.prior_kl(schedule, x_0, t=num_steps))


def test_prior_of_the_paper_is_about_1e_5():
    x_0 = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3))
    assert 5e-6 < likelihood.prior_kl(schedules.linear(), x_0)[0] < 2e-5


def test_decoder_term():
    """At t = 1 the mean is x_0_hat itself; the variance is that of the step before."""
    schedule, exact = pair("linear", 1000)
    x_0 = np.float32(np.random.default_rng(13).integers(0, 256, (5, 4, 4, 1)) / 127.5 - 1)
    x_t, guess = x_0 + np.float32(0.01), x_0 + np.float32(0.005)
    found = jax.jit(likelihood.decoder_nll)(schedule, x_0, x_t, jnp.ones(5, int), says(guess))
    log_likelihood = jax.jit(decoder_log_likelihood)
    nats = -log_likelihood(x_0, guess, np.float32(exact.log_small(1, 2))).mean((1, 2, 3))
    close(found * LN2, nats, rtol=1e-5)


def knows(schedule, x_0, error):
    """A denoiser that is off by `error` in x_0 at every time."""

    def denoise(x_t, t):
        assert t.shape == x_t.shape[:1]
        return from_x_0(schedule, x_t, t, x_0 + error)

    return denoise


@pytest.mark.parametrize(
    ("times", "shape", "jitted"),
    [
        (None, (3, 4, 5, 2), True),
        (None, (3, 4, 5, 2), False),
        (None, (3,), True),
        ([7], (3,), True),
        ([2, 5, 7], (3, 2), True),
        ([1, 2, 3, 4, 5, 6], (3, 2), True),
    ],
)
def test_terms_come_in_order(times, shape, jitted):
    schedule, exact = pair("linear", 7)
    x_0 = np.float32(np.random.default_rng(14).integers(1, 255, shape) / 127.5 - 1)
    error = np.float32([0.1, 0.2, 0.3]).reshape(3, *[1] * (len(shape) - 1))

    def bound(x_0, key):
        return likelihood.bits_per_dim(
            schedule, knows(schedule, x_0, error), x_0, key, variance=fixed_small, times=times
        )

    found = (jax.jit(bound) if jitted else bound)(x_0, jax.random.key(0))
    t = np.arange(1, 8) if times is None else np.array(times)
    snr = exact.alpha_bar[t] / exact.variance[t]
    expected = -0.5 * np.diff(snr) * np.float64(error.reshape(3, 1)) ** 2 / LN2
    assert found.steps.shape == (3, len(t) - 1)
    close(found.steps, expected, rtol=1e-5)
    close(found.prior, likelihood.prior_kl(schedule, x_0, t=t[-1]), rtol=1e-6)
    log_variance = fixed_small(schedule, t[0], s=0)
    axes = tuple(range(1, len(shape)))
    nats = -decoder_log_likelihood(x_0, x_0 + error, log_variance).mean(axes)
    close(found.decoder * LN2, nats, rtol=1e-5)
    close(found.total, found.prior + found.steps.sum(-1) + found.decoder, rtol=1e-6)
    squares = np.broadcast_to(np.float64(error.reshape(3, 1)) ** 2, (3, len(t)))
    close(found.squared_error, squares, rtol=1e-5)


def bound_of(schedule, x_0, key, **options):
    return likelihood.bits_per_dim(schedule, knows(schedule, x_0, 0), x_0, key, **options)


def test_bound_of_a_chain_of_one_step():
    schedule = MAKERS["linear"](1)
    x_0 = jnp.zeros((2, 3))
    found = jax.jit(lambda x_0: bound_of(schedule, x_0, jax.random.key(0)))(x_0)
    assert found.steps.shape == (2, 0)
    assert jnp.isfinite(found.total).all()


def test_noise_depends_on_the_key_alone():
    schedule, x_0 = schedules.linear(7), jnp.zeros((2, 3))
    copy = lambda x_t, t: Prediction(x_t, x_t)  # noqa: E731
    total = jax.jit(lambda key: likelihood.bits_per_dim(schedule, copy, x_0, key).total)
    first, again, other = (total(jax.random.key(k)) for k in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).all()
    assert first[0] != first[1]


@pytest.mark.parametrize("times", [[0, 1, 2], [3, 2, 1], [1, 1, 2], [1, 8], [], [[1, 2]], [1.5]])
def test_times_that_are_no_rising_list_are_refused(times):
    """A sampler's falling times, with 0 in them, would give some number too."""
    schedule, x_0 = schedules.linear(7), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="times"):
        bound_of(schedule, x_0, jax.random.key(0), times=times)


def test_prediction_of_another_shape_is_refused():
    schedule, x_0 = schedules.linear(7), jnp.zeros((2, 4, 4, 3))
    grey, t = jnp.zeros((2, 4, 4, 1)), jnp.array([2, 3])
    with pytest.raises(ValueError, match="shapes must be equal"):
        likelihood.step_kl(schedule, x_0, t, says(grey))
    with pytest.raises(ValueError, match="shapes must be equal"):
        likelihood.decoder_nll(schedule, x_0, x_0, t, says(grey))
    with pytest.raises(ValueError, match="shapes must be equal"):
        likelihood.decoder_nll(schedule, x_0, grey, t, says(grey))


# Coarse enough for every term to weigh.
BETAS = [0.02, 0.05, 0.1, 0.25, 0.4, 0.7]
MEAN, STD = 0.1, 0.3


def pixels(n):
    rng = np.random.default_rng(15)
    x = np.round((rng.normal(MEAN, STD, (n, 2)) + 1) * 127.5).clip(0, 255)
    return np.float32(x / 127.5 - 1)


@pytest.mark.parametrize(
    ("variance", "times"),
    [
        (fixed_large, [1, 2, 3, 4, 5, 6]),
        (fixed_small, [1, 2, 3, 4, 5, 6]),
        (fixed_large, [1, 3, 6]),
        (fixed_small, [2, 5]),
    ],
)
def test_bound_is_the_mean_log_ratio_of_whole_chains(times, variance):
    """Eq. 3: -log p(x_{0:T}) + log q(x_{1:T} | x_0), by chains drawn forward in float64."""
    n = 40_000
    schedule, exact, x_0 = schedules.from_betas(BETAS), Process(BETAS), pixels(n)
    exact_denoiser = gaussian_denoiser(exact, MEAN, STD**2)
    bound = jax.jit(
        lambda x_0, key: likelihood.bits_per_dim(
            schedule, exact_denoiser, x_0, key, variance=variance, times=times
        )
    )(x_0, jax.random.key(0))

    def reverse(x_t, s, t):
        """The model's mean and std, s = 0 as the decoder has it."""
        gain = exact.alpha[t] * STD**2 / (exact.alpha_bar[t] * STD**2 + exact.variance[t])
        of_x_0, of_x_t, small = exact.posterior(s, t)
        mean = of_x_0 * (MEAN + gain * (x_t - exact.alpha[t] * MEAN)) + of_x_t * x_t
        if s == 0:
            return mean, np.exp(0.5 * exact.log_small(t, min(2 * t, 6)))
        return mean, np.sqrt(small if variance is fixed_small else exact.step_beta(s, t))

    rng = np.random.default_rng(16)
    log_ratio, x_s = 0.0, np.float64(x_0)
    for s, t in zip([0, *times[:-1]], times, strict=True):
        beta = exact.step_beta(s, t)
        forward = stats.norm(np.sqrt(1 - beta) * x_s, np.sqrt(beta))
        x_t = rng.normal(forward.mean(), forward.std())
        log_ratio += forward.logpdf(x_t)
        mean, std = reverse(x_t, s, t)
        if s == 0:
            upper = np.where(x_0 > 0.999, np.inf, (x_s + 1 / 255 - mean) / std)
            lower = np.where(x_0 < -0.999, -np.inf, (x_s - 1 / 255 - mean) / std)
            log_ratio -= np.log(stats.norm.cdf(upper) - stats.norm.cdf(lower))
        else:
            log_ratio -= stats.norm.logpdf(x_s, mean, std)
        x_s = x_t
    log_ratio -= stats.norm.logpdf(x_s)

    direct = log_ratio.mean(-1) / LN2
    difference = direct - np.float64(bound.total)
    standard_error = difference.std() / np.sqrt(n)
    assert standard_error < 0.01 * direct.mean()
    assert abs(difference.mean()) < 4 * standard_error


def test_expected_steps_on_gaussian_data():
    """With fixed small: the lost SNR times half the posterior variance of x_0 given x_t."""
    n, dimensions = 20_000, 4
    schedule, exact = pair("cosine", 7)
    x_0 = np.float32(np.random.default_rng(17).normal(MEAN, STD, (n, dimensions)))
    bound = jax.jit(
        lambda x_0, key: likelihood.bits_per_dim(
            schedule, gaussian_denoiser(exact, MEAN, STD**2), x_0, key, variance=fixed_small
        )
    )(x_0, jax.random.key(1))
    a, v = exact.alpha_bar[1:], exact.variance[1:]
    left = STD**2 * v / (a * STD**2 + v)
    expected = -0.5 * np.diff(a / v) * left[1:] / LN2
    # An average of n * dimensions squares of normals.
    close(bound.steps.mean(0), expected, rtol=4 * np.sqrt(2 / (n * dimensions)))


def test_terms_use_the_x_t_of_their_own_time():
    schedule = schedules.linear(7)
    x_0, key = jnp.zeros((2, 3)), jax.random.key(3)
    copy = lambda x_t, t: Prediction(x_t, x_t)  # noqa: E731
    found = likelihood.bits_per_dim(schedule, copy, x_0, key, variance=fixed_small)

    @jax.jit
    def term(t):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), t))(jnp.arange(2))
        eps = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
        x_t = q_sample(schedule, x_0, t, eps)
        return likelihood.step_kl(schedule, x_0, t, copy(x_t, t), variance=fixed_small)

    for t in range(2, 8):
        close(found.steps[:, t - 2], term(t), rtol=1e-5)


def test_fast_sampling_times_are_not_mistaken_for_the_bounds():
    """The way to use one list for both: turned round, without 0."""
    schedule, x_0 = schedules.linear(7), jnp.zeros((2, 3))
    times = samplers.times(7, 3)[::-1][1:]
    found = jax.eval_shape(lambda x: bound_of(schedule, x, jax.random.key(0), times=times), x_0)
    assert found.steps.shape == (2, 2)


def test_pixels_that_are_not_scaled_are_refused():
    with pytest.raises(ValueError, match=r"x_0 is of uint8: must be scaled to \[-1, 1\]"):
        bound_of(schedules.linear(7), np.zeros((2, 3), np.uint8), jax.random.key(0))


def test_published_figures_give_the_published_codelength():
    """RMSE 0.95 of 255 at the first step's variance, 5.45e-5: a decoder term of 1.975 bits/dim."""
    schedule, rng = schedules.linear(1000), np.random.default_rng(18)
    x_0 = np.float32(rng.integers(1, 255, (8, 200, 200)) / 127.5 - 1)
    guess = x_0 + np.float32(rng.normal(0, 0.951 / 127.5, x_0.shape))
    found = likelihood.decoder_nll(schedule, x_0, x_0, jnp.ones(8, int), says(guess))
    close(found.mean(), 1.975, rtol=2e-3)
