"""Training losses, one value per example: whoever trains takes the mean.

A regression asks how far the prediction is from the truth, by a **criterion**: a distance in the
scale of one target (`distance`), or the squared error of x_0 weighted by the log-SNR (`weighted`).
The others are the variational bound, whole or next to a regression, and in continuous time.

Arguments all over: x_0, the data [B, ...]; t [B] or one for all, in 1..T, or within the ends of a
schedule in continuous time; eps, standard normal in the shape of x_0. Results are float32[B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ddpm.diffusion.bound_terms import BITS_PER_NAT, decoder_nll, prior_kl, step_kl
from ddpm.diffusion.gaussian import (
    decoder_log_likelihood,
    expand_like,
    fixed_large,
    normal_kl,
    per_example_mean,
    posterior_coefficients,
    q_sample,
    same_shape,
)
from ddpm.diffusion.loss_weights import Weight, on_v
from ddpm.diffusion.predictions import Denoiser, Prediction, predict, to_score, to_v
from ddpm.diffusion.schedules import NoiseSchedule, Schedule, require_signal
from ddpm.diffusion.times import as_times
from ddpm.diffusion.variances import ReverseVariance

NO_END = "where an integral over log-SNR has no end"

# Of the difference of two predictions at one x_t, the truth and the network's: [B, ...]. All are
# linear in it, so what x_t adds to v, score and mean cancels.
Target = Callable[[Schedule, jax.Array, Prediction], jax.Array]
Criterion = Callable[[Schedule, jax.Array, Prediction], jax.Array]


def of_eps(schedule: Schedule, t: jax.Array, error: Prediction) -> jax.Array:
    """Returns the error of eps."""
    return error.eps


def of_x_0(schedule: Schedule, t: jax.Array, error: Prediction) -> jax.Array:
    """Returns the error of x_0."""
    return error.x_0


of_v: Target = to_v
of_score: Target = to_score


def of_posterior_mean(schedule: Schedule, t: jax.Array, error: Prediction) -> jax.Array:
    """Returns the error of the mean of q(x_{t-1} | x_t, x_0), which is that of x_0 times a
    coefficient."""
    share, _ = posterior_coefficients(schedule.between(t - 1, t))
    return expand_like(share, error.x_0) * error.x_0


def huber(delta: float = 1.0) -> Callable[[jax.Array], jax.Array]:
    """Returns e -> e^2/2 up to |e| = delta, linear beyond (Huber 1964). Raises ValueError unless
    delta > 0."""
    if not delta > 0:
        raise ValueError(f"delta = {delta}: must be > 0")
    return lambda e: jnp.where(jnp.abs(e) < delta, e**2 / 2, delta * (jnp.abs(e) - delta / 2))


def distance(
    target: Target = of_eps, of: Callable[[jax.Array], jax.Array] = jnp.square
) -> Criterion:
    """Returns the criterion of the mean over dimensions of e^2, e the error; of |e| with `jnp.abs`;
    or of `huber()`."""
    return lambda schedule, t, error: per_example_mean(of(target(schedule, t, error)))


def weighted(weight: Weight, *, over_log_snr: bool = False) -> Criterion:
    """Returns the criterion weight(log_snr) |x_0 - x_0_hat|^2, the mean over dimensions.

    With `over_log_snr` the weight is that of an integral over log-SNR, on which the schedule has no
    say but for its ends: times -d log_snr/dt and the length of the time, as t is drawn uniformly;
    of whole times the expectation is the trapezoidal rule. Where the schedule has no such integral
    the criterion raises ValueError.
    The bound itself is half of L_simple so taken (Kingma & Gao 2023): likelihood weighting.
    """

    def criterion(schedule: Schedule, t: jax.Array, error: Prediction) -> jax.Array:
        # By way of v, which neither divides by alpha nor by sigma what was not divided before.
        factor = on_v(weight, schedule.at(t).high)
        if over_log_snr:
            factor *= _log_snr_jacobian(schedule, t)
        error_of_v = of_v(schedule, t, error)
        # Weighted before it is squared: where a weight vanishes the error may be beyond measure.
        return per_example_mean((expand_like(jnp.sqrt(factor), error_of_v) * error_of_v) ** 2)

    return criterion


def regression(
    schedule: Schedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    criterion: Criterion | None = None,
) -> jax.Array:
    """Returns the criterion of (the truth - the prediction) at x_t; `distance()`, L_simple, if left
    out."""
    _, t, prediction = _predict(schedule, denoiser, x_0, t, eps)
    return (criterion or distance())(schedule, t, _error(x_0, eps, prediction))


def simple(
    schedule: Schedule, denoiser: Denoiser, x_0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """Returns L_simple (Eq. 14): |eps - eps_hat(x_t, t)|^2, the mean over dimensions."""
    return regression(schedule, denoiser, x_0, t, eps)


def bound(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    *,
    variance: ReverseVariance = fixed_large,
    floor: float = 1e-12,
) -> jax.Array:
    """Returns T L_{t-1} + L_T in bits/dim: with t uniform over 1..T its expectation is L (Eq. 5).

    At t = 1 the term is the decoder's, else a KL divergence. `variance` is of the reverse steps
    where the denoiser does not learn it, `floor` the decoder's least probability, below which there
    is no gradient. x_0 is 8-bit data as k/127.5 - 1.
    """
    x_t, t, prediction = _predict(schedule, denoiser, x_0, t, eps)
    term = bound_term(schedule, x_0, x_t, t, prediction, variance=variance, floor=floor)
    return schedule.num_steps * term + prior_kl(schedule, x_0)


def bound_term(
    schedule: NoiseSchedule,
    x_0: jax.Array,
    x_t: jax.Array,
    t: jax.Array,
    prediction: Prediction,
    *,
    variance: ReverseVariance = fixed_large,
    floor: float = 1e-12,
) -> jax.Array:
    """Returns L_{t-1} in bits/dim for t [B] in 1..T, from the prediction at x_t; L_0 is the
    decoder's."""
    first = t == 1
    kl = step_kl(schedule, x_0, t, prediction, variance=variance)
    # What is not used must be harmless too: a gradient that is not finite, times 0, is not 0.
    used = expand_like(first, x_0)
    at_first = Prediction(
        jnp.where(used, prediction.x_0, x_0),
        prediction.eps,
        *(x if x is None else jnp.where(used, x, 0.0) for x in prediction[2:]),
    )
    nll = decoder_nll(schedule, x_0, x_t, t, at_first, variance=variance, floor=floor)
    return jnp.where(first, nll, kl)


