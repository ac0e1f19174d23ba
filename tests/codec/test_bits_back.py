"""Bits back with ANS: every image comes back, at the rate of the bound; what cannot is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import gaussian_denoiser, pair

import ddpm
from ddpm.codec import bits_back
from ddpm.diffusion.likelihood import bits_per_dim
from ddpm.diffusion.pixels import to_float, to_uint8

TIMES = np.asarray([1, 3, 6, 10, 14, 18, 22, 26, 30])
SCHEDULE, PROCESS = pair("cosine", 30)
DENOISER = gaussian_denoiser(PROCESS, 0.1, 0.04)
SHAPE = (150, 4, 4, 1)


def images(shape=SHAPE, seed=0):
    noise = np.random.default_rng(seed).normal(size=shape)
    return to_uint8((0.1 + 0.2 * noise).astype(np.float32))


def round_trip(x_0, denoiser=DENOISER, schedule=SCHEDULE, times=TIMES, variance=ddpm.fixed_large,
               **options):  # fmt: skip
    how = {"times": times, "variance": variance}
    data = bits_back.encode(schedule, denoiser, x_0, **how, **options)
    found = bits_back.decode(schedule, denoiser, data, x_0.shape, **how)
    np.testing.assert_array_equal(found, x_0)
    return data


def test_the_net_rate_is_the_bound():
    """The exact denoiser and the variance matched to it lose nothing."""
    x_0 = images()
    moments = ddpm.second_moments(SCHEDULE, DENOISER, to_float(images(seed=1)), jax.random.key(0))
    variance = ddpm.variances.wide_decoder(ddpm.analytic(moments))
    data = round_trip(x_0, variance=variance, batch_size=25)
    initial = bits_back.initial_bits(data)
    # The bits of the first batch's latents at one time: 4 to 7 for a number.
    assert 3 < initial / (25 * 16) < 8
    x = np.concatenate([to_float(x_0)] * 8)
    bound = bits_per_dim(
        SCHEDULE, DENOISER, x, jax.random.key(1), variance=variance, times=TIMES
    ).total.mean()
    net = (8 * (len(data) - 10) - initial) / x_0.size  # without the head, much of so few images
    assert net == pytest.approx(float(bound), rel=0.01)


def test_images_come_back_where_the_model_is_far_off():
    """Beyond the support of its Gaussians, and with other variances, schedules and batches."""

    def far(x_t, t):
        return ddpm.Prediction(0 * x_t + 9.0, x_t)

    def learned(x_t, t):
        return ddpm.Prediction(0 * x_t, x_t, variance_fraction=0.5 + 0.1 * x_t)

    x_0 = np.concatenate([images((5, 3)), np.asarray([[0, 255, 0], [255, 255, 0]], np.uint8)])
    narrow = lambda schedule, t, *, s=None: jnp.full(jnp.shape(t), -30.0)  # noqa: E731
    assert 8 * len(round_trip(x_0, far, variance=narrow, batch_size=3)) > 300 * x_0.size
    round_trip(x_0, learned, batch_size=1)
    without_signal = ddpm.schedules.zero_terminal_snr(SCHEDULE)
    round_trip(x_0, learned, without_signal, times=[2, 30])
    round_trip(np.asarray([[7]], np.uint8), learned, times=[30])


def test_another_model_or_damaged_data_is_refused(monkeypatch):
    x_0 = images((6, 2, 2, 1))
    data = bits_back.encode(SCHEDULE, DENOISER, x_0, times=TIMES, batch_size=2)
    with pytest.raises(ValueError, match="these are not the images"):
        bits_back.decode(SCHEDULE, gaussian_denoiser(PROCESS, 0.1, 0.05), data, x_0.shape,
                         times=TIMES)  # fmt: skip
    with pytest.raises(ValueError, match="these are not the images"):
        bits_back.decode(SCHEDULE, DENOISER, data, x_0.shape, times=TIMES[1:])
    once = bits_back._reverse_transition(SCHEDULE, DENOISER, ddpm.fixed_large, (2, 2, 2, 1))
    monkeypatch.setattr(bits_back, "_reverse_transition", lambda *model: once)
    rng = np.random.default_rng(1)
    for i in range(80):
        damaged = bytearray(data)
        if i % 4 == 0:
            damaged = damaged[: rng.integers(len(data))]
        elif i % 4 == 1:
            damaged[10:] = rng.bytes(4 * rng.integers(1, 100))
        else:
            where = rng.choice([*range(8), *range(10, len(data))])  # not the batch's size
            damaged[where] ^= 1 << rng.integers(8)
        with pytest.raises(ValueError, match="damaged"):
            bits_back.decode(SCHEDULE, DENOISER, bytes(damaged), x_0.shape, times=TIMES)
    with pytest.raises(ValueError, match="batches of 65535 images, of 6"):
        bits_back.decode(SCHEDULE, DENOISER, b"\xff" * 60, x_0.shape, times=TIMES)


def test_what_cannot_be_coded_is_refused():
    x_0 = images((2, 3))

    def not_finite(x_t, t):
        return ddpm.Prediction(x_t * jnp.nan, x_t)

    with pytest.raises(ValueError, match="the prediction at t = 3 is not finite"):
        bits_back.encode(SCHEDULE, not_finite, x_0, times=[3])
    for wrong in (x_0.astype(np.float32), x_0[:0]):
        with pytest.raises(ValueError, match="must be images of uint8"):
            bits_back.encode(SCHEDULE, DENOISER, wrong, times=TIMES)
    for times in ([3, 3], [], [[1]], [1.0]):
        with pytest.raises(ValueError, match="must be integers that rise"):
            bits_back.encode(SCHEDULE, DENOISER, x_0, times=np.asarray(times))
    for times in ([0, 1], [31]):
        with pytest.raises(ValueError, match=r"must be in 1\.\.30"):
            bits_back.encode(SCHEDULE, DENOISER, x_0, times=times)
    with pytest.raises(ValueError, match=r"batch_size = 0: must be in 1\.\.65535"):
        bits_back.encode(SCHEDULE, DENOISER, x_0, times=TIMES, batch_size=0)
    with pytest.raises(ValueError, match="must be what encode returned"):
        bits_back.initial_bits(b"123")
