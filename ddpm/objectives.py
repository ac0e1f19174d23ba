"""Config -> training objective, the names of `experiment` that have to do with the loss; and which
of them do not go together."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm.config import flatten
from ddpm.diffusion import continuous, losses, predictions, timesteps, variances, weights
from ddpm.diffusion.gaussian import fixed_large, fixed_small, lift
from ddpm.diffusion.losses import Criterion, Target
from ddpm.diffusion.predictions import Denoiser, LearnedVariance, Network, Prediction, Reading
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.diffusion.variances import ReverseVariance
from ddpm.errors import InputError
from ddpm.training import ema
from ddpm.training.objective import Draw, Loss, Objective


class Predicted(NamedTuple):
    """How to read the output, and the error that an unweighted loss is of."""

    reading: Reading
    target: Target


PREDICTIONS = {
    "eps": Predicted(predictions.from_eps, losses.of_eps),
    "x_0": Predicted(predictions.from_x_0, losses.of_x_0),
    "v": Predicted(predictions.from_v, losses.of_v),
    "score": Predicted(predictions.from_score, losses.of_score),
    "posterior_mean": Predicted(predictions.from_posterior_mean, losses.of_posterior_mean),
}
FIXED: dict[str, ReverseVariance] = {"fixed_large": fixed_large, "fixed_small": fixed_small}
# Their first level is one of many, as close together as the others: `variances.wide_decoder`.
CLOSE_LEVELS = ("linear_log_snr", "edm", "learned")
LEARNED: dict[str, LearnedVariance] = {
    "learned": variances.learned_diagonal,
    "learned_range": variances.learned_range,
}
DISTANCES: dict[str, Callable[[Any], Callable[[jax.Array], jax.Array]]] = {
    "mse": lambda training: jnp.square,
    "l1": lambda training: jnp.abs,
    "huber": lambda training: losses.huber(training.huber_delta),
}
WEIGHTS: dict[str, Callable[[Any], Criterion]] = {
    "simple": lambda config: losses.weighted(weights.simple),
    "x_0": lambda config: losses.weighted(weights.x_0),
    "v": lambda config: losses.weighted(weights.v),
    "min_snr": lambda config: losses.weighted(weights.min_snr(config.training.min_snr_gamma)),
    "truncated_snr": lambda config: losses.weighted(weights.truncated_snr),
    "p2": lambda config: losses.weighted(weights.p2()),
    "edm": lambda config: losses.weighted(weights.edm(config.diffusion.sigma_data)),
    "sigmoid": lambda config: losses.weighted(
        weights.sigmoid(config.training.sigmoid_bias), over_log_snr=True
    ),
    "likelihood": lambda config: losses.weighted(weights.simple, over_log_snr=True),
}
# Where in [0, 1) the times are.
PLACES: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "uniform": lambda key, n: jax.random.uniform(key, (n,)),
    "low_discrepancy": timesteps.low_discrepancy,
    "logit_normal": timesteps.logit_normal,
}
EMAS: dict[str, Callable[[Any], ema.Rate]] = {
    "constant": lambda t: ema.constant(t.ema_decay),
    "warm_up": lambda t: ema.warm_up(t.ema_decay),
    "half_life": lambda t: ema.half_life(t.ema_images, t.batch_size),
    "power": lambda t: ema.power(t.ema_relative_stds[0]),
}


def objective(config: ConfigDict, schedule: NoiseSchedule) -> Objective:
    """The objective by its names; InputError for those that do not go together."""
    check_objective(config, schedule)
    history: Any = ()
    if config.training.times == "importance":
        history = timesteps.LossHistory.empty(schedule.num_steps)
    plain = Objective(
        _denoiser(config, schedule), _draw(config, schedule), _loss(config, schedule), history
    )
    if config.diffusion.schedule != "learned":
        return plain
    begin = continuous.init_learned(config.diffusion.log_snr_0, config.diffusion.log_snr_1)
    draw = _draw(config, continuous.learned(begin))  # which has no say but for its ends, 0 and 1
    return plain._replace(
        draw=draw,
        begin=begin,
        at=lambda levels: Objective(_denoiser(config, levels), draw, _loss(config, levels)),
    )


def other_ema_rates(config: ConfigDict) -> tuple[ema.Rate, ...]:
    """Of the averages kept besides: the other widths of 'power'."""
    stds = config.training.ema_relative_stds[1:]
    return tuple(map(ema.power, stds)) if config.training.ema == "power" else ()


def ema_rate(config: ConfigDict) -> ema.Rate:
    """How fast the average of the weights follows them."""
    return EMAS[config.training.ema](config.training)


def weight_at_end(config: ConfigDict, schedule: NoiseSchedule) -> float:
    """How much an error of the output counts at t = T, in units of the median over 1..T.

    Where the signal vanishes and the weight does not, eps tells x_0 by so little that nearly all of
    the loss is there. Nothing refuses that.
    """
    prediction, name = config.diffusion.prediction, config.training.loss_weight
    if name == "none" or prediction == "edm":  # 1 on its own error; made for any weight
        return 1.0
    t = jnp.arange(1, schedule.num_steps + 1)
    level, of_x_0 = schedule.at(t), jnp.ones((schedule.num_steps, 1))
    error = Prediction(of_x_0, -lift(level.alpha / level.sigma, of_x_0))
    own = losses.distance(PREDICTIONS[prediction].target)(schedule, t, error)
    ratio = WEIGHTS[name](config)(schedule, t, error) / own
    return float(ratio[-1] / jnp.median(ratio))


def channels_out(config: ConfigDict, channels: int) -> int:
    """Of the network: twice the data's where it learns the variance."""
    return channels * (2 if config.diffusion.variance in LEARNED else 1)


