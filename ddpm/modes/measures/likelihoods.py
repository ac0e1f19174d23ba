"""Bits/dim: the variational bound, and the likelihood by the probability-flow ODE."""

import functools
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm.diffusion import flow
from ddpm.diffusion.likelihood import bits_per_dim, sampled_bits_per_dim
from ddpm.diffusion.pixels import to_float
from ddpm.diffusion.streams import sample_keys
from ddpm.evaluation import bound as bounds
from ddpm.evaluation import distances, report
from ddpm.evaluation.report import number
from ddpm.modes.measures.job import Job, Measured, batches

LEAST_PROBABILITY = 1e-12
DEQUANTISED = "uniform dequantisation"  # a variant of the flow, in evaluation.json


def bound(job: Job) -> Measured:
    """Measures the variational bound on every split, its curve over t, and rate-distortion."""
    config, schedule = job.run.built.config, job.run.built.schedule
    e, last = config.evaluation, job.run.built.schedule.num_steps
    every = e.bound_times == 0 or e.bound_times >= last - 1
    options: dict[str, Any] = {
        "variance": job.run.built.variance,
        "floor": LEAST_PROBABILITY,
    }

    @jax.jit
    def terms(params: Any, images: jax.Array, indices: jax.Array) -> Any:
        keys = sample_keys(jax.random.key(config.seed), indices)
        x_0 = to_float(images)
        denoiser = job.run.built.denoiser(params, x_0)
        if every:
            return bits_per_dim(schedule, denoiser, x_0, keys, **options)
        return sampled_bits_per_dim(
            schedule, denoiser, x_0, keys, num_times=e.bound_times, **options
        )

    figures, rows, fragments = {}, [], []
    how = "all T terms" if every else f"{e.bound_times} of T terms for each image"
    clip = "x_0 clipped" if config.sampling.clip else "not clipped"
    about = (
        f"{how}; {job.run.built.variance.__name__}, {clip}, decoder at least {LEAST_PROBABILITY:g}"
    )
    about += _given(config)
    for name, source in job.splits.items():
        parts = batches(job, source, e.bound_images, f"bound, {name}")
        found = bounds.summarise(
            ((terms(job.run.params, x, i), mask) for x, i, mask in parts), last
        )
        figures[name] = {
            "images": found.images,
            "how": about,
            **{
                part: {"bits_per_dim": value.value, "standard_error": value.standard_error}
                for part, value in found._asdict().items()
                if isinstance(value, distances.Estimate)
            },
            "t": list(range(1, last + 1)),
            "L": found.step.tolist(),
            "rate": found.rate.tolist(),
            "rmse": found.rmse.tolist(),
        }
        of = f"{name}, {found.images:,} images"
        rows.append(("L (NLL <=), bits/dim ↓", of, _pm(found.total), about))
        for label, value in (
            ("   L_0, distortion", found.decoder),
            ("   L_1 .. L_{T-1}, rate", found.steps),
            ("   L_T", found.prior),
        ):
            shown = f"{value.value:.1e}" if label.endswith("L_T") else _pm(value)
            rows.append((label, of, shown, ""))
        fragments += _curves(name, found)
    return Measured("The variational bound", figures, rows, fragments)


