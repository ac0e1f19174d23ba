"""The lossy coder: packets of bits, each of which takes x_t of all images of a file to a lower t.

The encoder sends draws from q(x_s | x_t, x_0) to a decoder that has p(x_s | x_t) only. All
dimensions of a file's images are one vector of N numbers, and each packet is of the same number of
bits, n = 1.05 KL: it is s that is chosen for it. p's mean is the posterior's at the denoiser's x_0,
and its variance r_i = 1 + lambda w_i times the posterior's, where

    KL = 1/2 sum log r_i,    (SNR_s - SNR_t) sum (x_0 - x_0')_i^2 / r_i = sum (1 - 1 / r_i).

The first gives lambda. The second, by which the KL of the step is that, gives s; r is the optimal
variance then (Analytic-DPM's, for these images) if the squared error of the denoiser's x_0' is in
proportion to the **spread** w, which has mean 1. It is 1 all over, or by the denoiser itself:
Var[x_0 | x_t] = sigma^2 / alpha dx_0'/dx_t. To the trellis all packets look alike: targets of
variance 1 / r_i, with N - sum 1 / r_i the square of their mean.

A packet is 4 bits that say by how much the stride t - s changes, and n bits of the trellis. The
dimensions are shuffled and cut into lanes of a few hundred bits, which share their codewords.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.codec import randomness, trellis
from ddpm.diffusion.gaussian import expand_like, posterior_coefficients
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.schedules import NoiseSchedule

RATIO = 1.05  # bits for each of the KL: what is sent is then spread as a draw from the target
COARSE = 1.5  # times the SNR that a packet gains: the most that a step from t to t - 1 may
CHANGE_BITS = 4
# Of the stride's place in the list. Large ones are for the first packets: where a schedule ends in
# noise alone, its first stride is many times its second.
_CHANGES = np.asarray([-24, -19, -15, -12, -10, -8, -6, -5, -4, -3, -2, -1, 0, 1, 2, 4], np.int32)
_MOST_DIMENSIONS = 1 << 14  # for each bit of a packet
_MOST_BITS = 2048  # of a lane: a decoder draws the codewords of all at once
_LANES_AT_ONCE = 256  # that the search has in memory, about 2 MB each
_START = 0xFFFFFFFF  # the number of the packet that is not sent, x_T
_SIGNS = 0xFFFFFFFE  # the block of a packet's numbers that is not the trellis'


class Layout(NamedTuple):
    """The shape of a file's packets: of `images` images, in `lanes` of `bits` bits each."""

    images: int
    shape: tuple[int, ...]
    lanes: int
    bits: int
    nu: int = 12
    spreads: bool = False  # the spread is the denoiser's own, not 1 all over

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
    def kl(self) -> float:
        """The KL of a packet in nats, over N."""
        return math.log(2) * self.lanes * self.bits / (RATIO * self.dimensions)

    @property
    def allowed(self) -> bool:
        """The answer whether files may have this layout: it bounds memory by a packet's bits."""
        total = self.lanes * self.bits
        return (
            3 <= self.nu <= 16
            and len(self.shape) in (1, 2, 3)
            and min(self.shape) >= 1
            and 1 <= self.images <= total
            and 3 <= self.bits <= min(self.lane, _MOST_BITS)
            and self.dimensions <= _MOST_DIMENSIONS * total
        )


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


@functools.partial(jax.jit, static_argnames=("layout", "files"))
def start(
    schedule: NoiseSchedule, layout: Layout, seed: jax.typing.ArrayLike, files: int = 1
) -> State:
    """Returns the state before the first packet: t = T, and x_T that the seed names."""
    row = jnp.uint32(0)
    z = randomness.normals(_key(seed, _START), row, row, layout.dimensions)
    x = z.reshape(1, layout.images, *layout.shape)
    last = jnp.full(files, schedule.num_steps, jnp.int32)
    return State(jnp.repeat(x, files, axis=0), last, jnp.zeros(files, jnp.int32))


@jax.jit
def estimate(denoiser: Denoiser, x_t: jax.Array, t: jax.Array) -> jax.Array:
    """Returns the denoiser's x_0 [F, G, ...] at x_t [F, G, ...] and t [F].

    The denoiser is a `jax.tree_util.Partial`, so that what its parameters are is no constant.
    """
    flat = x_t.reshape(-1, *x_t.shape[2:])
    return predict(denoiser, flat, jnp.repeat(t, x_t.shape[1])).x_0.reshape(x_t.shape)


