"""The file format: a header of 40 bytes, then packets of a fixed number of bits each, then pixels.

    bytes  field
    4      magic, b"DDPM"
    1      version, 1
    6      the model: the first bytes of a digest of its weights and schedule
    4      seed of the shared random numbers
    2      images in the file, together; of a picture in tiles, a tile's height - 1 and width - 1
    2 2 1  height, width and channels of each, or of the picture; 0 for those that vectors lack
    1      nu, the bits of the trellis' state; 32 more with spreads, 64 in tiles, 128 lossless
    2      lanes of a packet
    2      bits of a lane
    2      packets of the whole file
    1      the first stride, by its place in the list
    4      bytes of the pixels, 0 if lossy
    4      CRC-32: of the pixels themselves, or of the packets if lossy
    2      the lower half of the CRC-32 of the bytes before it

Integers are little-endian; bits are packed from a byte's highest. Packets fill whole bytes with
zeros at the end of the last. A packet has a bit or more for each image and for each 2^14 dimensions
of them, and a lane no more than 2048: so a file's size bounds what is allocated to decode it.
"""

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from ddpm.codec.packets import CHANGE_BITS, Layout
from ddpm.codec.tiles import count_tiles

MAGIC = b"DDPM"
VERSION = 1
_FIELDS = struct.Struct("<4sB6sIHHHBBHHHBII")
HEADER_BYTES = _FIELDS.size + 2
MODEL_BYTES = 6
_LOSSLESS, _TILED, _SPREADS, _NU = 0x80, 0x40, 0x20, 0x1F


class Header(NamedTuple):
    """What is said of a file before its packets."""

    lossless: bool
    model: bytes
    seed: int
    layout: Layout
    packets: int
    stride: int
    pixel_bytes: int
    crc: int
    picture: tuple[int, int] | None = None  # height and width of what is in tiles

    @property
    def packets_bytes(self) -> int:
        """The bytes of all packets."""
        return -(-self.packets * self.layout.packet_bits // 8)


def pack_header(header: Header) -> bytes:
    """Returns the header's bytes. Raises ValueError for what has no place in it."""
    layout, picture = header.layout, header.picture
    shape, images = (*layout.shape, 0, 0)[:3], layout.images
    if picture is not None:
        images = shape[0] - 1 << 8 | shape[1] - 1
        shape = (*picture, *shape[2:])
    kind = layout.nu | _SPREADS * layout.spreads
    kind |= _TILED * (picture is not None) | _LOSSLESS * header.lossless
    if not layout.allowed:
        raise ValueError(f"{layout} has no place in a file")
    if picture is not None and max(layout.shape[:2]) > 256:
        raise ValueError(f"tiles of shape {layout.shape}: must be of at most 256 x 256")
    try:
        fields = _FIELDS.pack(MAGIC, VERSION, header.model, header.seed, images, *shape, kind,
                              layout.lanes, layout.bits, header.packets, header.stride,
                              header.pixel_bytes, header.crc)  # fmt: skip
    except struct.error as error:
        raise ValueError(
            f"{layout.images} images of shape {layout.shape} have no place in a file's header "
            f"({error}): take fewer together, of at most 65535 x 65535 x 255"
        ) from error
    return fields + struct.pack("<H", zlib.crc32(fields) & 0xFFFF)


def read_header(data: bytes) -> Header:
    """Returns the header of a file. Raises ValueError for one that is foreign or damaged."""
    if data[:4] != MAGIC:
        raise ValueError("not a compressed file: it does not begin with DDPM")
    if len(data) < HEADER_BYTES:
        raise ValueError(f"{len(data)} bytes: the header alone is of {HEADER_BYTES}")
    fields = data[: _FIELDS.size]
    (_, version, model, seed, images, height, width, channels, kind, lanes, bits, packets, stride,
     pixel_bytes, crc) = _FIELDS.unpack(fields)  # fmt: skip
    if version != VERSION:
        raise ValueError(f"of format version {version}: this program reads version {VERSION}")
    if data[_FIELDS.size : HEADER_BYTES] != struct.pack("<H", zlib.crc32(fields) & 0xFFFF):
        raise ValueError("the header is damaged: its check sum is another")
    picture = None
    if kind & _TILED:
        picture, tile = (height, width), (1 + (images >> 8), 1 + (images & 255))
        images = count_tiles(picture, tile)
        height, width = tile
    shape = tuple(size for size in (height, width, channels) if size)
    nu, lossless = kind & _NU, bool(kind & _LOSSLESS)
    layout = Layout(images, shape, lanes, bits, nu, bool(kind & _SPREADS))
    sizes = (height, width, channels)[: len(shape)] == shape and len(shape) >= 1
    tiled = picture is None or len(shape) == 3
    counts = packets >= 1 and (lossless or not pixel_bytes)
    if not (sizes and tiled and counts and layout.allowed):
        raise ValueError("the header is damaged: its fields contradict each other")
    return Header(lossless, model, seed, layout, packets, stride, pixel_bytes, crc, picture)


def pack_packets(changes: list[int], bits: list[np.ndarray]) -> bytes:
    """Returns the bytes of packets: changes in 0..15, and bool[lanes, n] each."""
    change = (np.asarray(changes)[:, None] >> np.arange(CHANGE_BITS)[::-1]) & 1
    flat = np.asarray(bits, bool).reshape(len(changes), -1)
    return np.packbits(np.concatenate([change.astype(bool), flat], axis=1).ravel()).tobytes()


def read_packets(header: Header, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns the packets that are whole in a file's bytes: changes int32[k], bool[k, lanes, n].

    Raises ValueError where there is not one.
    """
    layout = header.layout
    payload = data[HEADER_BYTES : HEADER_BYTES + header.packets_bytes]
    count = min(header.packets, 8 * len(payload) // layout.packet_bits)
    if not count:
        raise ValueError(
            f"{len(data)} bytes: cut off before the first packet ends, which is of "
            f"{math.ceil(layout.packet_bits / 8)} after a header of {HEADER_BYTES}"
        )
    used = np.frombuffer(payload, np.uint8, -(-count * layout.packet_bits // 8))
    rows = np.unpackbits(used, count=count * layout.packet_bits).reshape(count, -1)
    change = rows[:, :CHANGE_BITS].astype(np.int32) @ (1 << np.arange(CHANGE_BITS)[::-1])
    bits = rows[:, CHANGE_BITS:].astype(bool).reshape(count, layout.lanes, layout.bits)
    return change.astype(np.int32), bits
