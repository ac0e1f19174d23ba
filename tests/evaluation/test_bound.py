"""The summary of the bound, against sums over whole arrays and closed forms."""

import jax
import numpy as np
import pytest
from scipy import stats

from ddpm import fixed_small, likelihood
from ddpm.evaluation.bound import summarise
from tests.exact import close, gaussian_denoiser, pair

MEAN, STD, STEPS, N = 0.1, 0.3, 50, 3000


def setting(sampled):
    schedule, exact = pair("linear", STEPS)
    denoise = gaussian_denoiser(exact, MEAN, STD**2)
    options = {"num_times": 4} if sampled else {}
    function = likelihood.sampled_bits_per_dim if sampled else likelihood.bits_per_dim
    x = np.random.default_rng(0).normal(MEAN, STD, (N, 3))
    x_0 = np.float32(np.round((x + 1) * 127.5).clip(0, 255) / 127.5 - 1)
    bound = jax.jit(
        lambda x, key: function(schedule, denoise, x, key, variance=fixed_small, **options)
    )
    return exact, x_0, bound(x_0, jax.random.key(0))


def in_batches(bound, size=700):
    """The last one filled up with what must not count."""
    for start in range(0, N, size):
        places = np.minimum(np.arange(start, start + size), N - 1)
        yield (
            type(bound)(*(np.asarray(x)[places] for x in bound)),
            np.arange(start, start + size) < N,
        )


@pytest.mark.parametrize("sampled", [False, True])
def test_means_and_errors_are_scipys_over_all_images(sampled):
    _, _, bound = setting(sampled)
    found = summarise(in_batches(bound), STEPS)
    assert found.images == N
    total = np.float64(bound.total)
    close(found.total, (total.mean(), stats.sem(total)), rtol=1e-5)
    close(found.decoder, (np.mean(bound.decoder), stats.sem(np.float64(bound.decoder))), rtol=1e-5)
    close(found.prior.value + found.steps.value + found.decoder.value, found.total.value, rtol=1e-6)


@pytest.mark.parametrize("sampled", [False, True])
def test_curves_are_those_of_gaussian_data(sampled):
    """L_{t-1}, and the error of E[x_0 | x_t], in closed form."""
    exact, _, bound = setting(sampled)
    found = summarise(in_batches(bound), STEPS)
    a, v = exact.alpha_bar[1:], exact.variance[1:]
    left = STD**2 * v / (a * STD**2 + v)
    seen = np.isfinite(found.rmse)
    close(found.rmse[seen], 127.5 * np.sqrt(left)[seen], rtol=0.2 if sampled else 0.03)
    terms = -0.5 * np.diff(a / v) * left[1:] / np.log(2)
    seen = np.isfinite(found.step[1:])
    close(found.step[1:][seen], terms[seen], rtol=0.4 if sampled else 0.06)
    close(found.step[0], found.decoder.value, rtol=1e-6)
    rate = found.prior.value + np.append(terms[::-1].cumsum()[::-1], 0)
    close(found.rate, rate, rtol=0.06, atol=0.005 if sampled else 1e-9)
    # All but the decoder has been received with x_1; the prior alone with x_T.
    close(found.rate[0] + found.decoder.value, found.total.value, rtol=1e-6)
    assert found.rate[-1] == found.prior.value


def test_nothing_and_nan_are_refused():
    _, _, bound = setting(False)
    with pytest.raises(ValueError, match="not finite, or of none"):
        summarise([], STEPS)
    with pytest.raises(ValueError, match="not finite"):
        summarise(in_batches(bound._replace(prior=bound.prior * np.nan)), STEPS)