@functools.partial(jax.jit, static_argnames="layout")
def spread(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    layout: Layout,
    seed: jax.Array,
    number: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
) -> jax.Array:
    """Returns w [F, G, ...], of mean 1 in each file: the diagonal of dx_0/dx_t, where the layout
    has it, by one random sign for each dimension (Hutchinson) and two calls of the denoiser.

    Where images are not independent in their dimensions it is noisy; it is 0.02 at least.
    """
    if not layout.spreads:
        return jnp.ones_like(x_t)
    block, row = jnp.uint32(_SIGNS), jnp.uint32(0)
    z = randomness.normals(_key(seed, number), block, row, layout.dimensions)
    sign = jnp.sign(z).reshape(x_t.shape[1:])  # no number of the table is 0
    small = expand_like(0.1 * schedule.at(t).sigma, x_t)
    ahead = estimate(denoiser, x_t + small * sign, t) - estimate(denoiser, x_t - small * sign, t)
    w = sign * ahead / (2 * small)
    mean = w.mean(axis=range(1, w.ndim), keepdims=True)
    relative = jnp.maximum(w / jnp.where(mean > 1e-6, mean, 1.0), 0.02)
    relative = relative / relative.mean(axis=range(1, w.ndim), keepdims=True)
    return jnp.where(mean > 1e-6, relative, 1.0)


@jax.jit
def variance_ratio(kl: jax.typing.ArrayLike, w: jax.Array) -> jax.Array:
    """Returns r = 1 + lambda w [F, G, ...] with a KL, in nats over N, of 1/2 mean log r."""
    axes = tuple(range(1, w.ndim))

    def halved(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low + high) / 2
        over = jnp.log1p(jnp.exp(middle) * w).mean(axis=axes, keepdims=True) > 2 * kl
        return jnp.where(over, low, middle), jnp.where(over, middle, high)

    ones = jnp.ones_like(w, shape=(len(w),) + (1,) * len(axes))
    low, high = jax.lax.fori_loop(0, 40, halved, (-30 * ones, 30 * ones))
    return 1 + jnp.exp((low + high) / 2) * w


@jax.jit
def snr_gain(x_0: jax.Array, estimated: jax.Array, ratio: jax.Array) -> jax.Array:
    """Returns SNR_s - SNR_t of the packet [F], for a variance ratio [F, G, ...]."""
    axes = range(1, x_0.ndim)
    error = ((x_0 - estimated) ** 2 / ratio).sum(axis=axes)
    return (1 - 1 / ratio).sum(axis=axes) / jnp.maximum(error, 1e-20)


@jax.jit
def squared_error(x_0: jax.Array, estimated: jax.Array) -> jax.Array:
    """Returns the mean squared error of each file's images, [F]; at least 1e-12."""
    return jnp.maximum(((x_0 - estimated) ** 2).mean(axis=range(1, x_0.ndim)), 1e-12)


@jax.jit
def first_stride(schedule: NoiseSchedule, t: jax.Array, gain: jax.Array) -> jax.Array:
    """Returns the stride at t [F], of all there are, that is nearest to a gain of SNR [F]."""
    every = jnp.arange(len(strides(schedule.num_steps)), dtype=jnp.int32)
    return _nearest(schedule, t, gain, jnp.broadcast_to(every, (len(t), len(every))))[1]


@functools.partial(jax.jit, static_argnames="layout")
def send(
    schedule: NoiseSchedule,
    layout: Layout,
    seed: jax.Array,
    number: jax.Array,
    state: State,
    x_0: jax.Array,
    estimated: jax.Array,
    ratio: jax.Array,
) -> tuple[State, Packet, jax.Array]:
    """Returns the state after a packet, the packet, and the KL that it is of, in bits [F].

    `estimated` is the denoiser's x_0 at the state, `ratio` is by `variance_ratio`; `number` counts
    packets from 0.
    """
    candidates = _changed(schedule, state.stride[:, None], jnp.arange(len(_CHANGES)))
    change, stride = _nearest(schedule, state.t, snr_gain(x_0, estimated, ratio), candidates)
    mean = target_mean(schedule, state.t, stride, x_0 - estimated, ratio)
    key = _key(seed, number)

    def search(target: trellis.Target) -> jax.Array:
        return trellis.encode(key, target, layout.bits, layout.nu)

    bits = in_chunks(search, _target(layout, key, mean, 1 / ratio), _LANES_AT_ONCE)
    packet = Packet(change, bits.reshape(len(x_0), layout.lanes, layout.bits))
    kl = trellis.kl(trellis.Target(*(x.reshape(len(x), -1) for x in (mean, 1 / ratio))))
    found = receive(schedule, layout, seed, number, state, packet, estimated, ratio)
    return found, packet, kl / math.log(2)


