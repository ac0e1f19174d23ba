"""Data parallelism: the batch is split over all devices, everything else replicated."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm.errors import InputError


def data_mesh() -> Mesh:
    """Returns all devices of all processes along one axis, 'data'."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding by which every device holds the whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding by which the axis of examples is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def to_devices(mesh: Mesh, batch: np.ndarray, axis: int = 0) -> jax.Array:
    """Places this process's part of the global batch, whose examples are along `axis`, as part of
    the global array."""
    return jax.make_array_from_process_local_data(split_batch(mesh, axis), batch)


def rounded_up(batch_size: int, mesh: Mesh) -> int:
    """Returns the next batch size that divides over the devices."""
    devices = mesh.devices.size
    return -(-batch_size // devices) * devices


def check_batch_size(batch_size: int, name: str, parts: int = 1) -> None:
    """Raises InputError unless every device gets equally many examples, in each of the parts."""
    devices = jax.device_count()
    if batch_size % (devices * parts):
        times = f" times config.training.accumulation, {parts}" if parts > 1 else ""
        nearest = max(1, round(batch_size / (devices * parts))) * devices * parts
        raise InputError(
            f"config.{name} = {batch_size}: must be divisible by the number of devices, {devices}"
            f"{times}; the nearest is {nearest}"
        )


def abstract_like(tree: Any, sharding: NamedSharding) -> Any:
    """Returns shapes and dtypes of a tree, placed: what a checkpoint is restored into."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
