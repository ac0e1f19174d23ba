"""Lossless coding of 8-bit pixels, given a network's prediction of their mean.

The model is the discretised Gaussian of Eq. 13: bins of one pixel level, the outer ones to
infinity. Its mean is the prediction, rounded to a grid; its scale is chosen by the encoder, one for
each **segment** of the mean's range, so that a background that is certain costs nothing. Symbols
are coded by `constriction`'s range coder.

The coder sees integers alone. Grid and scales are of fixed tables, the normal CDF is a table of
whole numbers, and a pixel's 256 weights add up to 2^24 - 256: the coder adds one to each, so that
every pixel can be coded, and has nothing to round.

The network's output is not the same to the last bit on another machine or in another batch, and
where it is close to the edge between two cells of the grid the decoder may round it to the wrong
one. So the encoder sends parities of random halves of the cells' numbers, a few more than there
are predictions within the **guard** of an edge. The decoder moves those closest to an edge across
it, as few as explain the parities: an erasure code, at one bit for each doubtful prediction (their
places would cost several). A finer grid has more of them, so the encoder chooses the grid by all
the bits.

    byte     0: the grid's number, low four bits; segments - 1, high four
    bytes    of each segment, the number of its scale; of each but the first, the bin it begins in
    bytes    of each block of 16384 pixels, the bytes of its parities; then these
    bytes    the range coder's 32-bit words, big-endian, without zeros at their end
"""

import contextlib
import functools
import hashlib
import math
from typing import NamedTuple

import constriction
import numpy as np

from ddpm.diffusion.pixels import HALF_RANGE

GUARD = 1e-5  # by how much a decoder's means may be off, in units of x_0
SCALES = 192  # sigma = 2^(k/16 - 4) pixel levels, 1/16 to 245
# Steps of the mean's grid in pixel levels, as fractions.
GRIDS = ((1, 16), (1, 12), (1, 8), (1, 6), (1, 5), (1, 4), (1, 3), (2, 5), (1, 2), (2, 3), (1, 1),
         (3, 2), (2, 1), (3, 1), (4, 1), (8, 1))  # fmt: skip

_WEIGHT = (1 << 24) - 256
_PER_SIGMA = 1 << 12  # entries of the CDF's table
_FURTHEST = 6 * _PER_SIGMA  # beyond, nothing is left of 2^-24
_UNIT = 20  # bits of a scale's inverse after the point
_SHA256 = "a3dbcefb75003387ed02eb20e229a1344b84f7c64604a57e797e67e11b2f18a2"
# Edges of the bins of the mean, in half pixel levels: fine where images are black or white.
_EDGES = np.asarray([1, 2, 4, 8, 16, 32, 96, 255, 414, 478, 494, 502, 506, 508, 509])
_BINS = len(_EDGES) + 1
_BLOCK = 1 << 14  # pixels that share parities
_SPARE = 8  # parities that check what the others correct
_CHUNK = 1 << 12
_SAMPLE = 1 << 14  # pixels by which the grid is chosen
_FLUSH = 4  # bits that rounding to bytes costs


class _Model(NamedTuple):
    """A grid, and of each segment the bin it begins in and the scale, by their numbers."""

    grid: int
    starts: list[int]
    scales: list[int]


class _Cells(NamedTuple):
    """Means on a grid: the cell's number; which neighbour is closer, -1 or 1; how far the edge to
    it is, in units of x_0. [N] each."""

    number: np.ndarray
    side: np.ndarray
    distance: np.ndarray


def encode(x_0: np.ndarray, mean: np.ndarray, *, guard: float = GUARD) -> bytes:
    """Returns the code of pixels, uint8[N], given their predicted mean, float[N] in [-1, 1].

    A decoder whose means differ by less than `guard`, at random or all alike, finds the same
    pixels; one whose means conspire may refuse. Raises ValueError for other types and shapes, or
    means that are not finite.
    """
    pixels, level = _checked(x_0, mean)
    chosen, _ = _choose(pixels, level, guard)
    cells = _on_grid(level, chosen.grid)
    parities = [_parity(part.number, _parity_bytes(part, guard)) for part in _blocks(cells)]
    head = [chosen.grid | len(chosen.scales) - 1 << 4, *chosen.scales, *chosen.starts[1:]]
    sizes = [len(parity) for parity in parities]
    weights, row = _weights_of(chosen, cells.number)
    words = _range_coded(pixels, weights, row)
    return bytes([*head, *sizes]) + b"".join(parities) + words


