"""Whole chains on closed-form denoisers: what they must converge to, and how they are seeded."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from ddpm import (
    ancestral,
    clipped,
    ddim,
    denoiser,
    fixed_large,
    fixed_small,
    sample,
    sample_chain,
    sample_keys,
    schedules,
)
from ddpm.diffusion.analytic import analytic, second_moments
from ddpm.sampling import grids
from ddpm.sampling.adaptive import probability_flow
from ddpm.sampling.langevin import annealed_langevin, predictor_corrector
from ddpm.sampling.samplers import StepInfo, times
from ddpm.sampling.solvers import dpm_solver, heun, unipc
from tests.exact import NAMES, close, gaussian_denoiser, levels, mixture_denoiser, pair

MEAN, VARIANCE = 0.4, 0.25


@functools.partial(jax.jit, static_argnames=("shape", "sampler"))
def gaussian_chain(key, schedule, exact_levels, shape, sampler):
    exact = gaussian_denoiser(exact_levels, MEAN, VARIANCE)
    return sample_chain(key, schedule, exact, shape, sampler=sampler, snapshots=1)


def chain_of(name, num_steps, shape, sampler, seed=0):
    schedule, exact = pair(name, num_steps)
    return gaussian_chain(jax.random.key(seed), schedule, levels(exact), shape, sampler)


def run(*args, **options):
    return np.asarray(chain_of(*args, **options).x_0)


TWINS = {
    (num_steps, steps): (ddim(1.0, steps=steps), ancestral(fixed_small, steps=steps))
    for num_steps, steps in ((1, None), (7, 3), (1000, None), (1000, 30))
}


@pytest.mark.parametrize(("num_steps", "steps"), TWINS)
@pytest.mark.parametrize("name", NAMES)
def test_ddim_of_eta_1_is_ancestral_sampling(name, num_steps, steps):
    first, second = (run(name, num_steps, (4, 3), s) for s in TWINS[num_steps, steps])
    close(first, second, atol=2e-5)


def test_ddim_of_eta_1_is_ancestral_sampling_with_a_clipped_network():
    """The same only if eps is derived anew from the clipped x_0."""
    schedule = schedules.linear(100)
    network = lambda x, t: jnp.sin(3 * x + 0.1 * t[:, None])  # noqa: E731
    clipping = clipped(schedule, denoiser(schedule, network))
    twins = ddim(1.0, steps=40), ancestral(fixed_small, steps=40)
    first, second = jax.jit(
        lambda key: [sample(key, schedule, clipping, (4, 3), sampler=s) for s in twins]
    )(jax.random.key(0))
    close(first, second, atol=2e-5)
    assert (abs(first) <= 1).all()


FLOWS = [ddim(steps=steps) for steps in (50, 100, 1000)]


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid", "jsd"])
def test_ddim_converges_to_the_flow_of_gaussian_data_in_first_order(name):
    """x - alpha m scales with the marginal's standard deviation along the probability flow."""
    _, exact = pair(name, 1000)
    spread = exact.alpha_bar[-1] * VARIANCE + exact.variance[-1]
    errors = []
    for sampler in FLOWS:
        chain = chain_of(name, 1000, (4, 3), sampler)
        start = chain.x_t[0] - exact.alpha[-1] * MEAN
        errors.append(abs(chain.x_0 - MEAN - np.sqrt(VARIANCE / spread) * start).max())
    assert 1.6 < errors[0] / errors[1] < 2.5
    assert errors[2] < errors[1] / 7
    assert errors[2] < 0.01


def chain_moments(exact, visited, variance_of):
    """Mean and variance of x at the end of an affine Gaussian chain, in float64."""
    mean, variance = 0.0, 1.0
    for t, s in itertools.pairwise(visited):
        gain = exact.alpha[t] * VARIANCE / (exact.alpha_bar[t] * VARIANCE + exact.variance[t])
        of_x_0, of_x_t, added = variance_of(exact, s, t)
        slope = of_x_0 * gain + of_x_t
        mean = slope * mean + of_x_0 * MEAN * (1 - gain * exact.alpha[t])
        variance = slope**2 * variance + (added if s else 0)
    return mean, variance


def large(exact, s, t):
    return (*exact.posterior(s, t)[:2], exact.step_beta(s, t))


def partly(eta, exact, s, t):
    """DDIM with eps = (x_t - alpha_t x_0)/sigma_t put in."""
    added = eta**2 * exact.posterior(s, t)[2]
    of_eps = np.sqrt(exact.variance[s] - added) / exact.sigma[t]
    return exact.alpha[s] - of_eps * exact.alpha[t], of_eps, added


