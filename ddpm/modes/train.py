"""Training: build, restore, step, log, sample, save. Stopped at any moment, the same call resumes
from the last checkpoint, and ends in the same weights bit for bit."""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm.build.data import check_labels, source
from ddpm.build.experiment import Experiment, build
from ddpm.build.objective import weight_at_end
from ddpm.config import to_json
from ddpm.config.combinations import check_steering
from ddpm.data import pipeline
from ddpm.data.images import check_image_shape
from ddpm.data.sources import Source
from ddpm.errors import InputError, NotFinite
from ddpm.files import pictures
from ddpm.files.atomic import write_atomically
from ddpm.files.progress import say
from ddpm.interop import weights
from ddpm.modes.inputs import with_small_images
from ddpm.modes.loading import draw as samples
from ddpm.modes.run_folder import check_run, compiling, described, run_folder
from ddpm.sampling.generate import Generator
from ddpm.training import sharding, snapshots
from ddpm.training.checkpoints import Checkpoints, NotWritten, items_of, saved_meta
from ddpm.training.logbook import Logbook
from ddpm.training.loop import Callback, Progress, every, run
from ddpm.training.state import NUM_BUCKETS, Metrics, TrainState, init
from ddpm.training.step import TrainStep, make_train_step
from ddpm.training.stopping import StopSignal

MUCH_WEIGHT = 1e4  # of an error at t = T, in units of the median, that is worth a warning
MUCH_SIGNAL = 0.05  # alpha_bar_T that is; 4e-5 in the paper, and in VDM 0.0067


def train(config: ConfigDict, workdir: Path, init_from: str = "") -> None:
    """Trains to config.training.steps in `workdir`, from its latest good checkpoint if it has one,
    else from the pretrained weights that `init_from` names, if it does.

    Leaves there: config.json, metrics.jsonl, losses.png, tensorboard/, samples/, checkpoints/.
    Raises InputError for what the user can mend, NotFinite if training diverged.
    """
    sharding.check_batch_size(config.training.batch_size, "training.batch_size")
    given = weights.load(init_from, config) if init_from else None
    if given is not None:
        config = given.config
    check_steering(config)
    check_run(config, workdir)  # first of all: preparing a data set may take an hour
    data = source(config)
    check_labels(config, data)
    built = with_small_images(build(config, data.image_shape), config.sampling.num_samples)
    _ = built.sampler  # refused now, if at all, not when the first samples are due
    check_run(config, workdir, data)
    saved = saved_meta(workdir / "checkpoints")
    if given is not None and saved and saved.get("init_from", given.sha256) != given.sha256:
        raise InputError(
            f"{workdir} holds a run that did not begin from --init_from={init_from}: choose "
            "another --workdir"
        )
    if given is not None:
        check_image_shape(
            data.image_shape, given.image_shape, f"--init_from={init_from} is of images"
        )
    with run_folder(workdir):
        try:
            _train(built, data, workdir, given)
        except OSError as error:
            raise InputError(
                f"{error.filename or workdir}: {error.strerror or error}; once that is mended, the "
                "same command resumes from the last checkpoint"
            ) from error


