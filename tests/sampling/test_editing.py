"""Variations, interpolation and inversion on closed-form denoisers: what equals what."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import ancestral, ddim, editing, sample, schedules
from ddpm.sampling.samplers import times
from tests.exact import close, gaussian_denoiser, mixture_denoiser, pair

MEAN, VARIANCE = 0.4, 0.09
KEY = jax.random.key(3)


# --- Variations, interpolation, shared latents


def setting(name="linear", num_steps=20, variance=VARIANCE):
    schedule, exact = pair(name, num_steps)
    return schedule, gaussian_denoiser(exact, MEAN, variance), exact


def test_variation_from_the_last_time_is_a_sample_and_from_the_first_the_data():
    schedule, denoise, _ = setting("steep", 1000)  # nothing is left of x_0 at T
    x_0 = jnp.array([[3.0, -1.0], [2.0, 0.0]])
    sampler = ddim(steps=10)
    fresh, found = jax.jit(
        lambda key: (
            sample(key, schedule, denoise, x_0.shape, sampler=sampler),
            editing.vary(key, schedule, denoise, x_0, 1000, sampler=sampler),
        )
    )(KEY)
    close(found, fresh, rtol=1e-6)
    schedule, denoise, exact = setting()
    gain = exact.alpha[1] * VARIANCE / (exact.alpha_bar[1] * VARIANCE + exact.variance[1])
    near = jax.jit(lambda key: editing.vary(key, schedule, denoise, x_0, 1))(KEY)
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

    @jax.jit
    def edits(key, first, last):
        vary = functools.partial(editing.vary, key, schedule, denoise, t=11, sampler=sampler)
        found = editing.interpolate(
            key,
            schedule,
            denoise,
            first,
            last,
            [0.0, 0.25, 1.0],
            11,
            sampler=sampler,
            shared_noise=shared_noise,
        )
        return found, vary(first), vary(last)

    found, of_first, of_last = edits(KEY, first, last)
    assert found.shape == (3, 3, 4)
    close(found[0], of_first, rtol=1e-5, atol=1e-6)
    end = np.abs(found[2] - of_last)
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
    for edit in map(jax.jit, (
        lambda key, x: editing.vary(key, schedule, denoise, x, 10),
        lambda key, x: editing.interpolate(key, schedule, denoise, x, -x, [0.5], 10)[0],
        lambda key, x: editing.inpaint(key, schedule, denoise, x, keep, resamplings=2),
    )):  # fmt: skip
        both = edit(KEY, x_0)
        close(edit(KEY, x_0[:2]), both[:2], rtol=1e-5, atol=1e-6)
        assert (edit(KEY, x_0) == both).all()
        other = edit(jax.random.key(4), x_0)
        assert (np.abs(other - both)[:, 1:] > 1e-4).all()


def test_shared_chain_is_one_until_it_parts():
    schedule, denoise, _ = setting()
    arguments = schedule, denoise, (4, 3)
    draw = lambda key, t: editing.share(key, *arguments, t, sampler=ancestral())  # noqa: E731
    whole, *shared, last = jax.jit(
        lambda key: [sample(key, *arguments), *(draw(key, t) for t in (20, 5, 2, 1))]
    )(KEY)
    spread = []
    for found in shared:
        close(found[0], whole[0], rtol=1e-5, atol=1e-6)
        spread.append(float(np.abs(found[1:] - found[0]).mean()))
    assert spread[0] > spread[1] > spread[2] > 0
    assert np.ptp(last, axis=0).max() == 0  # the last step draws nothing
    for t in (0, 21, 2.5):
        with pytest.raises(ValueError, match="one of the chain's times above 0"):
            draw(KEY, t)


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

    @jax.jit
    def there_and_back(x):
        x_t = editing.invert(schedule, denoise, x, times=path).x_t
        return sample(KEY, schedule, denoise, x.shape, sampler=ddim(), times=path, x_t=x_t)

    close(there_and_back(x), x, atol=1e-5)


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
