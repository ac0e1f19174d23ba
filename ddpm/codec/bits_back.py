"""Lossless coding of many images at the rate of the variational bound: bits back with ANS.

An ANS coder is a stack of bits: pushing a symbol adds -log2 of its probability, popping one by any
model takes them off. An image x_0 is pushed together with a chain x_t of its latents, which the
encoder draws by popping bits that are there already, and the decoder pushes back when it has found
them (Townsend et al. 2019). In the order of Bit-Swap (Kingma et al. 2019), over rising times:

    encoder   pop x_1 ~ q(x_1 | x_0), push x_0 ~ p(x_0 | x_1); then pop x_t ~ q(x_t | x_s),
              push x_s ~ p(x_s | x_t), time by time; push x_T ~ N(0, I)
    decoder   the same from the end, with push for pop

so that an image adds log2 q(x_1..x_T | x_0) / p(x_0..x_T) bits, on average the bound of
`likelihood.bits_per_dim`. The first image has nothing to pop from: it takes **initial bits**, a
shared random string.

Latents are whole numbers of a step, a quarter of the smaller of the standard deviations they are
drawn and predicted with: a finer one takes more initial bits and no fewer others. A decoder must
compute the very predictions of its encoder: the same machine, library and batch. Where it does
not, the checksum tells.

    uint32    the CRC-32 of the images; the 32-bit words of initial bits that were used
    uint16    the images in a batch
    uint32[]  the words of the ANS coder, those of unused initial bits left out; little-endian
"""

import hashlib
import itertools
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import constriction
import jax
import jax.numpy as jnp
import numpy as np

from ddpm.codec import pixel_coder
from ddpm.diffusion.gaussian import fixed_large
from ddpm.diffusion.pixels import to_float
from ddpm.diffusion.predictions import Denoiser, predict, to_posterior_mean
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.times import as_times
from ddpm.diffusion.variances import ReverseVariance, reverse_log_variance

PER_SIGMA = 4  # steps of a latent's grid in its standard deviation
_WIDTH = 7  # standard deviations to either side that a model's support has
_NARROWEST, _WIDEST = 0.25, 1 << 16  # steps in a standard deviation
_FURTHEST = 1 << 30  # steps from 0 to a mean
_HALF_WORD = constriction.stream.model.Uniform(1 << 16)
_HEAD = struct.Struct("<IIH")


_Transition = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


class _Latent(NamedTuple):
    """The latent of one time t: its grid's step; the signal's coefficient and the standard
    deviation, in steps, of q(x_t | x_s), s the time before."""

    time: int
    step: float
    alpha: float
    sigma: float


def encode(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: np.ndarray,
    *,
    times: Sequence[int] | np.ndarray,
    variance: ReverseVariance = fixed_large,
    batch_size: int = 16,
) -> bytes:
    """Returns the code of images, uint8[G, ...], by the chain over `times`.

    Args:
      x_0: all the images; the rate falls to the bound with their number.
      times: rising, of 1..T.
      variance: of the reverse steps, where the denoiser does not learn it. One that is not matched
        to the denoiser (`ddpm.analytic`) costs more than its own bound: the bits it leaves are not
        uniform, as the next image's latents need them.
      batch_size: images that are coded together, for which the denoiser is called at once. Initial
        bits grow with it.

    Raises ValueError for images that are not uint8, other times, a batch size outside 1..65535, or
    a prediction that is not finite.
    """
    x_0 = np.asarray(x_0)
    if x_0.dtype != np.uint8 or not x_0.size:
        raise ValueError(f"x_0 is {x_0.dtype}{list(x_0.shape)}: must be images of uint8")
    if not 1 <= batch_size <= 0xFFFF:
        raise ValueError(f"batch_size = {batch_size}: must be in 1..65535")
    batch_size = min(batch_size, len(x_0))
    latents = _latents(schedule, times)
    reverse = _reverse_transition(schedule, denoiser, variance, (batch_size, *x_0.shape[1:]))
    initial = _initial_words(latents, x_0[:batch_size].size)
    coder = constriction.stream.stack.AnsCoder(initial)
    for start in reversed(range(0, len(x_0), batch_size)):
        _push_images(coder, reverse, latents, x_0[start : start + batch_size])
    words = coder.get_compressed()
    shorter = min(len(words), len(initial))
    unused = int(np.append(words[:shorter] == initial[:shorter], False).argmin())
    head = _HEAD.pack(zlib.crc32(x_0.tobytes()), len(initial) - unused, batch_size)
    return head + words[unused:].astype("<u4").tobytes()


