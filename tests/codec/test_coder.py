"""Images to bytes and back, with exact denoisers: rates and errors are those of closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from ddpm import Prediction, schedules
from ddpm.codec import coder, rates
from ddpm.codec.container import HEADER_BYTES, read_header
from ddpm.codec.packets import Layout, in_chunks
from ddpm.codec.plan import choose_layout
from tests.codec.toys import gaussian, pixels
from tests.exact import close

KEY = jax.random.key(0)
SCHEDULE = schedules.linear(1000)
SHORT = schedules.cosine(100)
D = 512
VECTORS = 8
WHITE = np.ones(D)
POWER = np.arange(1, D + 1) ** -1.5 / (np.arange(1, D + 1) ** -1.5).mean()


def vectors(eigenvalues, files=1):
    z = np.random.default_rng(1).normal(size=(files, VECTORS, D)) * np.sqrt(eigenvalues)
    return jnp.asarray(z, jnp.float32)


def overheads(encoded, eigenvalues):
    """The excess of the rates at each point over an ideal coder's of the same diffusion at the same
    squared error."""
    curve = np.asarray(encoded.curve[1:])
    snr = np.geomspace(1e-5, 1e5, 20_000)
    errors = rates.gaussian_distortions(eigenvalues, snr).posterior_mean
    ideal = np.interp(-curve[:, 2], -errors, rates.gaussian_information(eigenvalues, snr))
    return curve[:, 0] / ideal - 1


@pytest.fixture(scope="module")
def white():
    """A file of eight vectors N(0, I), the vectors, the denoiser, and what is decoded of them."""
    x_0, denoiser = vectors(WHITE), gaussian(SCHEDULE, 1.0)
    layout = Layout(VECTORS, (D,), 3, 341)
    encoded = coder.encode_files(SCHEDULE, denoiser, x_0, 0, rate=1.3, layout=layout)[0]
    return encoded, x_0[0], denoiser, list(coder.decodings(SCHEDULE, denoiser, encoded.data))


def test_white_data_costs_a_few_percent_over_the_ideal_rate(white):
    encoded, *_ = white
    found = overheads(encoded, WHITE)[np.asarray(encoded.curve)[1:, 0] >= 0.5]
    assert len(found) >= 3
    assert found.mean() <= 0.085
    assert found.min() >= 0.03  # less would be a mistake of the test


def test_the_curve_is_that_of_the_file(white):
    encoded, x_0, _, decoded = white
    assert encoded.pixel_bytes == 0
    last, header = decoded[-1], read_header(encoded.data)
    assert last.packets == len(decoded) == header.packets == len(encoded.curve) - 1
    bits = header.packets * header.layout.packet_bits
    assert len(encoded.data) == HEADER_BYTES + -(-bits // 8)
    assert 1.3 - header.layout.packet_bits / x_0.size < last.rate <= 1.3
    for point, found in zip(encoded.curve[1:], decoded, strict=True):
        close(point.rate, found.rate)
        close(point.squared_error, ((found.x_0 - x_0) ** 2).mean(), rtol=1e-4)
    errors = [point.squared_error for point in encoded.curve]
    assert (np.diff(errors) < 0).all()
    assert [found.t for found in decoded] == sorted((f.t for f in decoded), reverse=True)
    close(encoded.curve[1].psnr, 10 * np.log10(4 / errors[1]), rtol=1e-6)


def test_what_is_left_is_noise_of_the_forward_process(white):
    _, x_0, _, decoded = white
    last = decoded[-1]
    at = SCHEDULE.at(jnp.asarray(last.t))
    noise = np.asarray((last.x_t - at.alpha * x_0) / at.sigma).ravel()
    assert abs(noise.var() - 1) < 0.05
    assert stats.kstest(noise, "norm").pvalue > 0.01


def test_decoders_have_their_distortions(white):
    _, x_0, denoiser, decoded = white
    last = decoded[-1]
    expected = rates.gaussian_distortions(WHITE, np.exp(float(SCHEDULE.log_snr[last.t])))
    for name, distortion in zip(coder.DECODERS, expected, strict=True):
        found = coder.finished(SCHEDULE, denoiser, last, name, KEY)
        close(((found.x_0 - x_0) ** 2).mean(), distortion, rtol=0.08)
    # A sample has the data's variance, the mean what is left of it.
    sample = coder.finished(SCHEDULE, denoiser, last, "ancestral", KEY).x_0
    close(sample.var(), 1, rtol=0.08)
    close(last.x_0.var(), 1 - expected.posterior_mean, rtol=0.08)
    with pytest.raises(ValueError, match="decoder = 'best': must be one of mean, ancestral, flow"):
        coder.finished(SCHEDULE, denoiser, last, "best", KEY)


def test_every_beginning_of_the_bytes_decodes(white):
    encoded, _, denoiser, decoded = white
    decode = functools.partial(coder.decode, SCHEDULE, denoiser)
    size = read_header(encoded.data).layout.packet_bits
    for k, more in ((1, 0), (2, 77), (len(decoded), 0)):
        cut = HEADER_BYTES + -(-k * size // 8) + more
        found = decode(encoded.data[:cut])
        assert (found.packets, found.t) == (k, decoded[k - 1].t)
        np.testing.assert_array_equal(found.x_0, decoded[k - 1].x_0)
    with pytest.raises(ValueError, match="cut off before the first packet ends, which is of 129"):
        decode(encoded.data[: HEADER_BYTES + size // 8])
    broken = bytearray(encoded.data)
    broken[100] ^= 4
    with pytest.raises(ValueError, match="the packets are damaged: their check sum"):
        decode(bytes(broken))
    with pytest.raises(ValueError, match="a schedule of another number of steps"):
        coder.decode(schedules.linear(4), denoiser, encoded.data)


def test_a_power_law_chooses_the_spread_of_the_denoiser():
    x_0, denoiser = vectors(POWER), gaussian(SCHEDULE, POWER)
    encoded = coder.encode_files(SCHEDULE, denoiser, x_0, 0, rate=1.5)[0]
    assert read_header(encoded.data).layout.spreads
    assert overheads(encoded, POWER)[-1] <= 0.12
    last = coder.decode(SCHEDULE, denoiser, encoded.data)
    close(((last.x_0 - x_0[0]) ** 2).mean(), encoded.curve[-1].squared_error, rtol=1e-3)


SMALL = Layout(1, (128,), 1, 40, 6)


def test_each_file_ends_by_itself(caplog):
    """Files of a batch reach a PSNR, or t = 1, after different numbers of packets."""
    scale = np.asarray([0.1, 0.5, 1.0, 2.0])[:, None, None]
    x_0 = jnp.asarray(scale * np.random.default_rng(0).normal(size=(4, 1, 128)), jnp.float32)
    denoiser = gaussian(SHORT, 1.0)
    encode = functools.partial(coder.encode_files, SHORT, denoiser, x_0, 3, layout=SMALL)
    found = encode(target_psnr=20.0)
    for file in found:
        psnrs = [point.psnr for point in file.curve]
        assert psnrs[-1] >= 20 or len(psnrs) == 2
        assert max(psnrs[1:-1], default=0.0) < 20
    assert len({len(file.curve) for file in found}) >= 3
    whole = encode()
    counts = [len(file.curve) for file in whole]
    assert len(set(counts)) >= 3
    for i in (0, 3):
        last = coder.decode(SHORT, denoiser, whole[i].data)
        close(((last.x_0 - x_0[i]) ** 2).mean(), whole[i].curve[-1].squared_error, rtol=1e-3)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        kept = encode(rate=1.0)
    assert "Compiling" not in caplog.text
    assert {len(file.curve) for file in kept} == {1 + 128 // SMALL.packet_bits}


OF_PIXELS = Layout(2, (6, 5, 1), 1, 24, 5)


@pytest.fixture(scope="module")
def lossless():
    """Three files of two 8-bit images each, with the images and a denoiser for them."""
    x_0 = pixels((3, 2, 6, 5, 1))
    denoiser = gaussian(SHORT, 0.04)
    files = coder.encode_files(SHORT, denoiser, x_0, 7, lossless=True, layout=OF_PIXELS)
    return files, x_0, denoiser


def test_pixels_come_back_file_by_file(lossless):
    files, x_0, denoiser = lossless
    for encoded, given in zip(files, x_0, strict=True):
        found = coder.decode(SHORT, denoiser, encoded.data)
        assert found.lossless
        np.testing.assert_array_equal(found.x_0, given)
        close(found.rate, 8 * (len(encoded.data) - HEADER_BYTES) / given.size)
    # Without the last byte the packets remain.
    coarse = coder.decode(SHORT, denoiser, encoded.data[:-1])
    assert not coarse.lossless
    close(((coarse.x_0 - given) ** 2).mean(), encoded.curve[-1].squared_error, rtol=1e-3)
    assert 0 < encoded.curve[-1].squared_error < encoded.curve[0].squared_error
    total = 8 * sum(len(file.data) - HEADER_BYTES for file in files) / x_0.size
    entropy = np.log2(0.2 * 127.5 * np.sqrt(2 * np.pi * np.e))
    assert entropy < total < 1.25 * entropy


def _off(denoiser, x_t, t):
    found = denoiser(x_t, t)
    return Prediction(found.x_0 + 1e-6 * jnp.sin(1e4 * x_t), found.eps)


def test_a_network_that_is_off_in_its_last_bits_gives_the_very_pixels(lossless):
    files, x_0, denoiser = lossless
    for encoded, given in zip(files, x_0, strict=True):
        found = coder.decode(SHORT, Partial(_off, denoiser), encoded.data)
        assert found.lossless
        np.testing.assert_array_equal(found.x_0, given)


def _far(denoiser, x_t, t):
    found = denoiser(x_t, t)
    return Prediction(0.5 * found.x_0 + 0.1, found.eps)


def test_another_denoiser_is_refused_not_taken_for_the_pixels(lossless):
    files, _, denoiser = lossless
    with pytest.raises(ValueError, match="the pixels do not come out as they were"):
        coder.decode(SHORT, Partial(_far, denoiser), files[0].data)


def _useless(x_t, t):
    return Prediction(0.9 * jnp.sin(3 * x_t), jnp.zeros_like(x_t))


def test_pixels_come_back_where_no_packet_helps():
    x_0 = pixels((3, 2, 6, 5, 1), sigma=0.5)
    files = coder.encode_files(SHORT, _useless, x_0, 0, lossless=True, layout=OF_PIXELS)
    for encoded, given in zip(files, x_0, strict=True):
        found = coder.decode(SHORT, _useless, encoded.data)
        assert found.lossless
        np.testing.assert_array_equal(found.x_0, given)
    assert min(len(file.curve) for file in files) == 2  # of one packet


def test_matrices():
    x_0, denoiser = pixels((2, 4, 6)), gaussian(SHORT, 0.04)
    layout = Layout(2, (4, 6), 1, 12, 12)
    data = coder.encode_files(SHORT, denoiser, x_0[None], 1, rate=2.0, layout=layout)[0].data
    assert read_header(data).layout == layout
    found = coder.decode(SHORT, denoiser, data)
    assert found.x_0.shape == x_0.shape
    assert ((found.x_0 - x_0) ** 2).mean() < 0.7 * 0.04


def test_vectors_of_a_named_model():
    x_0, denoiser = pixels((2, 20)), gaussian(SHORT, 0.04)
    data = coder.encode(KEY, SHORT, denoiser, x_0, rate=2.0, nu=4, model=b"the name of it")
    other = coder.encode(jax.random.key(1), SHORT, denoiser, x_0, rate=2.0, nu=4)
    assert read_header(other).seed != read_header(data).seed
    # What is checked of a name are the first bytes.
    found = coder.decode(SHORT, denoiser, data, model=b"the name of another's")
    assert found.x_0.shape == x_0.shape
    assert ((found.x_0 - x_0) ** 2).mean() < 0.7 * 0.04
    with pytest.raises(ValueError, match="made with another model"):
        coder.decode(SHORT, denoiser, data, model=b"other")


def _nan(x_t, t):
    return Prediction(x_t * jnp.nan, x_t)


@pytest.mark.parametrize(
    ("x_0", "options", "said"),
    [
        (np.zeros((2, 8), np.uint8), {}, "x_0 is of uint8: must be scaled"),
        (np.full((2, 8), 0.001, np.float32), {"lossless": True}, "not 8-bit pixels"),
        (np.zeros((2, 8), np.float32), {"rate": 1.0, "lossless": True}, "has no rate"),
        (np.zeros((2, 8), np.float32), {"nu": 17}, r"nu = 17 .*in 3\.\.16"),
        (np.zeros((2, 1), np.float32), {}, "2 dimensions of all images together: .* 3 or more"),
        (np.zeros(8, np.float32), {}, r"of shape \[8\]: must be \[G, ...\]"),
        (np.zeros((2, 2, 2, 2, 2), np.float32), {}, "1 to 3 dimensions each"),
        (np.zeros((0, 8), np.float32), {}, r"of shape \[0, 8\]: .*one image or more"),
    ],
)
def test_what_cannot_be_encoded(x_0, options, said):
    with pytest.raises(ValueError, match=said):
        coder.encode(KEY, SHORT, _useless, x_0, **options)


def test_a_denoiser_that_is_not_finite_and_a_rate_too_low():
    x_0 = np.zeros((1, 1, 128), np.float32)
    with pytest.raises(ValueError, match="the denoiser's x_0 is not finite"):
        coder.encode_files(SHORT, _nan, x_0, 0, layout=SMALL)
    with pytest.raises(ValueError, match=r"not one packet .* 0\.344 bits/dim: more than rate"):
        coder.encode_files(SHORT, gaussian(SHORT, 1.0), x_0, 0, layout=SMALL, rate=0.3)


@pytest.mark.parametrize("count", [1, 3, 7, 9])
def test_chunks_give_what_the_whole_does(count):
    z = jnp.asarray(np.random.default_rng(0).normal(size=(count, 4)), jnp.float32)
    sizes = []

    def function(given):
        sizes.append(len(given[0]))
        return {"sum": given[0].sum(axis=1) + given[1], "nothing": None}

    found = in_chunks(function, (z, jnp.arange(count)), 3)
    assert found["nothing"] is None
    np.testing.assert_allclose(found["sum"], z.sum(axis=1) + np.arange(count), rtol=1e-6)
    assert set(sizes) == {min(count, 3)}


def test_many_small_images_have_a_layout():
    x_0 = pixels((1, 14, 2))
    layout = choose_layout(SHORT, gaussian(SHORT, 0.04), x_0, nu=5)
    assert layout.allowed
    assert layout.dimensions == 28
