"""Rates of ideal coders against information, distortions against samples, times against trying
all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import Prediction, ddim, fixed_small, q_sample, sample, schedules
from ddpm.codec import rates
from ddpm.diffusion.analytic import analytic
from ddpm.sampling import samplers
from tests.exact import close

SCHEDULE = schedules.linear(1000)
SNR = np.exp(np.float64(SCHEDULE.log_snr) + np.float64(SCHEDULE.log_snr_low))
TIMES = [np.array([1000, 40]), np.array([1000, 700, 500, 300, 120, 40])]
SPECTRUM = np.array([2.0, 0.3, 0.05])


def erring(x_0, error):
    """Predicts x_0 with a squared error that is error[t] in every dimension, exactly."""

    def denoise(x_t, t):
        off = jnp.sqrt(jnp.asarray(error, jnp.float32))[t][:, None]
        return Prediction(x_0 - off, x_t)

    return denoise


def exact_denoiser(eigenvalues):
    """E[x_0 | x_t] of x_0 ~ N(0, diag(eigenvalues))."""
    variance = jnp.asarray(eigenvalues, jnp.float32)

    def denoise(x_t, t):
        level = SCHEDULE.at(t)
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        scaled = x_t / (alpha**2 * variance + sigma**2)
        return Prediction(alpha * variance * scaled, sigma * scaled)

    return denoise


@pytest.mark.parametrize("times", TIMES)
def test_the_rate_of_the_true_reverse_process_is_the_information(times):
    """White data, whose error by the exact denoiser is v / (1 + v SNR): matched variance is the
    true one, and gives I in any number of steps; beta-tilde, a left Riemann sum, more than I."""
    variance = 0.3
    error = variance / (1 + variance * SNR)
    x_0 = jnp.float32(np.random.default_rng(0).normal(size=(2, 3)))
    denoise = erring(x_0, error)
    key = jax.random.key(0)
    curve = rates.ideal_curve(SCHEDULE, denoise, x_0, key, times[::-1])
    np.testing.assert_array_equal(curve.times, times)
    close(curve.squared_error, [error[times]] * 2, rtol=1e-5)
    steps = curve.rate - curve.rate[:, :1]
    expected = rates.gaussian_information([variance], SNR[times])
    close(steps, [expected - expected[0]] * 2, rtol=1e-5, atol=1e-5)
    matched = analytic(jnp.float32(np.append(0, 1 - SNR[1:] * error[1:])))
    same = rates.ideal_curve(SCHEDULE, denoise, x_0, key, times, variance=matched)
    close(same.rate, curve.rate, rtol=1e-4, atol=1e-5)
    small = rates.ideal_curve(
        SCHEDULE, denoise, x_0, jax.random.key(0), times, variance=fixed_small
    )
    riemann = np.cumsum(np.diff(SNR[times]) * error[times[:-1]]) / 2 / np.log(2)
    close((small.rate - small.rate[:, :1])[:, 1:], [riemann] * 2, rtol=1e-5)
    assert (riemann > expected[1:] - expected[0]).all()
    # The first rate is that of the prior, by the examples themselves.
    assert (curve.rate[:, 0] < 1e-4).all()
    assert curve.rate[0, 0] != curve.rate[1, 0]


def test_examples_share_the_variance_that_is_matched_to_all():
    x_0, times = jnp.zeros((2, 1)), TIMES[1]
    error = np.stack([np.full(1001, 0.02), np.full(1001, 0.3)], axis=1)

    def denoise(x_t, t):
        off = jnp.sqrt(jnp.float32(error))[t, jnp.arange(2)]
        return Prediction(x_0 - off[:, None], x_t)

    curve = rates.ideal_curve(SCHEDULE, denoise, x_0, jax.random.key(0), times)
    ratio = 1 + np.diff(SNR[times]) * 0.16
    # KL of Gaussians with variances 1 and `ratio`, means g e apart.
    kls = [(np.log(ratio) + (1 + np.diff(SNR[times]) * e) / ratio - 1) / 2 for e in (0.02, 0.3)]
    expected = np.cumsum(kls, axis=1) / np.log(2)
    close((curve.rate - curve.rate[:, :1])[:, 1:], expected, rtol=1e-5)


def test_the_three_decoders_have_their_distortions():
    """Chains from x_t with the exact denoiser, of many steps, against the closed forms."""
    t, denoise = 300, exact_denoiser(SPECTRUM)
    x_0 = np.random.default_rng(1).normal(size=(6000, 3)) * np.sqrt(SPECTRUM)
    x_0 = jnp.asarray(x_0, jnp.float32)
    x_t = q_sample(
        SCHEDULE, x_0, jnp.full(6000, t), jax.random.normal(jax.random.key(2), x_0.shape)
    )
    times = np.append(np.arange(t, 0, -2), 0)
    decoded = [denoise(x_t, jnp.full(6000, t)).x_0] + [
        sample(jax.random.key(3), SCHEDULE, denoise, x_0.shape, sampler=s, times=times, x_t=x_t)
        for s in (samplers.ancestral(fixed_small), ddim())
    ]
    for i in range(3):  # each dimension, and with it the mean over them
        expected = rates.gaussian_distortions(SPECTRUM[i : i + 1], SNR[t])
        found = [((x - x_0)[:, i] ** 2).mean() for x in decoded]
        # The chains' own steps are within the spread of 6000 squares.
        close(found, expected, rtol=4 * np.sqrt(2 / 6000))
    of_all = rates.gaussian_distortions(SPECTRUM, [SNR[t], 0.0])
    close(of_all.posterior_mean, [(SPECTRUM / (1 + SPECTRUM * SNR[t])).mean(), SPECTRUM.mean()])
    assert of_all.posterior_mean[0] < of_all.probability_flow[0] < of_all.ancestral[0]


def test_no_codec_is_below_the_rate_distortion_function():
    """R(D) <= I, with equality for white data alone; and where the water covers no eigenvalue it
    is log2 of the spectrum's geometric mean over D."""
    for snr in (0.1, 3.0, 400.0):
        for spectrum in ([0.7, 0.7], SPECTRUM):
            least = rates.gaussian_distortions(spectrum, snr).posterior_mean
            bound = rates.gaussian_rate(spectrum, float(least))
            information = rates.gaussian_information(spectrum, snr)
            if spectrum is SPECTRUM:
                assert bound < information * (1 - 1e-6)
            else:
                close(bound, information, rtol=1e-9)
    dry = np.log2(SPECTRUM.prod() ** (1 / 3) / 0.04) / 2
    close(rates.gaussian_rate(SPECTRUM, 0.04), dry, rtol=1e-12)
    # Water at 0.1: the last dimension loses all it has, 0.05.
    wet = (np.log2(20) + np.log2(3)) / 6
    close(rates.gaussian_rate(SPECTRUM, 0.25 / 3), wet, rtol=1e-12)
    assert rates.gaussian_rate(SPECTRUM, 1.0) == 0
    with pytest.raises(ValueError, match="distortion = 0"):
        rates.gaussian_rate(SPECTRUM, 0)


