"""What the continuous bound leaves out: L_T + L_0, against quadrature, closed forms, likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddpm import Prediction, fixed_small, likelihood, q_sample, schedules
from ddpm.diffusion import continuous
from ddpm.diffusion.losses import ends_of_bound
from ddpm.diffusion.variances import wide_decoder
from tests.exact import close

LN2 = np.log(2)
GREY = np.arange(256) / 127.5 - 1
CLEAR, DARK = 60.0, -60.0  # where L_0, and L_T, are nothing


def ends(log_snr_0, log_snr_1, x_0, eps):
    schedule = continuous.ContinuousSchedule(lambda t: log_snr_0 + (log_snr_1 - log_snr_0) * t)
    return ends_of_bound(schedule, jnp.float32(x_0), jnp.float32(eps))


ends_of = jax.jit(ends)


@pytest.mark.parametrize("log_snr", [3.0, -1.0, -5.0, -14.0])
def test_prior_is_the_kl_to_the_standard_normal(log_snr):
    """By quadrature over x_T; each example by itself."""
    x_0, log_alpha_bar = np.array([-1.0, -0.2, 0.0, 1.0]), special.log_expit(log_snr)
    q = [stats.norm(np.exp(log_alpha_bar / 2) * x, special.expit(-log_snr) ** 0.5) for x in x_0]

    def integrand(z, q):
        return q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z))

    expected = [integrate.quad(integrand, -12, 12, (q,), epsabs=1e-14)[0] / LN2 for q in q]
    found = ends_of(CLEAR, log_snr, x_0[:, None], np.zeros((4, 1)))
    close(found, expected, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("log_snr", [2.0, -5.0, -12.0])
def test_prior_of_gaussian_data(log_snr):
    """In expectation (alpha^2 v + sigma^2 - 1 - log sigma^2)/2 for a variance v about 0."""
    variance, n = 0.3, 2000
    x_0 = stats.norm.ppf((np.arange(n) + 0.5) / n)
    x_0 *= np.sqrt(variance / np.mean(x_0**2))
    alpha_bar, rest = special.expit(log_snr), special.expit(-log_snr)
    expected = (alpha_bar * (variance - 1) - np.log(rest)) / 2 / LN2
    close(ends_of(CLEAR, log_snr, x_0[None], np.zeros((1, n))), [expected], rtol=1e-4)


@pytest.mark.parametrize("log_snr", [13.3, 6.0, 0.0])
def test_decoder_is_that_of_the_likelihood(log_snr):
    """Its L_0 for a network that predicts x_t/alpha_t, with the variance sigma_t^2/alpha_t^2."""
    rng = np.random.default_rng(0)
    x_0 = np.float32(rng.permutation(GREY).reshape(4, 8, 8, 1))
    eps = np.float32(rng.normal(size=x_0.shape))
    table = schedules.from_log_snr([log_snr, DARK])

    @jax.jit
    def decoder(x_0, eps):
        t = jnp.ones(4, int)
        x_t = q_sample(table, x_0, t, eps)
        mean = x_t / table.at(1).alpha
        variance = wide_decoder(fixed_small)
        return likelihood.decoder_nll(table, x_0, x_t, t, Prediction(mean, eps), variance=variance)

    expected = decoder(x_0, eps)
    close(ends_of(log_snr, DARK, x_0, eps), expected, rtol=2e-4)
    # A table's own ends, t = 1 and T.
    close(jax.jit(ends_of_bound)(table, x_0, eps), expected, rtol=2e-4)


def test_decoder_between_its_limits():
    """Certain where the noise is far below a bin, a density times its width where it is above."""
    middle = GREY[1:255].reshape(1, -1)
    eps = np.random.default_rng(1).normal(size=middle.shape)
    close(ends_of(22.0, DARK, middle, eps), [0], atol=1e-6)
    spread = np.exp(1.0)  # at log-SNR -2
    density = stats.norm.logpdf(spread * eps, scale=spread)
    close(ends_of(-2.0, DARK, middle, eps), -(density + np.log(2 / 255)).mean(-1) / LN2, rtol=1e-4)
    # The first and the last grey level have all that is beyond.
    close(ends_of(-2.0, DARK, [[-1.0, 1.0]], np.zeros((1, 2))), [1.0], rtol=2e-3)


def test_their_gradients():
    """By a(1 - a)(x^2 - 1 + 1/(1 - a))/2 of the last log-SNR, a = alpha^2; by -1/2 of the first."""
    x_0, log_snr = np.float32(GREY[[20, 200]])[None], -2.5
    eps = np.float32([[0.3, -1.0]])

    @jax.jit
    def slopes(first, last):
        return jax.grad(lambda a, b: ends(a, b, x_0, eps).sum(), argnums=(0, 1))(first, last)

    a = special.expit(log_snr)
    expected = a * (1 - a) * np.mean(np.float64(x_0) ** 2 - 1 + 1 / (1 - a)) / 2 / LN2
    of_first, of_last = slopes(0.0, log_snr)
    close(of_last, expected, rtol=1e-4)
    close(of_first, -1 / 2 / LN2, rtol=1e-3)
    assert slopes(13.3, DARK)[1] < 1e-6


def test_the_whole_is_a_sum_and_takes_all_dimensions_alike():
    rng = np.random.default_rng(2)
    x_0, eps = rng.choice(GREY, (3, 4, 4, 2)), rng.normal(size=(3, 4, 4, 2))
    both = ends_of(5.0, -2.0, x_0, eps)
    assert both.shape == (3,)
    close(both, ends_of(5.0, DARK, x_0, eps) + ends_of(CLEAR, -2.0, x_0, eps), rtol=1e-5)
    flat = ends_of(5.0, -2.0, x_0.reshape(3, -1), eps.reshape(3, -1))
    close(both, flat, rtol=1e-5)
