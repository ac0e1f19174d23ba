"""The lossy coder: packets of bits, each of which takes x_t of all images of a file to a lower t.

The encoder sends draws from q(x_s | x_t, x_0) to a decoder that has p(x_s | x_t) only. All
dimensions of a file's images are one vector of N numbers, and each packet is of the same number of
bits, n = 1.05 KL: it is s that is chosen for it. p's mean is the posterior's at the denoiser's x_0,
and its variance rho times the posterior's, rho = 2^(2 KL / N). With e the mean squared error of the
denoiser's x_0, the step in which

    (SNR_s - SNR_t) e = rho - 1

has that KL, and rho is its optimal variance (Analytic-DPM's, for these images). So to the trellis
all packets look alike: a target N(m, 1/rho) of mean |m|^2 = N (1 - 1/rho).

A packet is 4 bits that say by how much the stride t - s changes, and n bits of the trellis. The
dimensions are shuffled and cut into lanes of a few hundred bits, which share their codewords.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.codec import randomness, trellis
from ddpm.diffusion.gaussian import expand_like, posterior_coefficients
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.schedules import NoiseSchedule

RATIO = 1.05  # bits for each of the KL: what is sent is then spread as a draw from the target
CHANGE_BITS = 4
_SLOWER = 11  # of the 16 changes of the stride, those that shorten it
_START = 0xFFFFFFFF  # the number of the packet that is not sent, x_T


class Layout(NamedTuple):
    """The shape of a file's packets: of `images` images, in `lanes` of `bits` bits each."""

    images: int
    shape: tuple[int, ...]
    lanes: int
    bits: int
    nu: int = 12

    @property
    def dimensions(self) -> int:
        """N, of all images together."""
        return self.images * math.prod(self.shape)

    @property
    def lane(self) -> int:
        """The dimensions of a lane; the last may have fewer."""
        return -(-self.dimensions // self.lanes)

    @property
    def packet_bits(self) -> int:
        """The bits of a packet, those of its stride too."""
        return CHANGE_BITS + self.lanes * self.bits

    @property
    def rho(self) -> float:
        """The variance of p(x_s | x_t) over the posterior's: 2^(2 KL / N)."""
        return 2 ** (2 * self.lanes * self.bits / (RATIO * self.dimensions))


class State(NamedTuple):
    """The state of F files between packets: x_t float32[F, G, ...], t int32[F], and the stride of
    the last packet, by its place in `strides`, int32[F]."""

    x_t: jax.Array
    t: jax.Array
    stride: jax.Array


class Packet(NamedTuple):
    """A packet of each of F files: change int32[F] in 0..15, bits bool[F, lanes, n]."""

    change: jax.Array
    bits: jax.Array


def strides(num_steps: int) -> np.ndarray:
    """Returns the strides there are, int32[K], rising: 1 to 8, then by an eighth each, to T."""
    found = [1]
    while found[-1] < num_steps:
        found.append(min(found[-1] + max(1, found[-1] // 8), num_steps))
    return np.asarray(found, np.int32)


def start(schedule: NoiseSchedule, layout: Layout, seed: int, files: int = 1) -> State:
    """Returns the state before the first packet: t = T, and x_T that the seed names."""
    row = jnp.uint32(0)
    z = randomness.normals(_key(seed, _START), row, row, layout.dimensions)
    x = z.reshape(1, layout.images, *layout.shape)
    last = jnp.full(files, schedule.num_steps, jnp.int32)
    return State(jnp.repeat(x, files, axis=0), last, jnp.zeros(files, jnp.int32))


@functools.partial(jax.jit, static_argnames="denoiser")
def estimate(denoiser: Denoiser, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the denoiser's x_0 [F, G, ...] at x_t [F, G, ...] and t [F]."""
    flat = x_t.reshape(-1, *x_t.shape[2:])
    return predict(denoiser, flat, jnp.repeat(t, x_t.shape[1])).x_0.reshape(x_t.shape)


def squared_error(x_0: jax.Array, estimated: jax.Array) -> jax.Array:
    """Returns the mean squared error of each file's images, [F]; at least 1e-12."""
    return jnp.maximum(((x_0 - estimated) ** 2).mean(axis=range(1, x_0.ndim)), 1e-12)


def first_stride(
    schedule: NoiseSchedule, layout: Layout, error: jax.Array, t: jax.Array
) -> jax.Array:
    """Returns the best stride of a packet at t [F] for a squared error [F], of all there are."""
    every = jnp.arange(len(strides(schedule.num_steps)), dtype=jnp.int32)
    candidates = jnp.broadcast_to(every, (len(t), len(every)))
    return _nearest(schedule, layout, error, t, candidates)[1]


@functools.partial(jax.jit, static_argnames="layout")
def send(
    schedule: NoiseSchedule,
    layout: Layout,
    seed: jax.Array,
    number: jax.Array,
    state: State,
    x_0: jax.Array,
    estimated: jax.Array,
) -> tuple[State, Packet, jax.Array]:
    """Returns the state after a packet, the packet, and the KL that it is of, in bits [F].

    `estimated` is the denoiser's x_0 at the state; `number` counts packets from 0.
    """
    error = squared_error(x_0, estimated)
    changes = jnp.arange(1 << CHANGE_BITS, dtype=jnp.int32)
    candidates = _changed(schedule, state.stride[:, None], changes)
    change, stride = _nearest(schedule, layout, error, state.t, candidates)
    s = _earlier(schedule, state.t, stride)
    step = schedule.between(s, state.t)
    of_x_0, _ = posterior_coefficients(step)
    prior = layout.rho * step.posterior_variance
    mean = expand_like(of_x_0 / jnp.sqrt(prior), x_0) * (x_0 - estimated)
    key = _key(seed, number)
    bits = trellis.encode(key, _target(layout, key, mean), layout.bits, layout.nu)
    packet = Packet(change, bits.reshape(len(x_0), layout.lanes, layout.bits))
    gain = jnp.exp(schedule.at(s).high) * step.snr_loss * error
    kl = layout.dimensions / 2 * jnp.log2(1 + gain)
    return receive(schedule, layout, seed, number, state, packet, estimated), packet, kl


@functools.partial(jax.jit, static_argnames="layout")
def receive(
    schedule: NoiseSchedule,
    layout: Layout,
    seed: jax.Array,
    number: jax.Array,
    state: State,
    packet: Packet,
    estimated: jax.Array,
) -> State:
    """Returns the state after a packet that came; the arguments are as in `send`."""
    stride = _changed(schedule, state.stride, packet.change)
    s = _earlier(schedule, state.t, stride)
    step = schedule.between(s, state.t)
    of_x_0, of_x_t = posterior_coefficients(step)
    key = _key(seed, number)
    lanes = packet.bits.reshape(-1, layout.bits)
    z = trellis.decode(key, lanes, layout.lane, layout.nu).reshape(len(s), -1)
    order = randomness.permutation(key, layout.dimensions)
    noise = jnp.zeros((len(s), layout.dimensions)).at[:, order].set(z[:, : layout.dimensions])
    spread = jnp.sqrt(layout.rho * step.posterior_variance)
    x = state.x_t
    x_s = (
        expand_like(of_x_0, x) * estimated
        + expand_like(of_x_t, x) * x
        + expand_like(spread, x) * noise.reshape(x.shape)
    )
    return State(x_s, s, stride)


def too_coarse(
    schedule: NoiseSchedule, layout: Layout, state: State, error: jax.Array
) -> jax.Array:
    """Returns for which of the files no packet more can be sent, bool[F]: t is 1, or a stride of 1
    has more than 1.3 times a packet's KL."""
    step = schedule.between(jnp.maximum(state.t - 1, 1), state.t)
    gain = jnp.exp(step.s.high) * step.snr_loss * error
    most = jnp.log(layout.rho) * 1.3
    return (state.t == 1) | (jnp.log1p(gain) > most)


def _key(seed: jax.Array | int, number: jax.Array | int) -> jax.Array:
    return jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.asarray(number, jnp.uint32)])


def _changed(schedule: NoiseSchedule, stride: jax.Array, change: jax.Array) -> jax.Array:
    return jnp.clip(stride + change - _SLOWER, 0, len(strides(schedule.num_steps)) - 1)


def _earlier(schedule: NoiseSchedule, t: jax.Array, stride: jax.Array) -> jax.Array:
    return jnp.maximum(t - jnp.asarray(strides(schedule.num_steps))[stride], 1)


def _nearest(
    schedule: NoiseSchedule,
    layout: Layout,
    error: jax.Array,
    t: jax.Array,
    candidates: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns which of the candidates [F, K] is nearest to (SNR_s - SNR_t) e = rho - 1, and its
    stride."""
    s = _earlier(schedule, t[:, None], candidates)
    step = schedule.between(s, t[:, None])
    gain = step.s.high + jnp.log(step.snr_loss) + jnp.log(error)[:, None]
    best = jnp.abs(gain - math.log(layout.rho - 1)).argmin(axis=1)
    return best.astype(jnp.int32), jnp.take_along_axis(candidates, best[:, None], axis=1)[:, 0]


def _target(layout: Layout, key: jax.Array, mean: jax.Array) -> trellis.Target:
    """Returns the targets of all lanes [F * lanes, lane]; what pads the last is as the prior."""
    order = randomness.permutation(key, layout.dimensions)
    missing = layout.lanes * layout.lane - layout.dimensions
    shuffled = jnp.pad(mean.reshape(len(mean), -1)[:, order], ((0, 0), (0, missing)))
    variance = jnp.pad(
        jnp.full((len(mean), layout.dimensions), 1 / layout.rho),
        ((0, 0), (0, missing)),
        constant_values=1.0,
    )
    return trellis.Target(*(x.reshape(-1, layout.lane) for x in (shuffled, variance)))
