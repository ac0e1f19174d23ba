"""Config -> training objective: the loss, how t is drawn, and what the network's output means."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ddpm.build import parts
from ddpm.build.network import ENERGIES, NOISE_INPUTS
from ddpm.build.parts import Part
from ddpm.build.schedule import SCHEDULES, schedule_facts
from ddpm.build.variance import VARIANCES, decoder_variance
from ddpm.diffusion import continuous, loss_weights, losses, predictions, timesteps
from ddpm.diffusion.gaussian import expand_like
from ddpm.diffusion.losses import Target
from ddpm.diffusion.predictions import Denoiser, Network, Parameterization, Prediction
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.energy import dual
from ddpm.training import ema
from ddpm.training.objectives import (
    Draw,
    DualObjective,
    GaussianObjective,
    LearnedScheduleObjective,
    Loss,
    Objective,
)

_AT_END = "the schedule leaves no signal at t = T (alpha_T = 0 in float32)"


class Meaning(NamedTuple):
    """The meaning of an output, and the error that an unweighted loss is of."""

    parameterization: Parameterization
    target: Target


def _prediction(parameterization: Parameterization, target: Target) -> Part:
    """Returns the part of a parameterization, by what that says of itself."""
    excludes = {}
    if parameterization.needs_signal:
        excludes[parts.NO_SIGNAL] = (
            f"{_AT_END}, where that does not tell x_0: predict x_0 or v, or choose another schedule"
        )
    if parameterization.whole_times:
        excludes[parts.FRACTIONAL] = (
            "it is of the step from t to t - 1, and times are fractional with config.training.loss "
            "= {training_loss} and config.training.times = {training_times}"
        )
        excludes[parts.BETWEEN] = (
            "config.diffusion.prediction = {diffusion_prediction} is of the step from t to t - 1, "
            "and this asks between whole times"
        )
        excludes[parts.FLOW] = (
            "it is of whole times, and the flow's are not: leave 'flow' out of "
            "config.evaluation.parts"
        )
    facts = {parts.PREDICTS_EPS} if parameterization is predictions.from_eps else set()
    return Part(Meaning(parameterization, target), facts, excludes=excludes)


PREDICTIONS: dict[str, Part] = {
    "eps": _prediction(predictions.from_eps, losses.of_eps),
    "x_0": _prediction(predictions.from_x_0, losses.of_x_0),
    "v": _prediction(predictions.from_v, losses.of_v),
    "score": _prediction(predictions.from_score, losses.of_score),
    "posterior_mean": _prediction(predictions.from_posterior_mean, losses.of_posterior_mean),
    "edm": Part(  # its own preconditioning, and the weight that is 1 on the network's output
        facts={parts.PRECONDITIONED, parts.SEES_LOG_SNR},
        excludes={
            parts.NO_SIGNAL: f"{_AT_END}, where EDM's sigma is infinite: predict x_0 or v, or "
            "choose another schedule",
        },
    ),
}

# make(config) -> a criterion, of the error of x_0
_INTEGRAL: dict[str, Any] = {
    "facts": {parts.EVEN_TIMES},
    "excludes": {
        parts.NO_SIGNAL: "it is an integral over log-SNR, which has no end where the schedule "
        "leaves no signal at t = T",
        parts.ONE_LEVEL: "it is an integral over log-SNR, of which a schedule of one noise level "
        "has none: take more of them, or another loss",
    },
}


def _weight(make: Callable[[ConfigDict], loss_weights.Weight], *, integral: bool = False) -> Part:
    """Returns the part of a weight; `integral`: of an integral over log-SNR."""

    def criterion(config: ConfigDict) -> losses.Criterion:
        return losses.weighted(make(config), over_log_snr=integral)

    own: dict[str, Any] = _INTEGRAL if integral else {"facts": (), "excludes": {}}
    excludes = own["excludes"] | {parts.BOUND: "the bound has its own weights: take 'none'"}
    needs = {
        parts.SQUARED: "weights are of squared errors, not of config.training.loss = "
        "{training_loss}"
    }
    return Part(criterion, own["facts"], needs, excludes)


WEIGHTS: dict[str, Part] = {
    "none": Part(),
    "simple": _weight(lambda config: loss_weights.simple),
    "x_0": _weight(lambda config: loss_weights.x_0),
    "v": _weight(lambda config: loss_weights.v),
    "min_snr": _weight(lambda config: loss_weights.min_snr(config.training.min_snr_gamma)),
    "truncated_snr": _weight(lambda config: loss_weights.truncated_snr),
    "p2": _weight(lambda config: loss_weights.p2()),
    "sigmoid": _weight(
        lambda config: loss_weights.sigmoid(config.training.sigmoid_bias), integral=True
    ),
    "edm": _weight(lambda config: loss_weights.edm(config.diffusion.sigma_data)),
    "likelihood": _weight(lambda config: loss_weights.simple, integral=True),
}


def _criterion(config: ConfigDict, distance: Callable[[jax.Array], jax.Array]) -> losses.Criterion:
    """Returns the criterion of a regression: weighted, or a distance of the output's own error."""
    weight, prediction = config.training.loss_weight, config.diffusion.prediction
    if weight != "none":
        return WEIGHTS[weight].make(config)
    if prediction == "edm":
        return WEIGHTS["edm"].make(config)
    return losses.distance(PREDICTIONS[prediction].make.target, distance)