def variance_name(config: ConfigDict) -> str:
    """Of the reverse steps in samples and bounds: the learned one, where there is one."""
    learned = config.diffusion.variance in LEARNED
    return config.diffusion.variance if learned else config.sampling.variance


def with_decoder(config: ConfigDict, variance: ReverseVariance) -> ReverseVariance:
    """`variance`, with that of the decoder in L_0 as the schedule needs it."""
    close = config.diffusion.schedule in CLOSE_LEVELS
    return variances.wide_decoder(variance) if close else variance


# A schedule is a table, or the levels of one batch where it is learned.


def _denoiser(config: ConfigDict, schedule: Any) -> Callable[[Network], Denoiser]:
    d = config.diffusion
    if d.prediction == "edm":
        return lambda network: predictions.preconditioned(
            schedule, network, sigma_data=d.sigma_data
        )
    reading, learned = PREDICTIONS[d.prediction].reading, LEARNED.get(d.variance)

    def denoiser(network: Network) -> Denoiser:
        if config.model.noise_input == "log_snr":
            network = predictions.by_log_snr(schedule, network)
        return predictions.denoiser(schedule, network, reading, learned=learned)

    return denoiser


def _draw(config: ConfigDict, schedule: Any) -> Draw:
    kind = config.training.times
    fractional = config.training.loss == "continuous_bound"

    def draw(history: Any, key: jax.Array, n: int) -> tuple[jax.Array, jax.Array | None]:
        if kind == "importance":
            return timesteps.draw_important(history, key, n)
        if kind == "log_normal":
            return timesteps.log_normal(schedule, key, n), None
        if kind == "uniform" and not fractional:
            return timesteps.uniform(schedule, key, n), None
        to_times = timesteps.within if fractional else timesteps.whole
        return to_times(schedule, PLACES[kind](key, n)), None

    return draw


def _loss(config: ConfigDict, schedule: Any) -> Loss:
    d, t = config.diffusion, config.training
    if t.loss == "bound":
        fixed = FIXED.get(d.variance, fixed_large)  # of no say where it is learned
        variance = with_decoder(config, fixed)
        return functools.partial(losses.bound, schedule, variance=variance)
    if t.loss == "continuous_bound":
        return functools.partial(losses.continuous_bound, schedule)
    if t.loss_weight != "none":
        criterion = WEIGHTS[t.loss_weight](config)
    elif d.prediction == "edm":
        criterion = WEIGHTS["edm"](config)  # which is 1 on what the network puts out
    else:
        distance = DISTANCES["mse" if t.loss == "hybrid" else t.loss](t)
        criterion = losses.distance(PREDICTIONS[d.prediction].target, distance)
    if t.loss == "hybrid":
        return functools.partial(losses.hybrid, schedule, criterion=criterion)
    return functools.partial(losses.regression, schedule, criterion=criterion)


