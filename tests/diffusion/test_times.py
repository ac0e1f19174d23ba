"""Times, keys, denoisers and numbers of steps that are not what they are taken for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddpm
from ddpm import Prediction, analytic, continuous, fixed_large, fixed_small, flow, losses, schedules
from ddpm.diffusion import timesteps
from ddpm.diffusion.bound_terms import decoder_nll, step_kl
from ddpm.diffusion.predictions import (
    from_posterior_mean,
    from_score,
    from_v,
    from_x_0,
    preconditioned,
    to_posterior_mean,
    to_score,
    to_v,
)
from ddpm.diffusion.variances import range_log_variance, wide_decoder
from ddpm.models.layers import time_embedding
from tests.exact import close

T = 300  # more than int8 and uint8 hold, and 2 T more than it
SCHEDULE = schedules.linear(T)
X = jnp.linspace(-0.9, 0.9, 6).reshape(3, 2)
SAID = Prediction(X, X)
KEY = jax.random.key(0)


def denoise(x_t, t):
    return Prediction(0.5 * x_t, 0.5 * x_t)


AT = {
    "at": lambda t: SCHEDULE.at(t).high,
    "q_sample": lambda t: ddpm.q_sample(SCHEDULE, X, t, X),
    "to_v": lambda t: to_v(SCHEDULE, t, SAID),
    "from_eps": lambda t: ddpm.denoiser(SCHEDULE, lambda x, t: x)(X, t).x_0,
    "from_v": lambda t: from_v(SCHEDULE, X, t, X).x_0,
    "from_score": lambda t: from_score(SCHEDULE, X, t, X).x_0,
}
# Nothing is said, or 0 / 0, at t = 0.
NOISY = {
    "slope": lambda t: SCHEDULE.slope(t),
    "q_step": lambda t: ddpm.q_step(SCHEDULE, X, t, X),
    "q_posterior": lambda t: ddpm.q_posterior(SCHEDULE, X, X, t).mean,
    "q_posterior_s": lambda t: ddpm.q_posterior(SCHEDULE, X, X, t, s=jnp.zeros_like(t)).variance,
    "fixed_small": lambda t: fixed_small(SCHEDULE, t),
    "fixed_large": lambda t: fixed_large(SCHEDULE, t),
    "wide": lambda t: wide_decoder(fixed_small)(SCHEDULE, t),
    "range": lambda t: range_log_variance(SCHEDULE, X, t, jnp.zeros(3, int)),
    "analytic": lambda t: analytic(jnp.linspace(0, 1, T + 1))(SCHEDULE, t),
    "from_x_0": lambda t: from_x_0(SCHEDULE, X, t, X).eps,
    "from_mean": lambda t: from_posterior_mean(SCHEDULE, X, t, X).x_0,
    "to_mean": lambda t: to_posterior_mean(SCHEDULE, X, t, SAID),
    "to_score": lambda t: to_score(SCHEDULE, t, SAID),
    "edm": lambda t: preconditioned(SCHEDULE, lambda x, t: x)(X, t).x_0,
    "clipped": lambda t: ddpm.clipped(SCHEDULE, denoise)(X, t).eps,
    "step_kl": lambda t: step_kl(SCHEDULE, X, t, SAID),
    "decoder": lambda t: decoder_nll(SCHEDULE, X, X, t, SAID),
    "simple": lambda t: losses.simple(SCHEDULE, denoise, X, t, X),
    "bound": lambda t: losses.bound(SCHEDULE, denoise, X, t, X),
    "record": lambda t: timesteps.record(timesteps.LossHistory.empty(T), t, X[:, 0]).seen,
}


@pytest.mark.parametrize("name", [*AT, *NOISY])
def test_time_outside_the_table_is_refused(name):
    function = (AT | NOISY)[name]
    wrong = [-1, T + 1, 2**40 + 7]
    if name != "record":
        wrong += [0.5, float("nan")]
    for t in [*wrong, *([0] if name in NOISY else [])]:
        with pytest.raises(ValueError, match=r"^[ts] = .*: must be in 1..300") as refused:
            function(np.array([5, t, 7]))
        assert ("not t/T" in str(refused.value)) == (t == 0.5)


def test_times_of_small_types_are_those_of_int32():
    """In uint8 200 + 200 is 144, and 0 - 1 is 255: traced or not."""
    t = np.array([1, 127, 200])
    names = [*AT, *NOISY]

    @jax.jit
    def all_of(t):
        return [(AT | NOISY)[name](t) for name in names]

    wanted = all_of(jnp.int32(t))
    for name, found, same in zip(names, all_of(jnp.uint8(t)), wanted, strict=True):
        assert np.isfinite(same).all(), name
        close(found, same, rtol=1e-6, err_msg=name)
    close(fixed_small(SCHEDULE, np.uint8(t)), fixed_small(SCHEDULE, t))
    close(fixed_large(SCHEDULE, np.int8(1)), fixed_large(SCHEDULE, 1))
    close(time_embedding(np.uint8([0, 200]), 8), time_embedding(np.int32([0, 200]), 8))


def test_times_of_other_types_and_schedules_are_refused():
    for wrong in (True, 1j, "5"):
        with pytest.raises(ValueError, match="must be integers or floats"):
            SCHEDULE.at(wrong)
    smooth = continuous.cosine()
    for function in (smooth.at, smooth.slope, lambda t: ddpm.q_sample(smooth, X, t, X)):
        for t in (-0.1, 500):
            with pytest.raises(ValueError, match=f"t = {t:g}: must be in 0..1$"):
                function(np.array([0.5, t, 0.5]))
    for t, s in ((0, T), (1, T + 1), (0.3, 1)):
        with pytest.raises(ValueError, match=r"^[ts] = .*: must be in 1..300"):
            flow.transport(SCHEDULE, denoise, X, t, s)


STEPS = jnp.array([1, 2, 3])
TAKE_A_DENOISER = {
    "sample": lambda d: ddpm.sample(KEY, SCHEDULE, d, (3, 2), times=[2, 0]),
    "heun": lambda d: ddpm.sample(KEY, SCHEDULE, d, (3, 2), sampler=ddpm.heun(), times=[2, 0]),
    "simple": lambda d: losses.simple(SCHEDULE, d, X, STEPS, X),
    "bound": lambda d: ddpm.likelihood.bits_per_dim(SCHEDULE, d, X, KEY, times=[1, 2]),
    "flow": lambda d: flow.log_density(SCHEDULE, d, X),
    "transport": lambda d: flow.transport(SCHEDULE, d, X, 1, 2),
    "moments": lambda d: ddpm.second_moments(SCHEDULE, d, X, KEY),
    "clipped": lambda d: ddpm.clipped(SCHEDULE, d)(X, STEPS),
    "guided": lambda d: ddpm.classifier_free(SCHEDULE, denoise, d, 2.0)(X, STEPS),
    "invert": lambda d: ddpm.editing.invert(SCHEDULE, d, X, times=[2, 0]),
}


@pytest.mark.parametrize("name", TAKE_A_DENOISER)
def test_what_is_no_denoiser_is_refused(name):
    for wrong in (lambda x, t: x, lambda x, t: (x, x)):
        with pytest.raises(TypeError, match=r"not a Prediction: make it of a network by ddpm\.den"):
            TAKE_A_DENOISER[name](wrong)
    with pytest.raises(ValueError, match="shapes must be equal"):
        TAKE_A_DENOISER[name](lambda x, t: Prediction(x[:, :1], x[:, :1]))


@pytest.mark.parametrize(
    "call",
    [
        lambda key: ddpm.sample(key, SCHEDULE, denoise, (3, 2)),
        lambda key: ddpm.likelihood.bits_per_dim(SCHEDULE, denoise, X, key),
        lambda key: flow.dequantised_bits_per_dim(SCHEDULE, denoise, X, key),
        lambda key: ddpm.editing.vary(key, SCHEDULE, denoise, X, 5),
        lambda key: ddpm.sample_keys(key, [0, 1]),
        lambda key: timesteps.uniform(SCHEDULE, key, 3),
        lambda key: timesteps.low_discrepancy(key, 3),
        lambda key: timesteps.logit_normal(key, 3),
        lambda key: timesteps.log_normal(SCHEDULE, key, 3),
        lambda key: timesteps.draw_important(timesteps.LossHistory.empty(T), key, 3),
    ],
)
def test_a_seed_is_no_key(call):
    for wrong in (0, np.int64(3), np.uint32(3), np.array([1, 2]), None, 0.5):
        with pytest.raises(TypeError, match=r"^key is .*: pass a key, jax\.random\.key\(seed\)"):
            call(wrong)


MAKERS = [schedules.linear, schedules.quadratic, schedules.constant, schedules.jsd,
          schedules.warmup10, schedules.warmup50, schedules.cosine, schedules.sigmoid,
          lambda n: schedules.warmup(0.5, n), lambda n: continuous.table(continuous.cosine(), n),
          timesteps.LossHistory.empty]  # fmt: skip


@pytest.mark.parametrize("make", MAKERS)
def test_number_of_steps_is_whole(make):
    for wrong in (10.5, 10.0, np.float32(10), "10", 0, -3, None):
        with pytest.raises(ValueError, match=r"num_steps = .*: must be a whole number >= [12]"):
            make(wrong)
    assert make(np.int64(10))[0].shape[0] in (10, 11)


@pytest.mark.parametrize("steps", [2.5, 2.0])
def test_number_of_sampling_steps_is_whole(steps):
    for ask in (
        lambda: ddpm.grids.log_snr(SCHEDULE, steps),
        lambda: ddpm.sample(KEY, SCHEDULE, denoise, (3, 2), sampler=ddpm.ddim(steps=steps)),
    ):
        with pytest.raises(ValueError, match="sampling steps: must be a whole number"):
            ask()


def test_float64_of_numpy_is_taken_as_float32():
    x = np.float64(X)
    found = ddpm.clipped(SCHEDULE, denoise)(x, np.int64([1, 2, 3]))
    assert found.x_0.dtype == np.float32
    assert ddpm.q_sample(SCHEDULE, x, np.int64([1, 2, 3]), x).dtype == np.float32
