"""The coder of pixels: exact, also with a slightly different prediction, near the model's entropy,
and safe from damaged bytes."""

import constriction
import numpy as np
import pytest
from scipy import stats

from ddpm.codec import pixel_coder
from ddpm.diffusion.pixels import to_float


def sample(sigma, level, seed=0):
    """Pixels N(level, sigma^2), both in levels, rounded and cut; the mean in the network's units;
    and the model's bits."""
    level, sigma = np.broadcast_arrays(np.asarray(level, np.float64), sigma)
    noise = np.random.default_rng(seed).normal(size=level.shape)
    x_0 = np.clip(np.rint(level + sigma * noise), 0, 255).astype(np.uint8)
    below = np.where(x_0 == 0, -np.inf, (x_0 - 0.5 - level) / sigma)
    above = np.where(x_0 == 255, np.inf, (x_0 + 0.5 - level) / sigma)
    right = below > 0  # differences of the smaller tail
    low, high = np.where(right, -above, below), np.where(right, -below, above)
    bits = -np.log2(stats.norm.cdf(high) - stats.norm.cdf(low))
    return x_0, (level / 127.5 - 1).astype(np.float32), float(bits.sum())


def levels(count, seed=1):
    return np.random.default_rng(seed).uniform(0, 255, count)


@pytest.mark.parametrize(
    ("sigma", "guard"), [(0.5, 1e-6), (1, pixel_coder.GUARD), (8, 1e-5), (100, 1e-5)]
)
def test_the_length_is_the_models_bits(sigma, guard):
    x_0, mean, bits = sample(sigma, levels(20_000))
    data = pixel_coder.encode(x_0, mean, guard=guard)
    np.testing.assert_array_equal(pixel_coder.decode(mean, data), x_0)
    assert 8 * len(data) <= 1.01 * bits + 64
    assert abs(pixel_coder.cost(x_0, mean, guard=guard) - 8 * len(data)) < 40


def test_a_background_that_is_certain_costs_nothing():
    """Its scale is its own: with one for all, it would cost half a bit a pixel."""
    level = np.where(np.arange(10_000) % 4 == 0, levels(10_000), 0.01)
    x_0, mean, bits = sample(np.where(level == 0.01, 0.1, 3.0), level)
    data = pixel_coder.encode(x_0, mean)
    assert 8 * len(data) <= 1.01 * bits + 64


@pytest.mark.parametrize("value", [0, 128, 255])
def test_a_constant_image_is_a_few_bytes(value):
    x_0 = np.full(5000, value, np.uint8)
    for mean in (to_float(x_0), to_float(x_0) * np.float32(1.0001), to_float(x_0) + 0.01):
        data = pixel_coder.encode(x_0, mean)
        np.testing.assert_array_equal(pixel_coder.decode(mean, data), x_0)
        assert len(data) < 12


@pytest.mark.parametrize("sigma", [0.2, 2])
@pytest.mark.parametrize("count", [784, 20_000])
def test_a_slightly_different_prediction_decodes_exactly(sigma, count):
    """Also where each mean, or all, are off by the guard, and for pixels that surprise."""
    x_0, mean, _ = sample(sigma, np.random.default_rng(2).uniform(-5, 260, count))
    x_0[:4] = 0, 255, 0, 255
    data = pixel_coder.encode(x_0, mean)
    rng, most = np.random.default_rng(3), 0.99 * pixel_coder.GUARD
    before, grid = pixel_coder._levels(mean), data[0] & 15
    moved = 0
    for off in (rng.uniform(-most, most, count), most * rng.choice([-1, 1], count), most, -most):
        other = (mean + off).astype(np.float32)
        np.testing.assert_array_equal(pixel_coder.decode(other, data), x_0)
        cells = pixel_coder._on_grid(pixel_coder._levels(other), grid).number
        moved += (cells != pixel_coder._on_grid(before, grid).number).sum()
    assert moved > 10 or count < 1000  # to another cell, which the parities mend


def test_a_very_different_prediction_is_refused_or_gives_other_pixels():
    x_0, mean, _ = sample(1, levels(5000))
    with pytest.raises(ValueError, match="the prediction differs too much"):
        pixel_coder.decode(mean + np.float32(0.003), pixel_coder.encode(x_0, mean))


