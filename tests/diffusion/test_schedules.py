"""Every schedule at every time, in float32, against float64 from its betas by plain products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import fixed_large, fixed_small, schedules
from ddpm.diffusion.gaussian import posterior_coefficients
from ddpm.diffusion.timesteps import uniform
from tests.exact import NAMES, Process, close, pair

TINY = float(np.finfo(np.float32).tiny)  # what is smaller is 0 in float32
# Compiled or not; short chains only compiled, for the tests' own speed.
LENGTHS = [(1, True), (7, True), (1000, True), (1000, False)]


def one_time(schedule, t):
    level = schedule.at(t)
    return {
        "alpha_bar": schedule.alpha_bar[t],
        "beta": schedule.beta[t],
        "alpha": level.alpha,
        "sigma": level.sigma,
        "sigma_squared": level.sigma_squared,
        "log_sigma_squared": level.log_sigma_squared,
    }


def two_times(schedule, s, t):
    step = schedule.between(s, t)
    of_x_0, of_x_t = posterior_coefficients(step)
    return {
        "beta": step.beta,
        "snr_loss": step.snr_loss,
        "log_snr_loss": step.log_snr_loss,
        "posterior_variance": step.posterior_variance,
        "of_x_0": of_x_0,
        "of_x_t": of_x_t,
    }


def log_variances(schedule, s, t):
    return fixed_small(schedule, t, s=s), fixed_large(schedule, t, s=s)


def compiled(function, jitted):
    return jax.jit(function) if jitted else function


def all_pairs(num_steps):
    """s = t - 1 at every t, s = 0 at every t, and any others."""
    t = np.arange(1, num_steps + 1)
    rng = np.random.default_rng(1)
    later = rng.integers(1, num_steps + 1, num_steps)
    return np.concatenate([t - 1, 0 * t, rng.integers(0, later)]), np.concatenate([t, t, later])


@pytest.mark.parametrize(("num_steps", "jitted"), LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_functions_of_one_time(name, num_steps, jitted):
    schedule, exact = pair(name, num_steps)
    assert schedule.num_steps == num_steps
    assert schedule.log_snr.dtype == schedule.alpha_bar.dtype == jnp.float32
    found = compiled(one_time, jitted)(schedule, jnp.arange(num_steps + 1))
    for key in ("alpha_bar", "beta", "alpha", "sigma"):
        close(found[key], getattr(exact, key), rtol=1e-5, atol=1e-30, err_msg=key)
    close(found["sigma_squared"], exact.variance, rtol=1e-5)
    # Near log 1 = 0 the logarithm keeps its relative accuracy too: log(1 - abar) = -abar.
    logs = np.concatenate([[-np.inf], np.log1p(-exact.alpha_bar[1:])])
    close(found["log_sigma_squared"], logs, rtol=1e-5, atol=TINY)


@pytest.mark.parametrize(("num_steps", "jitted"), LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_functions_of_two_times(name, num_steps, jitted):
    schedule, exact = pair(name, num_steps)
    s, t = all_pairs(num_steps)
    found = compiled(two_times, jitted)(schedule, s, t)
    of_x_0, of_x_t, variance = exact.posterior(s, t)
    close(found["beta"], exact.step_beta(s, t), rtol=1e-5)
    close(found["snr_loss"], exact.step_beta(s, t) / exact.variance[t], rtol=1e-5)
    log_loss = exact.log_step_beta(s, t) - exact.log_variance(t)
    into_data = s == 0  # where it is log 1
    close(found["log_snr_loss"][~into_data], log_loss[~into_data], rtol=1e-5, atol=TINY)
    close(found["log_snr_loss"][into_data], 0, atol=0)
    close(found["of_x_0"], of_x_0, rtol=1e-5)
    close(found["of_x_t"], of_x_t, rtol=1e-5)
    close(found["posterior_variance"], variance, rtol=1e-5)


@pytest.mark.parametrize(("num_steps", "jitted"), LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_log_variances_of_later_steps(name, num_steps, jitted):
    schedule, exact = pair(name, num_steps)
    s, t = all_pairs(num_steps)
    later = s > 0
    small, large = (x[later] for x in compiled(log_variances, jitted)(schedule, s, t))
    s, t = s[later], t[later]
    close(small, exact.log_small(s, t), rtol=1e-5, atol=TINY)
    close(large, exact.log_step_beta(s, t), rtol=1e-5, atol=TINY)


@pytest.mark.parametrize(("num_steps", "jitted"), LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_log_variance_into_the_data_is_that_of_the_step_before(name, num_steps, jitted):
    """For any first time t: of the step from 2t to t, or to T if that is nearer."""
    schedule, exact = pair(name, num_steps)
    t = np.arange(1, num_steps + 1)
    before = np.minimum(2 * t, num_steps)
    expected = np.full(num_steps, exact.log_variance(num_steps))  # for a chain of one step
    expected[:-1] = exact.log_small(t[:-1], before[:-1])
    small, large = compiled(log_variances, jitted)(schedule, np.zeros_like(t), t)
    close(small, expected, rtol=1e-5, atol=TINY)
    close(large, expected, rtol=1e-5, atol=TINY)
    assert np.isfinite(small).all()


@pytest.mark.parametrize("name", NAMES)
def test_log_variances_with_s_left_out(name):
    schedule, _ = pair(name, 7)
    t = jnp.arange(1, 8)
    for variance in (fixed_small, fixed_large):
        close(variance(schedule, t), variance(schedule, t, s=t - 1))
        assert variance(schedule, 3).shape == ()


def test_figures_of_the_authors_schedule():
    """Verified figures, in the paper's index (the authors' plus one)."""
    schedule = schedules.linear()
    abar = schedule.alpha_bar
    close(abar[np.array([0, 1, 2])], [1, 0.9999, 0.999780092], rtol=1e-7)
    close(abar[500], 0.0785872, rtol=1e-6)
    close(abar[1000], 4.03582977e-5, rtol=2e-6)
    close(schedule.beta[np.array([0, 1, 1000])], [0, 1e-4, 0.02], rtol=2e-6)
    t = np.array([1, 2, 1000])
    step = schedule.between(t - 1, t)
    of_x_0, of_x_t = posterior_coefficients(step)
    close(of_x_0, [1, 0.5452915, 1.2835e-4], rtol=2e-5)
    close(of_x_t[np.array([0, 2])], [0, 0.98994868], rtol=1e-6)
    close(step.posterior_variance[:2], [0, 5.45318766e-5], rtol=2e-6)
    close(fixed_small(schedule, t)[:2], [-9.816725, -9.816725], rtol=1e-6)
    close(fixed_large(schedule, 1), -9.816725, rtol=1e-6)
    close(1 / schedule.at(1000).alpha, 157.4105, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (schedules.linear(), 4.036e-5),
        (schedules.quadratic(), 7.3e-4),
        (schedules.constant(), 1.7e-9),
        (schedules.jsd(), 0),
        (schedules.warmup(0.1), 4.6e-9),
        (schedules.warmup(0.5), 2.6e-7),
        (schedules.cosine(), 2.43e-9),
    ],
)
def test_signal_left_at_the_end(schedule, last):
    close(schedule.alpha_bar[-1], last, rtol=0.02)


def test_cosine_starts_as_published():
    close(schedules.cosine().beta[1], 4.128e-5, rtol=2e-4)


def test_jsd_keeps_alpha_bar_linear_in_time():
    close(schedules.jsd().alpha_bar, 1 - np.arange(1001) / 1000, rtol=1e-5)


def test_betas_are_not_rescaled_for_few_steps():
    close(schedules.linear(20).beta[1:], np.linspace(1e-4, 0.02, 20), rtol=1e-5)
    close(schedules.linear(2, 0.1, 0.9).beta[1:], [0.1, 0.9], rtol=1e-5)


@pytest.mark.parametrize(
    ("betas", "step"),
    [
        ([0.1, 0.0], 2),
        ([-0.1, 0.2], 1),
        ([0.1, 1.0, 0.2], 2),
        ([0.1, 0.2, 1.5], 3),
        ([np.nan, 0.1], 1),
        ([0.1, np.inf], 2),
    ],
)
def test_beta_out_of_range_is_refused_by_its_step(betas, step):
    with pytest.raises(ValueError, match=f"beta_{step} "):
        schedules.from_betas(betas)


@pytest.mark.parametrize("betas", [[], [[0.1, 0.2]]])
def test_betas_must_be_a_list(betas):
    with pytest.raises(ValueError, match="non-empty list"):
        schedules.from_betas(betas)


@pytest.mark.parametrize("log_snr", [[1.0, 1.0], [1.0, 2.0], [np.nan], [np.inf, 0.0]])
def test_log_snr_must_fall(log_snr):
    with pytest.raises(ValueError, match="fall"):
        schedules.from_log_snr(log_snr)


@pytest.mark.parametrize("name", NAMES)
def test_log_snr_gives_the_schedule_back(name):
    _, exact = pair(name, 1000)
    with np.errstate(divide="ignore"):
        log_snr = np.log(exact.alpha_bar[1:] / exact.variance[1:])
    close(schedules.from_log_snr(log_snr).beta, exact.beta, rtol=1e-5)


def test_times_in_the_wrong_order_are_nan():
    step = schedules.linear(7).between(5, 3)
    assert np.isnan([step.beta, step.posterior_variance, *posterior_coefficients(step)]).all()


@pytest.mark.parametrize("name", NAMES)
def test_log_variances_have_finite_gradients(name):
    """By the table, as a learned schedule will need them."""
    schedule, _ = pair(name, 7)
    s, t = all_pairs(7)
    s, t = s[(s > 0) & (t < 7)], t[(s > 0) & (t < 7)]

    def total(log_snr):
        small, large = log_variances(schedule._replace(log_snr=log_snr), s, t)
        return small.sum() + large.sum()

    assert np.isfinite(jax.grad(total)(schedule.log_snr)[1:]).all()


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_warmup_is_a_fraction(fraction):
    with pytest.raises(ValueError, match=f"fraction = {fraction}"):
        schedules.warmup(fraction)


def test_traced_time_outside_the_table_is_nan_and_not_another_time():
    schedule = schedules.linear(7)
    found = jax.jit(one_time)(schedule, jnp.array([-1, 8, 1000]))
    assert np.isnan(found["alpha"]).all()
    assert np.isnan(found["sigma"]).all()
    assert np.isnan(jax.jit(fixed_small)(schedule, 8))
    assert np.isnan(jax.jit(fixed_large)(schedule, 0))


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_are_one(name):
    """beta_{t|r} from beta_{s|r} and beta_{t|s}: the transitions form a semigroup."""
    schedule, _ = pair(name, 1000)
    r, s, t = np.sort(np.random.default_rng(2).choice(1001, 3 * 300).reshape(3, -1), axis=0)
    strictly = (r < s) & (s < t)
    r, s, t = r[strictly], s[strictly], t[strictly]
    first, second = (np.float64(schedule.between(*x).beta) for x in ((r, s), (s, t)))
    close(schedule.between(r, t).beta, 1 - (1 - first) * (1 - second), rtol=1e-5)


def test_times_are_drawn_uniformly_from_first_to_last():
    t = np.asarray(uniform(schedules.linear(7), jax.random.key(0), 7000))
    assert t.dtype == np.int32
    counts = np.bincount(t, minlength=8)
    assert counts[0] == 0
    assert len(counts) == 8
    # Chi-squared with 6 degrees of freedom exceeds 22.5 once in a thousand.
    assert ((counts[1:] - 1000) ** 2 / 1000).sum() < 22.5


def test_oracle_agrees_with_itself():
    """The oracle's variance, by sums, is 1 - alpha_bar."""
    exact = Process(np.linspace(1e-4, 0.02, 1000))
    close(exact.variance, 1 - exact.alpha_bar, rtol=1e-11)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_log_snr_is_linear_between_times(name):
    schedule, exact = pair(name, 50)
    t = np.float32([1, 1.25, 7.5, 49.75, 50])
    log_snr = np.log(exact.alpha_bar[1:] / exact.variance[1:])
    expected = np.interp(t, np.arange(1, 51), log_snr)
    close(schedule.at(t).high, expected, rtol=1e-5)
    close(jax.jit(schedule.time_of)(expected), t, rtol=1e-5)
    for whole in (0, 1, 13, 50):
        assert schedule.at(np.float32(whole)) == schedule.at(whole)
    outside = np.float32([-0.5, 0.5, 50.5])
    assert np.isnan(jax.jit(lambda t: schedule.at(t).high)(outside)).all()
    close(schedule.time_of(np.float32([1e3, -1e3])), [1, 50])


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    """By its formula in float64; alpha_1 stays, alpha_T = 0, and all between falls."""
    schedule, exact = pair(name, 20)
    rescaled = schedules.zero_terminal_snr(schedule)
    alpha = exact.alpha[1:]
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    close(rescaled.at(np.arange(1, 21)).alpha, expected, rtol=1e-5)
    close(rescaled.log_snr[1], schedule.log_snr[1], rtol=1e-6)
    assert rescaled.log_snr[20] == -np.inf
    assert rescaled.ends_without_signal()
    close(rescaled.beta[-1], 1)
    again = schedules.zero_terminal_snr(rescaled)
    close(again.log_snr[1:-1], rescaled.log_snr[1:-1], rtol=1e-5)


