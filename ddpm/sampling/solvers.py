"""Solvers of higher order for the probability flow, and for the SDE: fewer calls of the denoiser.

Over lambda = log(alpha / sigma), half the log-SNR, the flow is linear but for x_0(x_t, t), so

    x_s = sigma_s/sigma_t x_t + alpha_s int_0^1 h e^{-h (1 - r)} x_0(r) dr,

with h = lambda_s - lambda_t and r from 0 at t to 1 at s. A solver approximates x_0 along the way:
constant (DDIM), or a polynomial through what was predicted before (DPM-Solver++, UniPC). Heun's
method, as Karras et al. use it, takes the slope in sigma/alpha at both ends. For s = 0 all give x_0
as predicted last.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.process import Noise, StepInfo, StepResult
from ddpm.diffusion.schedules import LogSNR, NoiseSchedule
from ddpm.sampling.samplers import Sampler

_HIGHEST = 3
_LONG = 30.0  # in lambda: as good as infinite


def dpm_solver(order: int = 2, *, stochastic: bool = False, steps: int | None = None) -> Sampler:
    """Returns DPM-Solver++ (Lu et al. 2022), multistep: of order 1, DDIM(0), 2 (2M) or 3 (3M).

    The first steps, and the last ones before t = 0, are of lower order. Order 3 integrates the
    parabola through three predictions, as the order needs; the authors' and `diffusers`' 3M takes
    half of its quadratic term, and measures as of order 2.

    Args:
      stochastic: solves the SDE (Lu et al. 2022, appendix), with order 1, ancestral sampling with
        `fixed_small`, or 2. These are weak orders: of the samples' distribution. The formula of
        order 3 is of weak order 2 too, and no more precise, as the noise of a step moves x_0 along
        it.

    Raises ValueError for another order.
    """
    _check_order(order)
    if stochastic and order == _HIGHEST:
        raise ValueError(
            "order = 3 with stochastic = True: the SDE's samples would be no more precise than "
            "with order 2: take order 1 or 2, or the ODE"
        )

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: tuple[jax.Array, ...],
    ) -> StepResult:
        prediction = predict(denoiser, x_t, step_info.t)
        predicted = (prediction.x_0, *memory)
        x_s = _integrate(schedule, x_t, step_info, predicted, stochastic=stochastic)
        if stochastic:
            step = schedule.between(step_info.s, step_info.t)
            x_s += jnp.sqrt(step.posterior_variance) * noise()
        return StepResult(x_s, prediction, predicted[: order - 1])

    label = f"order{order}" + ("_stochastic" if stochastic else "")
    return Sampler(
        step,
        steps,
        lambda x: (jnp.zeros_like(x),) * (order - 1),
        label=label,
        draws_noise=stochastic,
    )


class _UniPC(NamedTuple):
    """x at the time before, corrected, and what was predicted there and before."""

    x: jax.Array
    predicted: tuple[jax.Array, ...]


def unipc(order: int = 2, *, steps: int | None = None) -> Sampler:
    """Returns UniPC (Zhao et al. 2023) of order 1, 2 or 3, predicting x_0, with B(h) = e^h - 1
    ('bh2').

    Each x_t is corrected by what is predicted there, which raises the order by one at no further
    call. Lower orders first and last, as in `dpm_solver`. Raises ValueError for another order.
    """
    _check_order(order)

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: _UniPC,
    ) -> StepResult:
        del noise
        prediction = predict(denoiser, x_t, step_info.t)
        before = step_info.number - 1

        def correct() -> jax.Array:
            last = StepInfo(step_info.times[before], step_info.t, before, step_info.times)
            return _integrate(schedule, memory.x, last, memory.predicted, at_s=prediction.x_0)

        x = jax.lax.cond(before < 0, lambda: x_t, correct)
        predicted = (prediction.x_0, *memory.predicted)[:order]
        x_s = _integrate(schedule, x, step_info, predicted)
        return StepResult(x_s, prediction, _UniPC(x, predicted))

    def memory(x: jax.Array) -> _UniPC:
        return _UniPC(x, (jnp.zeros_like(x),) * order)

    return Sampler(step, steps, memory, label=f"order{order}")


def _integrate(
    schedule: NoiseSchedule,
    x_t: jax.Array,
    step_info: StepInfo,
    predicted: Sequence[jax.Array],
    *,
    at_s: jax.Array | None = None,
    stochastic: bool = False,
) -> jax.Array:
    """Returns x_s (its mean, for the SDE) by the polynomial through x_0 as predicted at t, at the
    times before it, and at s where that is known."""
    between = schedule.between(step_info.s, step_info.t)
    # The SDE uses the ODE's formula with step 2h.
    h = between.log_snr_drop * (1.0 if stochastic else 0.5)
    kept = between.s.sigma / between.t.sigma * (jnp.exp(-h / 2) if stochastic else 1.0)

    def earlier(back: int) -> jax.Array:
        """Returns how far before t the prediction `back` steps ago was made, in units of h."""
        then = schedule.at(step_info.times[jnp.maximum(step_info.number - back, 0)])
        far = (then.high - between.t.high) + (then.low - between.t.low)
        return jnp.maximum(far / 2, -_LONG) / (h / 2 if stochastic else h)

    def of_order(n: int) -> jax.Array:
        places = [earlier(back) for back in range(1, n)]
        others = list(predicted[1:n])
        if at_s is not None:
            places, others = [*places, jnp.ones_like(h)], [*others, at_s]
        x_0 = predicted[0]
        for weight, other in zip(_weights(h, places), others, strict=True):
            x_0 = x_0 + weight * (other - predicted[0])
        return x_0

    steps, most = len(step_info.times) - 1, len(predicted)
    # As many predictions as there are; and fewer at the end, where x_0 itself is due.
    left = jnp.where(step_info.times[-1] == 0, steps - step_info.number, most)
    order = jnp.minimum(jnp.minimum(step_info.number + 1, left), most)
    ways = [lambda n=n: of_order(n) for n in range(1, most + 1)]
    x_0 = jax.lax.switch(order - 1, ways)
    return kept * x_t - between.s.alpha * jnp.expm1(-h) * x_0


def _weights(h: jax.Array, places: list[jax.Array]) -> list[jax.Array]:
    """Returns weights w of x_0(r_i) - x_0(0), whose sum plus x_0(0) is the mean of x_0(r) over the
    step.

    Exactly so for polynomials of degree n = len(places); for n = 1 with 1/2 in the place of the
    moment, as all implementations have it.
    """
    if not places:
        return []
    if len(places) == 1:
        return [0.5 / places[0]]
    powers = jnp.arange(1, len(places) + 1, dtype=jnp.int32)
    moments = jnp.stack([_moment(k, h) for k in range(1, len(places) + 1)])
    matrix = jnp.stack(places)[None, :] ** powers[:, None]
    return list(jnp.linalg.solve(matrix, moments))


def _moment(k: int, h: jax.Array) -> jax.Array:
    """Returns int_0^1 h e^{-h (1 - r)} r^k dr / (1 - e^{-h})."""
    # By parts, M_k = 1 - k/h M_{k-1}; for small h, where that cancels, by its series.
    small = jnp.minimum(h, 1.0)
    series = sum(
        (-1) ** j * small**j * (math.factorial(k) / math.factorial(k + j + 1)) for j in range(12)
    )
    series = series * small / -jnp.expm1(-small)
    large = jnp.maximum(h, 1.0)
    parts = -jnp.expm1(-large)
    for i in range(1, k + 1):
        parts = 1 - i / large * parts
    return jnp.where(h < 1, series, parts / -jnp.expm1(-large))


def _check_order(order: int) -> None:
    if order not in range(1, _HIGHEST + 1):
        raise ValueError(f"order = {order}: must be one of 1..{_HIGHEST}")


def euler(*, steps: int | None = None) -> Sampler:
    """Returns Euler's method in y = x/alpha over sigma/alpha, where the flow is dy/d(sigma/alpha) =
    eps.

    It is DDIM(0).
    """

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        del noise
        prediction = predict(denoiser, x_t, step_info.t)
        now, then = schedule.at(step_info.t), schedule.at(step_info.s)
        y = x_t / now.alpha + (_sigma(then) - _sigma(now)) * prediction.eps
        return StepResult(then.alpha * y, prediction, memory)

    return Sampler(step, steps, needs_signal=True)


def heun(
    *,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    steps: int | None = None,
) -> Sampler:
    """Returns Heun's method in x/alpha over sigma/alpha (Karras et al. 2022, Algorithms 1 and 2).

    Of second order, at two calls a step, and one for the last: 2N - 1. Their times are
    `grids.karras`.

    Args:
      churn: S_churn; each step first adds noise, up to sigma (1 + min(churn / N, sqrt(2) - 1)).
      churn_range: S_tmin and S_tmax, sigma/alpha between which noise is added.
      churn_noise: S_noise, the standard deviation of that noise in units of the right one.

    Raises ValueError for a negative churn.
    """
    if not churn >= 0:
        raise ValueError(f"churn = {churn}: must be a number >= 0")

    def step(
        schedule: NoiseSchedule,
        denoiser: Denoiser,
        x_t: jax.Array,
        step_info: StepInfo,
        noise: Noise,
        memory: Any,
    ) -> StepResult:
        t = step_info.t
        if churn:
            most = _sigma(schedule.at(schedule.num_steps))
            sigma, n = _sigma(schedule.at(t)), len(step_info.times) - 1
            within = (sigma >= churn_range[0]) & (sigma <= churn_range[1])
            raised = sigma * (1 + jnp.where(within, min(churn / n, math.sqrt(2) - 1), 0.0))
            raised = jnp.clip(raised, sigma, most)
            added = jnp.sqrt((raised - sigma) * (raised + sigma))
            y = x_t / schedule.at(t).alpha + added * churn_noise * noise()
            t = jnp.where(added > 0, schedule.time_of(-2 * jnp.log(raised)), jnp.float32(t))
            x_t = schedule.at(t).alpha * y
        now, then = schedule.at(t), schedule.at(step_info.s)
        first = predict(denoiser, x_t, t)
        x_s = then.alpha * first.x_0 + then.sigma * first.eps

        def corrected() -> jax.Array:
            second = predict(denoiser, x_s, step_info.s)
            # y_s = y_t + (sigma_s - sigma_t) (eps + eps') / 2, with x_0 in the place of y_t -
            # sigma_t eps, whose digits are lost where sigma/alpha is large.
            change = (second.eps - first.eps) / 2
            x_0 = first.x_0 - _sigma(now) * change
            return then.alpha * x_0 + then.sigma * (first.eps + change)

        last = step_info.s == 0
        x_s = jax.lax.cond(last, lambda: x_s, corrected)
        return StepResult(x_s, first, memory, jnp.where(last, 1, 2))

    label = ""
    if churn:
        ends = () if churn_range == (0.0, math.inf) else churn_range
        label = "_".join([f"churn{churn:g}", f"noise{churn_noise:g}", *(f"{x:g}" for x in ends)])
    return Sampler(
        step,
        steps,
        label=label,
        draws_noise=churn > 0,
        needs_signal=True,
        whole_times=not churn,
    )


def _sigma(level: LogSNR) -> jax.Array:
    """Returns sigma / alpha, the noise level of Karras et al."""
    return jnp.exp(-0.5 * level.high)
