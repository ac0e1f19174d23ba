"""Inpainting (RePaint) on closed-form denoisers: conditional moments, the times of its jumps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm import Prediction, ancestral, ddim, editing, fixed_small, sample, sample_chain
from ddpm.sampling.samplers import Sampler, times
from tests.exact import close, gaussian_denoiser, levels, pair

MEAN, VARIANCE = 0.4, 0.09
KEY = jax.random.key(3)
CENTRE = np.array([0.3, -0.2])
COVARIANCE = np.array([[0.5, 0.4], [0.4, 0.6]])


def correlated_denoiser(exact):
    """E[x_0 | x_t] for x_0 ~ N(CENTRE, COVARIANCE), in its eigenbasis."""
    values, basis = (jnp.asarray(a, jnp.float32) for a in np.linalg.eigh(COVARIANCE))
    tables = levels(exact)

    def denoise(x_t, t):
        alpha, sigma = (table[t][:, None] for table in tables)
        centred = (x_t - alpha * CENTRE) @ basis / (alpha**2 * values + sigma**2) @ basis.T
        x_0 = CENTRE + alpha * (centred @ basis * values @ basis.T)
        return Prediction(x_0, sigma * centred)

    return denoise


@functools.partial(jax.jit, static_argnames="resamplings")
def drawn(key, x_0, resamplings):
    schedule, exact = pair("cosine", 40)
    return editing.inpaint(
        key,
        schedule,
        correlated_denoiser(exact),
        x_0,
        jnp.array([True, False]),
        sampler=ancestral(fixed_small),
        jump_length=5,
        resamplings=resamplings,
    )


@functools.cache
def painted(known, resamplings, n=4000):
    """Samples of the second coordinate where the first is `known`."""
    x_0 = np.tile(np.float32([known, 7.0]), (n, 1))  # 7: what is not kept must not matter
    found = np.asarray(drawn(KEY, x_0, resamplings), np.float64)
    assert (found[:, 0] == np.float32(known)).all()
    return found[:, 1]


def painted_moments(known, path, exact):
    """Mean and variance of the second coordinate at the end of the path, in float64: with this
    denoiser every step is affine, and what is known is drawn without regard to the rest."""
    mean, spread = np.zeros(2), np.eye(2)
    for t, s in itertools.pairwise(path):
        if s > t:
            ratio = exact.alpha[s] / exact.alpha[t]
            mean, spread = ratio * mean, ratio**2 * spread + exact.step_beta(t, s) * np.eye(2)
            continue
        marginal = exact.alpha_bar[t] * COVARIANCE + exact.variance[t] * np.eye(2)
        gain = exact.alpha[t] * COVARIANCE @ np.linalg.inv(marginal)
        of_x_0, of_x_t, added = exact.posterior(s, t)
        slope = of_x_0 * gain + of_x_t * np.eye(2)
        mean = slope @ mean + of_x_0 * (CENTRE - gain @ CENTRE * exact.alpha[t])
        spread = slope @ spread @ slope.T + added * np.eye(2)
        mean[0], spread[0], spread[:, 0] = exact.alpha[s] * known, 0, 0
        spread[0, 0] = exact.variance[s]
    return mean[1], spread[1, 1]


@pytest.mark.parametrize("known", [-0.9, 1.2])
def test_what_is_painted_fits_what_is_known_with_resamplings(known):
    _, exact = pair("cosine", 40)
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    mean = CENTRE[1] + slope * (known - CENTRE[0])
    variance = COVARIANCE[1, 1] - slope * COVARIANCE[0, 1]
    off = []
    for resamplings in (1, 10):
        found = painted(known, resamplings)
        path = editing.repaint_times(times(40), jump_length=5, resamplings=resamplings)
        right, spread = painted_moments(known, path, exact)
        assert abs(found.mean() - right) < 4 * np.sqrt(spread / len(found))
        assert abs(found.var() / spread - 1) < 4 * np.sqrt(2 / len(found))
        off.append((abs(found.mean() - mean), abs(found.var() / variance - 1)))
    # Without going back, what is known is heard of too late: far off the mean, and too wide.
    (mean_once, wide_once), (mean_often, wide_often) = off
    assert mean_once > 0.25
    assert mean_often < 0.1
    assert wide_often < wide_once


@pytest.mark.parametrize(
    ("steps", "resamplings", "way", "width"),
    [(250, 1, 0.56, 1.12), (250, 10, 0.93, 0.96), (250, 30, 0.97, 0.95), (50, 30, 0.72, 1.01)],
)
def test_what_is_painted_is_as_far_off_as_its_docstring_says(steps, resamplings, way, width):
    known, (_, exact) = 1.2, pair("linear", 1000)
    slope = COVARIANCE[0, 1] / COVARIANCE[0, 0]
    path = editing.repaint_times(times(1000, steps), resamplings=resamplings)
    mean, variance = painted_moments(known, path, exact)
    close((mean - CENTRE[1]) / (slope * (known - CENTRE[0])), way, atol=0.005)
    close(np.sqrt(variance / (COVARIANCE[1, 1] - slope * COVARIANCE[0, 1])), width, atol=0.005)
    assert f"{way}" in editing.inpaint.__doc__


@pytest.mark.parametrize("sampler", [ancestral(), ddim(0.5, steps=7)])
def test_with_nothing_kept_inpainting_is_sampling(sampler):
    schedule, exact = pair("linear", 20)
    denoise, x_0 = gaussian_denoiser(exact, MEAN, VARIANCE), jnp.full((3, 2), 0.5)
    nothing = jnp.zeros((3, 2), bool)

    @jax.jit
    def both(key):
        return (
            editing.inpaint(
                key, schedule, denoise, x_0, nothing, sampler=sampler, jump_length=2, resamplings=1
            ),
            sample(key, schedule, denoise, x_0.shape, sampler=sampler),
        )

    found, plain = both(KEY)
    close(found, plain, rtol=1e-6)


def test_known_part_gets_another_noise_at_each_visit():
    """At x_s on the way down: of x_0 = 0, the known part is sigma_s times its noise."""
    n = 3000
    schedule, exact = pair("cosine", 9)
    sampler = ancestral(fixed_small)
    x_0, keep = jnp.zeros((n, 2)), jnp.array([True, False])
    path = editing.repaint_times(times(9), jump_length=3, resamplings=3)
    chain = jax.jit(
        lambda key: sample_chain(
            key,
            schedule,
            correlated_denoiser(exact),
            x_0.shape,
            sampler=editing.inpainting(sampler, x_0, keep),
            times=path,
            snapshots=len(path),
        )
    )(KEY)
    assert (np.asarray(chain.times) == path[:-1]).all()
    known = np.float64(chain.x_t)[..., 0]
    down = np.flatnonzero(np.diff(path[:-1]) < 0) + 1
    eps = known[down] / exact.sigma[path[:-1][down], None]
    close(eps.var(axis=1), 1, atol=0.12)
    correlation = np.corrcoef(eps) - np.eye(len(down))
    assert abs(correlation).max() < 0.09
    # Going up, nothing is predicted anew.
    up = np.flatnonzero(np.diff(path) > 0)
    predicted = np.asarray(chain.predicted_x_0)
    assert len(up) == 2 * 2
    assert (predicted[up] == predicted[up - 1]).all()
    assert chain.evaluations == len(path) - 1 - len(up)


def test_going_up_is_the_forward_process():
    schedule, exact = pair("linear", 1000)
    x_0 = jnp.full((20_000, 1), 0.7)
    sampler = editing.inpainting(ancestral(), x_0, jnp.ones((1, 1), bool))
    denoise = gaussian_denoiser(exact)
    chain = jax.jit(
        lambda key: sample_chain(
            key, schedule, denoise, x_0.shape, sampler=sampler, times=[400, 50, 300, 0], snapshots=3
        )
    )(KEY)
    low, high = (np.float64(x)[:, 0] for x in chain.x_t[1:])
    for x, t in ((low, 50), (high, 300)):
        z = (x - exact.alpha[t] * 0.7) / exact.sigma[t]
        assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-4
    ratio = exact.alpha[300] / exact.alpha[50]
    z = (high - ratio * low) / np.sqrt(exact.step_beta(50, 300))
    assert stats.kstest(z, stats.norm.cdf).pvalue > 1e-4
    assert abs(np.corrcoef(z, low)[0, 1]) < 4 / np.sqrt(len(z))
    assert (chain.x_0 == x_0).all()


def test_times_that_jump_by_hand():
    found = editing.repaint_times([50, 40, 30, 20, 10, 0], jump_length=2, resamplings=2)
    assert found.tolist() == [50, 40, 30, 50, 40, 30, 20, 10, 30, 20, 10, 0]
    found = editing.repaint_times([3, 2, 1, 0], jump_length=1, resamplings=3)
    assert found.tolist() == [3, 2, 3, 2, 3, 2, 1, 2, 1, 2, 1, 0]
    assert editing.repaint_times([3, 1.5, 0], resamplings=1).tolist() == [3, 1.5, 0]


def test_times_of_the_paper():
    """250 steps: from the 1st, 11th, .. 231st before the end ten steps up, nine times each."""
    found = editing.repaint_times(times(1000, 250))
    ups = np.flatnonzero(np.diff(found) > 0)
    starts, counts = np.unique(found[ups], return_counts=True)
    assert starts.tolist() == [4 * (1 + 10 * k) for k in range(24)]
    assert (counts == 9).all()
    assert (np.diff(found)[ups] == 40).all()
    down = np.diff(found)[np.diff(found) < 0]
    assert (down == -4).all()
    assert len(down) == 250 + 24 * 9 * 10
    assert found[-1] == 0


def with_memory():
    return Sampler(ancestral().step, None, memory=lambda x: x)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: editing.inpainting(with_memory(), x, x > 0), "without a memory"),
        (lambda x: editing.inpainting(ancestral(), x, x), "float32: must be bool"),
        (
            lambda x: editing.inpainting(ancestral(), x, x[:, :1].T > 0),
            r"keep is of shape \(1, 3\)",
        ),
        (lambda x: editing.repaint_times([3, 2, 0], jump_length=0), "at least 1"),
        (lambda x: editing.repaint_times([3, 2, 0], resamplings=0), "at least 1"),
        (
            lambda x: editing.repaint_times([3, 2, 0], jump_length=2),
            "less than the chain's 2 steps",
        ),
    ],
)
def test_wrong_inpainting_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(jnp.zeros((3, 2)))
