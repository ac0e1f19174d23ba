"""Training: build, restore, step, log, sample, save. Stopped at any moment, the same call
goes on from the last checkpoint, and ends in the same weights bit for bit."""

import contextlib
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm import experiment
from ddpm.config import to_json
from ddpm.data import pipeline
from ddpm.data.sources import Source
from ddpm.errors import InputError
from ddpm.files import write_whole
from ddpm.interop import weights
from ddpm.modes.inputs import with_small_images
from ddpm.objectives import weight_at_end
from ddpm.sampling import pictures
from ddpm.sampling.generate import Generator
from ddpm.training import sharding, snapshots
from ddpm.training.checkpoints import Checkpoints, items_of, parameter_count, saved_meta
from ddpm.training.logbook import Logbook, plot_losses, say
from ddpm.training.state import NUM_BUCKETS, Metrics, TrainState, init, make_train_step
from ddpm.training.stopping import StopSignal
from ddpm.validation import check_steering

NOT_FINITE = 3  # main.py's exit code for it
MUCH_WEIGHT = 1e4  # of an error at t = T, in units of the median, of which one is told
MUCH_SIGNAL = 0.05  # alpha_bar_T of which one is told; 4e-5 in the paper, and that of VDM 0.0067


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; the text names step and checkpoint."""


def train(config: ConfigDict, workdir: Path, init_from: str = "") -> None:
    """Trains to config.training.steps in `workdir`, from its latest good checkpoint if it has one,
    else from the weights of others that `init_from` names, if it does.

    Leaves there: config.json, metrics.jsonl, losses.png, tensorboard/, samples/, checkpoints/.
    Raises InputError for what the user can mend, NotFinite if training diverged.
    """
    sharding.check_batch_size(config.training.batch_size, "training.batch_size")
    given = weights.load(init_from, config) if init_from else None
    if given is not None:
        config = given.config
    check_steering(config)
    check_run(config, workdir)  # first of all: preparing a data set may take an hour
    source = experiment.source(config)
    experiment.check_labels(config, source)
    built = experiment.build(config, source.image_shape)
    built = with_small_images(built, config.sampling.num_samples)
    _ = built.sampler  # refused now, if at all, not when the first samples are due
    check_run(config, workdir, source)
    saved = saved_meta(workdir / "checkpoints")
    if given is not None and saved and saved.get("init_from", given.sha256) != given.sha256:
        raise InputError(
            f"{workdir} holds a run that did not begin from --init_from={init_from}: choose "
            "another --workdir"
        )
    if given is not None and given.image_shape != source.image_shape:
        raise InputError(
            f"--init_from={init_from} is of images {given.image_shape}, these are "
            f"{source.image_shape} (height, width, channels)"
        )
    with run_folder(workdir):
        _train(built, source, workdir, given)


def _train(
    built: experiment.Experiment, source: Source, workdir: Path, given: weights.Imported | None
) -> None:
    config, training = built.config, built.config.training
    checkpoints = Checkpoints(workdir / "checkpoints", keep=training.checkpoints_kept)

    # Everything on its devices: the weights on all of them, the batch split.
    mesh = sharding.data_mesh()
    everywhere, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    optimizer = built.optimizer
    start = jax.jit(
        lambda: init(
            built.model,
            optimizer,
            source.image_shape,
            config.seed,
            built.objective.history,
            schedule_parameters=built.objective.schedule_parameters(),
            other_averages=len(built.other_ema_rates),
        ),
        out_shardings=everywhere,
    )
    state = resume(checkpoints, jax.eval_shape(start), everywhere)
    saved = saved_meta(workdir / "checkpoints") or {}
    began_from = saved.get("init_from", "") if given is None else given.sha256
    if state is None:
        state = start()
        if given is not None:
            params, ema_params = (jax.device_put(given.params, everywhere) for _ in range(2))
            state = state._replace(params=params, ema_params=ema_params)
    if jax.process_index() == 0:
        text = json.dumps(to_json(config), indent=2) + "\n"
        write_whole(workdir / "config.json", lambda path: path.write_text(text))
    no_metrics = jax.jit(Metrics.zero, out_shardings=everywhere)
    metrics = no_metrics()
    train_step = jax.jit(
        make_train_step(
            built.model,
            built.schedule,
            optimizer,
            ema_decay=built.ema_rate,
            other_ema_rates=built.other_ema_rates,
            seed=config.seed,
            objective=built.objective,
            num_classes=config.model.num_classes,
            label_dropout=training.label_dropout,
            prepare=built.prepare,
            self_conditioning=training.self_conditioning,
        ),
        in_shardings=(everywhere, everywhere, split, split),
        out_shardings=everywhere,
        donate_argnums=(0, 1),
    )

    def batch(step: int) -> tuple[jax.Array, jax.Array | None]:
        part = pipeline.train_batch(
            source,
            config.seed,
            step,
            training.batch_size,
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        images = sharding.to_devices(mesh, part.image)
        if not config.model.num_classes:
            return images, None
        assert part.label is not None  # of check_labels
        return images, sharding.to_devices(mesh, part.label)

    step = int(state.step)
    if jax.process_index() == 0:
        snapshots.cut(workdir / "averages", step)
    logbook = Logbook(workdir, step=step, steps=training.steps)
    shape = "x".join(map(str, source.image_shape))
    begun = "from the start" if given is None else f"from weights {given.sha256[:8]}"
    origin = f"going on at step {step}" if step else begun
    logbook.say(
        f"{parameter_count(state.params):,} parameters, {len(source):,} images of {shape}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; {origin}, "
        f"to step {training.steps}, in {workdir}"
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
            f"config.training.loss_weight = {training.loss_weight!r} counts an error of "
            f"{config.diffusion.prediction!r} at t = T as {weight:.0e} at the median t, nearly all "
            "of the loss: such a weight is for the predictions x_0, v and edm"
        )

    @functools.cache
    def fixed_generator() -> Generator:
        return built.generator(mesh, batch_size=config.sampling.batch_size)

    def generator_for(params: Any) -> Generator:
        """Compiled once, but for a schedule that was learned on."""
        if built.objective.begin is None:
            return fixed_generator()
        now = built.with_schedule(jax.device_get(params))
        return now.generator(mesh, batch_size=config.sampling.batch_size)

    def save(state: TrainState, metrics: Metrics) -> None:
        check_finite(metrics, checkpoints)
        if checkpoints.latest_step() != int(state.step):
            about = {
                "config": to_json(config),
                "image_shape": source.image_shape,
                "num_images": len(source),
                "init_from": began_from,
            }
            checkpoints.save(state, about)

    def keep_averages(state: TrainState) -> None:
        check_finite(metrics, checkpoints)
        if jax.process_index() == 0:
            averages = (state.ema_params, *state.other_ema_params)
            snapshots.save(
                workdir / "averages", int(state.step), averages, training.ema_relative_stds
            )

    def draw(state: TrainState, stop: StopSignal) -> None:
        """A grid of samples; none if a signal comes between two batches of them."""
        step, params = int(state.step), state.ema_params if config.sampling.ema else state.params
        s, batches = config.sampling, []
        generator = generator_for(params)
        for part in generator.batches(params, s.num_samples, seed=s.seed):
            batches.append(part)
            if stop.name:
                return
        if not logbook.speaks:
            return
        images = np.concatenate(batches)
        pictures.save_grid(workdir / "samples" / f"step_{step:08}.png", images)
        logbook.image(step, "samples", pictures.grid(images))
        plot_losses(logbook.path, workdir / "losses.png")

    first, began = step, time.perf_counter()
    try:
        with StopSignal() as stop:
            for images, labels in pipeline.prefetch(batch, step, training.steps):
                state, metrics = train_step(state, metrics, images, labels)
                step += 1
                logbook.advance()
                if step == first + 1:
                    jax.block_until_ready(state)
                    logbook.say(
                        f"first step after {time.perf_counter() - began:.1f} s of compiling"
                    )
                    logbook.start_clock(step)
                if step % training.log_every == 0 or step == training.steps:
                    check_finite(metrics, checkpoints)
                    logbook.scalars(step, summary(metrics, built.schedule.num_steps))
                    metrics = no_metrics()
                every = training.ema_snapshot_every
                if every and (step % every == 0 or step == training.steps):
                    keep_averages(state)
                if step % training.checkpoint_every == 0:
                    save(state, metrics)
                between = training.sample_every and step < training.steps
                if between and step % training.sample_every == 0 and not stop.name:
                    save(state, metrics)  # before what takes long
                    draw(state, stop)
                    logbook.start_clock(step)
                if stop.requested(step):
                    break
            save(state, metrics)
            checkpoints.wait()
            if not stop.name:
                draw(state, stop)
            if stop.name:
                logbook.say(
                    f"{stop.name}: saved at step {step} of {training.steps}; "
                    "the same command goes on from here"
                )
                return
        logbook.say(f"done: step {step}; samples, losses.png and checkpoints are in {workdir}")
    except InputError:  # of a picture that cannot be read, found on the way
        if step > first and jax.process_count() == 1:  # others may be in the next step by now
            save(state, metrics)
        raise
    finally:
        logbook.close()
        checkpoints.close()


def check_run(config: ConfigDict, workdir: Path, source: Source | None = None) -> None:
    """InputError if the folder holds the run of another experiment, or of images of other shape.

    Says in a line each what is not the same and may be.
    """
    saved = saved_meta(workdir / "checkpoints")
    if saved is None:
        return
    changed = experiment.check_same_run(config, saved["config"], workdir)
    if source is None:
        return
    shape, count = tuple(saved["image_shape"]), saved["num_images"]
    if shape != source.image_shape:
        raise InputError(
            f"{workdir} holds a run on images of {shape}, these are {source.image_shape} (height, "
            "width, channels): choose another --workdir"
        )
    if count != len(source):
        changed.append(f"{len(source):,} images, before {count:,}")
    if changed and jax.process_index() == 0:
        say(f"changed since the last checkpoint: {'; '.join(changed)}")


@contextlib.contextmanager
def run_folder(workdir: Path) -> Iterator[None]:
    """The folder, made if need be and locked; InputError if it cannot be written, or is in use."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "checkpoints").mkdir(exist_ok=True)
        lock = (workdir / ".lock").open("w")
    except OSError as error:
        raise InputError(
            f"the run folder {workdir} cannot be written ({error.strerror}): "
            "choose another with --workdir"
        ) from error
    with lock:
        if jax.process_index() == 0:
            try:
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back however this ends
            except BlockingIOError as error:
                raise InputError(
                    f"another process is training in {workdir}: choose another --workdir"
                ) from error
            except (ImportError, OSError):
                pass  # a system, or a network's file system, without locks
        yield


def resume(checkpoints: Checkpoints, abstract: TrainState, placed: Any) -> TrainState | None:
    """The state of the newest good checkpoint, placed on the devices; None without one."""
    found = checkpoints.restore(sharding.abstract_like(items_of(abstract), placed), say)
    if found is None:
        return None
    items, meta = found
    step = jax.device_put(np.int32(meta["step"]), placed)
    return TrainState(step, **items)


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
    """Means since the last line: the loss, the gradient's norm, the loss by parts of 1..T."""
    m = jax.device_get(metrics)
    row = {"loss": float(m.loss / m.steps), "grad_norm": float(m.grad_norm / m.steps)}
    edges = -(-np.arange(NUM_BUCKETS + 1) * num_steps // NUM_BUCKETS)
    for i in np.flatnonzero(m.bucket_count):
        name = f"loss_t{edges[i] + 1:04}-{edges[i + 1]:04}"
        row[name] = float(m.bucket_loss[i] / m.bucket_count[i])
    return row