def _train(built: Experiment, data: Source, workdir: Path, given: weights.Imported | None) -> None:
    config, training = built.config, built.config.training
    mesh = sharding.data_mesh()
    checkpoints = Checkpoints(workdir / "checkpoints", keep=training.checkpoints_kept)
    state, origin = _first_state(built, checkpoints, mesh, given)
    if jax.process_index() == 0:
        text = json.dumps(to_json(config), indent=2) + "\n"
        write_atomically(workdir / "config.json", lambda path: path.write_text(text))
        snapshots.cut(workdir / "averages", int(state.step))
    no_metrics = jax.jit(Metrics.zero, out_shardings=sharding.replicated(mesh))
    progress = Progress(int(state.step), state, no_metrics())
    then = f"{config.sampling.num_samples} samples"
    logbook = Logbook(workdir, step=progress.step, steps=training.steps, then=then)
    _announce(built, data, logbook, progress, given)
    save = _saving(built, data, checkpoints, origin)
    log = _logging(built, logbook, checkpoints, no_metrics)
    first, batch = progress.step, _batches(built, data, mesh)
    try:
        with StopSignal() as stop:
            draw = _drawing(built, mesh, logbook, workdir, stop)
            callbacks = [
                lambda progress: logbook.advance(),
                every(training.log_every, log, last=training.steps),
                _keeping_averages(built, workdir, checkpoints),
                every(training.checkpoint_every, save),
                every(training.checkpoint_every, lambda progress: logbook.plot()),
                _sampling_between(training, logbook, save, draw, stop),
            ]
            batches = pipeline.prefetch(batch, first, training.steps)
            step, batches = _compiled(_step(built, mesh), progress, batches, workdir)
            logbook.start_clock(first)
            run(progress, step, batches, callbacks, stop)
            if stop.name and int(progress.metrics.steps):
                log(progress)
            save(progress)
            logbook.plot()
            checkpoints.wait()
            if not stop.name:
                draw(progress)
            if stop.name:
                logbook.say(
                    f"{stop.name}: saved at step {progress.step} of {training.steps}; "
                    "the same command resumes from here"
                )
                return
        logbook.say(
            f"done: step {progress.step}; samples, losses.png and checkpoints are in {workdir}"
        )
    except NotWritten:
        raise
    except InputError:  # of a picture that cannot be read, found on the way
        if progress.step > first and jax.process_count() == 1:  # others may be a step ahead by now
            save(progress)
        raise
    finally:
        logbook.close()
        checkpoints.close()


# --- What a run begins with


def _first_state(
    built: Experiment, checkpoints: Checkpoints, mesh: Mesh, given: weights.Imported | None
) -> tuple[TrainState, str]:
    """Returns the state to begin at, and the digest of the pretrained weights it began from."""
    everywhere = sharding.replicated(mesh)
    start = jax.jit(
        lambda: init(
            built.model,
            built.optimizer,
            built.image_shape,
            built.config.seed,
            built.objective,
            other_averages=len(built.other_ema_rates),
        ),
        out_shardings=everywhere,
    )
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


def _step(built: Experiment, mesh: Mesh) -> TrainStep:
    """Returns the training step over the devices: the weights on all of them, the batch split."""
    config, everywhere = built.config, sharding.replicated(mesh)
    split = sharding.split_batch(mesh)
    return jax.jit(
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
        ),
        in_shardings=(everywhere, everywhere, split, split),
        out_shardings=everywhere,
        donate_argnums=(0, 1),
    )


def _compiled(
    step: Any, progress: Progress, batches: Iterator[tuple[Any, ...]], workdir: Path
) -> tuple[TrainStep, Iterator[tuple[Any, ...]]]:
    """Returns the training step, compiled for these batches, and the batches; both as they are if
    there are none."""
    batch = next(batches, None)
    if batch is None:
        return step, batches
    with compiling("the training step", workdir):
        compiled = step.lower(progress.state, progress.metrics, *batch).compile()
    return compiled, itertools.chain([batch], batches)


