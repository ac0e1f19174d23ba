"""The choice of the packets' size: long ones cost fewer bits of the trellis, short ones of the KL.

A step's KL is of a Gaussian p, which the true reverse transition is near for short steps alone; and
the trellis costs the more over the KL, the fewer bits a lane has. Both are known before anything is
sent, from what packets of each size would gain at a few times.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.codec import packets
from ddpm.codec.packets import CHANGE_BITS, RATIO, Layout
from ddpm.diffusion.gaussian import q_sample
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule

LANE_BITS = 400
_LEAST_BITS = 32  # but for those of which all sequences are tried
_FEW_BITS = 12
_TIMES = 10
_LOSSLESS_ERROR = 1e-3  # about where the pixels' own code takes over
_MOST_SPREAD = 0.33  # bits for each dimension of a lane, where few of them may have most of the KL
_SPREADS_FROM = 0.97  # of the bits: what the spread must save, for two more calls at each packet


def choose_layout(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    *,
    seed: int = 0,
    nu: int = 12,
    rate: float | None = None,
    error: float | None = None,
    lossless: bool = False,
) -> Layout:
    """Returns the layout for files of x_0 [F, G, ...] that should cost the fewest bits.

    It is for files that end at a rate in bits/dim or at a mean squared error, whichever is given
    and comes first, whose packets are long enough for the steps from t to t - 1 on the way there;
    or, if lossless, where the pixels' own code takes over; else as far as packets go. Calls the
    denoiser 30 times.
    """
    log_snr, times = np.asarray(schedule.log_snr, np.float64), even_times(schedule, _TIMES)
    layouts = _layouts(x_0.shape[1], x_0.shape[2:], nu)
    measured = _measured(
        schedule,
        denoiser,
        layouts[0]._replace(spreads=True),
        jnp.asarray([layout.kl for layout in layouts]),
        x_0,
        jax.random.key(seed),
        jnp.asarray(times, jnp.int32),
    )
    errors, gains = (np.asarray(x, np.float64) for x in measured)
    places = np.linspace(log_snr[times[0]], log_snr[times[-1]], 4000)
    snr = np.exp(places)

    def finely(x: np.ndarray) -> np.ndarray:
        return np.exp(np.interp(places, log_snr[times], np.log(np.maximum(x, 1e-12))))

    fine = finely(errors)
    ideal = np.append(0, np.cumsum(fine[:-1] * np.diff(snr))) / (2 * math.log(2))
    ends = np.full(len(snr), False)
    if rate is not None:
        ends |= ideal >= rate
    if error is not None or lossless:
        ends |= fine <= (_LOSSLESS_ERROR if error is None else error)
    end = int(ends.argmax()) if ends.any() else len(snr) - 1
    finest = np.interp(snr, np.exp(log_snr[:0:-1])[:-1], np.diff(np.exp(log_snr[:0:-1])))
    must_reach = not lossless and (rate is not None or error is not None)
    found = []
    for spreads, most in ((False, 1.0), (True, 1 / _SPREADS_FROM)):
        for i, layout in enumerate(layouts):
            if spreads and layout.bits > _MOST_SPREAD * layout.lane:
                break
            gain = finely(gains[:, int(spreads), i])
            stuck = finest[:end] > packets.COARSE * gain[:end]
            far = int(stuck.argmax()) if must_reach and stuck.any() else end
            bits = (layout.packet_bits - CHANGE_BITS) * _overhead(layout.bits) + CHANGE_BITS
            total = _packets(snr, gain, far) * bits * most
            found.append((-far, total, i, layout._replace(spreads=spreads)))
    return min(found)[-1]


def even_times(schedule: NoiseSchedule, count: int) -> np.ndarray:
    """Returns whole times, falling, with log-SNR about evenly spread from -8 or T's to that of
    t = 1; where steps are long, some of them twice."""
    log_snr = np.asarray(schedule.log_snr, np.float64)
    wanted = np.linspace(max(log_snr[-1], -8.0), log_snr[1], count)
    return 1 + np.abs(log_snr[1:, None] - wanted).argmin(axis=0)


@functools.partial(jax.jit, static_argnames="layout")
def _measured(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    layout: Layout,
    kls: jax.Array,
    x_0: jax.Array,
    key: jax.Array,
    times: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the denoiser's mean squared error at times [K], and the gain of SNR by packets of
    KLs [L] there, without the spread and with it, [K, 2, L]: the means of all files."""

    def at(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        eps = jax.random.normal(jax.random.fold_in(key, t), x_0.shape)
        flat = x_0.reshape(-1, *x_0.shape[2:])
        x_t = q_sample(schedule, flat, t, eps.reshape(flat.shape)).reshape(x_0.shape)
        each = jnp.broadcast_to(t, x_0.shape[:1])
        estimated = packets.estimate(denoiser, x_t, each)
        w = packets.spread(schedule, denoiser, layout, jnp.uint32(0), jnp.uint32(t), x_t, each)

        def gain(kl: jax.Array) -> jax.Array:
            ratios = packets.variance_ratio(kl, jnp.ones_like(w)), packets.variance_ratio(kl, w)
            return jnp.stack([packets.snr_gain(x_0, estimated, r).mean() for r in ratios])

        error = packets.squared_error(x_0, estimated).mean()
        return error, jax.lax.map(gain, kls).T

    return jax.lax.map(at, times)


def _packets(snr: np.ndarray, gain: np.ndarray, end: int) -> float:
    """Returns how many packets it takes from snr[0] to snr[end], the last in part."""
    count, now = 0.0, float(snr[0])
    while now < snr[end]:
        each = float(np.interp(now, snr, gain))
        count += min(1.0, (snr[end] - now) / each)
        now += each
    return count


def _layouts(images: int, shape: tuple[int, ...], nu: int) -> list[Layout]:
    """Returns the layouts to choose from: packets of 12 bits, and of 32, or one for each image, up
    to one bit for each dimension."""
    size = images * math.prod(shape)
    found = []
    if images <= _FEW_BITS:
        found.append(Layout(images, shape, 1, min(_FEW_BITS, nu, size), nu))
    total = float(max(min(_LEAST_BITS, size), images))
    while total <= size:
        lanes = max(1, round(total / LANE_BITS))
        bits = round(total / lanes)
        # A long memory is of no use to a short lane: it bites its tail before it has begun.
        found.append(Layout(images, shape, lanes, bits, min(nu, max(8, bits // 4))))
        total *= math.sqrt(2)
    found = [layout for layout in found if layout.allowed and 3 <= nu <= 16]
    if not found:
        raise ValueError(
            f"nu = {nu} and {size} dimensions of all images together: must be in 3..16, and 3 or "
            "more"
        )
    return found


def _overhead(bits: int) -> float:
    """Returns by how much the bits of a lane exceed those it was given, at the same squared error:
    measured on white Gaussians."""
    return (1.33 if bits < _LEAST_BITS else 1.065 + 110 / bits**2) / RATIO
