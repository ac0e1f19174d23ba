"""The check, before a training is compiled, that the memory holds it."""

from typing import Any

import jax

from ddpm.build.experiment import Experiment
from ddpm.errors import InputError
from ddpm.files.progress import say
from ddpm.modes.feed import Feed
from ddpm.training import memory, sharding
from ddpm.training.state import Metrics

# On accelerators, where the estimate was not measured, only what is far beyond is refused.
_CERTAIN = {"cpu": 1.0}
_ELSEWHERE = 2.0
_FILLED = 0.9  # of the free memory, by what is advised
_GB = 1e9


def check_memory(built: Experiment, batches: Feed, start: Any, step: Any) -> None:
    """Raises InputError, before anything is compiled, for a training that the devices cannot hold;
    warns in a line where it is more than what is free.

    Args:
      start: the jitted function that makes the first state.
      step: the jitted training step. Neither is traced anew when it is called.
    """
    device = jax.local_devices()[0]
    there = memory.memory(device)
    if there is None:
        return
    size = built.config.training.batch_size
    try:
        state = jax.eval_shape(start)
    except (OverflowError, MemoryError) as error:
        raise InputError(f"{_keys(built)}: no memory holds such a network") from error
    held = memory.tree_bytes(state)
    if held > there.total:
        raise InputError(_line(built, held, there, 0))
    # Placed as they will be, or the step would be traced anew for them.
    carried = (state, jax.eval_shape(Metrics.zero))
    carried = sharding.abstract_like(carried, sharding.replicated(batches.mesh))
    traced = step.trace(*carried, *batches.abstract())
    passing = memory.temporaries(traced.jaxpr.jaxpr) // jax.device_count()
    if held + passing <= there.free:
        return
    fits = int(size * max(0, _FILLED * there.free - held) / passing)
    devices = jax.device_count()
    fits = devices * 2 ** ((fits // devices).bit_length() - 1) if fits >= devices else 0
    line = _line(built, held + passing, there, fits)
    if held + passing > _CERTAIN.get(device.platform, _ELSEWHERE) * there.total:
        raise InputError(line)
    if jax.process_index() == 0:
        say(f"warning: {line}")


def _line(built: Experiment, needed: int, there: memory.Memory, fits: int) -> str:
    advice = (
        f"a batch of {fits} would fit; or lower image_size or channels"
        if fits
        else "not even the smallest batch would fit: lower image_size or channels"
    )
    return (
        f"{_keys(built)} take about {_gigabytes(needed)} of memory to train, of "
        f"{_gigabytes(there.total)} here, {_gigabytes(there.free)} of them free: {advice}"
    )


def _keys(built: Experiment) -> str:
    height, width, _ = built.image_shape
    config = built.config
    return (
        f"config.training.batch_size = {config.training.batch_size}, config.data.image_size = "
        f"({height}, {width}) and config.model.channels = {config.model.channels}"
    )


def _gigabytes(n: int) -> str:
    return f"{n / _GB:.3g} GB"