def test_a_variance_for_each_frequency_is_the_true_reverse_process():
    """Images whose frequencies are independent: in few steps the scalar variance costs more than
    I, one for each frequency does not."""
    spectrum = 1 / (1 + np.add.outer(np.arange(4) ** 2, np.arange(4) ** 2))
    flat = exact_denoiser(spectrum.ravel())

    def dct(x, back=False):
        transform = jax.scipy.fft.idctn if back else jax.scipy.fft.dctn
        return transform(x.reshape(-1, 4, 4, 1), axes=(1, 2), norm="ortho")

    def denoise(x_t, t):
        found = flat(dct(x_t).reshape(-1, 16), t)
        return Prediction(*(dct(x, back=True) for x in found[:2]))

    x_0 = np.random.default_rng(4).normal(size=(4000, 4, 4, 1)) * np.sqrt(spectrum)[..., None]
    x_0 = dct(jnp.float32(x_0), back=True)
    times = TIMES[1]
    errors = rates.frequency_errors(SCHEDULE, denoise, x_0, jax.random.key(5), times)
    assert errors.shape == (6, 4, 4, 1)
    expected = spectrum / (1 + spectrum * SNR[times][:, None, None])
    close(errors[..., 0], expected, rtol=5 * np.sqrt(2 / 4000))
    gain = np.diff(SNR[times])
    information = rates.gaussian_information(spectrum.ravel(), SNR[times[[0, -1]]])
    each = rates.matched_kl(gain[:, None, None, None], errors[:-1]).mean((1, 2, 3)).sum()
    close(each, information[1] - information[0], rtol=0.01)
    scalar = rates.matched_kl(gain, errors[:-1].mean((1, 2, 3))).sum()
    assert scalar > 1.03 * each
    costs = rates.step_costs(SCHEDULE, times, errors)
    close(np.diagonal(costs, 1).sum(), each, rtol=1e-5)


def test_costs_of_steps():
    times, errors = np.array([900, 400, 20, 0]), np.array([0.4, 0.1, 0.02, 0.0])
    costs = rates.step_costs(SCHEDULE, times, errors)
    for i, j in itertools.product(range(4), repeat=2):
        if i < j < 3:
            expected = 0.5 * np.log2(1 + (SNR[times[j]] - SNR[times[i]]) * errors[i])
            close(costs[i, j], expected, rtol=1e-9)
        else:
            assert costs[i, j] == np.inf
    of_two = rates.step_costs(SCHEDULE, times, np.stack([errors, 3 * errors], axis=1))
    close(of_two[:3, :3], (costs + rates.step_costs(SCHEDULE, times, 3 * errors))[:3, :3] / 2)
    with pytest.raises(ValueError, match=r"errors \(3,\) of times \(4,\)"):
        rates.step_costs(SCHEDULE, times, errors[:3])


@pytest.mark.parametrize("overhead", [0.0, 0.3, 2.0])
def test_the_times_are_the_best_of_all(overhead):
    n, rng = 7, np.random.default_rng(6)
    costs = np.where(np.triu(np.ones((n, n)), 1), rng.uniform(0, 1, (n, n)), np.inf)

    def total(way):
        return sum(costs[i, j] + overhead for i, j in itertools.pairwise(way))

    ways = [
        (0, *middle, n - 1)
        for k in range(n - 1)
        for middle in itertools.combinations(range(1, n - 1), k)
    ]
    for num_steps in range(1, n):
        found = rates.choose_times(costs, num_steps, overhead=overhead)
        expected = min((way for way in ways if len(way) == num_steps + 1), key=total)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        rates.choose_times(costs, overhead=overhead), min(ways, key=total)
    )


def test_what_has_no_best_times_is_refused():
    costs = np.array([[np.inf, 1.0, 1.0], [np.inf, np.inf, np.inf], [np.inf] * 3])
    with pytest.raises(ValueError, match="no way from the first to the last candidate in 2 steps"):
        rates.choose_times(costs, 2)
    with pytest.raises(ValueError, match=r"num_steps = 3: must be in 1\.\.N - 1 = 2"):
        rates.choose_times(costs, 3)
    with pytest.raises(ValueError, match=r"costs \(2, 3\): must be \[N, N\]"):
        rates.choose_times(costs[:2])