def _curves(name: str, found: bounds.BoundSummary) -> list[str]:
    t = np.arange(1, len(found.step) + 1)
    (terms, left), (coding, right) = report.axes(6, 4), report.axes(6, 4)
    left.loglog(t, found.step, ".", ms=3)
    left.set(xlabel="$t$", ylabel="$L_{t-1}$, bits/dim")
    right.plot(found.rate, found.rmse, ".-", ms=3, lw=0.8)
    right.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE on [0, 255]")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    steps = len(t)
    known = t[np.isfinite(found.rmse)]  # a time may have been drawn for no image
    wanted = np.linspace(steps, 1, 11)
    chosen = np.unique(known[np.abs(known[:, None] - wanted).argmin(axis=0)])[::-1]
    rows = [
        (steps - k + 1, k, number(found.rate[k - 1], 5), number(found.rmse[k - 1], 3))
        for k in chosen
    ]
    curves = report.pair(
        report.plot(terms, f"{name}: the bound's terms L_{{t-1}} over t."),
        report.plot(
            coding,
            f"{name}: progressive coding (the paper's Figure 5). The distortion of x_0 as "
            "predicted from x_t, against what has been received by then.",
        ),
    )
    header = ("reverse steps", "t", "rate, bits/dim", "RMSE on [0, 255]")
    table = report.table(header, rows)
    return [curves, report.folded(f"{name}: rate and distortion as a table", table)]


def flow_likelihood(job: Job) -> Measured:
    """Measures bits/dim of held-out data, or without any of training data, by the
    probability-flow ODE, without clipping of the network."""
    split, source = next(iter(job.splits.items()))
    built = job.run.built
    e = built.config.evaluation
    options = {"exact_trace": e.flow_exact_trace, "tolerance": e.flow_tolerance}
    trace = "exact trace" if e.flow_exact_trace else "Hutchinson's trace"
    ways = {
        DEQUANTISED: flow.dequantised_bits_per_dim,
        "from x_1, with decoder": functools.partial(
            flow.decoded_bits_per_dim, variance=built.variance
        ),
    }
    figures, rows = {}, []
    for way, function in ways.items():

        def bits(params: Any, x: Any, i: Any, function: Any = function) -> flow.FlowBits:
            keys = sample_keys(jax.random.key(built.config.seed), i)
            x_0 = to_float(x)
            denoiser = built.unclipped_denoiser(params, x_0=x_0)
            return function(built.schedule, denoiser, x_0, keys, **options)

        compiled, values, calls = jax.jit(bits), [], []
        for x, i, mask in batches(job, source, e.flow_images, f"flow, {way}"):
            found = compiled(job.run.params, x, i)
            values.append(np.asarray(found.bits_per_dim, np.float64)[mask])
            calls.append(int(found.evaluations))
        of_images = np.concatenate(values)
        if not np.isfinite(of_images).all():
            raise ValueError(
                f"the ODE was not solved within {flow.MAX_STEPS} steps at tolerance "
                f"{e.flow_tolerance:g}: raise config.evaluation.flow_tolerance"
            )
        mean = bounds.mean(of_images)
        figures[way] = {
            "bits_per_dim": mean.value,
            "standard_error": mean.standard_error,
            "split": split,
            "images": len(of_images),
            "evaluations": calls,
            "tolerance": e.flow_tolerance,
            "trace": trace,
        }
        how = f"{trace}, tolerance {e.flow_tolerance:g}, {np.mean(calls):.0f} evaluations"
        how += _given(built.config)
        rows.append(
            (
                f"flow, {way}, bits/dim ↓",
                f"{split}, {len(of_images):,} images",
                _pm(mean),
                how,
            )
        )
    words = (
        "Bits/dim by the probability-flow ODE between t = 1 and T. With uniform dequantisation the "
        "density at t = 1 is taken for that of the data; with the decoder, the step from x_1 to "
        "the 8-bit data is coded too. Neither is to be mixed with the bound above."
    )
    return Measured("Likelihood by the probability-flow ODE", figures, rows, [report.text(words)])


def _given(config: ConfigDict) -> str:
    """Returns the conditioning that the figures depend on, as text."""
    parts = [
        (config.model.num_classes, "without label"),
        (config.model.low_resolution, "given its low resolution"),
        (config.training.self_conditioning, "its own estimate by a second call"),
    ]
    return "".join(f"; {words}" for holds, words in parts if holds)


def _pm(estimate: distances.Estimate) -> str:
    return f"{number(estimate.value)} ± {number(estimate.standard_error)}"
