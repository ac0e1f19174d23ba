"""Exact likelihood by the probability-flow ODE (Song et al. 2021, section 4.3), in bits/dim.

The ODE that moves x_t with the marginals of the diffusion is, over u = log(sigma_t / alpha_t),

    dx/du = sigma (eps(x, t) - sigma x),

and log p(x(u)) changes along it by minus the divergence, sigma (tr(d eps/d x) - sigma D). It goes
from t = 1, the first noise level, to T, where p is N(0, I). What is left is the gap between the
data and t = 1, for which there are two ways, each a bound on the bits that 8-bit data need:

`dequantised_bits_per_dim`  uniform noise fills the 8-bit bins, and the density at t = 1 is taken as
    that of the data, x_1 = alpha_1 x_0 (as score_sde does). It is the density of a sampler that
    stops at t = 1, and so is too wide for data that are sharper than sigma_1.
`decoded_bits_per_dim`  x_1 is drawn from q(x_1 | x_0), and p(x_0 | x_1) is the bound's decoder, so
    that nothing is left out: E[-log p(x_1) + log q(x_1 | x_0)] + L_0.

The denoiser must not be clipped: a clipped one has another, wrong divergence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddpm.diffusion import streams
from ddpm.diffusion.bound_terms import BITS_PER_NAT, decoder_nll
from ddpm.diffusion.gaussian import fixed_large, per_example_mean, q_sample
from ddpm.diffusion.pixels import HALF_BIN, check_scaled
from ddpm.diffusion.predictions import Denoiser, predict
from ddpm.diffusion.schedules import NoiseSchedule, require_signal
from ddpm.diffusion.streams import keys_per_example, normal
from ddpm.diffusion.times import as_times
from ddpm.diffusion.variances import ReverseVariance

MAX_STEPS = 10_000
NO_END = "so that its probability flow has no end in log-SNR"


class Flow(NamedTuple):
    """log p(x_1) in nats [B], x_T, and how often the denoiser was called for a batch.

    All NaN where the solver did not reach its tolerance.
    """

    log_density: jax.Array
    x_last: jax.Array
    evaluations: jax.Array


class FlowBits(NamedTuple):
    """Bits/dim, float32[B], and the denoiser's calls for the batch."""

    bits_per_dim: jax.Array
    evaluations: jax.Array


class Transported(NamedTuple):
    """x_s [B, ...], NaN where the solver did not reach its tolerance; the denoiser's calls."""

    x: jax.Array
    evaluations: jax.Array


def transport(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_t: jax.Array,
    t: jax.typing.ArrayLike,
    s: jax.typing.ArrayLike,
    *,
    tolerance: float = 1e-4,
) -> Transported:
    """Moves x_t along the probability flow to time s, down or up; the way back gives x_t again.

    Args:
      x_t: [B, ...]. t, s: scalars within 1..T, whole or not, not equal.
      tolerance: of the adaptive solver, as in `log_density`; of the worst example.

    Raises ValueError for a schedule without signal at T.
    """
    require_signal(schedule, NO_END)

    def velocity(u: Any, x: jax.Array, _: Any) -> jax.Array:
        sigma = jnp.sqrt(jax.nn.sigmoid(2 * u))
        eps = predict(denoiser, x, schedule.time_of(-2 * u)).eps
        return sigma * (eps - sigma * x)

    def worst(error: jax.Array) -> jax.Array:
        return jnp.sqrt(per_example_mean(error**2)).max()

    times = as_times(schedule.ends, t, noisy=True), as_times(schedule.ends, s, name="s", noisy=True)
    first, last = (-schedule.at(time).high / 2 for time in times)
    start = jnp.asarray(check_scaled(x_t, "x_t"), jnp.float32)
    end, calls = _solve(velocity, first, last, start, tolerance, worst)
    return Transported(end, calls)


