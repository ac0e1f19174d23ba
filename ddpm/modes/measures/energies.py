"""The normalised energy of images, -log p by one evaluation, and how it tells foreign ones."""

from typing import Any

import jax
import numpy as np

from ddpm.build.data import foreign
from ddpm.diffusion.bound_terms import BITS_PER_NAT
from ddpm.diffusion.pixels import to_float
from ddpm.diffusion.streams import sample_keys
from ddpm.evaluation import bound as bounds
from ddpm.evaluation import distances, report
from ddpm.evaluation.report import number
from ddpm.modes.measures.job import Job, Measured, batches


def energies(job: Job) -> Measured:
    """Measures the energy of every split and of foreign images, and the ROC area of telling foreign
    images from the first split, held out if any is."""
    built, params = job.run.built, job.run.params
    e, name = built.config.evaluation, built.config.evaluation.foreign
    sources = dict(job.splits)
    if name:
        sources[name] = foreign(built.config, built.image_shape)
    key = jax.random.key(built.config.seed)
    log_z = jax.jit(lambda params: built.log_normalizer(params, key))(params)

    @jax.jit
    def bits(params: Any, log_z: jax.Array, images: jax.Array, indices: jax.Array) -> jax.Array:
        x_0, keys = to_float(images), sample_keys(key, indices)
        return built.energy_bits_per_dim(params, log_z, x_0, keys)

    per_nat = BITS_PER_NAT / np.prod(built.image_shape)
    found: dict[str, np.ndarray] = {}
    figures: dict[str, Any] = {}
    rows: list[tuple[str, str, str, str]] = []
    for split, source in sources.items():
        parts = batches(job, source, e.bound_images, f"energy, {split}")
        values = [np.asarray(bits(params, log_z.value, x, i), np.float64)[m] for x, i, m in parts]
        found[split] = np.concatenate(values)
        mean = bounds.mean(found[split])
        figures[split] = {
            "images": len(found[split]),
            "bits_per_dim": mean.value,
            "standard_error": mean.standard_error,
            "nats": mean.value / per_nat,
            "nats_standard_error": mean.standard_error / per_nat,
        }
        of = f"{split}, {len(found[split]):,} images"
        how = "one evaluation, uniform dequantisation"
        for label, unit in (("energy, bits/dim ↓", 1.0), ("   in nats for an image", per_nat)):
            shown = f"{number(mean.value / unit)} ± {number(mean.standard_error / unit)}"
            rows.append((label, of, shown, how))
            how = ""
    figures["log_normalizer_standard_error"] = float(log_z.standard_error)
    if name:
        first = next(iter(job.splits))
        figures["roc_area"] = distances.roc_area(found[first], found[name])
        row = (f"ROC area, {name} ↑", f"against {first}", number(figures["roc_area"]), "by energy")
        rows.append(row)
    words = (
        "The energy is -log p of an image with uniform noise in its 8-bit bins, the quantity that "
        "the flow has by an ODE. The ROC area is the probability that a foreign image has more of "
        "it than one of the model's own: 0.5 tells nothing, 1 everything."
    )
    return Measured("Normalised energies", figures, rows, [report.text(words)])
