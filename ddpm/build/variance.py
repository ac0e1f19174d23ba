"""Config -> reverse variance: fixed, learned with the mean, or the optimal one."""

import functools
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from ddpm.build.parts import (
    CLOSELY_SPACED,
    HAS_VARIANCE,
    LEARNS_VARIANCE,
    PRECONDITIONED,
    SKIPS,
    TRAINS_VARIANCE,
    Part,
)
from ddpm.build.schedule import SCHEDULES
from ddpm.diffusion import variances
from ddpm.diffusion.analytic import analytic
from ddpm.diffusion.gaussian import fixed_large, fixed_small
from ddpm.diffusion.predictions import LearnedVariance
from ddpm.diffusion.variances import ReverseVariance
from ddpm.errors import InputError

UNMEASURED = (
    "config.sampling.variance = 'analytic' is measured on a trained run: train with another, and "
    "then sample with it"
)


class Variance(NamedTuple):
    """The fixed variance, and how the network's second half is one where it is learned."""

    fixed: ReverseVariance = fixed_large
    learned: LearnedVariance | None = None


_LEARNED: dict[str, Any] = {
    "facts": {LEARNS_VARIANCE},
    "needs": {
        TRAINS_VARIANCE: "config.training.loss = {training_loss} says nothing of the variance: "
        "take 'hybrid' or 'bound'"
    },
    "excludes": {PRECONDITIONED: "EDM's preconditioning is of x_0 alone: take 'fixed_large'"},
}
_ONE_STEP = {
    SKIPS: "config.diffusion.variance = 'learned' is that of single steps from t to t - 1: take "
    "all T, config.sampling.steps = 0 with grid 'uniform', or sampler 'ddim', or train with "
    "'learned_range'"
}

# Of the bound that is trained: make is a `Variance`.
VARIANCES: dict[str, Part] = {
    "fixed_large": Part(Variance()),
    "fixed_small": Part(
        Variance(fixed_small),
        needs={
            HAS_VARIANCE: "config.training.loss = {training_loss} has no reverse variance in it: "
            "leave it at 'fixed_large'; samples and the bound that is evaluated go by "
            "config.sampling.variance"
        },
    ),
    "learned": Part(
        Variance(learned=variances.learned_diagonal),
        **(_LEARNED | {"excludes": _LEARNED["excludes"] | _ONE_STEP}),
    ),
    "learned_range": Part(Variance(learned=variances.learned_range), **_LEARNED),
}

# Of samples and of the bound that is evaluated: make(moments) -> ReverseVariance
SAMPLING_VARIANCES: dict[str, Part] = {
    "fixed_large": Part(lambda moments: fixed_large),
    "fixed_small": Part(lambda moments: fixed_small),
    "analytic": Part(
        analytic,
        excludes={
            LEARNS_VARIANCE: "the model has learned its own, config.diffusion.variance = "
            "{diffusion_variance}, which samples and the bound take: leave it at 'fixed_large'"
        },
    ),
}


def learns_variance(config: ConfigDict) -> bool:
    """Returns whether the network puts out a reverse variance in addition to the mean."""
    return VARIANCES[config.diffusion.variance].make.learned is not None


def reverse_variance(config: ConfigDict, moments: jax.Array | None) -> ReverseVariance:
    """Returns the variance of the reverse steps, by config.sampling, `__name__`d as in file names.

    Where the model learns its own, that is taken. Raises InputError for 'analytic' without the
    `moments` that are measured on a run, float32[T + 1].
    """
    name = config.sampling.variance
    if name == "analytic" and moments is None:
        raise InputError(UNMEASURED)
    found = decoder_variance(config, SAMPLING_VARIANCES[name].make(moments))

    @functools.wraps(found)
    def variance(*args: Any, **options: Any) -> jax.Array:
        return found(*args, **options)

    variance.__name__ = config.diffusion.variance if learns_variance(config) else name
    return variance


def decoder_variance(config: ConfigDict, variance: ReverseVariance) -> ReverseVariance:
    """Returns `variance`, with that of the decoder in L_0 as the schedule needs it."""
    spaced = CLOSELY_SPACED in SCHEDULES[config.diffusion.schedule].facts
    return variances.wide_decoder(variance) if spaced else variance
