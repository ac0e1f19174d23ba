"""Images to bytes and back, by any denoiser: `encode`, `decode`, and all that lies between.

    data = ddpm.codec.encode(key, schedule, denoiser, x_0)
    x_0 = ddpm.codec.decode(schedule, denoiser, data).x_0

Any beginning of the bytes, from the first packet on, decodes to coarser images (Section 4.3's
progressive lossy compression, by a coder that can be run). Images given together are coded
together: the more they are, the closer their bits come to the model's bound.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ddpm.codec import packets, pixel_coder
from ddpm.codec.container import (
    HEADER_BYTES,
    MODEL_BYTES,
    Header,
    pack_header,
    pack_packets,
    read_header,
    read_packets,
)
from ddpm.codec.packets import Layout, Packet, estimate
from ddpm.codec.plan import choose_layout
from ddpm.diffusion.pixels import check_scaled, to_float, to_uint8
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.sampling.sample import sample
from ddpm.sampling.samplers import ancestral, ddim

PEAK = 2.0  # the range of x_0, for the PSNR
_PATIENCE = 6  # packets without a gain, after which no better end is sought
_OTHERWISE = (
    "the pixels do not come out as they were: the file is damaged, or the network is computed "
    "otherwise here; cut off its last byte to have the images without it"
)
DECODERS = ("mean", "ancestral", "flow")


class Point(NamedTuple):
    """A place on a file's rate-distortion curve: bits/dim of all packets to here, what an ideal
    coder of the same steps would take, and the mean squared error of the x_0 that they give."""

    rate: float
    ideal: float
    squared_error: float

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio in dB, of x_0 in [-1, 1]."""
        return psnr(self.squared_error)


class Encoded(NamedTuple):
    """A file's bytes, its curve from no packet to all, and the bytes of its pixels, if lossless."""

    data: bytes
    curve: list[Point]
    pixel_bytes: int


class Decoded(NamedTuple):
    """Images x_0 float32[G, ...] by the bits of some packets, the x_t and t that these reach, their
    rate in bits/dim, and whether x_0 is the very pixels."""

    x_0: jax.Array
    x_t: jax.Array
    t: int
    rate: float
    packets: int
    lossless: bool = False


def psnr(squared_error: float) -> float:
    """Returns the peak signal-to-noise ratio in dB of a mean squared error in units of x_0."""
    return float(10 * np.log10(PEAK**2 / max(squared_error, 1e-20)))


def encode(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    *,
    rate: float | None = None,
    target_psnr: float | None = None,
    lossless: bool = False,
    nu: int = 12,
    model: bytes = b"",
) -> bytes:
    """Returns images x_0, float[G, ...] with at most 3 dimensions each, as bytes.

    Args:
      key: from which the file's 32-bit seed is drawn.
      rate: bits/dim of the packets, at most; without end, to t = 1 or as far as a packet goes.
      target_psnr: in dB, where to end.
      lossless: with the pixels, k/127.5 - 1 of k = 0..255, to the last bit; of no given rate.
      nu: bits of the trellis' state, 3..16: 12 costs about 7 % more bits than an ideal coder, 16
        about 4 %, in 16 times the time.
      model: bytes that name the denoiser and the schedule, of which `decode` checks the first 6.

    The denoiser is called about 100 times. It should be one object in repeated calls, as what is
    compiled is kept by it, and for a large network `jax.tree_util.Partial(function, parameters)`,
    so that they are not compiled in. Raises ValueError for x_0 of integers or, if lossless, of
    other values than pixels have; for a rate of less than a packet; and for a denoiser that is not
    finite.
    """
    seed = int(jax.random.bits(key, (), jnp.uint32))
    found = encode_files(
        schedule,
        denoiser,
        check_scaled(x_0)[None],
        seed,
        rate=rate,
        target_psnr=target_psnr,
        lossless=lossless,
        nu=nu,
        model=model,
    )
    return found[0].data


