"""The subject of an evaluation, checked before anything is computed."""

import functools
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm.build.sampler import check_energy, check_flow
from ddpm.data import sources
from ddpm.data.images import check_image_shape
from ddpm.data.pipeline import evaluation_batches
from ddpm.data.sources import Source
from ddpm.diffusion.schedules import NoiseSchedule
from ddpm.errors import InputError
from ddpm.evaluation import features
from ddpm.evaluation.inception_weights import WHERE
from ddpm.evaluation.shipped import SHIPPED
from ddpm.files import pictures
from ddpm.files.progress import doing
from ddpm.modes.loading import Run, draw
from ddpm.training import sharding


class Measured(NamedTuple):
    """The results of a part, for evaluation.json, the tables and the page."""

    title: str
    figures: dict[str, Any]
    rows: list[tuple[str, str, str, str]]
    fragments: list[str]


class Job(NamedTuple):
    """The subject of an evaluation: the run, its training data, and the data held out, if any."""

    run: Run
    train: Source
    held_out: Source | None
    extractor: features.Extractor | None
    samples: Callable[[int], np.ndarray]  # by seed

    @property
    def splits(self) -> dict[str, Source]:
        """The splits by name, the held-out one first."""
        found = {} if self.held_out is None else {"held out": self.held_out}
        return found | {"train": self.train}

    def features(self, split: str) -> features.Features:
        """Returns the features of all images of a split."""
        assert self.extractor is not None
        config, held_out = self.run.built.config, split == "held out"
        return features_of_data(config, self.extractor, self.splits[split], held_out=held_out)


def prepare(
    run: Run,
    folder: Path,
    train: Source,
    held_out: Source | None,
    parts: list[str],
) -> Job:
    """Returns the job, after checking everything that can be checked before computing; samples are
    kept in `folder`."""
    e = run.built.config.evaluation
    check_parts(run.built.config, run.built.schedule, parts)
    extractor, given = None, None
    if "distances" in parts or "neighbours" in parts:
        extractor = make_extractor(run.built.config, run.built.image_shape, run.mesh)
        if e.samples:
            given = sources.npz(e.samples)
            check_image_shape(
                given.image_shape,
                run.built.image_shape,
                "the data's images are",
                f"those of {e.samples} are",
            )
            if len(given) < e.num_samples:
                raise InputError(
                    f"{e.samples}: {len(given)} images, config.evaluation.num_samples asks for "
                    f"{e.num_samples}"
                )

    @functools.cache
    def samples(seed: int) -> np.ndarray:
        if given is not None:
            return given.image[: e.num_samples]
        return _drawn(run, folder, e.num_samples, seed)

    return Job(run, train, held_out, extractor, samples)


def check_parts(config: ConfigDict, schedule: NoiseSchedule, parts: Collection[str]) -> None:
    """Raises InputError, with the reason, for parts that the model cannot have."""
    if "distances" in parts or "neighbours" in parts:
        _features(config)
    never = config.model.num_classes and config.training.label_dropout == 0
    if never and {"bound", "flow", "energy"} & set(parts):
        raise InputError(
            "the bound, the flow and the energy of a model with labels are those without label, "
            "which it never learned (config.training.label_dropout = 0): leave 'bound', 'flow' and "
            "'energy' out of config.evaluation.parts"
        )
    if "energy" in parts:
        check_energy(config)
    if "flow" in parts:
        check_flow(config, schedule)


def make_extractor(
    config: ConfigDict, image_shape: tuple[int, int, int], mesh: Mesh
) -> features.Extractor:
    """Returns the feature extractor that the config asks for."""
    e, name = config.evaluation, _features(config)
    if name == "inception":
        network = features.of_inception(e.inception_path, e.inception_resize)
    else:
        network = features.of_classifier(name, image_shape)
    return features.Extractor(network, mesh, batch_size=e.batch_size)


def _features(config: ConfigDict) -> str:
    """Returns the features' name: the data's classifier, or Inception. Raises InputError without
    the file of its weights."""
    e, data = config.evaluation, config.data
    name = e.features or (data.name if data.name in SHIPPED else "inception")
    if name == "inception" and not e.inception_path:
        raise InputError(
            f"the features of {data.name!r} are those of Inception: name the file of its weights "
            f"in config.evaluation.inception_path ({WHERE}), or leave 'distances' and 'neighbours' "
            "out of config.evaluation.parts"
        )
    return name


def _drawn(run: Run, folder: Path, num_samples: int, seed: int) -> np.ndarray:
    """Returns the samples of a seed, from their file if the same weights wrote it before."""
    s, name = run.built.config.sampling, run.sample_name(seed, num_samples)
    if s.variance == "analytic":
        name += f"_analytic{s.analytic_images}_{run.fingerprint('data')}"
    else:
        name += f"_{run.fingerprint()}"
    if s.low_resolution_noise:
        name += f"_noise{s.seed}"
    path = folder / f"{name}.npz"
    shape = (num_samples, *run.built.image_shape)
    if not path.exists():
        generator = run.generator(num_samples)
        about = run.provenance(seed)
        drawn = draw(generator, run.params, num_samples, seed, folder.parent)
        pictures.save_npz(path, drawn, shape, about=about)
    found = sources.npz(path).image
    if found.shape != shape:
        raise InputError(f"{path}: holds {found.shape}, not {shape}; remove it")
    return found


def batches(
    job: Job, source: Source, most: int, name: str
) -> Iterator[tuple[jax.Array, np.ndarray, np.ndarray]]:
    """Yields (images, their numbers, mask) over the devices, for the first `most` (0: all)."""
    most = min(most, len(source)) if most else len(source)
    size = job.run.built.config.evaluation.batch_size
    size = -(-most // -(-most // size))  # equal batches: padding of the last one is computed too
    size = sharding.rounded_up(size, job.run.mesh)
    with doing(name, total=most) as bar:
        for k, batch in enumerate(evaluation_batches(source, size)):
            indices = np.arange(k * size, (k + 1) * size)
            mask = batch.mask & (indices < most)
            yield sharding.to_devices(job.run.mesh, batch.examples.image), indices, mask
            bar.update(int(mask.sum()))
            if indices[-1] + 1 >= most:
                return


def features_of_data(
    config: ConfigDict, extractor: features.Extractor, source: Source, *, held_out: bool
) -> features.Features:
    """Returns the features of a whole split, from the cache if they were computed before."""
    about = {k: str(config.data[k]) for k in ("name", "path", "split", "image_size", "channels")}
    if held_out:
        about |= {"held_out": config.evaluation.split, "held_out_path": config.evaluation.path}
    return features.of_source(extractor, source, about)
