"""The bound over a whole data set: means with standard errors, the curve of L_t, rate-distortion.

Works on what `likelihood.bits_per_dim` or `sampled_bits_per_dim` gives for each batch.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ddpm.diffusion.likelihood import Bound, SampledBound
from ddpm.diffusion.pixels import HALF_RANGE
from ddpm.evaluation.distances import Estimate


class BoundSummary(NamedTuple):
    """Bits/dim, means over images. Curves are float64[T], of t = 1..T.

    step[t - 1] is the mean of L_{t-1} (L_0: the decoder), NaN where t was never drawn; rate[t - 1]
    what has been received once x_t is there, L_T and the terms above t; rmse[t - 1] of the x_0
    predicted at t, on [0, 255], NaN where never drawn.
    """

    images: int
    total: Estimate
    prior: Estimate
    steps: Estimate
    decoder: Estimate
    step: np.ndarray
    rate: np.ndarray
    rmse: np.ndarray


def summarise(
    batches: Iterable[tuple[Bound | SampledBound, np.ndarray]], num_steps: int
) -> BoundSummary:
    """Summarises (terms, mask) batch by batch; images that the mask leaves out are not counted.

    Raises ValueError for no images at all, or terms that are not finite.
    """
    parts: list[np.ndarray] = []  # of each image: prior, all steps, decoder
    count, step, contribution, error = (np.zeros(num_steps + 1) for _ in range(4))
    for bound, mask in batches:
        prior, decoder, steps = (
            np.asarray(x, np.float64)[mask] for x in (bound.prior, bound.decoder, bound.steps)
        )
        n = len(prior)
        if isinstance(bound, SampledBound):
            t = np.asarray(bound.t)[mask].astype(int)
            weight = np.asarray(bound.weight, np.float64)[mask]
        else:
            t = np.broadcast_to(np.arange(2, num_steps + 1), steps.shape)
            weight = np.ones_like(steps)
        parts.append(np.stack([prior, (weight * steps).sum(axis=1), decoder], axis=1))
        np.add.at(step, t, steps)
        np.add.at(contribution, t, weight * steps)
        step[1] += decoder.sum()
        at = np.concatenate([np.ones((n, 1), int), t], axis=1)
        np.add.at(error, at, np.asarray(bound.squared_error, np.float64)[mask])
        np.add.at(count, at, 1)
    terms = np.concatenate(parts) if parts else np.zeros((0, 3))
    if not len(terms) or not np.isfinite(terms).all():
        raise ValueError(f"the bound of {len(terms)} images is not finite, or of none")
    drawn = np.where(count > 0, count, np.nan)
    above = contribution[::-1].cumsum()[::-1] / len(terms)  # of t and all above it
    of_prior, of_steps, of_decoder = (mean(x) for x in terms.T)
    return BoundSummary(
        images=len(terms),
        total=mean(terms.sum(axis=1)),
        prior=of_prior,
        steps=of_steps,
        decoder=of_decoder,
        step=(step / drawn)[1:],
        rate=of_prior.value + np.append(above[2:], 0.0),
        rmse=HALF_RANGE * np.sqrt(error / drawn)[1:],
    )


def mean(values: np.ndarray) -> Estimate:
    """Returns the mean of independent values and its standard error; NaN for a single one."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), float(error))
