"""Editing on closed-form denoisers: conditional moments, exact inversion, what equals what."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm import Prediction, ancestral, ddim, editing, fixed_small, sample, sample_chain, schedules
from ddpm.sampling.samplers import Sampler, times
from tests.exact import close, gaussian_denoiser, levels, mixture_denoiser, pair

MEAN, VARIANCE = 0.4, 0.09
KEY = jax.random.key(3)


# --- Inpainting

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


@functools.cache
def painted(known, resamplings, n=4000):
    """Samples of the second coordinate where the first is `known`."""
    schedule, exact = pair("cosine", 40)
    x_0 = jnp.tile(jnp.array([known, 7.0]), (n, 1))  # 7: what is not kept must not matter

    @jax.jit
    def draw(key):
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

    found = np.asarray(draw(KEY), np.float64)
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


@pytest.mark.parametrize("sampler", [ancestral(), ddim(0.5, steps=7)])
def test_with_nothing_kept_inpainting_is_sampling(sampler):
    schedule, exact = pair("linear", 20)
    denoise, x_0 = gaussian_denoiser(exact, MEAN, VARIANCE), jnp.full((3, 2), 0.5)
    nothing = jnp.zeros((3, 2), bool)
    found = editing.inpaint(
        KEY, schedule, denoise, x_0, nothing, sampler=sampler, jump_length=2, resamplings=1
    )
    close(found, sample(KEY, schedule, denoise, x_0.shape, sampler=sampler), rtol=1e-6)


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


# --- Variations, interpolation, shared latents


def setting(name="linear", num_steps=20, variance=VARIANCE):
    schedule, exact = pair(name, num_steps)
    return schedule, gaussian_denoiser(exact, MEAN, variance), exact


def test_variation_from_the_last_time_is_a_sample_and_from_the_first_the_data():
    schedule, denoise, _ = setting("steep", 1000)  # nothing is left of x_0 at T
    x_0 = jnp.array([[3.0, -1.0], [2.0, 0.0]])
    fresh = sample(KEY, schedule, denoise, x_0.shape, sampler=ddim(steps=10))
    found = editing.vary(KEY, schedule, denoise, x_0, 1000, sampler=ddim(steps=10))
    close(found, fresh, rtol=1e-6)
    schedule, denoise, exact = setting()
    gain = exact.alpha[1] * VARIANCE / (exact.alpha_bar[1] * VARIANCE + exact.variance[1])
    near = editing.vary(KEY, schedule, denoise, x_0, 1)
    # The posterior mean of x_0 given x_1, whose noise is of sigma_1 = 0.01.
    close(near, MEAN + gain * (x_0 - MEAN), atol=4 * exact.sigma[1])
    assert (near != x_0).all()


@pytest.mark.parametrize("t", [300, 700, 1000])
def test_variation_is_of_the_law_of_noising_and_the_chain(t):
    """DDIM moves x_t - alpha_t m of Gaussian data by one factor, whatever it is."""
    schedule, denoise, exact = setting("cosine", 1000)
    factor, path = 1.0, [t, *(s for s in times(1000, 20) if s < t)]
    for before, s in itertools.pairwise(path):
        alpha, sigma = exact.alpha[before], exact.sigma[before]
        of_x_0 = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        factor *= exact.alpha[s] * of_x_0 + exact.sigma[s] * (1 - alpha * of_x_0) / sigma
    n = 20_000
    vary = jax.jit(lambda x: editing.vary(KEY, schedule, denoise, x, t, sampler=ddim(steps=20)))
    found = np.float64(vary(jnp.full((n, 1), 0.9)))
    spread = factor * exact.sigma[t]
    mean = MEAN + factor * exact.alpha[t] * (0.9 - MEAN)
    assert abs(found.mean() - mean) < 4 * spread / np.sqrt(n)
    assert abs(found.std() / spread - 1) < 4 / np.sqrt(2 * n)
    if t == 1000:  # samples of the data, but for the steps
        assert abs(spread / np.sqrt(VARIANCE) - 1) < 0.15


@pytest.mark.parametrize("sampler", [ancestral(steps=10), ddim(0.5, steps=5)])
@pytest.mark.parametrize("shared_noise", [True, False])
def test_ends_of_an_interpolation_are_variations(sampler, shared_noise):
    schedule, denoise, _ = setting()
    first, last = jax.random.normal(jax.random.key(1), (2, 3, 4))
    found = editing.interpolate(
        KEY,
        schedule,
        denoise,
        first,
        last,
        [0.0, 0.25, 1.0],
        11,
        sampler=sampler,
        shared_noise=shared_noise,
    )
    assert found.shape == (3, 3, 4)
    vary = functools.partial(editing.vary, KEY, schedule, denoise, t=11, sampler=sampler)
    close(found[0], vary(first), rtol=1e-5, atol=1e-6)
    end = np.abs(found[2] - vary(last))
    assert end.max() < 1e-6 if shared_noise else end.min() > 1e-5
    # Gaussian data: the chain is affine in x_t, by the same noise for all fractions.
    close(found[1], 0.75 * found[0] + 0.25 * found[2], rtol=1e-4, atol=1e-5)


def test_mix_has_the_variance_of_x_t_only_with_shared_noise():
    schedule, denoise, exact = setting("cosine", 1000)
    x_0 = jnp.zeros((20_000, 1))
    seen = []

    def spread(shared_noise):
        def spy(x_t, t):
            jax.debug.callback(lambda x: seen.append(float(x.std())), x_t)
            return denoise(x_t, t)

        editing.interpolate(
            KEY, schedule, spy, x_0, x_0, [0.5], 600, times=[600, 0], shared_noise=shared_noise
        )
        jax.effects_barrier()
        return seen[-1]

    assert abs(spread(True) / exact.sigma[600] - 1) < 0.02
    assert abs(spread(False) / (exact.sigma[600] * np.sqrt(0.5)) - 1) < 0.02


def test_given_times_are_cut_at_t():
    schedule, denoise, _ = setting()
    asked = []

    def spy(x_t, t):
        jax.debug.callback(lambda t: asked.append(float(t[0])), t)
        return denoise(x_t, t)

    editing.vary(KEY, schedule, spy, jnp.zeros((2, 3)), 7, times=[20, 12, 5, 2, 0])
    jax.effects_barrier()
    assert asked == [7, 5, 2]


@pytest.mark.parametrize("t", [0, 0.5, 21, -1, float("nan")])
def test_time_outside_is_refused(t):
    schedule, denoise, _ = setting()
    x_0 = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match=r"must be in 1\.\.T = 20"):
        editing.vary(KEY, schedule, denoise, x_0, t)
    with pytest.raises(ValueError, match=r"must be in 1\.\.T = 20"):
        editing.interpolate(KEY, schedule, denoise, x_0, x_0, [0.5], t)


def test_edit_depends_on_the_examples_key_alone():
    schedule, denoise, _ = setting()
    x_0 = jax.random.normal(jax.random.key(1), (4, 3))
    keep = jnp.array([True, False, False])
    for edit in (
        lambda key, x: editing.vary(key, schedule, denoise, x, 10),
        lambda key, x: editing.interpolate(key, schedule, denoise, x, -x, [0.5], 10)[0],
        lambda key, x: editing.inpaint(key, schedule, denoise, x, keep, resamplings=2),
    ):
        both = edit(KEY, x_0)
        close(edit(KEY, x_0[:2]), both[:2], rtol=1e-5, atol=1e-6)
        assert (edit(KEY, x_0) == both).all()
        other = edit(jax.random.key(4), x_0)
        assert (np.abs(other - both)[:, 1:] > 1e-4).all()


def test_shared_chain_is_one_until_it_parts():
    schedule, denoise, _ = setting()
    draw = functools.partial(editing.share, KEY, schedule, denoise, (4, 3), sampler=ancestral())
    whole = sample(KEY, schedule, denoise, (4, 3))
    spread = []
    for t in (20, 5, 2):
        found = draw(t)
        close(found[0], whole[0], rtol=1e-5, atol=1e-6)
        spread.append(float(np.abs(found[1:] - found[0]).mean()))
    assert spread[0] > spread[1] > spread[2] > 0
    assert np.ptp(draw(1), axis=0).max() == 0  # the last step draws nothing
    for t in (0, 21, 2.5):
        with pytest.raises(ValueError, match="one of the chain's times above 0"):
            draw(t)


# --- Inversion


@functools.partial(jax.jit, static_argnames=("steps", "iterations", "mixture", "name"))
def there_and_back(x_0, name, steps, iterations, mixture):
    schedule, exact = pair(name, 1000)
    if mixture:
        denoise = mixture_denoiser(exact, [0.5, 0.5], [[-0.7, 0.2], [0.6, -0.4]], 0.04)
    else:
        denoise = gaussian_denoiser(exact, MEAN, 0.9)
    path = times(1000, steps)
    found = editing.invert(schedule, denoise, x_0, times=path, iterations=iterations)
    back = sample(KEY, schedule, denoise, x_0.shape, sampler=ddim(), times=path, x_t=found.x_t)
    return found, back


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_inversion_is_exact(name, mixture):
    x_0 = jnp.array([[-0.7, 0.1], [0.5, -0.4], [-0.6, 0.5], [0.8, -0.1]])
    found, back = there_and_back(x_0, name, 50, 10, mixture)
    close(back, x_0, atol=1e-4)
    assert found.residual.shape == (4,)
    assert found.residual.max() < 1e-4
    found, back = there_and_back(x_0, name, 50, 0, mixture)
    assert abs(back - x_0).max() > 0.02
    assert (found.residual > 5e-4).all()


def test_long_steps_of_gaussian_data_are_solved_in_two_iterations():
    """Their eps is linear in x_t, and the secant of two points tells all of it."""
    x_0 = jnp.array([[-0.7, 0.1], [0.5, -0.4]])
    found, back = there_and_back(x_0, "linear", 5, 3, False)
    close(back, x_0, atol=1e-5)
    assert found.residual.max() < 1e-5


def test_inversion_approaches_the_flow_of_gaussian_data():
    x_0 = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)
    _, exact = pair("cosine", 1000)
    spread = exact.alpha_bar[-1] * 0.9 + exact.variance[-1]
    flow = exact.alpha[-1] * MEAN + np.sqrt(spread / 0.9) * (x_0 - MEAN)
    errors = [
        np.abs(there_and_back(x_0, "cosine", steps, 10, False)[0].x_t - flow).max()
        for steps in (100, 1000)
    ]
    assert errors[1] < 0.01
    assert errors[0] > 4 * errors[1]


def test_inversion_between_two_times_of_any_kind():
    schedule, denoise, _ = setting("linear", 1000)
    x = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)
    path = [903.5, 700, 412.25, 90]
    found = editing.invert(schedule, denoise, x, times=path)
    back = sample(KEY, schedule, denoise, x.shape, sampler=ddim(), times=path, x_t=found.x_t)
    close(back, x, atol=1e-5)


def test_inversion_without_signal_or_of_wrong_times_is_refused():
    x_0 = jnp.zeros((2, 2))
    schedule, denoise, _ = setting("jsd", 20)
    with pytest.raises(ValueError, match="no signal"):
        editing.invert(schedule, denoise, x_0)
    assert np.isfinite(editing.invert(schedule, denoise, x_0, times=times(20)[1:]).x_t).all()
    with pytest.raises(ValueError, match="must fall"):
        editing.invert(schedules.linear(20), denoise, x_0, times=[0, 10, 20])
    with pytest.raises(ValueError, match="must not be negative"):
        editing.invert(schedules.linear(20), denoise, x_0, iterations=-1)
