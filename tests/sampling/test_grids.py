"""Time grids: where they begin and end, and how even they are. (Others' names: test_solvers.)"""

import numpy as np
import pytest

from ddpm.diffusion import schedules
from ddpm.sampling import grids


@pytest.mark.parametrize("grid", [grids.log_snr, grids.karras])
@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
def test_grids_over_noise(grid, make):
    schedule = make(1000)
    t = grid(schedule, 12)
    assert t.shape == (13,)
    assert (np.diff(t) < 0).all()
    assert t[-2:].tolist() == [1.0, 0.0]
    log_snr = np.asarray(schedule.at(t[:-1]).high, np.float64)
    sigma = np.exp(-log_snr / 2)
    assert abs(sigma[0] / 80 - 1) < 1e-3
    even = log_snr if grid is grids.log_snr else sigma ** (1 / 7)
    steps = np.diff(even)
    assert np.ptp(steps) < 2e-3 * abs(steps.mean())
    assert grid(schedule, 12, sigma_max=None)[0] == 1000


def test_quadratic_grid():
    schedule = schedules.linear(1000)
    for steps in (1, 10, 100, 1000):
        t = grids.quadratic(schedule, steps)
        assert t.shape == (steps + 1,)
        assert (np.diff(t) < 0).all()
        assert (t[0], t[-1]) == (1000, 0)
    assert (grids.quadratic(schedule, 10) == 10 * np.arange(10, -1, -1) ** 2).all()


@pytest.mark.parametrize(
    "grid", [grids.uniform, grids.leading, grids.linspace, grids.quadratic, grids.log_snr]
)
@pytest.mark.parametrize("steps", [0, 11])
def test_too_many_steps_or_none(grid, steps):
    with pytest.raises(ValueError, match="between 1 and T = 10"):
        grid(schedules.linear(10), steps)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sigma_max": 1e-3}, "less than t = 1 has"),
        ({"sigma_max": -1.0}, "sigma_max = -1"),
        ({"rho": 0.0}, "rho = 0"),
    ],
)
def test_grids_that_cannot_be(how, said):
    with pytest.raises(ValueError, match=said):
        grids.karras(schedules.linear(1000), 5, **how)


def test_grids_of_a_schedule_that_ends_without_signal():
    """They begin a step below T at the most."""
    for most in (None, 80.0, 3.0):
        t = grids.log_snr(schedules.jsd(100), 5, sigma_max=most)
        assert (np.diff(t) < 0).all()
        assert t[0] == 99 if most != 3.0 else t[0] < 99


@pytest.mark.parametrize("make", [schedules.linear, schedules.jsd])
@pytest.mark.parametrize("grid", [grids.log_snr, grids.karras])
def test_one_noise_level_has_no_grid_over_log_snr(grid, make):
    with pytest.raises(ValueError, match=r"of which there are [01]: take another grid"):
        grid(make(1), 1, sigma_max=None)