def _regression(distance: Callable[[Any], Callable[[jax.Array], jax.Array]]) -> Any:
    """Returns the maker of a regression, by a distance of config.training."""

    def make(config: ConfigDict, schedule: Any) -> Loss:
        criterion = _criterion(config, distance(config.training))
        return functools.partial(losses.regression, schedule, criterion=criterion)

    return make


def _bound(config: ConfigDict, schedule: Any) -> Loss:
    variance = decoder_variance(config, VARIANCES[config.diffusion.variance].make.fixed)
    return functools.partial(losses.bound, schedule, variance=variance)


def _hybrid(config: ConfigDict, schedule: Any) -> Loss:
    return functools.partial(losses.hybrid, schedule, criterion=_criterion(config, jnp.square))


_EDM_SQUARED = {parts.PRECONDITIONED: "EDM's network is trained by the squared error: take 'mse'"}
# make(config, schedule) -> loss(denoiser, x_0, t, eps) [B]. A schedule is a table, or the levels of
# one batch where it is learned.
LOSSES: dict[str, Part] = {
    "mse": Part(_regression(lambda training: jnp.square), facts={parts.SQUARED}),
    "l1": Part(_regression(lambda training: jnp.abs), excludes=_EDM_SQUARED),
    "huber": Part(
        _regression(lambda training: losses.huber(training.huber_delta)), excludes=_EDM_SQUARED
    ),
    "bound": Part(
        _bound,
        facts={
            parts.BOUND,
            parts.TRAINS_VARIANCE,
            parts.HAS_VARIANCE,
            parts.EVEN_TIMES,
            parts.CODES_DATA,
        },
    ),
    "hybrid": Part(
        _hybrid,
        facts={parts.SQUARED, parts.TRAINS_VARIANCE, parts.EVEN_TIMES, parts.CODES_DATA},
        needs={
            parts.LEARNS_VARIANCE: "its bound is to learn the variance, and "
            "config.diffusion.variance = {diffusion_variance}",
        },
    ),
    "continuous_bound": Part(
        lambda config, schedule: functools.partial(losses.continuous_bound, schedule),
        facts={parts.BOUND, parts.CONTINUOUS, parts.FRACTIONAL, parts.EVEN_TIMES},
        excludes=_INTEGRAL["excludes"],
    ),
    "dual": Part(  # loss(energy, x_0, t, eps), of an energy by its log-SNR
        lambda config, schedule: functools.partial(
            dual.loss, schedule, time_weight=config.training.time_weight
        ),
        facts={parts.FRACTIONAL, parts.DUAL},
        needs={
            parts.HAS_ENERGY: parts.Blame(
                "model.energy",
                "config.training.loss = 'dual' fits both derivatives of an energy: take "
                "'denoising', or another loss",
            ),
            parts.SEES_LOG_SNR: parts.Blame(
                "model.noise_input",
                "config.training.loss = 'dual' differentiates the energy by the log-SNR: take "
                "'log_snr'",
            ),
        },
        excludes={
            parts.ONE_LEVEL: "an energy is normalised from one noise level to another, and the "
            "schedule has one",
        },
    ),
}