def hybrid(
    schedule: NoiseSchedule,
    denoiser: Denoiser,
    x_0: jax.Array,
    t: jax.Array,
    eps: jax.Array,
    criterion: Criterion | None = None,
    *,
    bound_weight: float = 1e-3,
    floor: float = 1e-12,
) -> jax.Array:
    """Returns a regression for the mean plus bound_weight times the bound for the variance (IDDPM,
    Eq. 16).

    The bound is that of `bound`, T terms and L_T in bits/dim, and no gradient of it reaches the
    mean. Raises ValueError if the denoiser does not learn its variance.
    """
    x_t, t, prediction = _predict(schedule, denoiser, x_0, t, eps)
    if prediction.log_variance is None and prediction.variance_fraction is None:
        raise ValueError("the hybrid loss is for a denoiser that learns its variance")
    main = (criterion or distance())(schedule, t, _error(x_0, eps, prediction))
    still = jax.lax.stop_gradient(prediction)
    frozen = prediction._replace(x_0=still.x_0, eps=still.eps)
    term = bound_term(schedule, x_0, x_t, t, frozen, floor=floor)
    return main + bound_weight * (schedule.num_steps * term + prior_kl(schedule, x_0))


def continuous_bound(
    schedule: Schedule, denoiser: Denoiser, x_0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
    """Returns the bound's steps in the limit of many, in bits/dim: -1/2 d log_snr/dt |eps -
    eps_hat|^2.

    With t uniform between the schedule's ends (for a table that is 1..T, t fractional) its
    expectation is the diffusion loss of VDM (Kingma et al. 2021), the limit of
    L_1 + .. + L_{T-1} with fixed-small variance; L_0 and L_T are not in it. The log-SNR in between
    is linear for a table, and does not matter but for the noise of the estimate. Raises ValueError
    for a schedule of one noise level, or one that leaves no signal.
    """
    _, t, prediction = _predict(schedule, denoiser, x_0, t, eps)
    squares = per_example_mean(_error(x_0, eps, prediction).eps ** 2)
    return 0.5 * BITS_PER_NAT * _log_snr_jacobian(schedule, t.astype(jnp.float32)) * squares


def ends_of_bound(schedule: Schedule, x_0: jax.Array, eps: jax.Array) -> jax.Array:
    """Returns what `continuous_bound` leaves out, L_T + L_0 in bits/dim, from a schedule's end
    points alone.

    L_T at the last time. The decoder, at the first, is N(x_t/alpha_t, sigma_t^2/alpha_t^2) cut into
    bins: no network is in it, so that end points can be learned by it (Kingma et al. 2021). x_0 is
    8-bit data as k/127.5 - 1.
    """
    first, last = (jnp.full(len(x_0), t, jnp.float32) for t in schedule.ends)
    level = schedule.at(last)
    alpha, log_variance = expand_like(level.alpha, x_0), expand_like(level.log_sigma_squared, x_0)
    prior = normal_kl(alpha * x_0, log_variance, 0.0, 0.0)
    # x_t/alpha_t = x_0 + sigma_t/alpha_t eps
    log_snr = expand_like(schedule.at(first).high, x_0)
    decoded = decoder_log_likelihood(x_0, x_0 + jnp.exp(-0.5 * log_snr) * eps, -log_snr)
    return BITS_PER_NAT * per_example_mean(prior - decoded)


def _log_snr_jacobian(schedule: Schedule, t: jax.Array) -> jax.Array:
    """Turns a mean over uniform times into an integral over log-SNR between the ends, [B].

    Raises ValueError for ends between which there is none.
    """
    require_signal(schedule, NO_END)
    first, last = schedule.ends
    if first == last:
        raise ValueError(f"the schedule has one noise level, {first:g}: no integral over log-SNR")
    if not jnp.issubdtype(t.dtype, jnp.integer):
        return -schedule.slope(t) * (last - first)
    before = schedule.between(jnp.maximum(t - 1, int(first)), t)
    after = schedule.between(t, jnp.minimum(t + 1, int(last)))
    return (last - first + 1) * (before.log_snr_drop + after.log_snr_drop) / 2


def _predict(
    schedule: Schedule, denoiser: Denoiser, x_0: jax.Array, t: jax.Array, eps: jax.Array
) -> tuple[jax.Array, jax.Array, Prediction]:
    """Returns x_t, t as [B], and the denoiser's prediction at them."""
    t = as_times(schedule.ends, t, noisy=True)
    x_t = q_sample(schedule, x_0, t, eps)
    t = jnp.broadcast_to(t, x_0.shape[:1])
    return x_t, t, predict(denoiser, x_t, t)


def _error(x_0: jax.Array, eps: jax.Array, prediction: Prediction) -> Prediction:
    """Returns the truth minus the prediction."""
    same_shape(x_0=x_0, predicted_x_0=prediction.x_0)
    same_shape(eps=eps, predicted_eps=prediction.eps)
    return Prediction(x_0 - prediction.x_0, eps - prediction.eps)