def decode(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    data: bytes,
    shape: Sequence[int],
    *,
    times: Sequence[int] | np.ndarray,
    variance: ReverseVariance = fixed_large,
) -> np.ndarray:
    """Returns the images, uint8[shape], shape = [G, ...]; all else as it was given to `encode`.

    Raises ValueError where they are not those that were coded: data is damaged, or the model, its
    times or its arithmetic is another.
    """
    shape = tuple(shape)
    crc, used, batch_size = _HEAD.unpack(data[: _HEAD.size].ljust(_HEAD.size, b"\0"))
    latents = _latents(schedule, times)
    if not 1 <= batch_size <= shape[0]:
        raise ValueError(f"batches of {batch_size} images, of {shape[0]}: the data is damaged")
    x_0 = np.zeros(shape, np.uint8)
    reverse = _reverse_transition(schedule, denoiser, variance, (batch_size, *shape[1:]))
    initial = _initial_words(latents, x_0[:batch_size].size)
    body = data[_HEAD.size :]
    if used > len(initial) or len(body) % 4 or not any(body[-4:]):
        raise ValueError("the data is damaged, or not all there")
    words = [initial[: len(initial) - used], np.frombuffer(body, "<u4").astype(np.uint32)]
    coder = constriction.stream.stack.AnsCoder(np.concatenate(words))
    for start in range(0, len(x_0), batch_size):
        _pop_images(coder, reverse, latents, x_0[start : start + batch_size])
    if zlib.crc32(x_0.tobytes()) != crc or not np.array_equal(coder.get_compressed(), initial):
        raise ValueError(
            "these are not the images that were coded: the data is damaged, or the model or the "
            "machine is another"
        )
    return x_0


def initial_bits(data: bytes) -> int:
    """Returns how many of the bits of what `encode` returned are initial ones, used once however
    many images there are. Raises ValueError for data without a head."""
    if len(data) < _HEAD.size:
        raise ValueError(f"{len(data)} bytes: must be what encode returned")
    return 32 * _HEAD.unpack(data[: _HEAD.size])[1]