def _batches(
    built: Experiment, data: Source, mesh: Mesh
) -> Callable[[int], tuple[jax.Array, jax.Array | None]]:
    """Returns the function of a step to its images and labels, on the devices."""
    config = built.config

    def batch(step: int) -> tuple[jax.Array, jax.Array | None]:
        part = pipeline.train_batch(
            data,
            config.seed,
            step,
            config.training.batch_size,
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        images = sharding.to_devices(mesh, part.image)
        if not config.model.num_classes:
            return images, None
        assert part.label is not None  # of check_labels
        return images, sharding.to_devices(mesh, part.label)

    return batch


def _announce(
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


# --- Callbacks


def _logging(
    built: Experiment, logbook: Logbook, checkpoints: Checkpoints, no_metrics: Callable[[], Metrics]
) -> Callback:
    """Logs the metrics and resets them."""

    def callback(progress: Progress) -> None:
        check_finite(progress.metrics, checkpoints)
        logbook.scalars(progress.step, summary(progress.metrics, built.schedule.num_steps))
        progress.metrics = no_metrics()

    return callback


def _saving(built: Experiment, data: Source, checkpoints: Checkpoints, origin: str) -> Callback:
    """Saves a checkpoint, unless this step has one."""
    about = {
        "config": to_json(built.config),
        "image_shape": data.image_shape,
        "num_images": len(data),
        "init_from": origin,
    }

    def callback(progress: Progress) -> None:
        check_finite(progress.metrics, checkpoints)
        if checkpoints.latest_step() != progress.step:
            checkpoints.save(progress.state, about)

    return callback


def _keeping_averages(built: Experiment, workdir: Path, checkpoints: Checkpoints) -> Callback:
    """Saves snapshots of the averages, of which any width can be made afterwards."""
    training = built.config.training

    def callback(progress: Progress) -> None:
        check_finite(progress.metrics, checkpoints)
        if jax.process_index() == 0:
            state = progress.state
            averages = (state.ema_params, *state.other_ema_params)
            stds = training.ema_relative_stds
            snapshots.save(workdir / "averages", progress.step, averages, stds)

    steps = training.ema_snapshot_every
    return every(steps, callback, last=training.steps if steps else 0)


def _sampling_between(
    training: ConfigDict, logbook: Logbook, save: Callback, draw: Callback, stop: StopSignal
) -> Callback:
    """Saves and samples now and then, but not at the end, where both are due anyway."""

    def callback(progress: Progress) -> None:
        if progress.step < training.steps and not stop.name:
            save(progress)  # before what takes long
            draw(progress)
            logbook.start_clock(progress.step)

    return every(training.sample_every, callback)


def _drawing(
    built: Experiment, mesh: Mesh, logbook: Logbook, workdir: Path, stop: StopSignal
) -> Callback:
    """Draws a grid of samples; none if a signal comes before the last batch of them."""
    s = built.config.sampling
    learns_schedule = bool(built.objective.schedule_parameters())

    @functools.cache
    def fixed_generator() -> Generator:
        return built.generator(mesh, s.num_samples)

    def generator(params: Any) -> Generator:
        """Returns what is compiled once, unless the schedule is being learned."""
        if not learns_schedule:
            return fixed_generator()
        return built.with_schedule(jax.device_get(params)).generator(mesh, s.num_samples)

    def callback(progress: Progress) -> None:
        params = progress.state.ema_params if s.ema else progress.state.params
        batches: list[np.ndarray] = []
        for part in samples(generator(params), params, s.num_samples, s.seed, workdir):
            batches.append(part)
            if stop.name and sum(map(len, batches)) < s.num_samples:
                return
        if not logbook.speaks:
            return
        images = np.concatenate(batches)
        pictures.save_grid(workdir / "samples" / f"step_{progress.step:08}.png", images)
        logbook.image(progress.step, "samples", pictures.grid(images))

    return callback


def check_finite(metrics: Metrics, checkpoints: Checkpoints) -> None:
    """Raises NotFinite once a loss or gradient was not, naming its step and what is left."""
    bad = int(metrics.first_bad_step)
    if bad < 0:
        return
    checkpoints.wait()
    last = checkpoints.latest_step()
    good = "no checkpoint yet" if last is None else f"{checkpoints.folder / str(last)}"
    raise NotFinite(
        f"the loss or its gradient is not finite at step {bad}; last good checkpoint: {good}; "
        "try a lower config.training.learning_rate, or a longer warmup_steps"
    )


def summary(metrics: Metrics, num_steps: int) -> dict[str, float]:
    """Returns means since the last line: loss, norm of the gradient, loss by parts of 1..T."""
    m = jax.device_get(metrics)
    row = {"loss": float(m.loss / m.steps), "grad_norm": float(m.grad_norm / m.steps)}
    edges = -(-np.arange(NUM_BUCKETS + 1) * num_steps // NUM_BUCKETS)
    for i in np.flatnonzero(m.bucket_count):
        name = f"loss_t{edges[i] + 1:04}-{edges[i + 1]:04}"
        row[name] = float(m.bucket_loss[i] / m.bucket_count[i])
    return row