def encode_files(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    seed: int,
    *,
    rate: float | None = None,
    target_psnr: float | None = None,
    lossless: bool = False,
    nu: int = 12,
    model: bytes = b"",
    layout: Layout | None = None,
    picture: tuple[int, int] | None = None,
    progress: Callable[[int], object] = lambda number: None,
) -> list[Encoded]:
    """Returns F files of G images each, x_0 [F, G, ...]: as `encode`, with their curves.

    `layout` is chosen by `choose_layout` if left out; `picture` is height and width of that of
    which the G images are tiles (`tiles.cut`); `progress` is called after each packet.
    """
    x_0, denoiser = jnp.float32(check_scaled(x_0)), _partial(denoiser)
    if not 3 <= x_0.ndim <= 5 or not x_0.size:
        raise ValueError(
            f"x_0 is of shape {list(x_0.shape[1:])}: must be [G, ...], one image or more of 1 to 3 "
            "dimensions each"
        )
    if lossless and (rate, target_psnr) != (None, None):
        raise ValueError("lossless: a file of the very pixels has no rate or PSNR to keep to")
    pixels = _pixels(x_0) if lossless else None
    error = None if target_psnr is None else PEAK**2 / 10 ** (target_psnr / 10)
    if layout is None:
        layout = choose_layout(
            schedule, denoiser, x_0, seed=seed, nu=nu, rate=rate, error=error, lossless=lossless
        )
    pack_header(Header(lossless, _model(model), seed, layout, 1, 0, 0, 0, picture))  # or refuses
    files = range(len(x_0))
    state = packets.start(schedule, layout, np.uint32(seed), len(x_0))
    sent: list[Packet] = []
    errors: list[np.ndarray] = []  # after each number of packets, from 0; [F], as those below
    kls = [np.zeros(len(x_0))]
    ends: list[int | None] = [None] * len(x_0)  # a file that has ended is kept in the batch
    totals: list[list[float]] = [[] for _ in files]  # bits after each number of packets, from 1
    means = [np.zeros(0)] * len(x_0)  # where a file takes the fewest bits
    while True:
        estimated = estimate(denoiser, state.x_t, state.t)
        errors.append(np.asarray(packets.squared_error(x_0, estimated)))
        words = np.uint32(seed), np.uint32(len(sent))
        w = packets.spread(schedule, denoiser, layout, *words, state.x_t, state.t)
        ratio = packets.variance_ratio(layout.kl, w)
        gain = packets.snr_gain(x_0, estimated, ratio)
        going = [i for i in files if ends[i] is None]
        if not np.isfinite(errors[-1][going]).all():
            raise ValueError("the denoiser's x_0 is not finite")
        if not sent:
            stride = packets.first_stride(schedule, state.t, gain)
            state, first = state._replace(stride=stride), np.asarray(stride)
        last = np.asarray(packets.too_coarse(schedule, state.t, gain))
        for i in going:
            if pixels is not None and sent:
                now = np.asarray(estimated[i]).ravel()
                bits = pixel_coder.cost(pixels[i], now) + len(sent) * layout.packet_bits
                if bits < min(totals[i], default=np.inf):
                    means[i] = now
                totals[i].append(bits)
            ends[i] = (
                _end_of_packets(layout, len(sent), errors[-1][i], bool(last[i]), rate, error)
                if pixels is None
                else _end_before_pixels(totals[i], bool(last[i]))
            )
            if ends[i] == 0:
                _refuse(layout, bool(last[i]))
        if None not in ends:
            break
        state, packet, kl = packets.send(schedule, layout, *words, state, x_0, estimated, ratio)
        sent.append(jax.tree.map(np.asarray, packet))
        kls.append(np.asarray(kl))
        progress(len(sent))
    found = []
    for i, end in zip(files, ends, strict=True):
        assert end is not None
        ideal, size = np.cumsum(np.asarray(kls)[:, i]), layout.dimensions
        curve = [
            Point(k * layout.packet_bits / size, float(ideal[k]) / size, float(errors[k][i]))
            for k in range(end + 1)
        ]
        payload = pack_packets([int(packet.change[i]) for packet in sent[:end]],
                               [np.asarray(packet.bits[i]) for packet in sent[:end]])  # fmt: skip
        tail, checked = b"", payload
        if pixels is not None:
            tail, checked = pixel_coder.encode(pixels[i], means[i]), pixels[i].tobytes()
        about = Header(lossless, _model(model), seed, layout, end, int(first[i]), len(tail),
                       zlib.crc32(checked), picture)  # fmt: skip
        found.append(Encoded(pack_header(about) + payload + tail, curve, len(tail)))
    return found


def decodings(
    schedule: NoiseSchedule, denoiser: Denoiser, data: bytes, *, model: bytes | None = None
) -> Iterator[Decoded]:
    """Yields the images by each number of packets that are in the bytes, from one on; last, if they
    are, the very pixels. See `decode`."""
    header, denoiser = read_header(data), _partial(denoiser)
    if model is not None and header.model != _model(model):
        raise ValueError(
            "the file was made with another model, another step of its training or other clipping: "
            "decode it with those"
        )
    changes, bits = read_packets(header, data)
    end = HEADER_BYTES + header.packets_bytes
    whole = len(changes) == header.packets
    if whole and not header.lossless and zlib.crc32(data[HEADER_BYTES:end]) != header.crc:
        raise ValueError("the packets are damaged: their check sum is another")
    known = len(packets.strides(schedule.num_steps))
    if header.stride >= known or header.packets >= schedule.num_steps:
        raise ValueError("the file was made with a schedule of another number of steps")
    layout, seed = header.layout, np.uint32(header.seed)
    state = packets.start(schedule, layout, seed)
    state = state._replace(stride=jnp.full(1, header.stride, jnp.int32))
    estimated = estimate(denoiser, state.x_t, state.t)
    for number in range(len(changes)):
        if int(state.t[0]) == 1:
            raise ValueError("the packets are damaged: they go on after t = 1")
        packet = Packet(jnp.asarray(changes[number])[None], jnp.asarray(bits[number])[None])
        words = seed, np.uint32(number)
        w = packets.spread(schedule, denoiser, layout, *words, state.x_t, state.t)
        ratio = packets.variance_ratio(layout.kl, w)
        state = packets.receive(schedule, layout, *words, state, packet, estimated, ratio)
        estimated = estimate(denoiser, state.x_t, state.t)
        rate = (number + 1) * layout.packet_bits / layout.dimensions
        yield Decoded(estimated[0], state.x_t[0], int(state.t[0]), rate, number + 1)
    if whole and header.lossless and len(data) >= end + header.pixel_bytes:
        x_0 = _decoded_pixels(header, np.asarray(estimated[0]), data[end:])
        rate = 8 * (len(data) - HEADER_BYTES) / layout.dimensions
        yield Decoded(x_0, state.x_t[0], int(state.t[0]), rate, header.packets, lossless=True)


