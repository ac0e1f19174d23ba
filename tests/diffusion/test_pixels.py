"""Integers are pixels that are not scaled: refused wherever data are taken."""

import jax
import numpy as np
import pytest

from ddpm import Prediction, editing, flow, losses, q_posterior, q_sample, q_step, sample, schedules
from ddpm.diffusion.analytic import second_moments
from ddpm.diffusion.gaussian import decoder_log_likelihood

SCHEDULE, KEY = schedules.linear(10), jax.random.key(0)
T, EPS = np.array([3, 4]), np.zeros((2, 3), np.float32)


def denoise(x_t, t):
    return Prediction(x_t, x_t)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: q_sample(SCHEDULE, x, T, EPS),
        lambda x: q_step(SCHEDULE, x, T, EPS),
        lambda x: q_posterior(SCHEDULE, x, EPS, T),
        lambda x: q_posterior(SCHEDULE, EPS, x, T),
        lambda x: decoder_log_likelihood(x, EPS, EPS),
        lambda x: losses.simple(SCHEDULE, denoise, x, T, EPS),
        lambda x: editing.vary(KEY, SCHEDULE, denoise, x, 5),
        lambda x: editing.interpolate(KEY, SCHEDULE, denoise, x, x, [0.5], 5),
        lambda x: editing.inpaint(KEY, SCHEDULE, denoise, x, x > 1, jump_length=2),
        lambda x: editing.invert(SCHEDULE, denoise, x),
        lambda x: second_moments(SCHEDULE, denoise, x, KEY),
        lambda x: flow.dequantised_bits_per_dim(SCHEDULE, denoise, x, KEY),
        lambda x: flow.decoded_bits_per_dim(SCHEDULE, denoise, x, KEY),
        lambda x: flow.log_density(SCHEDULE, denoise, x),
        lambda x: sample(KEY, SCHEDULE, denoise, (2, 3), x_t=x),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_integers_are_refused_and_named(use, dtype):
    said = rf"x_[0t1s] is of {dtype.__name__}: must be scaled to \[-1, 1\]"
    with pytest.raises(ValueError, match=said):
        use(np.full((2, 3), 200, dtype))
