"""Editing of given data: inpainting, interpolation, variations, exact DDIM inversion.

All run the reverse process of `sample` from somewhere else than noise; x_0 is data in [-1, 1],
float[B, ...]. What noises x_0 to t is the noise that `sample` by the same key would begin with at
t, so that at t = T, where next to nothing is left of x_0, an edit is a sample.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddpm.diffusion.gaussian import q_sample, q_step, same_shape
from ddpm.diffusion.pixels import check_scaled
from ddpm.diffusion.predictions import Denoiser, Prediction, predict
from ddpm.diffusion.process import Noise, StepInfo, StepResult, no_memory
from ddpm.diffusion.schedules import NoiseSchedule, require_signal
from ddpm.diffusion.streams import KNOWN, keys_per_example, noise_streams, normal
from ddpm.sampling import samplers
from ddpm.sampling.sample import check_times, sample
from ddpm.sampling.samplers import Sampler, ancestral

Times = Sequence[float] | np.ndarray


def vary(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    t: float,
    *,
    sampler: Sampler | None = None,
    times: Times | None = None,
) -> jax.Array:
    """Noises x_0 to t and samples from there: SDEdit (Meng et al. 2022, Algorithm 1).

    The larger t, the less is left of x_0: at t = T it is a sample.

    Args:
      key: one key, split into one for each example by its number, or B of them.
      t: in [1, T], a number.
      times: of a whole chain, falling; those below t are taken. The sampler's own if left out.

    Raises ValueError for a t outside 1..T.
    """
    keys, below = keys_per_example(key, len(x_0)), _from(t, schedule, sampler, times)
    x_t = _noised(keys, schedule, x_0, below)
    return sample(keys, schedule, denoiser, x_0.shape, sampler=sampler, times=below, x_t=x_t)


def interpolate(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    other: jax.Array,
    fractions: Sequence[float] | np.ndarray,
    t: float,
    *,
    sampler: Sampler | None = None,
    times: Times | None = None,
    shared_noise: bool = True,
) -> jax.Array:
    """Noises both ends to t, mixes them, and samples from there (Section 4.3, Figures 8 and 9).

    (1 - f) x_t + f x'_t for each fraction f is decoded with the same noise, so that fractions 0 and
    1 are what `vary` makes of each end. Both ends get the same eps too, which the mix then keeps
    whole; with shared_noise = False they get two, and the mix has sqrt(f^2 + (1 - f)^2) of the
    noise that the denoiser expects, 0.71 in the middle, which comes out smoother.

    Arguments and errors are those of `vary`. Returns [F, B, ...].
    """
    same_shape(x_0=x_0, other=other)
    keys, below = keys_per_example(key, len(x_0)), _from(t, schedule, sampler, times)
    first = _noised(keys, schedule, x_0, below)
    last = _noised(
        keys if shared_noise else jax.vmap(jax.random.split)(keys)[:, 1], schedule, other, below
    )
    f = jnp.asarray(fractions, jnp.float32).reshape(-1, *(1 for _ in x_0.shape))
    mixed = (1 - f) * first + f * last
    decoded = sample(
        jnp.broadcast_to(keys, mixed.shape[:2]).reshape(-1),
        schedule,
        denoiser,
        (mixed.shape[0] * mixed.shape[1], *x_0.shape[1:]),
        sampler=sampler,
        times=below,
        x_t=mixed.reshape(-1, *x_0.shape[1:]),
    )
    return decoded.reshape(mixed.shape)


def share(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    shape: Sequence[int],
    t: float,
    *,
    sampler: Sampler | None = None,
    times: Times | None = None,
) -> jax.Array:
    """Samples of `shape` [B, ...] whose chains are one until x_t, and part there (Figure 7).

    The first is the one that `sample` draws by the same key. A sampler with a memory begins a new
    one at t; of one that draws no noise all samples are the same.

    Raises ValueError unless t is among the times, before the last.
    """
    keys, whole = keys_per_example(key, shape[0]), _whole(schedule, sampler, times)
    if t not in whole[:-1]:
        raise ValueError(f"t = {t:g}: must be one of the chain's times above {whole[-1]:g}")
    place = whole.index(t)
    first, one = keys[:1], (1, *shape[1:])
    if place:
        above = whole[: place + 1]
        x_t = sample(first, schedule, denoiser, one, sampler=sampler, times=above)
    else:
        x_t = normal(first, _stream(whole, schedule), shape[1:])
    x_t = jnp.broadcast_to(x_t, tuple(shape))
    return sample(keys, schedule, denoiser, shape, sampler=sampler, times=whole[place:], x_t=x_t)


# --- Inpainting


def inpaint(
    key: jax.Array,
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    keep: jax.typing.ArrayLike,
    *,
    sampler: Sampler | None = None,
    times: Times | None = None,
    jump_length: int = 10,
    resamplings: int = 10,
) -> jax.Array:
    """Returns x_0 with what is not kept drawn anew, to fit: RePaint (Lugmayr et al. 2022, Algorithm
    1).

    It is approximate, also with an exact denoiser. On two pixels of a Gaussian with correlation
    0.73, with `schedules.linear(1000)`, 250 steps, jumps of 10 and `fixed_small`, the mean of the
    painted pixel goes this part of the way from the marginal to the conditional mean, and its
    standard deviation is this multiple of the conditional's:

        resamplings              1      10     30     100
        way to the mean          0.56   0.93   0.97   0.98
        standard deviation       1.12   0.96   0.95   0.95

    Shorter chains are worse, however many the resamplings: 50 steps end at 0.72 of the way.

    Args:
      keep: bool, [B, ...] or broadcastable to it: True where x_0 is known.
      sampler: one without a memory; with few steps not `fixed_large`.
      times: of a chain without jumps; the sampler's own if left out.
      jump_length, resamplings: of `repaint_times`. The denoiser is called nearly `resamplings`
        times as often as in sampling.

    Raises ValueError as `inpainting` and `repaint_times` do.
    """
    sampler = sampler or ancestral()
    jumping = repaint_times(
        _whole(schedule, sampler, times), jump_length=jump_length, resamplings=resamplings
    )
    return sample(
        key,
        schedule,
        denoiser,
        x_0.shape,
        sampler=inpainting(sampler, x_0, keep),
        times=jumping,
    )


def inpainting(sampler: Sampler, x_0: jax.Array, keep: jax.typing.ArrayLike) -> Sampler:
    """Returns a sampler of what is not kept of x_0, given the rest; it can go up in time, to try
    again.

    Down to s: q(x_s | x_0) where x_0 is kept, the sampler's step elsewhere; at s = 0 x_0 itself.
    Up to t: q(x_t | x_s), for which the denoiser is not called (the last prediction is kept).
    Going down once, what is painted fits the known part badly; `repaint_times` goes up and down.

    Raises ValueError for a sampler with a memory, which a jump would make wrong, and for a `keep`
    that is not bool or does not fit x_0.
    """
    if sampler.memory is not no_memory:
        raise ValueError("inpainting jumps back in time: it needs a sampler without a memory")
    keep, x_0 = jnp.asarray(keep), jnp.asarray(check_scaled(x_0), jnp.float32)
    if keep.dtype != bool:
        raise ValueError(f"keep is of dtype {keep.dtype}: must be bool, True where x_0 is known")
    try:
        keep = jnp.broadcast_to(keep, x_0.shape)
    except ValueError as error:
        raise ValueError(f"keep is of shape {keep.shape}, x_0 of {x_0.shape}") from error

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        last: Prediction,
    ) -> StepResult:
        t, s = step_info.t, step_info.s

        def down() -> tuple[jax.Array, Prediction, jax.Array]:
            # Its noises are the even ones, 0 among them: with nothing kept it is `sampler`.
            even = Noise(lambda k: noise(2 * k), noise.keys)
            found = sampler.step(schedule, denoiser, x_t, step_info, even, ())
            known = q_sample(schedule, x_0, s, noise(KNOWN))
            said = Prediction(found.prediction.x_0, found.prediction.eps)
            calls = jnp.asarray(found.evaluations, jnp.int32)
            return jnp.where(keep, known, found.x), said, calls

        def up() -> tuple[jax.Array, Prediction, jax.Array]:
            return q_step(schedule, x_t, s, noise(), s=t), last, jnp.zeros((), jnp.int32)

        x_s, said, calls = jax.lax.cond(s > t, up, down)
        return StepResult(x_s, said, said, calls)

    def memory(x: jax.Array) -> Any:
        return Prediction(jnp.zeros_like(x), jnp.zeros_like(x))

    return sampler._replace(step=step, memory=memory, may_increase_t=True)


def repaint_times(times: Times, *, jump_length: int = 10, resamplings: int = 10) -> np.ndarray:
    """Returns the times of a chain, [N + 1], that goes up again every `jump_length` steps.

    From the first time above the last one, and from every jump_length-th after it, the chain goes
    up by jump_length steps and down again, until it has been there `resamplings` times: the
    schedule of RePaint (250 steps, 10 and 10 there). A jump up is one step here, of the same law
    as single ones.

    Raises ValueError for less than 1 of either, or jumps longer than the chain.
    """
    falling = list(np.asarray(times))
    steps = len(falling) - 1
    if jump_length < 1 or resamplings < 1:
        raise ValueError(
            f"jump_length = {jump_length}, resamplings = {resamplings}: must be at least 1"
        )
    if resamplings > 1 and jump_length >= steps:
        raise ValueError(
            f"jump_length = {jump_length}: must be less than the chain's {steps} steps, or "
            "resamplings = 1"
        )
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    path, left = [], steps  # how many steps are left
    while left >= 0:
        path.append(falling[steps - left])
        if jumps.get(left, 0):
            jumps[left] -= 1
            left += jump_length
            path.append(falling[steps - left])
        left -= 1
    return np.array(path)


# --- Inversion


class Inversion(NamedTuple):
    """x_T [B, ...], and the residual [B]: by how much, at most, a step of `ddim` from any x_t on
    the way misses the x_s it should reach. Where that is not small, take more iterations or steps.
    """

    x_t: jax.Array
    residual: jax.Array


def invert(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    *,
    times: Times | None = None,
    iterations: int = 20,
) -> Inversion:
    """Returns the x_T from which `ddim()` over the same times reaches x_0, exact where it
    converges.

    Each step x_s = ddim(x_t) is solved for x_t by fixed-point iteration, from the eps of the point
    before; with no iterations that is the usual inversion (Song et al. 2021, Section 5.4), right to
    first order. The map is, in y = x / alpha and r = sigma / alpha, or where noise prevails in
    z = x / sigma and q = alpha / sigma,

        y_t = y_s + (r_t - r_s) eps(x_t, t),    z_t = z_s + (q_t - q_s) x_0(x_t, t),

    whichever changes less with x_t; from s = 0 it is x_t = alpha_t x_0 + sigma_t eps(x_t, t), begun
    with eps = 0. Each example is relaxed by the secant of its last two points (Aitken), and of all
    points the one that misses x_s least is taken.

    Args:
      times: of the chain that is inverted, falling, as `sample` is given them; all T if left out.
      iterations: for each step, which calls the denoiser once more than that. They converge where
        the prediction changes little with x_t over a step: short steps, a well-trained network.

    Raises ValueError for times that do not fall, or no signal at the first of them.
    """
    if iterations < 0:
        raise ValueError(f"iterations = {iterations}: must not be negative")
    falling = check_times(_whole(schedule, None, times), schedule.num_steps)
    if falling[0] == schedule.num_steps:
        require_signal(schedule, "from which no x_0 can be found")
    rising = jnp.asarray(falling[::-1].copy())
    x_0 = jnp.asarray(check_scaled(x_0), jnp.float32)

    def total(x: jax.Array) -> jax.Array:
        """Sums each example: [B, 1, ...]."""
        return x.sum(axis=tuple(range(1, x.ndim)), keepdims=True)

    def rise(carry: Any, step_info: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        x_s, eps, worst = carry
        s, t = step_info
        step = schedule.between(s, t)
        # alpha_t (r_t - r_s), without the difference of what may be nearly equal.
        by_eps = -step.t.sigma * jnp.expm1(-step.log_snr_drop / 2)
        noisy = (step.t.high < 0) & (s > 0)
        sigma_s = jnp.where(noisy, step.s.sigma, 1.0)
        by_x_0 = -step.t.alpha * jnp.expm1(jnp.where(noisy, step.log_snr_drop, 0.0) / 2)

        def nearer(k: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x, x_before, lack_before, best, best_eps, least = state
            x_0, eps, *_ = predict(denoiser, x, t)
            missed = jnp.abs(step.s.alpha * x_0 + step.s.sigma * eps - x_s)
            missed = missed.max(axis=tuple(range(1, x.ndim)), keepdims=True)
            better = missed < least
            best, best_eps = jnp.where(better, x, best), jnp.where(better, eps, best_eps)
            lack = jnp.where(
                noisy,
                step.t.sigma / sigma_s * x_s + by_x_0 * x_0 - x,
                step.alpha * x_s + by_eps * eps - x,
            )
            change = lack - lack_before
            secant = total(change * lack) / jnp.maximum(total(change**2), 1e-30)
            back = jnp.where(k > 0, secant, 0.0) * (x - x_before + change)
            return x + lack - back, x, lack, best, best_eps, jnp.minimum(missed, least)

        x = step.alpha * x_s + by_eps * eps
        none, never = jnp.zeros_like(x), jnp.full_like(total(x), jnp.inf)
        found = jax.lax.fori_loop(0, iterations + 1, nearer, (x, none, none, x, eps, never))
        _, _, _, x_t, eps, least = found
        return (x_t, eps, jnp.maximum(worst, least.reshape(-1))), None

    eps = predict(denoiser, x_0, rising[0]).eps if falling[-1] else jnp.zeros_like(x_0)
    start = x_0, eps, jnp.zeros(len(x_0), x_0.dtype)
    (x_t, _, worst), _ = jax.lax.scan(rise, start, (rising[:-1], rising[1:]))
    return Inversion(x_t, worst)


def _whole(schedule: NoiseSchedule, sampler: Sampler | None, times: Times | None) -> list[Any]:
    """Returns the times of a whole chain, those given or the sampler's own."""
    if times is None:
        times = samplers.times(schedule.num_steps, sampler.steps if sampler else None)
    return np.asarray(times).tolist()


def _from(
    t: float, schedule: NoiseSchedule, sampler: Sampler | None, times: Times | None
) -> list[Any]:
    """Returns t, and the times of the whole chain below it."""
    if not 1 <= t <= schedule.num_steps:
        raise ValueError(f"t = {t:g}: must be in 1..T = {schedule.num_steps}")
    return [t] + [s for s in _whole(schedule, sampler, times) if s < t]


def _noised(
    keys: jax.Array, schedule: NoiseSchedule, x_0: jax.Array, times: list[Any]
) -> jax.Array:
    """Returns x_t at the first of the times, with the noise that a chain over them would begin
    with."""
    t = check_times(times, schedule.num_steps)
    eps = normal(keys, _stream(times, schedule), x_0.shape[1:])
    return q_sample(schedule, jnp.asarray(check_scaled(x_0), jnp.float32), jnp.asarray(t)[0], eps)


def _stream(times: list[Any], schedule: NoiseSchedule) -> Any:
    return noise_streams(check_times(times, schedule.num_steps), schedule.num_steps)[0]