def decode(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    data: bytes,
    *,
    decoder: str = "mean",
    key: jax.Array | None = None,
    model: bytes | None = None,
) -> Decoded:
    """Returns the images of bytes that `encode` made, or of any beginning with a packet in it.

    Args:
      decoder: of x_t, where the packets end: "mean", the denoiser's x_0, of the least squared
        error; "ancestral", a sample (Algorithm 2) by the key; "flow", by the probability flow
        (DDIM). Of a whole lossless file it is not needed.
      model: as in `encode`: raises ValueError where the file was made by another.

    Raises ValueError for bytes that are foreign, damaged or of another model, or whose pixels come
    out otherwise than they were. What comes from others may ask for images of any shape: compare
    `container.read_header(data).layout.shape` with the model's first.
    """
    for last in decodings(schedule, denoiser, data, model=model):  # noqa: B007
        pass
    return finished(schedule, denoiser, last, decoder, jax.random.key(0) if key is None else key)


def finished(
    schedule: NoiseSchedule, denoiser: Denoiser, found: Decoded, decoder: str, key: jax.Array
) -> Decoded:
    """Returns what was decoded with x_0 by this decoder of its x_t; the very pixels as they are."""
    if decoder not in DECODERS:
        raise ValueError(f"decoder = {decoder!r}: must be one of {', '.join(DECODERS)}")
    if decoder == "mean" or found.lossless:
        return found
    x_0 = sample(
        key,
        schedule,
        denoiser,
        found.x_t.shape,
        sampler=ancestral() if decoder == "ancestral" else ddim(),
        times=np.arange(found.t, -1, -1),
        x_t=found.x_t,
    )
    return found._replace(x_0=x_0)


def _end_of_packets(
    layout: Layout, count: int, now: float, last: bool, rate: float | None, error: float | None
) -> int | None:
    """Returns the number of packets with which a lossy file ends, or None if more may come."""
    over = rate is not None and (count + 1) * layout.packet_bits > rate * layout.dimensions
    fine = error is not None and count > 0 and now <= error
    return count if last or over or fine else None


def _end_before_pixels(totals: list[float], last: bool) -> int | None:
    """Returns the number of packets of the fewest bits, or None if more packets may take fewer."""
    best = int(np.argmin(totals)) + 1 if totals else 0
    return best if last or (totals and len(totals) - best >= _PATIENCE) else None


def _refuse(layout: Layout, last: bool) -> NoReturn:
    why = "its first step has more bits: take a schedule of more" if last else "more than rate"
    raise ValueError(
        f"not one packet can be sent, of {layout.packet_bits / layout.dimensions:.3f} "
        f"bits/dim: {why}"
    )


def _pixels(x_0: jax.Array) -> np.ndarray:
    """Returns the pixels of x_0, uint8[F, N]; raises ValueError where they are not those."""
    x = np.asarray(x_0)
    pixels = to_uint8(x)
    if abs(to_float(pixels) - x).max(initial=0) > 1e-6:
        raise ValueError("x_0 is of values that are not 8-bit pixels, k/127.5 - 1 of k = 0..255")
    return pixels.reshape(len(x), -1)


def _decoded_pixels(header: Header, mean: np.ndarray, data: bytes) -> jax.Array:
    """Returns x_0 of the pixels, whose check sum is the header's; else raises ValueError."""
    try:
        pixels = pixel_coder.decode(mean.ravel(), data[: header.pixel_bytes])
    except ValueError as error:
        raise ValueError(f"{_OTHERWISE} ({error})") from error
    if zlib.crc32(pixels.tobytes()) != header.crc:
        raise ValueError(_OTHERWISE)
    return jnp.asarray(to_float(pixels).reshape(mean.shape))


def _partial(denoiser: Denoiser) -> Denoiser:
    """Returns the denoiser as an argument for what is compiled, with its parameters if it is a
    `Partial` of them."""
    made: Denoiser = denoiser if isinstance(denoiser, Partial) else Partial(denoiser)
    return made


def _model(name: bytes) -> bytes:
    return name[:MODEL_BYTES].ljust(MODEL_BYTES, b"\0")
