"""The way of training batches to the devices: so many steps at a time, images from the host or, by
index, from the whole set on the devices."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ddpm.build.experiment import Experiment
from ddpm.data import pipeline
from ddpm.data.sources import ArraySource, Source
from ddpm.errors import InputError
from ddpm.training import dispatch, memory, sharding
from ddpm.training.step import TrainStep

_SHARE = 0.1  # of a device's memory that a set may take by 'auto'
# Steps in a dispatch where 0 is asked for, on accelerators: not measured on one yet.
_STEPS_ELSEWHERE = 10


class Feed(NamedTuple):
    """Batches for a training step.

    steps: the most that are taken in one dispatch.
    images: the whole set on all devices, uint8[n, H, W, C]; None where images come with the batch.
    """

    built: Experiment
    data: Source
    mesh: Mesh
    steps: int
    images: jax.Array | None

    def takes(self, step: TrainStep) -> TrainStep:
        """Returns the step in the form that takes these batches."""
        if self.images is not None:
            step = dispatch.by_index(step)
        return dispatch.several(step, fixed=self.images is not None) if self.steps > 1 else step

    def batch(self, steps: range) -> tuple[Any, ...]:
        """Returns what the step takes besides state and metrics, on the devices."""
        arrays = [self._arrays(step) for step in steps]
        if self.steps == 1:
            placed = [self._placed(x) for x in arrays[0]]
        else:
            arrays += arrays[-1:] * (self.steps - len(arrays))  # of one shape, whatever the number
            stacked = [None if x[0] is None else np.stack(x) for x in zip(*arrays, strict=True)]
            placed = [self._placed(x) for x in stacked]
        count = [np.int32(len(steps))] if self.steps > 1 else []
        return (*count, *self._fixed(), *placed)

    def abstract(self) -> tuple[Any, ...]:
        """Returns the shapes of a batch, placed as it will be; nothing is read for them."""
        config, split = self.built.config, self._split()
        shape = (*((self.steps,) if self.steps > 1 else ()), config.training.batch_size)

        def of(more: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=split)

        images: list[Any] = [of(self.built.image_shape, np.uint8)]
        if self.images is not None:
            images = [of((), np.int32), of((), np.bool_) if config.data.flip else None]
        count = [np.int32(0)] if self.steps > 1 else []
        labels = of((), np.int32) if config.model.num_classes else None
        return (*count, *self._fixed(), *images, labels)

    def _arrays(self, step: int) -> tuple[np.ndarray | None, ...]:
        """Returns this process's part of one step's batch: images, or indices and which are
        mirrored, and labels."""
        config = self.built.config
        plan = pipeline.plan(
            config.seed,
            step,
            config.training.batch_size,
            len(self.data),
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        if self.images is None:
            images, labels = pipeline.read(self.data, plan)
            return images, labels if config.model.num_classes else None
        assert isinstance(self.data, ArraySource)
        of_classes = config.model.num_classes and self.data.label is not None
        labels = self.data.label[plan.indices] if of_classes else None  # type: ignore[index]
        return plan.indices.astype(np.int32), plan.mirrored, labels

    def _fixed(self) -> tuple[jax.Array, ...]:
        return () if self.images is None else (self.images,)

    def _split(self) -> NamedSharding:
        return sharding.split_batch(self.mesh, axis=int(self.steps > 1))

    def _placed(self, x: np.ndarray | None) -> jax.Array | None:
        return None if x is None else sharding.to_devices(self.mesh, x, axis=int(self.steps > 1))


def feed(built: Experiment, data: Source, mesh: Mesh) -> Feed:
    """Returns the way of a run's batches by its config and devices; InputError for a set that is to
    be on the devices and cannot."""
    config, device = built.config, jax.local_devices()[0]
    elsewhere = 1 if device.platform == "cpu" else _STEPS_ELSEWHERE
    most = config.training.steps_per_dispatch or elsewhere
    fits = _fits(config.data.on_device, data, device)
    images = _on_devices(data, mesh) if fits and isinstance(data, ArraySource) else None
    return Feed(built, data, mesh, most, images)


def _fits(choice: str, data: Source, device: Any) -> bool:
    if choice == "never" or (choice == "auto" and device.platform == "cpu"):
        return False
    if not isinstance(data, ArraySource):
        if choice == "always":
            raise InputError(
                "config.data.on_device = 'always': this set is too large to be held in memory: "
                "take 'auto'"
            )
        return False
    there = memory.memory(device)
    return choice == "always" or there is None or data.image.nbytes <= _SHARE * there.total


def _on_devices(data: ArraySource, mesh: Mesh) -> jax.Array:
    everywhere, whole = sharding.replicated(mesh), np.asarray(data.image)
    return jax.make_array_from_callback(whole.shape, everywhere, whole.__getitem__)