def check_objective(config: ConfigDict, schedule: NoiseSchedule) -> None:
    """InputError, with the reason, for names that do not go together."""
    d, t = config.diffusion, config.training
    learned, dark = d.variance in LEARNED, schedule.ends_without_signal()
    bound = t.loss in ("bound", "continuous_bound")
    over_log_snr = t.loss_weight in ("sigmoid", "likelihood")
    integral = over_log_snr or t.loss == "continuous_bound"
    uneven = t.times in ("log_normal", "logit_normal")
    fractional = t.times == "log_normal" or t.loss == "continuous_bound"
    for holds, key, why in (
        (
            dark and d.prediction in ("eps", "score", "edm"),
            "diffusion.prediction",
            "the schedule leaves no signal at t = T (alpha_T = 0 in float32), where that does not "
            "tell x_0: predict x_0 or v, or choose another schedule",
        ),
        (
            dark and integral,
            "training.loss_weight" if over_log_snr else "training.loss",
            "it is an integral over log-SNR, which has no end where the schedule leaves no signal "
            "at t = T",
        ),
        (
            dark and t.times == "log_normal",
            "training.times",
            "sigma/alpha is infinite at t = T, where the schedule leaves no signal, so that T is "
            "never drawn and samples begin there: take 'uniform', or another schedule",
        ),
        (
            integral and schedule.num_steps < 2,
            "training.loss_weight" if over_log_snr else "training.loss",
            "it is an integral over log-SNR, of which a schedule of one noise level has none: take "
            "more of them, or another loss",
        ),
        (
            learned and t.loss not in ("hybrid", "bound"),
            "diffusion.variance",
            f"config.training.loss = {t.loss!r} says nothing of the variance: take 'hybrid' or "
            "'bound'",
        ),
        (
            d.variance == "fixed_small" and t.loss != "bound",
            "diffusion.variance",
            f"config.training.loss = {t.loss!r} has no reverse variance in it: leave it at "
            "'fixed_large'; samples and the bound that is evaluated go by config.sampling.variance",
        ),
        (
            config.model.noise_input == "log_snr" and d.prediction == "edm",
            "model.noise_input",
            "EDM's preconditioning tells of the noise in its own way: take 't'",
        ),
        (
            d.schedule == "learned"
            and d.prediction != "edm"
            and config.model.noise_input != "log_snr",
            "model.noise_input",
            "t means another noise as the schedule is learned: take 'log_snr'",
        ),
        (
            d.schedule == "learned" and t.loss != "continuous_bound",
            "training.loss",
            "a schedule is learned by the continuous bound alone, which knows it by its end "
            "points: take 'continuous_bound'",
        ),
        (
            d.schedule == "learned" and (d.zero_terminal_snr or bool(d.reference_resolution)),
            "diffusion.schedule",
            "it is learned, and neither rescaled nor shifted: set diffusion.log_snr_0 and "
            ".log_snr_1, where it begins",
        ),
        (
            learned and d.prediction == "edm",
            "diffusion.variance",
            "EDM's preconditioning is of x_0 alone: take 'fixed_large'",
        ),
        (
            t.loss == "hybrid" and not learned,
            "training.loss",
            f"its bound is to learn the variance, and config.diffusion.variance = {d.variance!r}",
        ),
        (
            t.loss_weight != "none" and t.loss not in ("mse", "hybrid"),
            "training.loss_weight",
            "the bound has its own weights: take 'none'"
            if bound
            else f"weights are of squared errors, not of config.training.loss = {t.loss!r}",
        ),
        (
            d.prediction == "edm" and t.loss in ("l1", "huber"),
            "training.loss",
            "EDM's network is trained by the squared error: take 'mse'",
        ),
        (
            uneven and (bound or over_log_snr or t.loss == "hybrid"),
            "training.times",
            "the loss is an integral over evenly drawn times: take 'uniform', 'low_discrepancy' "
            "or, for whole times, 'importance'",
        ),
        (
            t.times == "importance" and t.loss == "continuous_bound",
            "training.times",
            "it remembers the losses of whole times, and config.training.loss = "
            "'continuous_bound' is of fractional ones",
        ),
        (
            fractional and d.prediction == "posterior_mean",
            "diffusion.prediction",
            "it is of the step from t to t - 1, and times are fractional with "
            + ("log_normal times" if t.times == "log_normal" else "the continuous bound"),
        ),
    ):
        if holds:
            raise InputError(f"config.{key} = {flatten(config)[key]!r}: {why}")
