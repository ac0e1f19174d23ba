"""Learned reverse variances: what the network's second half means, at steps of any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm import (
    Prediction,
    ancestral,
    clipped,
    ddim,
    denoiser,
    fixed_large,
    fixed_small,
    predictions,
    sample,
    schedules,
)
from ddpm.diffusion import continuous, variances
from ddpm.diffusion.variances import learned_diagonal, learned_range, reverse_log_variance
from tests.exact import NAMES, close, gaussian_denoiser, pair


@pytest.mark.parametrize("name", NAMES)
def test_range_is_between_the_two_in_the_log_at_any_step(name):
    """IDDPM's Eq. 15, with beta and beta-tilde of the step from t to s."""
    schedule, exact = pair(name, 100)
    rng = np.random.default_rng(0)
    t = np.arange(2, 101)
    fraction = np.float32(rng.uniform(-0.2, 1.2, (99, 3)))
    for s in (t - 1, rng.integers(1, t)):
        small, large = exact.log_small(s, t)[:, None], exact.log_step_beta(s, t)[:, None]
        found = jax.jit(variances.range_log_variance)(schedule, fraction, t, s)
        close(found, fraction * large + (1 - fraction) * small, rtol=1e-5, atol=1e-5)


def test_range_at_the_first_step():
    """beta-tilde is that of t = 2, as the authors clip it; beta is beta_1 itself."""
    schedule, exact = pair("linear", 1000)
    fraction = jnp.float32([[0.0, 0.5, 1.0]])
    found = variances.range_log_variance(schedule, fraction, jnp.array([1]), jnp.array([0]))
    small, large = exact.log_small(1, 2), np.log(exact.beta[1])
    close(found, [[small, (small + large) / 2, large]], rtol=1e-5)


@pytest.mark.parametrize("fixed", [fixed_small, fixed_large])
def test_wide_decoder_depends_on_the_first_level_alone(fixed):
    """However close the next one is; the steps before the last are as they were."""
    wide = variances.wide_decoder(fixed)
    for num_steps in (4, 4000):
        schedule = continuous.table(continuous.linear(9.0, -5.0), num_steps)
        t = np.arange(1, num_steps + 1)
        found = np.asarray(wide(schedule, t))
        close(found[0], -9.0)
        close(found[1:], np.asarray(fixed(schedule, t))[1:])
        close(wide(schedule, t, s=np.zeros_like(t)), -schedule.log_snr[1:], rtol=1e-5, atol=1e-5)
    assert fixed(schedule, t)[0] < -14  # where beta-tilde_2 is next to nothing


def test_network_of_twice_the_channels():
    schedule, exact = pair("linear", 10)
    x_t = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    t = jnp.array([2, 7])
    raw = jnp.linspace(-1, 1, x_t.size).reshape(x_t.shape)
    network = lambda x_t, t: jnp.concatenate([0.5 * x_t, raw], axis=-1)  # noqa: E731
    ranged = denoiser(schedule, network, learned=learned_range)(x_t, t)
    assert (ranged.eps == 0.5 * x_t).all()
    close(ranged.variance_fraction, (raw + 1) / 2)
    assert ranged.log_variance is None
    diagonal = denoiser(schedule, network, predictions.from_v, learned=learned_diagonal)(x_t, t)
    assert (diagonal.log_variance == raw).all()
    close(diagonal.x_0, predictions.from_v(schedule, x_t, t, 0.5 * x_t).x_0)

    s, small = t - 1, lambda *_, **__: pytest.fail("the model has the say")
    found = reverse_log_variance(schedule, ranged, t, s, small)
    ends = [
        np.asarray(f(s, t))[:, None, None, None] for f in (exact.log_small, exact.log_step_beta)
    ]
    f = np.float64(ranged.variance_fraction)
    close(found, f * ends[1] + (1 - f) * ends[0], rtol=1e-5)
    assert (reverse_log_variance(schedule, diagonal, t, s, small) == raw).all()
    fixed = reverse_log_variance(schedule, Prediction(x_t, x_t), t, s, fixed_small)
    close(fixed, fixed_small(schedule, t)[:, None, None, None])


def test_clipping_leaves_the_learned_variance():
    schedule, _ = pair("linear", 10)
    x_t = 3 * jnp.ones((2, 3))
    said = Prediction(x_t, x_t, variance_fraction=0.25 * x_t)
    found = clipped(schedule, lambda x_t, t: said)(x_t, jnp.array([1, 5]))
    assert (found.variance_fraction == 0.75).all()
    assert (found.x_0 == 1).all()


def test_halves_that_do_not_fit_are_refused():
    schedule, _ = pair("linear", 10)
    x, t = jnp.ones((2, 4)), jnp.array([1, 2])
    for network in (lambda x, t: x, lambda x, t: jnp.ones((2, 5)), lambda x, t: jnp.ones((2, 12))):
        for learned in (learned_range, learned_diagonal):
            with pytest.raises(ValueError, match=r"shapes must be equal|equal division"):
                denoiser(schedule, network, learned=learned)(x, t)


@pytest.mark.parametrize("steps", [50, 5])
def test_range_in_a_chain_of_fewer_steps(steps):
    """The fraction 0 is fixed-small, and another one is wider, at whatever length of a step."""
    schedule, exact = pair("linear", 50)
    denoise = gaussian_denoiser(exact, 0.2, 0.3)

    @jax.jit
    def chain(fraction):
        learns = lambda x_t, t: denoise(x_t, t)._replace(  # noqa: E731
            variance_fraction=jnp.full_like(x_t, fraction)
        )
        return sample(jax.random.key(0), schedule, learns, (4, 3), sampler=ancestral(steps=steps))

    fixed = jax.jit(
        lambda: sample(jax.random.key(0), schedule, denoise, (4, 3),
                       sampler=ancestral(fixed_small, steps=steps))
    )()  # fmt: skip
    close(chain(0.0), fixed, rtol=1e-4, atol=1e-5)
    assert abs(chain(1.0) - fixed).max() > 1e-2


def test_a_learned_diagonal_is_of_single_steps():
    """Longer steps would have too small a variance: refused, as by the command."""
    schedule, key = schedules.linear(5), jax.random.key(0)
    twice = lambda x, t: jnp.concatenate([x, x], -1)  # noqa: E731
    denoise = denoiser(schedule, twice, learned=learned_diagonal)
    for sampler in (ddim(steps=2), ancestral()):
        sample(key, schedule, denoise, (2, 3), sampler=sampler)
    with pytest.raises(ValueError, match="is that of single steps from t to t - 1: take all T"):
        sample(key, schedule, denoise, (2, 3), sampler=ancestral(steps=2))