def log_density(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_1: jax.Array,
    key: jax.Array | None = None,
    *,
    tolerance: float = 1e-5,
) -> Flow:
    """Returns log p(x_1) in nats under the model's probability flow, x_1 at the noise level t = 1.

    Args:
      denoiser: called at fractional t too; differentiated once.
      x_1: [B, ...].
      key: estimates the divergence by Hutchinson's probe, random signs, one for each example and
        the same all along; one key or B. Without a key it is exact, which costs a derivative for
        every dimension.
      tolerance: of the adaptive solver (Tsitouras 5(4)), relative and absolute, for each example's
        root mean square.

    Raises ValueError for a schedule without signal at T, where u is infinite.
    """
    require_signal(schedule, NO_END)
    x_1 = jnp.asarray(check_scaled(x_1, "x_1"), jnp.float32)
    shape = x_1.shape
    probe = None
    if key is not None:
        signs = jax.vmap(
            lambda key: jax.random.rademacher(
                jax.random.fold_in(key, streams.FLOW_PROBE), shape[1:], jnp.float32
            )
        )
        probe = signs(keys_per_example(key, shape[0]))

    def velocity(u: Any, y: Any, _: Any) -> tuple[jax.Array, jax.Array]:
        sigma = jnp.sqrt(jax.nn.sigmoid(2 * u))
        t = jnp.broadcast_to(schedule.time_of(-2 * u), shape[:1])

        def eps(x: jax.Array) -> jax.Array:
            return predict(denoiser, x, t).eps

        value, trace = _with_trace(eps, y[0], probe)
        return sigma * (value - sigma * y[0]), sigma * (trace - sigma)

    def worst(error: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Returns the largest root mean square of the examples: an average would hide a single bad
        one."""
        of_x = jnp.sqrt(per_example_mean(error[0] ** 2))
        return jnp.maximum(of_x, jnp.abs(error[1])).max()

    first, last = -schedule.log_snr[1] / 2, -schedule.log_snr[-1] / 2
    start = x_1, jnp.zeros(shape[:1], jnp.float32)
    (x_last, divergence), calls = _solve(velocity, first, last, start, tolerance, worst)
    prior = -0.5 * per_example_mean(x_last**2) - 0.5 * jnp.log(2 * jnp.pi)
    return Flow(x_1[0].size * (prior + divergence), x_last, calls)


def _solve(
    velocity: Callable[[Any, Any, Any], Any],
    first: jax.Array,
    last: jax.Array,
    start: Any,
    tolerance: float,
    norm: Callable[[Any], jax.Array],
) -> tuple[Any, jax.Array]:
    """Returns what `start` becomes over u = log(sigma / alpha) from first to last, up or down (NaN
    where the solver gave up), and how often the denoiser was called."""
    import diffrax  # a third of the time that importing all of this library takes

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        first,
        last,
        dt0=(last - first) / 100,
        y0=start,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=norm),
        max_steps=MAX_STEPS,
        adjoint=diffrax.ForwardMode(),
        throw=False,
    )
    reached = diffrax.is_successful(solution.result)
    end = jax.tree.map(lambda x: jnp.where(reached, x[-1], jnp.nan), solution.ys)
    # Six stages a step, of which the first is the last one's sixth.
    return end, 6 * solution.stats["num_steps"].astype(jnp.int32) + 1


def _with_trace(
    eps: Callable[[jax.Array], jax.Array], x: jax.Array, probe: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns eps(x) and tr(d eps / d x) / D of each example, exact without a probe.

    The Jacobian and its transpose have the same trace, so either serves.
    """
    product: Callable[[jax.Array], jax.Array]
    # Part of the network may have a gradient alone, as cuDNN's attention: jvp would fail, but not
    # before it is compiled.
    if "custom_vjp_call" in str(jax.make_jaxpr(eps)(x)):
        value, pull = jax.vjp(eps, x)
        product = lambda direction: pull(direction)[0]  # noqa: E731
    elif probe is not None:
        value, column = jax.jvp(eps, (x,), (probe,))
        return value, per_example_mean(probe * column)
    else:
        value, product = jax.linearize(eps, x)
    if probe is not None:
        return value, per_example_mean(probe * product(probe))
    dimensions = x[0].size

    def diagonal(i: jax.Array) -> jax.Array:
        basis = jnp.zeros(dimensions, x.dtype).at[i].set(1.0).reshape(x.shape[1:])
        column = product(jnp.broadcast_to(basis, x.shape))
        return column.reshape(x.shape[0], -1)[:, i]

    return value, jax.lax.map(diagonal, jnp.arange(dimensions)).mean(axis=0)


def dequantised(
    schedule: NoiseSchedule, x_0: jax.Array, keys: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns x_1 = alpha_1 (x_0 + u), u uniform over an 8-bit value's bin, from keys [B]; and log
    alpha_1."""
    draw = jax.vmap(
        lambda key: jax.random.uniform(
            jax.random.fold_in(key, streams.FLOW_NOISE),
            x_0.shape[1:],
            jnp.float32,
            minval=-HALF_BIN,
            maxval=HALF_BIN,
        )
    )
    log_alpha = -0.5 * jax.nn.softplus(-schedule.log_snr[1])
    return jnp.exp(log_alpha) * (x_0 + draw(keys)), log_alpha


def dequantised_bits_per_dim(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    key: jax.Array,
    *,
    exact_trace: bool = False,
    tolerance: float = 1e-5,
) -> FlowBits:
    """Returns bits/dim: -log2 p(x_0 + u) per dimension - log2(2/255), u uniform over an 8-bit
    value's bin, [-1, 1]/255.

    Args:
      x_0: 8-bit data as k/127.5 - 1, [B, ...].
      key: one key or B; draws u and the probe.
    """
    x_0, keys = check_scaled(x_0), keys_per_example(key, len(x_0))
    x_1, log_alpha = dequantised(schedule, x_0, keys)
    probe = None if exact_trace else keys
    flow = log_density(schedule, denoiser, x_1, probe, tolerance=tolerance)
    nats = -flow.log_density / x_0[0].size - log_alpha - jnp.log(2 * HALF_BIN)
    return FlowBits(nats * BITS_PER_NAT, flow.evaluations)


def decoded_bits_per_dim(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    key: jax.Array,
    *,
    exact_trace: bool = False,
    tolerance: float = 1e-5,
    variance: ReverseVariance = fixed_large,
) -> FlowBits:
    """Returns bits/dim: -log p(x_1) + log q(x_1 | x_0) + L_0 with x_1 ~ q(x_1 | x_0), which codes
    the gap at t = 1 too.

    Arguments as in `dequantised_bits_per_dim`; `variance` as in `decoder_nll`.
    """
    keys = keys_per_example(key, len(x_0))
    eps = normal(keys, streams.FLOW_NOISE, x_0.shape[1:])
    t = jnp.ones((), jnp.int32)
    x_1 = q_sample(schedule, x_0, t, eps)
    flow = log_density(schedule, denoiser, x_1, None if exact_trace else keys, tolerance=tolerance)
    entropy = 0.5 * (per_example_mean(eps**2) + jnp.log(2 * jnp.pi))
    entropy += 0.5 * schedule.at(t).log_sigma_squared
    prediction = predict(denoiser, x_1, t)
    decoder = decoder_nll(schedule, x_0, x_1, t, prediction, variance=variance)
    nats = -flow.log_density / x_0[0].size - entropy
    return FlowBits(nats * BITS_PER_NAT + decoder, flow.evaluations)
