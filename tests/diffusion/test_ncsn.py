"""The rules of Song & Ermon (2020) against SciPy, the paper's own numbers and a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, stats
from scipy.spatial.distance import pdist

from configs import cifar10_ncsn, digits_ncsn
from ddpm import Prediction, annealed_langevin, ncsn, schedules
from ddpm.data import sources
from ddpm.diffusion import pixels
from ddpm.diffusion.process import StepInfo
from ddpm.diffusion.streams import LANGEVIN

# Dimensions, sigma_max, levels, steps a level and epsilon of the paper, with sigma_min = 0.01.
CIFAR10 = (3072, 50, 232, 5, 6.2e-6)
THEIRS = [CIFAR10, (3 * 64**2, 90, 500, 5, 3.3e-6), (3 * 128**2, 190, 1086, 3, 1.8e-6)]


def ratio_of(sigma_min, sigma_max, num_levels):
    return (sigma_max / sigma_min) ** (1 / (num_levels - 1))


@pytest.mark.parametrize("block", [16, 64])
def test_largest_distance(block):
    x = np.random.default_rng(0).normal(size=(50, 3, 4, 1)).astype(np.float32) + 3
    expected = pdist(x.reshape(50, -1).astype(np.float64)).max()
    assert ncsn.largest_distance(x, block=block) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dimensions", [5, 64, 3072, 196608])
def test_level_ratio_solves_the_equation_of_technique_2(dimensions):
    def overlap(ratio):
        away = np.sqrt(2 * dimensions) * (ratio - 1)
        return stats.norm.cdf(away + 3 * ratio) - stats.norm.cdf(away - 3 * ratio)

    expected = optimize.brentq(lambda ratio: overlap(ratio) - 0.5, 1, 100)
    assert ncsn.level_ratio(dimensions) == pytest.approx(expected, rel=1e-9)
    assert ncsn.level_overlap(1.7, dimensions) == pytest.approx(overlap(1.7), abs=1e-12)


def test_overlap_is_of_the_radii_at_neighbouring_levels():
    """Within three standard deviations of the larger level's, at the smaller one."""
    d = 3072
    for ratio in (1.02, 1.04, 1.06):
        low, high = (ratio * (np.sqrt(d) + k / np.sqrt(2)) for k in (-3, 3))
        within = stats.chi.cdf(high, d) - stats.chi.cdf(low, d)
        assert within == pytest.approx(ncsn.level_overlap(ratio, d), abs=0.01)


@pytest.mark.parametrize(("dimensions", "sigma_max", "levels", "steps", "epsilon"), THEIRS)
def test_numbers_of_the_paper(dimensions, sigma_max, levels, steps, epsilon):
    """Epsilon to its two digits; of the levels they have a few more than at an overlap of 0.5."""
    ratio = ratio_of(0.01, sigma_max, levels)
    assert f"{ncsn.langevin_step_size(ratio, steps) * 0.01**2:.1e}" == f"{epsilon:.1e}"
    assert ncsn.level_overlap(ratio, dimensions) == pytest.approx(0.567, abs=1e-3)
    assert ncsn.num_levels(0.01, sigma_max, ncsn.level_ratio(dimensions, overlap=0.567)) in range(
        levels - 1, levels + 2
    )


def test_step_size_is_the_best_for_the_variance():
    for ratio, steps in ((1.04, 5), (1.36, 11), (3.0, 1), (1.001, 2)):
        best = optimize.minimize_scalar(
            lambda h, of=(ratio, steps): abs(ncsn.langevin_variance(*of, h) - 1),
            bounds=(0, 1), method="bounded", options={"xatol": 1e-10},
        )  # fmt: skip
        found = ncsn.langevin_step_size(ratio, steps)
        assert found == pytest.approx(best.x, rel=1e-4)