_UNEVEN = {
    parts.EVEN_TIMES: "the loss is an integral over evenly drawn times: take 'uniform', "
    "'low_discrepancy' or, for whole times, 'importance'"
}


def _places(draw: Callable[[jax.Array, int], jax.Array]) -> Callable[[Any, bool], tuple[Draw, Any]]:
    """Returns the maker of draws of times at `draw`'s places in [0, 1)."""

    def make(schedule: Any, fractional: bool) -> tuple[Draw, Any]:
        to_times = timesteps.within if fractional else timesteps.whole
        return lambda history, key, n: (to_times(schedule, draw(key, n)), None), ()

    return make


def _uniform(schedule: Any, fractional: bool) -> tuple[Draw, Any]:
    if fractional:
        return _places(lambda key, n: jax.random.uniform(key, (n,)))(schedule, True)
    return lambda history, key, n: (timesteps.uniform(schedule, key, n), None), ()


def _importance(schedule: Any, fractional: bool) -> tuple[Draw, Any]:
    return timesteps.draw_important, timesteps.LossHistory.empty(schedule.num_steps)


def _log_normal(schedule: Any, fractional: bool) -> tuple[Draw, Any]:
    return lambda history, key, n: (timesteps.log_normal(schedule, key, n), None), ()


# make(schedule, fractional) -> (draw, the history that it goes by at first, or ())
TIMES: dict[str, Part] = {
    "uniform": Part(_uniform),
    "low_discrepancy": Part(_places(timesteps.low_discrepancy)),
    "importance": Part(
        _importance,
        excludes={
            parts.FRACTIONAL: "it remembers the losses of whole times, and config.training.loss = "
            "{training_loss} is of fractional ones",
        },
    ),
    "log_normal": Part(
        _log_normal,
        facts={parts.FRACTIONAL},
        excludes=_UNEVEN
        | {
            parts.NO_SIGNAL: "sigma/alpha is infinite at t = T, where the schedule leaves no "
            "signal, so that T is never drawn and samples begin there: take 'uniform', or another "
            "schedule",
        },
    ),
    "logit_normal": Part(_places(timesteps.logit_normal), excludes=_UNEVEN),
}

# make(config.training) -> how fast an average of the weights follows them
EMAS: dict[str, Part] = {
    "constant": Part(lambda t: ema.constant(t.ema_decay)),
    "warm_up": Part(lambda t: ema.warm_up(t.ema_decay)),
    "half_life": Part(lambda t: ema.half_life(t.ema_images, t.batch_size)),
    "power": Part(lambda t: ema.power(t.ema_relative_stds[0])),
}


_NOT_DATA = "warped images are not the 8-bit data that the decoder "
AUGMENTATION = Part(
    excludes={
        parts.IS_LEARNED: _NOT_DATA
        + "of a learned schedule codes: take another config.diffusion.schedule",
        parts.CODES_DATA: _NOT_DATA + "in config.training.loss = {training_loss} codes: take 'mse'",
    }
)


def objective(config: ConfigDict, schedule: NoiseSchedule) -> Objective:
    """Returns the objective of the config; raises InputError for parts that do not go together."""
    check_objective(config, schedule)
    t, num_steps = config.training, schedule.num_steps
    loss, times = LOSSES[t.loss], TIMES[t.times]
    fractional = parts.FRACTIONAL in loss.facts

    def at(levels: Any, draw: Draw, history: Any = ()) -> Any:
        read, loss_at = _denoiser(config, levels), loss.make(config, levels)
        if parts.DUAL in loss.facts:
            first, last = (float(levels.at(end).high) for end in levels.ends)
            return DualObjective(read, draw, loss_at, num_steps, (first, last))
        return GaussianObjective(read, draw, loss_at, num_steps, history, t.self_conditioning)

    if parts.IS_LEARNED not in SCHEDULES[config.diffusion.schedule].facts:
        return at(schedule, *times.make(schedule, fractional))
    begin = continuous.init_learned(config.diffusion.log_snr_0, config.diffusion.log_snr_1)
    draw, _ = times.make(continuous.learned(begin), fractional)  # by its ends alone, 0 and 1
    return LearnedScheduleObjective(
        lambda levels: at(levels, draw), _denoiser(config, schedule), draw, num_steps, begin
    )


