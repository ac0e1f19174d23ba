"""The file format: what it keeps, and that hostile bytes give a ValueError or images, no more."""

import struct
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from ddpm import Prediction, schedules
from ddpm.codec import coder
from ddpm.codec.container import (
    HEADER_BYTES,
    Header,
    pack_header,
    pack_packets,
    read_header,
    read_packets,
)
from ddpm.codec.packets import Layout
from ddpm.diffusion.gaussian import expand_like
from tests.codec.toys import gaussian, pixels

SCHEDULE = schedules.cosine(30)
DENOISER = gaussian(SCHEDULE, 0.04)
LAYOUT = Layout(2, (4, 3, 1), 1, 12, 12)
KEPT = Path(__file__).parents[1] / "fixtures" / "codec_lossless.ddpm"
PLAIN = Header(False, b"model\0", 2**32 - 1, LAYOUT, 3, 5, 0, 77)
# The fields of the header by their place: see the module's docstring.
FIELDS = {"version": (4, "B"), "seed": (11, "I"), "images": (15, "H"), "height": (17, "H"),
          "width": (19, "H"), "channels": (21, "B"), "kind": (22, "B"), "lanes": (23, "H"),
          "bits": (25, "H"), "packets": (27, "H"), "stride": (29, "B"), "pixels": (30, "I"),
          "crc": (34, "I")}  # fmt: skip


def mended(data):
    """The bytes with the check sum that their header should have."""
    head = data[: HEADER_BYTES - 2]
    return head + struct.pack("<H", zlib.crc32(head) & 0xFFFF) + data[HEADER_BYTES:]


def changed(data, **fields):
    data = bytearray(data)
    for name, value in fields.items():
        at, kind = FIELDS[name]
        struct.pack_into("<" + kind, data, at, value)
    return mended(bytes(data))


@pytest.mark.parametrize(
    "header",
    [
        PLAIN,
        PLAIN._replace(lossless=True, pixel_bytes=2**32 - 1, stride=255, packets=65535),
        PLAIN._replace(layout=Layout(65535, (7,), 512, 128, 3, True)),
        PLAIN._replace(layout=Layout(1, (5, 65535), 3, 2048, 16), seed=0, crc=2**32 - 1),
        PLAIN._replace(layout=Layout(6, (256, 3, 255), 8, 80), picture=(511, 9)),
        PLAIN._replace(layout=Layout(70000, (1, 2, 1), 175, 400), picture=(700, 200)),
    ],
)
def test_a_header_is_read_as_it_was_packed(header):
    data = pack_header(header)
    assert len(data) == HEADER_BYTES == 40
    assert read_header(data) == header


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (PLAIN._replace(layout=LAYOUT._replace(shape=(4, 3, 256))), "no place in a file's header"),
        (PLAIN._replace(layout=LAYOUT._replace(shape=(2, 2, 3, 1))), "no place in a file"),
        (PLAIN._replace(layout=LAYOUT._replace(bits=2)), "no place in a file"),
        (PLAIN._replace(layout=Layout(6, (257, 9, 1), 8, 80), picture=(511, 9)), "256 x 256"),
    ],
)
def test_what_has_no_place_is_not_packed(header, said):
    with pytest.raises(ValueError, match=said):
        pack_header(header)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"version": 2}, "of format version 2: this program reads version 1"),
        ({"images": 0}, "contradict"),
        ({"images": 13}, "contradict"),  # more than a packet has bits
        ({"height": 0}, "contradict"),
        ({"width": 0}, "contradict"),
        ({"height": 0, "width": 0, "channels": 0}, "contradict"),
        ({"height": 65535, "width": 65535}, "contradict"),
        ({"kind": 2}, "contradict"),
        ({"kind": 17}, "contradict"),
        ({"kind": 64 | 12, "channels": 0}, "contradict"),  # a picture without channels
        ({"kind": 64 | 12, "height": 65535, "images": 0}, "contradict"),
        ({"lanes": 0}, "contradict"),
        ({"lanes": 65535}, "contradict"),
        ({"bits": 2}, "contradict"),
        ({"bits": 25}, "contradict"),  # more than dimensions
        ({"packets": 0}, "contradict"),
        ({"pixels": 1}, "contradict"),  # of a lossy file
    ],
)
def test_damaged_headers_are_refused(fields, said):
    data = pack_header(PLAIN)
    with pytest.raises(ValueError, match=said):
        read_header(changed(data, **fields))
    assert read_header(changed(data)) == PLAIN


def test_foreign_and_short_files_are_refused():
    data = pack_header(PLAIN)
    for wrong, said in (
        (b"", "not a compressed file"),
        (b"\x89PNG" + data[4:], "not a compressed file"),
        (data[:39], "39 bytes: the header alone is of 40"),
        (data[:11] + b"\x01" + data[12:], "the header is damaged: its check sum"),
        (data[:-1] + bytes([data[-1] ^ 1]), "the header is damaged: its check sum"),
    ):
        with pytest.raises(ValueError, match=said):
            read_header(wrong)
    with pytest.raises(ValueError, match="of 2 after a header of 40"):
        read_packets(PLAIN, data + b"\xff")


def test_packets_are_read_as_they_were_packed():
    rng = np.random.default_rng(0)
    header = PLAIN._replace(layout=Layout(1, (40,), 3, 7), packets=5)  # of 25 bits
    changes, bits = rng.integers(0, 16, 5), rng.integers(0, 2, (5, 3, 7)).astype(bool)
    payload = pack_packets(list(changes), list(bits))
    assert len(payload) == header.packets_bytes == 16
    for size in range(4, 17):
        found, those = read_packets(header, pack_header(header) + payload[:size])
        count = 8 * size // 25
        np.testing.assert_array_equal(found, changes[:count])
        np.testing.assert_array_equal(those, bits[:count])