def test_langevin_variance_is_that_of_a_chain_at_one_point():
    """Exactly: the chain is linear in where it begins and in each noise, one example for each."""
    steps, h, sigmas = 4, 0.3, (0.5, 0.8)
    schedule = schedules.geometric(2, *sigmas)

    def at_zero(x_t, t):
        return Prediction(jnp.zeros_like(x_t), x_t / schedule.at(t).sigma[:, None])

    def noise(k=0):
        return jax.nn.one_hot(k - LANGEVIN + 1, steps + 1)[:, None]

    ratio = 1.6
    t, s = jnp.asarray(2), jnp.asarray(1)
    x = ratio * schedule.at(t).sigma * jax.nn.one_hot(0, steps + 1)[:, None]
    info = StepInfo(t, s, jnp.asarray(0), jnp.asarray([2, 1]))
    sampler = annealed_langevin(steps, step_size=h)
    found = sampler.step(schedule, at_zero, x, info, noise, ()).x / schedule.at(s).alpha
    variance = float((found**2).sum()) / sigmas[1] ** 2
    assert variance == pytest.approx(ncsn.langevin_variance(ratio, steps, h), rel=1e-5)


def test_examples_of_the_docstrings():
    assert round(ncsn.level_ratio(3072), 4) == 1.0398
    assert round(ncsn.langevin_step_size(5000 ** (1 / 231), 5), 4) == 0.0618
    images = np.float32(np.random.default_rng(2).uniform(-1, 1, (9, 4, 4, 1)))
    sigma_max = ncsn.largest_distance(images)
    ratio = ncsn.level_ratio(images[0].size)
    num_steps = ncsn.num_levels(0.02, sigma_max, ratio)
    schedule = schedules.geometric(num_steps, 0.02, sigma_max)
    sigma = np.exp(-0.5 * np.asarray(schedule.log_snr[1:], np.float64))
    assert sigma[[0, -1]] == pytest.approx([0.02, sigma_max], rel=1e-6)
    ratios = sigma[1:] / sigma[:-1]
    assert ratios == pytest.approx(np.full(num_steps - 1, ratios[0]), rel=1e-5)
    assert ratio ** ((num_steps - 2) / (num_steps - 1)) < ratios[0] <= ratio
    assert 0 < ncsn.langevin_step_size(ratio, 5) < 1


def test_configs_follow_the_rules():
    """The digits' by the data; CIFAR-10's are the paper's, whose data are half as large."""
    d, s = digits_ncsn.get_config().diffusion, digits_ncsn.get_config().sampling
    images = pixels.to_float(sources.digits("train").image)
    largest, ratio = ncsn.largest_distance(images), ncsn.level_ratio(images[0].size)
    assert d.sigma_max == round(largest, 2)
    assert d.num_steps == ncsn.num_levels(d.sigma_min, d.sigma_max, ratio)
    ratio = ratio_of(d.sigma_min, d.sigma_max, d.num_steps)
    best = ncsn.langevin_step_size(ratio, s.langevin_steps)
    assert s.langevin_step_size == pytest.approx(best, abs=5e-4)

    d, s = cifar10_ncsn.get_config().diffusion, cifar10_ncsn.get_config().sampling
    _, sigma_max, levels, steps, epsilon = CIFAR10
    assert (d.sigma_min, d.sigma_max, d.num_steps) == (2 * 0.01, 2 * sigma_max, levels)
    assert (s.langevin_steps, s.langevin_step_size) == (steps, round(epsilon / 0.01**2, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ncsn.largest_distance(np.zeros((3, 2), np.uint8)), "must be scaled"),
        (lambda: ncsn.largest_distance(np.zeros((1, 2))), "1 images: a distance is between two"),
        (lambda: ncsn.level_ratio(4), "dimensions = 4: must be a whole number >= 5"),
        (lambda: ncsn.level_ratio(64, overlap=1.0), "overlap = 1.0: must be in"),
        (lambda: ncsn.num_levels(0.1, 0.1, 1.3), "sigma from 0.1 to 0.1 by a ratio of 1.3"),
        (lambda: ncsn.num_levels(0.1, 1.0, 1.0), "by a ratio of 1.0: must rise"),
        (lambda: ncsn.langevin_step_size(1.0, 5), "ratio = 1.0: must be a number > 1"),
        (lambda: ncsn.langevin_step_size(1.3, 0), "steps_per_level = 0"),
        (lambda: schedules.geometric(1), "num_steps = 1: must be a whole number >= 2"),
        (lambda: schedules.geometric(9, 2.0, 1.0), "sigma from 2.0 to 1.0: must rise"),
        (lambda: schedules.geometric(9, 0.0, 1.0), "sigma from 0.0 to 1.0: must rise"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