@functools.partial(jax.jit, static_argnames="layout")
def receive(
    schedule: NoiseSchedule,
    layout: Layout,
    seed: jax.Array,
    number: jax.Array,
    state: State,
    packet: Packet,
    estimated: jax.Array,
    ratio: jax.Array,
) -> State:
    """Returns the state after a packet that came; the arguments are as in `send`."""
    stride = _changed(schedule, state.stride, packet.change)
    key = _key(seed, number)
    lanes = packet.bits.reshape(-1, layout.bits)
    z = trellis.decode(key, lanes, layout.lane, layout.nu).reshape(len(stride), -1)
    order = randomness.permutation(key, layout.dimensions)
    noise = jnp.zeros((len(z), layout.dimensions)).at[:, order].set(z[:, : layout.dimensions])
    return step(schedule, state, stride, estimated, ratio, noise.reshape(ratio.shape))


def target_mean(
    schedule: NoiseSchedule, t: jax.Array, stride: jax.Array, missing: jax.Array, ratio: jax.Array
) -> jax.Array:
    """Returns the mean of the target, relative to the prior, of a step: `missing` is x_0 less the
    denoiser's, [F, G, ...]."""
    transition = schedule.between(_earlier(schedule, t, stride), t)
    of_x_0, _ = posterior_coefficients(transition)
    scale = of_x_0 / jnp.sqrt(transition.posterior_variance)
    return expand_like(scale, missing) * missing / jnp.sqrt(ratio)


def step(
    schedule: NoiseSchedule,
    state: State,
    stride: jax.Array,
    estimated: jax.Array,
    ratio: jax.Array,
    noise: jax.Array,
) -> State:
    """Returns the state after a step of p(x_s | x_t), whose noise, N(0, I) but for the target, was
    sent: all [F, G, ...]."""
    s, x = _earlier(schedule, state.t, stride), state.x_t
    transition = schedule.between(s, state.t)
    of_x_0, of_x_t = posterior_coefficients(transition)
    variance = expand_like(transition.posterior_variance, x) * ratio
    mean = expand_like(of_x_0, x) * estimated + expand_like(of_x_t, x) * x
    return State(mean + jnp.sqrt(variance) * noise, s, stride)


@jax.jit
def too_coarse(schedule: NoiseSchedule, t: jax.Array, gain: jax.Array) -> jax.Array:
    """Returns for which of the files no packet more can be sent, bool[F]: t is 1, or a stride of 1
    gains more than `COARSE` times the SNR that a packet does."""
    step = schedule.between(jnp.maximum(t - 1, 1), t)
    return (t == 1) | (jnp.exp(step.s.high) * step.snr_loss > COARSE * gain)


def in_chunks(function: Callable[[Any], Any], given: Any, size: int) -> Any:
    """Returns function(given), computed of `size` rows at a time: to bound memory, where a row of
    what it returns depends on one row of its arguments. Both are trees of arrays [B, ...]."""
    count = len(jax.tree.leaves(given)[0])
    if count <= size:
        return function(given)
    chunks = -(-count // size)
    rows = np.minimum(np.arange(chunks * size), count - 1).reshape(chunks, size)
    found = jax.lax.map(lambda chunk: function(jax.tree.map(lambda x: x[chunk], given)), rows)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


def _key(seed: jax.typing.ArrayLike, number: jax.typing.ArrayLike) -> jax.Array:
    return jnp.stack([jnp.asarray(seed, jnp.uint32), jnp.asarray(number, jnp.uint32)])


def _changed(schedule: NoiseSchedule, stride: jax.Array, change: jax.Array) -> jax.Array:
    changed = stride + jnp.asarray(_CHANGES)[change]
    return jnp.clip(changed, 0, len(strides(schedule.num_steps)) - 1)


def _earlier(schedule: NoiseSchedule, t: jax.Array, stride: jax.Array) -> jax.Array:
    return jnp.maximum(t - jnp.asarray(strides(schedule.num_steps))[stride], 1)


def _nearest(
    schedule: NoiseSchedule, t: jax.Array, gain: jax.Array, candidates: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns which of the candidates [F, K] is nearest to a gain of SNR, and its stride."""
    step = schedule.between(_earlier(schedule, t[:, None], candidates), t[:, None])
    gains = step.s.high + jnp.log(step.snr_loss)
    best = jnp.abs(gains - jnp.log(gain)[:, None]).argmin(axis=1)
    return best.astype(jnp.int32), jnp.take_along_axis(candidates, best[:, None], axis=1)[:, 0]


def _target(layout: Layout, key: jax.Array, mean: jax.Array, variance: jax.Array) -> trellis.Target:
    """Returns the targets of all lanes [F * lanes, lane]; what pads the last is as the prior."""
    order = randomness.permutation(key, layout.dimensions)
    more = ((0, 0), (0, layout.lanes * layout.lane - layout.dimensions))

    def cut(x: jax.Array, padding: float) -> jax.Array:
        shuffled = jnp.pad(x.reshape(len(x), -1)[:, order], more, constant_values=padding)
        return shuffled.reshape(-1, layout.lane)

    return trellis.Target(cut(mean, 0.0), cut(variance, 1.0))