@pytest.fixture(scope="module")
def valid():
    """Files of one layout: a lossy one and a lossless one."""
    x_0 = pixels((1, 2, 4, 3, 1))
    coded = [
        coder.encode_files(SCHEDULE, DENOISER, x_0, 1, layout=LAYOUT, rate=2.0)[0].data,
        coder.encode_files(SCHEDULE, DENOISER, x_0, 1, layout=LAYOUT, lossless=True)[0].data,
    ]
    assert [len(coder.decode(SCHEDULE, DENOISER, data).x_0) for data in coded] == [2, 2]
    return coded


def mutated(rng, data):
    """A file with a few bytes of another value, cut off or longer; half of them mended."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        kind, at = rng.integers(4), rng.integers(len(data))
        if kind == 0:
            data[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            data[rng.integers(min(len(data), HEADER_BYTES))] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2 and rng.random() < 0.3:
            data = data[: at + 1]
        else:
            data[at] = rng.integers(256)
    data += rng.bytes(rng.integers(9)) if rng.random() < 0.2 else b""
    whole = len(data) >= HEADER_BYTES and rng.random() < 0.5
    return mended(bytes(data)) if whole else bytes(data)


def test_hostile_bytes_give_an_error_or_images(valid):
    """A header that is read is decoded where its layout is compiled, and a few others."""
    rng = np.random.default_rng(0)
    decoded = other = refused = 0
    for i in range(10_000):
        data = mutated(rng, valid[i % 2])
        try:
            header = read_header(data)
            changes, bits = read_packets(header, data)
        except ValueError:
            refused += 1
            continue
        layout = header.layout
        assert len(changes) * layout.packet_bits <= 8 * len(data)
        assert bits.size < 8 * len(data)
        assert layout.images <= 8 * len(data)
        assert layout.dimensions <= 8 * len(data) << 14
        if layout != LAYOUT:
            other += 1
            if other > 3 or layout.dimensions > 2000:
                continue
        elif decoded > 500:
            continue
        try:
            x_0 = coder.decode(SCHEDULE, DENOISER, data).x_0
        except ValueError:
            continue
        assert x_0.shape == (layout.images, *layout.shape)
        decoded += 1
    assert refused > 5000
    assert decoded > 100
    assert other > 50


def test_hostile_pixels_give_an_error_or_the_pixels(valid):
    """The header and the packets are right, what follows is not."""
    rng = np.random.default_rng(1)
    whole = valid[1]
    header = read_header(whole)
    end = HEADER_BYTES + header.packets_bytes
    expected = np.asarray(coder.decode(SCHEDULE, DENOISER, whole).x_0)
    found = 0
    for i in range(300):
        tail = bytearray(whole[end:])
        if i % 3 == 0:
            tail = bytearray(rng.bytes(rng.integers(1, 60)))
        elif i % 3 == 1:
            tail[rng.integers(4)] = rng.integers(256)
        else:
            tail[rng.integers(len(tail))] ^= 1 << rng.integers(8)
        data = changed(whole[:end] + bytes(tail), pixels=len(tail))
        try:
            last = coder.decode(SCHEDULE, DENOISER, data)
        except ValueError:
            continue
        found += 1
        np.testing.assert_array_equal(last.x_0, expected)
    assert found < 30


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"stride": 255}, "a schedule of another number of steps"),
        ({"packets": 30}, "a schedule of another number of steps"),
        ({"packets": 29}, "they go on after t = 1"),
    ],
)
def test_hostile_fields_that_a_header_may_have(valid, fields, said):
    with pytest.raises(ValueError, match=said):
        coder.decode(SCHEDULE, DENOISER, changed(valid[1] + b"\xff" * 60, **fields))


LEVEL = np.float32(191 / 127.5 - 1)  # and pixel 64 is the same below 0


def _of_two(schedule, x_t, t):
    at = schedule.at(t)
    alpha, sigma = expand_like(at.alpha, x_t), expand_like(at.sigma, x_t)
    x_0 = LEVEL * jnp.tanh(LEVEL * alpha * x_t / sigma**2)
    return Prediction(x_0, (x_t - alpha * x_0) / sigma)


OF_TWO = Partial(_of_two, SCHEDULE)  # exact for pixels that are 64 or 191


def kept_pixels():
    """Images by a formula, so that they need not be stored."""
    image, y, x, _ = np.indices((2, 4, 3, 1))
    return np.where((image + 2 * x + 3 * y * y) % 5 < 2, LEVEL, -LEVEL)


def test_a_kept_file_is_read_for_ever():
    """Files that were written once decode to the very pixels with every later version.

    Made by `python -m tests.codec.test_container FILE` in a process of its own.
    """
    found = coder.decode(SCHEDULE, OF_TWO, KEPT.read_bytes(), model=b"kept")
    assert found.lossless
    np.testing.assert_allclose(found.x_0, kept_pixels(), atol=1e-6)
    assert found.packets >= 2  # which say nearly all
    assert read_header(KEPT.read_bytes()).pixel_bytes < 8


if __name__ == "__main__":
    made = coder.encode_files(SCHEDULE, OF_TWO, kept_pixels()[None], 24, lossless=True,
                              layout=LAYOUT._replace(spreads=True), model=b"kept")[0]  # fmt: skip
    Path(sys.argv[1]).write_bytes(made.data)