def other_ema_rates(config: ConfigDict) -> tuple[ema.Rate, ...]:
    """Returns the rates of the additional averages: the other widths of 'power'."""
    stds = config.training.ema_relative_stds[1:]
    return tuple(map(ema.power, stds)) if config.training.ema == "power" else ()


def ema_rate(config: ConfigDict) -> ema.Rate:
    """Returns how fast the average of the weights follows them."""
    return EMAS[config.training.ema].make(config.training)


def weight_at_end(config: ConfigDict, schedule: NoiseSchedule) -> float:
    """Returns the weight of an error of the output at t = T, in units of the median over 1..T.

    Where the signal vanishes and the weight does not, eps says so little of x_0 that nearly all of
    the loss is there. Where the weight vanishes too, the network is not trained at T, where samples
    begin. Nothing refuses either; training says so at start.
    """
    prediction, name = config.diffusion.prediction, config.training.loss_weight
    if name == "none" or prediction == "edm":  # 1 on its own error; made for any weight
        return 1.0
    t = jnp.arange(1, schedule.num_steps + 1)
    level, of_x_0 = schedule.at(t), jnp.ones((schedule.num_steps, 1))
    error = Prediction(of_x_0, -expand_like(level.alpha / level.sigma, of_x_0))
    own = losses.distance(PREDICTIONS[prediction].make.target)(schedule, t, error)
    ratio = WEIGHTS[name].make(config)(schedule, t, error) / own
    return float(ratio[-1] / jnp.median(ratio))


def _denoiser(config: ConfigDict, schedule: Any) -> Callable[[Network], Denoiser]:
    """Returns what makes a denoiser of a network, by config.diffusion and config.model."""
    d = config.diffusion
    if d.prediction == "edm":
        return functools.partial(predictions.preconditioned, schedule, sigma_data=d.sigma_data)
    meaning, learned = PREDICTIONS[d.prediction].make, VARIANCES[d.variance].make.learned

    def denoiser(network: Network) -> Denoiser:
        seen = NOISE_INPUTS[config.model.noise_input].make(schedule, network)
        return predictions.denoiser(schedule, seen, meaning.parameterization, learned=learned)

    return denoiser


def chosen_parts(config: ConfigDict) -> dict[str, tuple[Any, Part]]:
    """Returns the parts that training is made of, by the config's keys."""
    registries = {
        "diffusion.prediction": PREDICTIONS,
        "model.energy": ENERGIES,
        "model.noise_input": NOISE_INPUTS,
        "diffusion.schedule": SCHEDULES,
        "diffusion.variance": VARIANCES,
        "training.loss": LOSSES,
        "training.loss_weight": WEIGHTS,
        "training.times": TIMES,
    }
    chosen = parts.choose(config, registries)
    if not config.training.augmentation:
        return chosen
    return {"training.augmentation": (config.training.augmentation, AUGMENTATION)} | chosen


def check_objective(config: ConfigDict, schedule: NoiseSchedule | None = None) -> None:
    """Raises InputError, with the reason, for parts of training that do not go together.

    Without the schedule, only for those that never do.
    """
    facts = {} if schedule is None else dict(schedule_facts(config, schedule))
    if config.model.dtype != "float32":
        facts[parts.HALF_PRECISION] = "model.dtype"
    if config.training.self_conditioning:
        facts[parts.SELF_CONDITIONED] = "training.self_conditioning"
    parts.check(config, chosen_parts(config), facts)
