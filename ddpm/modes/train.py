"""Training: build, restore, step, log, sample, save. Stopped at any moment, the same call
goes on from the last checkpoint, and ends in the same weights bit for bit."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm import experiment
from ddpm.config import to_json
from ddpm.data import pipeline
from ddpm.errors import InputError
from ddpm.sampling import pictures
from ddpm.training import sharding
from ddpm.training.checkpoints import Checkpoints, parameter_count, saved_meta
from ddpm.training.logbook import Logbook, plot_losses, say
from ddpm.training.state import NUM_BUCKETS, Metrics, TrainState, init, make_train_step
from ddpm.training.stopping import StopSignal


class NotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; the text names step and checkpoint."""


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains to config.training.steps in `workdir`, from its latest good checkpoint if it has one.

    Leaves there: config.json, metrics.jsonl, losses.png, tensorboard/, samples/, checkpoints/.
    Raises InputError for what the user can mend, NotFinite if training diverged.
    """
    training = config.training
    sharding.check_batch_size(training.batch_size, "training.batch_size")
    source = experiment.source(config)
    built = experiment.build(config, source.image_shape)
    checkpoints = open_run(config, workdir)

    # Everything on its devices: the weights on all of them, the batch split.
    mesh = sharding.data_mesh()
    everywhere, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    optimizer = built.optimizer
    start = jax.jit(
        lambda: init(built.model, optimizer, source.image_shape, config.seed),
        out_shardings=everywhere,
    )
    state = resume(checkpoints, jax.eval_shape(start), everywhere) or start()
    no_metrics = jax.jit(Metrics.zero, out_shardings=everywhere)
    metrics = no_metrics()
    train_step = jax.jit(
        make_train_step(
            built.model, built.schedule, optimizer, ema_decay=training.ema_decay, seed=config.seed
        ),
        in_shardings=(everywhere, everywhere, split),
        out_shardings=everywhere,
        donate_argnums=(0, 1),
    )
    generator = built.generator(mesh, batch_size=config.sampling.batch_size)

    def batch(step: int) -> jax.Array:
        part = pipeline.train_batch(
            source,
            config.seed,
            step,
            training.batch_size,
            flip=config.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return sharding.to_devices(mesh, part.image)

    step = int(state.step)
    logbook = Logbook(workdir, step=step, steps=training.steps)
    shape = "x".join(map(str, source.image_shape))
    origin = f"going on at step {step}" if step else "from the start"
    logbook.say(
        f"{parameter_count(state.params):,} parameters, {len(source):,} images of {shape}, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; {origin}, "
        f"to step {training.steps}, in {workdir}"
    )

    def save(state: TrainState, metrics: Metrics) -> None:
        check_finite(metrics, checkpoints)
        if checkpoints.latest_step() != int(state.step):
            about = {"config": to_json(config), "image_shape": source.image_shape}
            checkpoints.save(state, about)

    def draw(state: TrainState) -> None:
        step, params = int(state.step), state.ema_params if config.sampling.ema else state.params
        images = generator.samples(params, config.sampling.num_samples, seed=config.sampling.seed)
        if not logbook.speaks:
            return
        pictures.save_grid(workdir / "samples" / f"step_{step:08}.png", images)
        logbook.image(step, "samples", pictures.grid(images))
        plot_losses(logbook.path, workdir / "losses.png")

    first, began = step, time.perf_counter()
    try:
        with StopSignal() as stop:
            for images in pipeline.prefetch(batch, step, training.steps):
                state, metrics = train_step(state, metrics, images)
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
                if step % training.checkpoint_every == 0 or step == training.steps:
                    save(state, metrics)
                between = training.sample_every and step < training.steps
                if between and step % training.sample_every == 0:
                    draw(state)
                    logbook.start_clock(step)
                if stop.requested(step):
                    save(state, metrics)
                    checkpoints.wait()
                    logbook.say(
                        f"{stop.name}: saved at step {step} of {training.steps}; "
                        "the same command goes on from here"
                    )
                    return
        draw(state)
        checkpoints.wait()
        logbook.say(f"done: step {step}; samples, losses.png and checkpoints are in {workdir}")
    finally:
        logbook.close()
        checkpoints.close()


def open_run(config: ConfigDict, workdir: Path) -> Checkpoints:
    """The run folder, made if need be; InputError if it cannot be written or is another run's."""
    folder = workdir / "checkpoints"
    saved = saved_meta(folder)
    if saved is not None:
        experiment.check_same_run(config, saved["config"], workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")
        return Checkpoints(folder, keep=config.training.checkpoints_kept)
    except OSError as error:
        raise InputError(
            f"the run folder {workdir} cannot be written ({error.strerror}): "
            "choose another with --workdir"
        ) from error


def resume(checkpoints: Checkpoints, abstract: TrainState, placed: Any) -> TrainState | None:
    """The state of the newest good checkpoint, placed on the devices; None without one."""
    items = {"params": abstract.params, "ema_params": abstract.ema_params,
             "opt_state": abstract.opt_state}  # fmt: skip
    found = checkpoints.restore(sharding.abstract_like(items, placed), say)
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
