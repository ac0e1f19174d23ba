"""Training: build, restore, step, log, sample, save. Stopped at any moment, the same call resumes
from the last checkpoint, and ends in the same weights bit for bit."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm.build.data import check_labels, source
from ddpm.build.experiment import Experiment, build
from ddpm.config import to_json
from ddpm.config.combinations import check_steering
from ddpm.data import pipeline
from ddpm.data.images import check_image_shape
from ddpm.data.sources import Source
from ddpm.errors import InputError, NotFinite, path_error
from ddpm.files import pictures
from ddpm.files.atomic import write_atomically
from ddpm.files.progress import clock
from ddpm.interop import weights
from ddpm.modes.capacity import check_memory
from ddpm.modes.feed import Feed, feed
from ddpm.modes.inputs import with_small_images
from ddpm.modes.loading import draw as samples
from ddpm.modes.run_folder import check_run, run_folder
from ddpm.modes.start import (
    announce,
    compiled_step,
    first_state,
    jitted_start,
    jitted_step,
)
from ddpm.sampling.generate import Generator
from ddpm.training import sharding, snapshots
from ddpm.training.checkpoints import Checkpoints, NotWritten, saved_meta
from ddpm.training.dispatch import dispatches
from ddpm.training.logbook import Logbook
from ddpm.training.loop import Callback, Progress, every, run
from ddpm.training.objectives import LEARNED_SCHEDULE
from ddpm.training.profiling import profiled
from ddpm.training.state import NUM_BUCKETS, Metrics, TrainState
from ddpm.training.step import TrainStep
from ddpm.training.stopping import StopSignal


def train(config: ConfigDict, workdir: Path, init_from: str = "", profile: int = 0) -> None:
    """Trains to config.training.steps in `workdir`, from its latest good checkpoint if it has one,
    else from the pretrained weights that `init_from` names, if it does.

    Leaves there: config.json, metrics.jsonl, losses.png, tensorboard/, samples/, checkpoints/;
    and profile/, where `profile` steps are to be traced.
    Raises InputError for what the user can mend, NotFinite if training diverged.
    """
    sharding.check_batch_size(
        config.training.batch_size, "training.batch_size", config.training.accumulation
    )
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
    mesh = sharding.data_mesh()
    batches = feed(built, data, mesh)
    start, step = jitted_start(built, mesh), jitted_step(built, batches)
    check_memory(built, batches, start, step)
    with run_folder(workdir):
        try:
            _train(built, data, workdir, given, batches, start, step, profile)
        except OSError as error:
            raise InputError(
                f"{path_error(error)}; then the same command resumes from the last checkpoint"
            ) from error


def _train(
    built: Experiment,
    data: Source,
    workdir: Path,
    given: weights.Imported | None,
    batches: Feed,
    start: Callable[[], TrainState],
    step: TrainStep,
    profile: int,
) -> None:
    config, training, mesh = built.config, built.config.training, batches.mesh
    checkpoints = Checkpoints(workdir / "checkpoints", keep=training.checkpoints_kept)
    state, origin = first_state(start, checkpoints, mesh, given)
    if jax.process_index() == 0:
        text = json.dumps(to_json(config), indent=2) + "\n"
        write_atomically(workdir / "config.json", lambda path: path.write_text(text))
        snapshots.cut(workdir / "averages", int(state.step))
    no_metrics = jax.jit(Metrics.zero, out_shardings=sharding.replicated(mesh))
    progress = Progress(int(state.step), state, no_metrics())
    then = f"{config.sampling.num_samples} samples"
    logbook = Logbook(workdir, step=progress.step, steps=training.steps, then=then)
    announce(built, data, logbook, progress, given)
    save = _saving(built, data, checkpoints, origin)
    log = _logging(built, logbook, checkpoints, no_metrics)
    first = progress.step
    due = (training.log_every, training.checkpoint_every, training.sample_every,
           training.ema_snapshot_every)  # fmt: skip
    parts = dispatches(first, training.steps, batches.steps, due)
    try:
        tracing = profiled(
            workdir / "profile", profile, first=first, last=training.steps, say=logbook.say
        )
        with StopSignal() as stop, tracing as trace:
            draw = _drawing(built, mesh, logbook, workdir, stop)
            callbacks = [
                trace,
                lambda progress: logbook.advance(progress.step),
                every(training.log_every, log, last=training.steps),
                _keeping_averages(built, workdir, checkpoints),
                every(training.checkpoint_every, save),
                every(training.checkpoint_every, lambda progress: logbook.plot()),
                _sampling_between(training, logbook, save, draw, stop),
            ]
            ahead = pipeline.prefetch(lambda steps: (steps, batches.batch(steps)), parts)
            compiled, ahead = compiled_step(step, progress, ahead, workdir)
            logbook.start_clock(first)
            run(progress, compiled, ahead, callbacks, stop)
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
    learns_schedule = LEARNED_SCHEDULE in built.objective.schedule_parameters()

    @functools.cache
    def fixed_generator() -> Generator:
        return built.generator(mesh, s.num_samples)

    def generator(params: Any) -> Generator:
        """Returns what is compiled once, unless the schedule is being learned."""
        if not learns_schedule:
            return fixed_generator()
        return built.with_schedule(jax.device_get(params)).generator(mesh, s.num_samples)

    def callback(progress: Progress) -> None:
        began = time.monotonic()
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
        took = clock(time.monotonic() - began)
        logbook.expect(f"{s.num_samples} samples, {took} the last time")

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