@pytest.mark.parametrize(
    ("sampler", "variance_of", "num_steps"),
    [
        (ancestral(fixed_small, steps=20), lambda e, s, t: e.posterior(s, t), 1000),
        (ancestral(fixed_large, steps=20), large, 1000),
        (ancestral(), large, 60),
        (ddim(0.5, steps=20), functools.partial(partly, 0.5), 1000),
        (ddim(steps=20), functools.partial(partly, 0.0), 1000),
    ],
    ids=["small", "large", "all", "half", "none"],
)
@pytest.mark.parametrize("name", ["linear", "cosine", "jsd"])
def test_moments_of_samples_are_those_of_the_chain(name, sampler, variance_of, num_steps):
    """The noise of two steps, or of two samples, being the same would show here."""
    _, exact = pair(name, num_steps)
    mean, variance = chain_moments(exact, times(num_steps, sampler.steps), variance_of)
    x = np.float64(run(name, num_steps, (10_000, 2), sampler))
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / x.size)
    assert abs(x.var() / variance - 1) < 4 * np.sqrt(2 / x.size)
    assert abs(np.corrcoef(x.T)[0, 1]) < 4 / np.sqrt(len(x))
    assert abs(np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1]) < 4 / np.sqrt(len(x))
    assert stats.kstest(x.ravel(), stats.norm(mean, np.sqrt(variance)).cdf).pvalue > 1e-4


WEIGHTS, SPREAD = np.array([0.2, 0.3, 0.5]), 0.04
CENTRES = np.array([[-1.0, 0.0], [1.0, 1.0], [0.5, -1.0]])


def analytic_ancestral():
    """With the variance that is optimal for few steps, measured on the mixture."""
    schedule, exact = pair("linear", 1000)
    denoise = mixture_denoiser(exact, WEIGHTS, CENTRES, SPREAD)
    rng = np.random.default_rng(25)
    x_0 = CENTRES[rng.choice(3, 500, p=WEIGHTS)] + SPREAD**0.5 * rng.normal(size=(500, 2))
    moments = jax.jit(lambda x: second_moments(schedule, denoise, x, jax.random.key(8)))
    return ancestral(analytic(moments(np.float32(x_0))), steps=100)


EXACT = {
    "small": (lambda: ancestral(fixed_small, steps=250), None),
    "large": (lambda: ancestral(fixed_large), None),
    "analytic": (analytic_ancestral, None),
    "ddim": (lambda: ddim(steps=100), None),
    "dpm_solver": (lambda: dpm_solver(2), 25),
    "unipc": (lambda: unipc(2), 20),
    "stochastic_1": (lambda: dpm_solver(1, stochastic=True), 250),
    "stochastic_2": (lambda: dpm_solver(2, stochastic=True), 60),
    "heun": (heun, 20),
    "churn": (lambda: heun(churn=10.0, churn_range=(0.05, 50.0)), 50),
    "flow": (lambda: probability_flow(1e-4), None),
    "langevin": (lambda: annealed_langevin(20, step_size=0.05), 40),
    "corrected": (lambda: predictor_corrector(ancestral(fixed_small), corrector_steps=2), 60),
    "corrected_solver": (lambda: predictor_corrector(dpm_solver(2)), 40),
}


@functools.cache
def true_mixture(n):
    """Draws of the mixture, and their distances from each other."""
    rng = np.random.default_rng(24)
    true = CENTRES[rng.choice(3, n, p=WEIGHTS)] + SPREAD**0.5 * rng.normal(size=(n, 2))
    signs = np.repeat([1.0, -1.0], n)
    permuted = np.stack([rng.permutation(signs) for _ in range(100)])
    return true, cdist(true, true), signs, permuted


@pytest.mark.parametrize("name", EXACT)
def test_mixture_is_sampled_in_its_shares_and_shape(name):
    """By the energy distance; `log_snr` times where a number of steps is given."""
    n = 1500
    make, steps = EXACT[name]
    schedule, exact = pair("linear", 1000)
    denoise = mixture_denoiser(exact, WEIGHTS, CENTRES, SPREAD)
    t = None if steps is None else grids.log_snr(schedule, steps)
    sampler = make()
    run = jax.jit(lambda k: sample(k, schedule, denoise, (n, 2), sampler=sampler, times=t))
    found = np.asarray(run(jax.random.key(2)))
    shares = np.bincount(cdist(found, CENTRES).argmin(1), minlength=3) / n
    assert (abs(shares - WEIGHTS) < 4 * np.sqrt(WEIGHTS * (1 - WEIGHTS) / n)).all()

    true, among_true, signs, permuted = true_mixture(n)
    across = cdist(found, true)
    distance = np.block([[cdist(found, found), across], [across.T, among_true]])

    def energy(signs):
        return -((signs @ distance) * signs).sum(-1) / n**2

    null = energy(permuted)
    # Beyond all of a hundred permutations by half of their range: not by chance.
    assert energy(signs) < 1.5 * max(null)
    assert abs(found.mean(0) - true.mean(0)).max() < 5 * true.std() * np.sqrt(2 / n)
    assert abs(np.cov(found.T) - np.cov(true.T)).max() < 0.1