def _reverse_transition(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    variance: ReverseVariance,
    shape: tuple[int, ...],
) -> _Transition:
    """Returns p(x_s | x_t) of a model, (x_t, t, s) -> mean and standard deviation, float64[N] each,
    of the images of one batch or fewer.

    Compiled once, for one shape. Raises ValueError if they are not finite.
    """

    @jax.jit
    def compiled(x_t: jax.Array, t: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        prediction = predict(denoiser, x_t, t)
        log_variance = reverse_log_variance(schedule, prediction, t, s, variance)
        mean = to_posterior_mean(schedule, x_t, t, prediction, s=s)
        return mean, jnp.broadcast_to(jnp.exp(0.5 * log_variance), mean.shape)

    def transition(x_t: np.ndarray, t: int, s: int) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros(shape, np.float32)
        padded.reshape(-1)[: x_t.size] = x_t
        found = compiled(padded, np.int32(t), np.int32(s))
        mean, sigma = (np.asarray(x, np.float64).reshape(-1)[: x_t.size] for x in found)
        if not (np.isfinite(mean).all() and np.isfinite(sigma).all()):
            raise ValueError(f"the prediction at t = {t} is not finite")
        return mean, sigma

    return transition


def _latents(schedule: NoiseSchedule, times: Sequence[int] | np.ndarray) -> list[_Latent]:
    """Returns the latents of a chain over rising times."""
    t = np.asarray(as_times(schedule.ends, np.asarray(times), noisy=True))
    if t.ndim != 1 or not t.size or t.dtype != np.int32 or (np.diff(t) < 1).any():
        raise ValueError(f"times {np.asarray(times).tolist()}: must be integers that rise")
    steps = schedule.between(jnp.asarray([0, *t[:-1]], jnp.int32), jnp.asarray(t))
    alpha, beta, posterior = (
        np.asarray(x, np.float64) for x in (steps.alpha, steps.beta, steps.posterior_variance)
    )
    predicted = np.append(posterior[1:], 1.0)  # with the last one's prior
    grid = np.sqrt(np.minimum(beta, predicted)) / PER_SIGMA
    before = np.append(1.0, grid[:-1])
    rows = zip(t, grid, alpha * before / grid, np.sqrt(beta) / grid, strict=True)
    return [_Latent(int(time), *map(float, row)) for time, *row in rows]


def _initial_words(latents: list[_Latent], dimensions: int) -> np.ndarray:
    """Returns the initial bits: more than all latents of a batch can take, uint32[...]."""
    bits = sum(1 + np.log2(2 * _WIDTH * latent.sigma + 1) for latent in latents)
    words = int(dimensions * bits / 32) + 64
    digest = hashlib.shake_128(b"bits back").digest(4 * words)
    found = np.frombuffer(digest, "<u4").astype(np.uint32)
    found[-1] |= 1  # the coder's last word may not be zero
    return found


def _push_images(
    coder: Any,
    reverse: _Transition,
    latents: list[_Latent],
    x_0: np.ndarray,
) -> None:
    """Codes a batch of images: the stack grows by them."""
    values, first = to_float(x_0).reshape(-1).astype(np.float64), latents[0]
    k = _pop_q(coder, first, values)
    mean, sigma = reverse(k * first.step, first.time, 0)
    coder.encode_reverse(x_0.reshape(-1).astype(np.int32), *_pixels(mean, sigma))
    for earlier, later in itertools.pairwise(latents):
        k_later = _pop_q(coder, later, k)
        mean, sigma = reverse(k_later * later.step, later.time, earlier.time)
        _push_p(coder, k, mean / earlier.step, sigma / earlier.step)
        k = k_later
    zeros = np.zeros(x_0.size)
    _push_p(coder, k, zeros, zeros + 1 / latents[-1].step)


def _pop_images(
    coder: Any,
    reverse: _Transition,
    latents: list[_Latent],
    x_0: np.ndarray,
) -> None:
    """Fills in a batch of images: `_push_images` backwards."""
    zeros, first = np.zeros(x_0.size), latents[0]
    k = _pop_p(coder, zeros, zeros + 1 / latents[-1].step)
    for earlier, later in reversed(list(itertools.pairwise(latents))):
        mean, sigma = reverse(k * later.step, later.time, earlier.time)
        k_earlier = _pop_p(coder, mean / earlier.step, sigma / earlier.step)
        _push_q(coder, later, k, k_earlier)
        k = k_earlier
    mean, sigma = reverse(k * first.step, first.time, 0)
    x_0[:] = coder.decode(*_pixels(mean, sigma)).reshape(x_0.shape)
    _push_q(coder, first, k, to_float(x_0).reshape(-1).astype(np.float64))


def _pop_q(coder: Any, latent: _Latent, x_s: np.ndarray) -> np.ndarray:
    """Draws x_t ~ q(x_t | x_s), in whole steps, int64[N]."""
    base, _, model = _gaussian(latent.alpha * x_s, np.full(len(x_s), latent.sigma))
    return base + coder.decode(*model)


def _push_q(coder: Any, latent: _Latent, x_t: np.ndarray, x_s: np.ndarray) -> None:
    """Undoes the draw. What cannot have been drawn, of damaged data, is moved nearer."""
    base, reach, model = _gaussian(latent.alpha * x_s, np.full(len(x_s), latent.sigma))
    coder.encode_reverse((x_t - base).clip(-reach, reach).astype(np.int32), *model)


def _push_p(coder: Any, x_s: np.ndarray, mean: np.ndarray, sigma: np.ndarray) -> None:
    """Codes x_s, in whole steps, by p: beyond the support, its end and 32 bits more."""
    base, reach, model = _gaussian(mean, sigma)
    off = x_s - base
    excess = abs(off[abs(off) >= reach]) - reach
    for half in (excess & 0xFFFF, excess >> 16):
        coder.encode_reverse(half.astype(np.int32), _HALF_WORD)
    coder.encode_reverse(off.clip(-reach, reach).astype(np.int32), *model)


def _pop_p(coder: Any, mean: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Reads x_s as `_push_p` wrote it, int64[N]."""
    base, reach, model = _gaussian(mean, sigma)
    off = coder.decode(*model).astype(np.int64)
    ends = np.flatnonzero(abs(off) == reach)
    high, low = (coder.decode(_HALF_WORD, len(ends)).astype(np.int64) for _ in range(2))
    off[ends] += np.sign(off[ends]) * (high << 16 | low)
    return base + off


def _gaussian(mean: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, int, tuple[Any, ...]]:
    """Returns Gaussians on whole numbers, [N] each: their middles, int64, how far they reach, and
    the coder's model of the distance from the middle. A narrow support leaves little to symbols
    that do not come: each has 2^-24 at least."""
    mean = mean.clip(-_FURTHEST, _FURTHEST)
    sigma = sigma.clip(_NARROWEST, _WIDEST)
    base, reach = np.rint(mean), math.ceil(_WIDTH * sigma.max())
    model = constriction.stream.model.QuantizedGaussian(-reach, reach)
    return base.astype(np.int64), reach, (model, mean - base, sigma)


def _pixels(mean: np.ndarray, sigma: np.ndarray) -> tuple[Any, np.ndarray]:
    """Returns the coder's model of x_0, the discretised Gaussian of Eq. 13."""
    family = constriction.stream.model.Categorical(perfect=False)
    return family, pixel_coder.finest_weights(mean, sigma)