def test_the_range_coder_rounds_no_weight():
    """A weight w is w + 1 of 2^24, wherever it stands: read from the coder's own answers."""
    number, scale = np.asarray([0, 30, 255, 128]), np.asarray([0, 64, 100, 191])
    weights = pixel_coder.weights(number, 10, scale)
    assert (weights >= 0).all()
    assert (weights.sum(axis=1) == 2**24 - 256).all()
    model = constriction.stream.model.Categorical(perfect=False)
    for row in weights:
        edges = np.concatenate([[0], np.cumsum(row + 1)])
        for symbol in (0, 1, 29, 30, 127, 128, 129, 254, 255):
            for value in (edges[symbol], edges[symbol + 1] - 1):
                words = np.asarray([value | 7 << 24, 1], np.uint32)
                coder = constriction.stream.stack.AnsCoder(words)
                assert coder.decode(model, row[None].astype(np.float32)) == [symbol]


def test_weights_are_the_discretised_gaussian():
    step, parts = pixel_coder.GRIDS[5]
    number, scale = np.asarray([3, 600]), np.asarray([80, 100])
    sigma = 2 ** (scale / 16 - 4)
    level = number * step / parts
    edges = np.concatenate([[-np.inf], np.arange(255) + 0.5, [np.inf]])
    expected = np.diff(stats.norm.cdf((edges - level[:, None]) / sigma[:, None]), axis=1)
    found = pixel_coder.weights(number, 5, scale) / 2**24
    np.testing.assert_allclose(found, expected, atol=2e-4 * expected.max())
    fine = pixel_coder.finest_weights(level / 127.5 - 1, 1.01 * sigma / 127.5)
    np.testing.assert_array_equal(fine, pixel_coder.weights(number * 4, 0, scale))


def test_bytes_of_earlier_versions_are_read():
    """The file has parities, as its mean needs them."""
    mean = (np.arange(200) * 7919 % 1000 / 500 - 1).astype(np.float32)
    level = np.rint((mean + 1) * 127.5).astype(int)
    x_0 = np.clip(level + np.arange(200) ** 2 % 5 - 2, 0, 255).astype(np.uint8)
    data = bytes.fromhex(
        "0a4b0583dd226f8639ac96e6a2fce2b43ce212aefd91708883a4353bf52c8dc8d200ce67be80b334"
        "513e6cead2144d9ef8dd7ea9883703915f972138207f4d4fb36a3e54df2e367cb106c688c3185a6d"
    )
    for off in (0, -4e-4, 4e-4):
        np.testing.assert_array_equal(pixel_coder.decode(mean + np.float32(off), data), x_0)


def test_damaged_bytes_end_in_a_clear_error_or_other_pixels():
    x_0, mean, _ = sample(1, levels(500))
    data, rng = pixel_coder.encode(x_0, mean), np.random.default_rng(4)
    errors = 0
    for i in range(400):
        damaged = bytearray(data[: rng.integers(len(data))] if i % 2 else data)
        for _ in range(0 if i % 4 == 1 else rng.integers(1, 8)):
            if damaged:
                damaged[rng.integers(len(damaged)) % (8 if i % 3 else 10_000)] = rng.integers(256)
        if i % 10 == 0:
            damaged = bytearray(rng.bytes(200))
        try:
            found = pixel_coder.decode(mean, bytes(damaged))
        except ValueError:
            errors += 1
        else:
            assert found.dtype == np.uint8
            assert found.shape == x_0.shape
    assert 50 < errors < 350


def test_what_cannot_be_coded_is_refused():
    mean = np.zeros(3, np.float32)
    for wrong in (np.zeros(3), np.zeros(2, np.uint8), np.zeros((3, 1), np.uint8)):
        with pytest.raises(ValueError, match=r"must be uint8\[3\]"):
            pixel_coder.encode(wrong, mean)
    for wrong in (np.asarray([0, np.nan, 0]), np.zeros((3, 1))):
        with pytest.raises(ValueError, match="must be finite numbers in a row"):
            pixel_coder.encode(np.zeros(3, np.uint8), wrong)
    assert (
        pixel_coder.decode(mean[:0], pixel_coder.encode(np.zeros(0, np.uint8), mean[:0])).size == 0
    )