# --- Seeding

DEFAULT = ancestral(fixed_large)


def compiled(function, *args):
    """function(*args), compiled as a whole: many times faster than its operations one by one."""
    return jax.tree.map(np.asarray, jax.jit(function)(*args))


@pytest.mark.parametrize("sampler", [ancestral(), ddim(0.5, steps=3)])
def test_sample_does_not_depend_on_its_batch(sampler):
    few, many = (run("linear", 7, (n, 2, 3, 1), sampler) for n in (3, 7))
    assert (few == many[:3]).all()
    assert len({x.tobytes() for x in many}) == 7


def test_key_is_split_by_the_samples_numbers():
    schedule, exact = pair("linear", 7)
    denoise = gaussian_denoiser(exact, MEAN, VARIANCE)
    together = run("linear", 7, (3, 2), DEFAULT)
    keys = sample_keys(jax.random.key(0), np.array([2, 0]))
    found = compiled(lambda keys: sample(keys, schedule, denoise, (2, 2)), keys)
    assert (found == together[[2, 0]]).all()


def test_another_key_is_another_sample():
    first, second = (run("linear", 7, (3, 2), DEFAULT, seed) for seed in (0, 1))
    assert (first != second).all()


def test_number_of_keys_must_be_that_of_samples():
    schedule, exact = pair("linear", 7)
    keys = sample_keys(jax.random.key(0), np.arange(3))
    with pytest.raises(ValueError, match="one key, or one each"):
        sample(keys, schedule, gaussian_denoiser(exact), (4, 2))


def test_more_steps_than_times_are_refused():
    schedule, exact = pair("linear", 7)
    with pytest.raises(ValueError, match="between 1 and T = 7"):
        sample(jax.random.key(0), schedule, gaussian_denoiser(exact), (4, 2), sampler=ddim(steps=8))


def test_fixed_large_is_the_default():
    schedule, exact = pair("linear", 7)
    denoise = gaussian_denoiser(exact, MEAN, VARIANCE)
    default = compiled(lambda k: sample(k, schedule, denoise, (3, 2)), jax.random.key(0))
    assert (default == run("linear", 7, (3, 2), DEFAULT)).all()


def test_chain_starts_from_standard_noise_and_asks_at_its_times():
    schedule, exact = pair("linear", 1000)
    asked = []

    def denoise(x_t, t):
        assert t.shape == (2000,)
        jax.debug.callback(lambda t: asked.append(int(t[0])), t)
        return gaussian_denoiser(exact)(x_t, t)

    chain = sample_chain(
        jax.random.key(4), schedule, denoise, (2000, 5), sampler=ddim(steps=6), snapshots=1
    )
    jax.effects_barrier()
    assert asked == [1000, 833, 667, 500, 333, 167]
    assert stats.kstest(np.asarray(chain.x_t[0]).ravel(), stats.norm.cdf).pvalue > 1e-4


# --- Snapshots

SEVEN = ancestral(steps=7)


@pytest.mark.parametrize("snapshots", [2, 4, 50])
def test_snapshots_change_nothing(snapshots):
    schedule, exact = pair("linear", 20)
    denoise, key = gaussian_denoiser(exact, MEAN, VARIANCE), jax.random.key(5)
    chain = compiled(
        lambda k: sample_chain(k, schedule, denoise, (3, 2), sampler=SEVEN, snapshots=snapshots),
        key,
    )
    kept = min(snapshots, 7)
    assert chain.x_t.shape == chain.predicted_x_0.shape == (kept, 3, 2)
    assert chain.times.shape == (kept,)
    assert (chain.x_0 == run("linear", 20, (3, 2), SEVEN, seed=5)).all()
    whole = times(20, 7)
    assert chain.times[0] == 20
    assert set(chain.times) <= set(whole[:-1])
    assert (np.diff(chain.times) < 0).all()
    assert chain.times[-1] == whole[-2]
    times_of_each = np.repeat(chain.times[:, None], 3, axis=1)
    predicted = compiled(jax.vmap(lambda x_t, t: denoise(x_t, t).x_0), chain.x_t, times_of_each)
    close(chain.predicted_x_0, predicted, rtol=1e-5, atol=1e-6)


def test_snapshots_are_one_step_apart():
    schedule, exact = pair("linear", 20)
    denoise, sampler = gaussian_denoiser(exact, MEAN, VARIANCE), ddim(steps=7)
    chain = compiled(
        lambda k: sample_chain(k, schedule, denoise, (3, 2), sampler=sampler, snapshots=7),
        jax.random.key(6),
    )
    t = times(20, 7)
    assert (chain.times == t[:-1]).all()

    def step(x_t, t_now, s, i):
        step_info = StepInfo(t_now, s, i, t)
        return sampler.step(schedule, denoise, x_t, step_info, lambda k=0: 0.0, ()).x

    expected = compiled(jax.vmap(step), chain.x_t, t[:-1], t[1:], np.arange(7))
    close([*chain.x_t[1:], chain.x_0], expected, rtol=1e-5, atol=1e-6)
    assert chain.evaluations == 7