def test_zero_terminal_snr_of_a_single_step_is_refused():
    with pytest.raises(ValueError, match="one step"):
        schedules.zero_terminal_snr(schedules.linear(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("resolution", "reference"), [(256, 64), (8, 32), (3, 7)])
def test_shifted_by_the_resolution(name, resolution, reference):
    """Log-SNR by 2 log(reference/resolution) at every time, to the 48 bits that a table keeps."""
    schedule, exact = pair(name, 20)
    shifted = schedules.shifted(schedule, resolution, reference=reference)
    before, after = (np.float64(x.log_snr) + np.float64(x.log_snr_low) for x in (schedule, shifted))
    there = np.isfinite(before)
    close(after[there] - before[there], 2 * np.log(reference / resolution), rtol=1e-11)
    assert (after[~there] == before[~there]).all()  # the data at 0; no signal at T, as before
    assert shifted.log_snr[0] == np.inf
    # By the definition: noise that averaging over the pixels brings back.
    alpha, sigma = shifted.at(np.arange(1, 21)).alpha, shifted.at(np.arange(1, 21)).sigma
    ratio = exact.sigma[1:] * resolution / reference
    close(alpha * ratio, sigma * exact.alpha[1:], rtol=1e-4)
    assert ((shifted.beta[1:] > 0) & (shifted.beta[1:] <= 1)).all()
    assert shifted.ends_without_signal() == schedule.ends_without_signal()


def test_shifted_from_the_same_resolution_is_the_same():
    schedule = schedules.cosine(20)
    for a, b in zip(schedule, schedules.shifted(schedule, 64), strict=True):
        assert (a == b).all()
    for wrong in ({"resolution": 0}, {"resolution": 8, "reference": 0}):
        with pytest.raises(ValueError, match="must be >= 1"):
            schedules.shifted(schedule, **wrong)