def decode(mean: np.ndarray, data: bytes) -> np.ndarray:
    """Returns the pixels, uint8[N], that `encode` was given with this mean, or nearly this one.

    Raises ValueError for data that no encoder writes, or where the means differ too much. Damage
    that is not seen gives other pixels: keep a checksum of them.
    """
    level = _levels(mean)
    chosen, sizes, at = _read_head(data, -(-len(level) // _BLOCK))
    cells = _on_grid(level, chosen.grid)
    corrected = []
    for part, size in zip(_blocks(cells), sizes, strict=True):
        corrected.append(_corrected(part, data[at : at + size]))
        at += size
    number = np.concatenate([np.zeros(0, np.int64), *corrected])
    return _range_decoded(data[at:], *_weights_of(chosen, number)).astype(np.uint8)


def cost(x_0: np.ndarray, mean: np.ndarray, *, guard: float = GUARD) -> float:
    """Returns the bits that `encode` takes, to a few bytes, without coding."""
    return _choose(*_checked(x_0, mean), guard)[1]


def weights(number: np.ndarray, grid: int, scale: np.ndarray) -> np.ndarray:
    """Returns the 256 pixels' weights, int64[N, 256], each >= 0 and 2^24 - 256 in all, of a mean's
    number on a grid and a scale's number, [N] each.

    As float32 they are exact, and `constriction.stream.model.Categorical(perfect=False)` makes each
    one more, of 2^24.
    """
    step, parts = GRIDS[grid]
    edges = (2 * np.arange(255) + 1) * parts - 2 * step * number[:, None]
    below = np.zeros((len(number), 257), np.int64)
    below[:, 1:256] = _cdf(edges, parts, scale[:, None])
    below[:, 256] = _WEIGHT
    return np.diff(below, axis=1)


def finest_weights(mean: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Returns `weights`, as float32, of means and standard deviations in units of x_0, [N] each,
    on the finest grid and the nearest scale: for who computes them twice exactly the same."""
    _, parts = GRIDS[0]
    number = np.rint(_levels(mean) * parts).astype(np.int64)
    scale = np.rint(16 * (np.log2(sigma * HALF_RANGE) + 4)).clip(0, SCALES - 1)
    return weights(number, 0, scale.astype(np.int64)).astype(np.float32)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns the normal CDF in units of 1/(2^24 - 256) by 2^-12 sigma, and the scales' inverses.

    Raises RuntimeError where this machine computes them otherwise: no file by others could be read.
    """
    tail = [0.5 * math.erfc(i / _PER_SIGMA / math.sqrt(2)) for i in range(_FURTHEST)]
    upper = _WEIGHT - np.asarray([round(_WEIGHT * p) for p in tail] + [0], "<i8")
    inverse = np.asarray([round(2 ** (_UNIT + 4 - k / 16)) for k in range(SCALES)], "<i8")
    if hashlib.sha256(upper.tobytes() + inverse.tobytes()).hexdigest() != _SHA256:
        raise RuntimeError("the table of the normal CDF is not the codec's: report this machine")
    return np.concatenate([_WEIGHT - upper[:0:-1], upper]), inverse


def _cdf(edge: np.ndarray, parts: int, scale: np.ndarray) -> np.ndarray:
    """Returns the CDF's table at an edge, its distance from the mean in 1/(2 parts) of a level."""
    cdf, inverse = _tables()
    place = edge * (inverse[scale] * _PER_SIGMA // (2 * parts)) >> _UNIT
    return cdf[np.clip(place, -_FURTHEST, _FURTHEST) + _FURTHEST]


def _checked(x_0: np.ndarray, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixels as int64 and the levels of their means."""
    x_0, level = np.asarray(x_0), _levels(mean)
    if x_0.dtype != np.uint8 or x_0.shape != level.shape:
        raise ValueError(f"x_0 is {x_0.dtype}{list(x_0.shape)}: must be uint8{list(level.shape)}")
    return x_0.astype(np.int64), level


def _levels(mean: np.ndarray) -> np.ndarray:
    """Returns means in pixel levels, float64 in 0..255."""
    level = (np.asarray(mean, np.float64) + 1) * HALF_RANGE
    if level.ndim != 1 or not np.isfinite(level).all():
        raise ValueError(f"the mean, of shape {list(level.shape)}, must be finite numbers in a row")
    return level.clip(0, 2 * HALF_RANGE)


def _on_grid(level: np.ndarray, grid: int) -> _Cells:
    step, parts = GRIDS[grid]
    place = level * (parts / step)
    number = np.floor(place + 0.5)
    side = np.where(place < number, -1, 1)
    distance = (0.5 - abs(place - number)) * (step / parts / HALF_RANGE)
    outermost = side > 0, number == math.floor(2 * HALF_RANGE * parts / step + 0.5)
    distance[np.logical_and(*outermost)] = np.inf
    return _Cells(number.astype(np.int64), side, distance)


def _blocks(cells: _Cells) -> list[_Cells]:
    starts = range(0, len(cells.number), _BLOCK)
    return [_Cells(*(x[i : i + _BLOCK] for x in cells)) for i in starts]


def _bins(number: np.ndarray, grid: int) -> np.ndarray:
    """Returns the bin of each mean on a grid."""
    step, parts = GRIDS[grid]
    return np.searchsorted(_EDGES * parts, 2 * step * number, side="right")


def _weights_of(chosen: _Model, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of each mean there is, float32[M, 256], and which of them is a pixel's,
    [N]."""
    means, row = np.unique(number, return_inverse=True)
    segment = np.searchsorted(chosen.starts, _bins(means, chosen.grid), side="right") - 1
    scale = np.asarray(chosen.scales)[segment]
    return weights(means, chosen.grid, scale).astype(np.float32), row


def _range_coded(pixels: np.ndarray, weights: np.ndarray, row: np.ndarray) -> bytes:
    """Returns the range coder's words, without zeros at their end; of few pixels, with as many
    zeros as still decode."""
    coder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    for i in range(0, len(pixels), _CHUNK):
        part = slice(i, i + _CHUNK)
        coder.encode(pixels[part].astype(np.int32), family, weights[row[part]])
    words = coder.get_compressed()
    for bits in (24, 16, 8) if 0 < len(pixels) <= _BLOCK else ():
        last = -(-int(words[-1]) >> bits) << bits
        if last < 1 << 32:
            shorter = _stripped(np.append(words[:-1], np.uint32(last)))
            with contextlib.suppress(ValueError):
                if np.array_equal(_range_decoded(shorter, weights, row), pixels):
                    return shorter
    return _stripped(words)


def _stripped(words: np.ndarray) -> bytes:
    return words.astype(">u4").tobytes().rstrip(b"\0")


def _range_decoded(data: bytes, weights: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Returns the pixels, int32[N], of what `_range_coded` returned. Raises ValueError for what it
    cannot have."""
    words = np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32)
    coder = constriction.stream.queue.RangeDecoder(words)
    family = constriction.stream.model.Categorical(perfect=False)
    found = [np.zeros(0, np.int32)]
    for i in range(0, len(row), _CHUNK):
        try:
            found.append(coder.decode(family, weights[row[i : i + _CHUNK]]))
        except AssertionError as error:  # constriction's, of words that it does not write
            raise ValueError("the code of the pixels is damaged") from error
    return np.concatenate(found)


def _choose(pixels: np.ndarray, level: np.ndarray, guard: float) -> tuple[_Model, float]:
    """Returns the grid, segments and scales that take the fewest bits, and those.

    Grids are compared on some of the pixels and scales, the best three of them on all.
    """
    every = max(1, len(pixels) // _SAMPLE)

    def fitted(grid: int, every: int, scales: np.ndarray) -> tuple[float, _Model]:
        cells, some = _on_grid(level[::every], grid), pixels[::every]
        starts, places, bits = _segments(_bits(some, cells.number, grid, scales))
        sizes = [_parity_bytes(part, guard) for part in _blocks(cells)]
        total = bits + 8 * (2 + len(sizes) + sum(sizes)) + _FLUSH
        return every * total, _Model(grid, starts, scales[places].tolist())

    grids = range(len(GRIDS))
    likely = sorted(grids, key=lambda grid: fitted(grid, every, np.arange(0, SCALES, 6))[0])
    bits, chosen = min(fitted(grid, 1, np.arange(SCALES)) for grid in likely[:3])
    return chosen, bits


def _bits(pixels: np.ndarray, number: np.ndarray, grid: int, scales: np.ndarray) -> np.ndarray:
    """Returns the bits of all pixels whose mean is in a bin, at each scale, float64[bins, scales].

    Many pixels are as far from their mean: each distance is looked up once.
    """
    step, parts = GRIDS[grid]
    end = np.where(pixels == 0, 1, np.where(pixels == 255, 2, 0))
    span = 1 << 14  # of distances, at most 255 * 16 to either side
    keys = (_bins(number, grid) * 3 + end) * span + pixels * parts - number * step + span // 2
    unique, count = np.unique(keys, return_counts=True)
    bits = np.zeros((_BINS, len(scales)))
    for i in range(0, len(unique), _CHUNK):
        key = unique[i : i + _CHUNK, None]
        edge, of_end = 2 * (key % span - span // 2), key // span % 3
        below = np.where(of_end == 1, 0, _cdf(edge - parts, parts, scales))
        above = np.where(of_end == 2, _WEIGHT, _cdf(edge + parts, parts, scales))
        one = 24 - np.log2(above - below + 1)
        np.add.at(bits, key[:, 0] // (3 * span), count[i : i + _CHUNK, None] * one)
    return bits


def _segments(bits: np.ndarray) -> tuple[list[int], list[int], float]:
    """Returns where segments of bins begin, their scales (places in `bits`), and the bits in all
    with two bytes for each segment but the first: the fewest, by dynamic programming."""
    before = np.concatenate([np.zeros_like(bits[:1]), bits.cumsum(axis=0)])
    best: list[tuple[float, list[int], list[int]]] = [(-16.0, [], [])]
    for end in range(1, len(before)):
        options = []
        for start in range(end):
            total = before[end] - before[start]
            scale = int(total.argmin())
            options.append((best[start][0] + 16 + total[scale], start, scale))
        total_bits, start, scale = min(options)
        best.append((float(total_bits), [*best[start][1], start], [*best[start][2], scale]))
    total_bits, starts, scales = best[-1]
    return starts, scales, total_bits


def _parity_bytes(cells: _Cells, guard: float) -> int:
    """Returns how many bytes of parities correct a block; 0 if no mean is within the guard of an
    edge.

    A decoder may find as many means there as the encoder, but for chance; or as many as are there
    of edges shifted by less than the guard, where all its means are.
    """
    if not (cells.distance < guard).any():
        return 0
    signed = np.sort((cells.side * cells.distance)[cells.distance < 2 * guard])
    within = np.searchsorted(signed, signed + 2 * guard) - np.arange(len(signed))
    doubtful = int(within.max())
    return min(-(-(doubtful + math.isqrt(doubtful) + 4 + _SPARE) // 8), 255)


def _columns(count: int, size: int) -> np.ndarray:
    """Returns which parities each of `count` cells is in, random bits uint8[count, size]."""
    digest = hashlib.shake_128(b"parity").digest(count * size)
    return np.frombuffer(digest, np.uint8).reshape(count, size)


def _parity(number: np.ndarray, size: int) -> bytes:
    """Returns the parities of the cells' lowest bits, `size` bytes."""
    if not size:
        return b""
    return np.bitwise_xor.reduce(_columns(len(number), size)[number & 1 == 1], axis=0).tobytes()


def _corrected(cells: _Cells, parity: bytes) -> np.ndarray:
    """Returns the cells' numbers as the encoder has them, by its parities.

    The cells closest to an edge are taken one by one, until moving some of them across it explains
    the parities: Gaussian elimination over GF(2), bits in Python's integers.
    """
    number = cells.number.copy()
    size = len(parity)
    unexplained = _integer(_parity(number, size)) ^ _integer(parity)
    columns, order = _columns(len(number), size), np.argsort(cells.distance, kind="stable")
    basis: dict[int, tuple[int, int]] = {}  # by its highest bit: a sum of columns, and of which
    moved = taken = 0
    while unexplained:
        if len(basis) >= 8 * size - _SPARE or taken >= len(order):
            raise ValueError("the prediction differs too much from the encoder's, or data is bad")
        column, which = _reduced(basis, _integer(columns[order[taken]].tobytes()), 1 << taken)
        taken += 1
        if column:
            basis[column.bit_length()] = column, which
            unexplained, moved = _reduced(basis, unexplained, moved)
    wrong = order[[k for k in range(taken) if moved >> k & 1]]
    number[wrong] += cells.side[wrong]
    return number


def _reduced(basis: dict[int, tuple[int, int]], value: int, which: int) -> tuple[int, int]:
    """Subtracts from a value what has its highest bit, as long as there is any."""
    while value and value.bit_length() in basis:
        column, those = basis[value.bit_length()]
        value, which = value ^ column, which ^ those
    return value, which


def _integer(bits: bytes) -> int:
    return int.from_bytes(bits, "little")


def _read_head(data: bytes, blocks: int) -> tuple[_Model, bytes, int]:
    """Returns what was chosen, each block's number of parity bytes, and where those begin."""
    segments = (data[0] >> 4) + 1 if data else 0
    at = 2 * segments + blocks
    if not segments or len(data) < at or len(data) < at + sum(data[2 * segments : at]):
        raise ValueError(f"{len(data)} bytes end before the pixels do")
    scales, starts = list(data[1 : 1 + segments]), [0, *data[1 + segments : 2 * segments]]
    if max(scales) >= SCALES or max(starts) >= _BINS or (np.diff(starts) < 1).any():
        raise ValueError("the scales of the pixels are none that an encoder writes")
    return _Model(data[0] & 15, starts, scales), data[2 * segments : at], at