def test_no_snapshots():
    schedule, exact = pair("linear", 20)
    denoise = gaussian_denoiser(exact)
    chain = compiled(
        lambda k: sample_chain(k, schedule, denoise, (3, 2), snapshots=0), jax.random.key(6)
    )
    assert chain.x_t.shape == (0, 3, 2)
    assert chain.times.shape == (0,)


def test_old_keys_are_keys():
    schedule, exact = pair("linear", 10)
    old, new = jax.random.PRNGKey(3), jax.random.key(3)
    denoise = gaussian_denoiser(exact)
    draw = lambda *keys: [sample(key, schedule, denoise, (2, 3)) for key in keys]  # noqa: E731
    by_old, by_new = compiled(draw, old, new)
    assert (by_old == by_new).all()


def test_ddim_upwards_is_ddim_downwards_inverted():
    """From T down in many steps and up again: the same x_T, to the order of a step."""
    schedule, exact = pair("cosine", 1000)
    denoise = gaussian_denoiser(exact, variance=0.3)

    @jax.jit
    def move(x, t, s):
        return ddim().step(schedule, denoise, x, StepInfo(t, s, 0, None), None, ()).x

    x = start = jnp.linspace(-2, 2, 8).reshape(2, 4)
    for s in range(900, 100, -1):
        x = move(x, s + 1, s)
    there = x
    for s in range(101, 901):
        x = move(x, s, s + 1)
    assert abs(there - start).max() > 0.3
    close(x, start, atol=0.01)


@pytest.mark.parametrize("sampler", [ancestral(), ddim(0.5)])
def test_a_chain_in_two_pieces_is_the_whole(sampler):
    schedule, exact = pair("linear", 7)
    denoise = gaussian_denoiser(exact, MEAN, VARIANCE)
    draw = functools.partial(
        sample, schedule=schedule, denoiser=denoise, shape=(3, 2), sampler=sampler
    )

    def pieces(key, other_key):
        x_3 = draw(key, times=[7, 6, 5, 4, 3])
        below = functools.partial(draw, times=[3, 2, 1, 0], x_t=x_3)
        return draw(key), below(key), below(other_key)

    whole, found, other = compiled(pieces, jax.random.key(4), jax.random.key(5))
    close(found, whole, rtol=1e-6)
    assert np.abs(other - whole).max() > 1e-2


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([8, 0], "t = 8 is not within T = 7..1, nor 0"),
        ([3, -1], "t = -1 is not within"),
        ([3, 0.5, 0], "t = 0.5 is not within"),
        ([3, float("nan")], "t = nan is not within"),
        ([1, 2, 3], "must fall, but after t = 1 comes 2"),
        ([3, 3, 0], "must fall, but after t = 3 comes 3"),
        ([3], "at least two"),
        ([], "at least two"),
        ([[3, 0]], "at least two"),
    ],
)
def test_times_that_do_not_fall_within_the_schedule_are_refused(times, said):
    schedule, exact = pair("linear", 7)
    denoise = gaussian_denoiser(exact)
    with pytest.raises(ValueError, match=said):
        sample(jax.random.key(0), schedule, denoise, (3, 2), times=times)


def test_whole_times_are_the_same_as_floats_and_between_them_is_a_chain_too():
    schedule, exact = pair("linear", 7)
    denoise = gaussian_denoiser(exact)

    def runs(key):
        run = functools.partial(sample, key, schedule, denoise, (3, 2))
        fixed = functools.partial(run, sampler=ddim(), x_t=jnp.ones((3, 2)))
        between = [7, 4.001, 2.001, 0], [7, 4, 2, 0]
        return (
            (run(times=[7.0, 4.0, 0.0]), run(times=[7, 4, 0])),
            [run(times=times) for times in between],
            [fixed(times=times) for times in between],
        )

    (floats, whole), (near, noised), (fixed_near, fixed_whole) = compiled(runs, jax.random.key(0))
    close(floats, whole)
    assert abs(near - noised).max() > 0.01  # another noise
    close(fixed_near, fixed_whole, atol=1e-3)


def test_start_of_another_shape_is_refused():
    schedule, exact = pair("linear", 7)
    with pytest.raises(ValueError, match=r"x_t is of shape \(1, 2\), the samples of \(3, 2\)"):
        sample(jax.random.key(0), schedule, gaussian_denoiser(exact), (3, 2), x_t=jnp.zeros((1, 2)))
