"""The start of a training: its first state, compiled step and batches, and lines about them."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm.build.experiment import Experiment
from ddpm.build.objective import weight_at_end
from ddpm.data.sources import Source
from ddpm.files.progress import say
from ddpm.interop import weights
from ddpm.modes.feed import Feed
from ddpm.modes.run_folder import compiling, described
from ddpm.training import sharding
from ddpm.training.checkpoints import Checkpoints, items_of, saved_meta
from ddpm.training.logbook import Logbook
from ddpm.training.loop import Dispatch, Progress
from ddpm.training.state import TrainState, init
from ddpm.training.step import TrainStep, make_train_step

MUCH_WEIGHT = 1e4  # of an error at t = T, in units of the median, that is worth a warning
MUCH_SIGNAL = 0.05  # alpha_bar_T that is; 4e-5 in the paper, and in VDM 0.0067


def jitted_start(built: Experiment, mesh: Mesh) -> Callable[[], TrainState]:
    """Returns the function that makes the state before the first step, on all devices."""
    return jax.jit(
        lambda: init(
            built.model,
            built.optimizer,
            built.image_shape,
            built.config.seed,
            built.objective,
            other_averages=len(built.other_ema_rates),
        ),
        out_shardings=sharding.replicated(mesh),
    )


def first_state(
    start: Callable[[], TrainState],
    checkpoints: Checkpoints,
    mesh: Mesh,
    given: weights.Imported | None,
) -> tuple[TrainState, str]:
    """Returns the state to begin at, and the digest of the pretrained weights it began from."""
    everywhere = sharding.replicated(mesh)
    state = resume(checkpoints, jax.eval_shape(start), everywhere)
    saved = saved_meta(checkpoints.folder) or {}
    if state is None:
        state = start()
        if given is not None:
            params, ema_params = (jax.device_put(given.params, everywhere) for _ in range(2))
            state = state._replace(params=params, ema_params=ema_params)
    return state, saved.get("init_from", "") if given is None else given.sha256


def resume(checkpoints: Checkpoints, abstract: TrainState, placed: Any) -> TrainState | None:
    """Returns the state of the newest good checkpoint, placed on the devices; None without one."""
    found = checkpoints.restore(sharding.abstract_like(items_of(abstract), placed), say)
    if found is None:
        return None
    items, meta = found
    step = jax.device_put(np.int32(meta["step"]), placed)
    return TrainState(step, **items)


def jitted_step(built: Experiment, batches: Feed) -> TrainStep:
    """Returns the training step over the devices: the weights on all of them, the batch split."""
    config = built.config
    step = batches.takes(
        make_train_step(
            built.model,
            built.objective,
            built.optimizer,
            ema_decay=built.ema_rate,
            other_ema_rates=built.other_ema_rates,
            seed=config.seed,
            num_classes=config.model.num_classes,
            label_dropout=config.training.label_dropout,
            prepare=built.prepare,
            accumulation=config.training.accumulation,
        )
    )
    return jax.jit(step, out_shardings=sharding.replicated(batches.mesh), donate_argnums=(0, 1))


def compiled_step(
    step: Any, progress: Progress, batches: Iterator[Dispatch], workdir: Path
) -> tuple[TrainStep, Iterator[Dispatch]]:
    """Returns the training step, compiled for these batches, and the batches; both as they are if
    there are none."""
    first = next(batches, None)
    if first is None:
        return step, batches
    with compiling("the training step", workdir):
        compiled = step.lower(progress.state, progress.metrics, *first[1]).compile()
    if jax.process_index() == 0:
        say(f"the training step: {costs(compiled)}")
    return compiled, itertools.chain([first], batches)


def costs(compiled: Any) -> str:
    """Returns in words what a device computes and holds in one call of a compiled step: FLOPs, and
    bytes of what it carries and of what it needs meanwhile, as XLA counts them."""
    memory, found = compiled.memory_analysis(), compiled.cost_analysis() or {}
    flops = f"{found['flops'] / 1e9:,.3g} GFLOP" if found.get("flops", 0) > 0 else "unknown FLOPs"
    if memory is None:
        return flops
    carried, passing = memory.output_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
    return f"{flops}, {carried:,.0f} MB of state and {passing:,.0f} MB more while it runs, a device"


def announce(
    built: Experiment,
    data: Source,
    logbook: Logbook,
    progress: Progress,
    given: weights.Imported | None,
) -> None:
    """Logs what begins, and what of it looks like a mistake."""
    config, training, step = built.config, built.config.training, progress.step
    shape = "x".join(map(str, data.image_shape))
    begun = "from the start" if given is None else f"from weights {given.sha256[:8]}"
    origin = f"resuming at step {step}" if step else begun
    logbook.say(
        f"{described(built, logbook.path.parent, progress.state.params, training.batch_size)}; "
        f"{len(data):,} images of {shape}; {origin}, to step {training.steps}"
    )
    left = float(built.schedule.alpha_bar[-1])
    if left > MUCH_SIGNAL:
        logbook.say(
            f"alpha_bar_T = {left:.2g}: x_T still shows the data, and samples begin without; see "
            "config.diffusion (the betas of 'linear' are for T = 1000)"
        )
    weight = weight_at_end(config, built.schedule)
    if weight > MUCH_WEIGHT:
        logbook.say(
            f"config.training.loss_weight = {config.training.loss_weight!r} counts an error of "
            f"{config.diffusion.prediction!r} at t = T as {weight:.0e} at the median t, nearly all "
            "of the loss: such a weight is for the predictions x_0, v and edm"
        )
    if weight == 0:
        logbook.say(
            f"config.training.loss_weight = {config.training.loss_weight!r} is 0 at t = T, where "
            "the schedule leaves no signal: the step that samples begin with is never trained; "
            "take 'none', 'v' or 'truncated_snr'"
        )
