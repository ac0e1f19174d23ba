"""The choice of the packets' size: long ones cost fewer bits of the trellis, short ones of the KL.

A step's KL is of a Gaussian p, which the true reverse transition is near for short steps alone; and
the trellis costs the more over the KL, the fewer bits a lane has. Both are known before anything is
sent, from the squared error of the denoiser's x_0 over time.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.codec.packets import CHANGE_BITS, RATIO, Layout, estimate
from ddpm.diffusion.gaussian import q_sample
from ddpm.diffusion.predictions import Denoiser
from ddpm.diffusion.schedules import NoiseSchedule

LANE_BITS = 400
_LEAST_BITS = 16
_TIMES = 12


@functools.partial(jax.jit, static_argnames="denoiser")
def squared_errors(
    schedule: NoiseSchedule, denoiser: Denoiser, x_0: jax.Array, key: jax.Array, times: jax.Array
) -> jax.Array:
    """Returns the mean squared error of the denoiser's x_0 of x_0 [F, G, ...] at times [K]: [K]."""

    def at(t: jax.Array) -> jax.Array:
        eps = jax.random.normal(jax.random.fold_in(key, t), x_0.shape)
        flat = x_0.reshape(-1, *x_0.shape[2:])
        x_t = q_sample(schedule, flat, t, eps.reshape(flat.shape)).reshape(x_0.shape)
        found = estimate(denoiser, x_t, jnp.broadcast_to(t, x_0.shape[:1]))
        return ((found - x_0) ** 2).mean()

    return jax.lax.map(at, times)


def choose_layout(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    *,
    seed: int = 0,
    nu: int = 12,
    rate: float | None = None,
    error: float | None = None,
) -> Layout:
    """Returns the layout for files of x_0 [F, G, ...] that should cost the fewest bits.

    It is for files that end at a rate in bits/dim or at a mean squared error, whichever is given
    and comes first; else at t = 1. Takes 12 calls of the denoiser.
    """
    log_snr = np.asarray(schedule.log_snr, np.float64)
    wanted = np.linspace(max(log_snr[-1], -8.0), log_snr[1], _TIMES)
    times = 1 + np.abs(log_snr[1:, None] - wanted).argmin(axis=0)
    key = jax.random.key(seed)
    found = np.asarray(
        squared_errors(schedule, denoiser, x_0, key, jnp.asarray(times, jnp.int32)), np.float64
    )
    # On a fine grid, in which the KL of infinitely many steps is a sum.
    places = np.linspace(log_snr[times[0]], log_snr[times[-1]], 4000)
    errors = np.exp(np.interp(places, log_snr[times], np.log(np.maximum(found, 1e-12))))
    snr = np.exp(places)
    ideal = np.append(0, np.cumsum(errors[:-1] * np.diff(snr))) / (2 * math.log(2))
    ends = np.full(len(snr), False)
    if rate is not None:
        ends |= ideal >= rate
    if error is not None:
        ends |= errors <= error
    end = int(ends.argmax()) if ends.any() else len(snr) - 1
    images, shape = x_0.shape[1], x_0.shape[2:]
    size = images * math.prod(shape)
    best, least = None, math.inf
    for layout in _layouts(images, shape, size, nu):
        packets, place = 0.0, 0
        while place < end:
            gain = (layout.rho - 1) / errors[place]
            later = int(np.searchsorted(snr, snr[place] + gain))
            if later > end:  # a part of a packet
                packets += (snr[end] - snr[place]) / gain
            place, packets = max(later, place + 1), packets + (later <= end)
        total = packets * (layout.packet_bits - CHANGE_BITS) * _overhead(layout.bits)
        total += packets * CHANGE_BITS
        if total < least:
            best, least = layout, total
    assert best is not None
    return best


def _layouts(images: int, shape: tuple[int, ...], size: int, nu: int) -> list[Layout]:
    """Returns the layouts to choose from: packets of 16 bits, or one for each image, and up to one
    bit for each dimension."""
    found = []
    total = float(min(size, max(_LEAST_BITS, images)))
    while total <= size:
        lanes = max(1, round(total / LANE_BITS))
        found.append(Layout(images, shape, lanes, max(3, round(total / lanes)), nu))
        total *= math.sqrt(2)
    return [layout for layout in found if layout.bits <= size // layout.lanes] or found[:1]


def _overhead(bits: int) -> float:
    """Returns by how much the bits of a lane exceed those it was given, at the same squared error:
    measured on white Gaussians."""
    return (1.06 + 2.6 / bits) / RATIO
