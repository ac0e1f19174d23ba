"""Editing of pictures with a run: variations, inpainting, interpolation, reconstruction."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm.build.data import decoding
from ddpm.config import TASKS, with_settings
from ddpm.data.images import read_image
from ddpm.diffusion.pixels import to_float, to_uint8
from ddpm.diffusion.streams import sample_keys
from ddpm.errors import InputError
from ddpm.files import pictures
from ddpm.files.atomic import check_writable
from ddpm.files.progress import doing
from ddpm.modes.inputs import by, pictures_at
from ddpm.modes.loading import Run, announce, load_run
from ddpm.sampling import editing
from ddpm.sampling.sample import sample
from ddpm.training import sharding

GRID_ROWS = 50
HOLE = 128  # grey level of the area to paint, in the grid


class Edited(NamedTuple):
    """results: uint8[n, K, H, W, C], K for each picture (or pair); rows: the same with the inputs,
    for the grid; `what` they depend on, for the name; and a `report` to print."""

    results: np.ndarray
    rows: np.ndarray
    what: str
    report: str = ""


def edit(config: ConfigDict, workdir: Path, given: str, init_from: str = "", out: str = "") -> None:
    """Edits the pictures named by `given` by config.editing, with the weights that sample uses.

    The noise depends only on config.sampling.seed and a variation's number. Writes
    <name>.png, a row for each picture, and .npz, `images` uint8[n, H, W, C] in the same order
    without the inputs, to `out`, or else workdir/edits. The name has task, settings, weights and a
    digest of the pictures. Raises InputError for what the user can fix.
    """
    e, task = config.editing, config.editing.task
    if task == "inpaint" and bool(e.mask) == bool(e.box):
        raise InputError(
            "config.editing.task = 'inpaint' needs config.editing.mask, a picture that is white "
            "where to paint, or config.editing.box = (top, left, height, width), one of the two"
        )
    if task == "reconstruct":  # only DDIM can be inverted
        exact = {"sampler": "ddim", "eta": 0.0, "corrector_steps": 0}
        config, _ = with_settings(config, sampling=exact)
    if config.model.low_resolution:
        raise InputError(
            f"config.model.low_resolution = {config.model.low_resolution}: this model enlarges, "
            "and does not edit: see --mode=sample with config.sampling.low_resolution_images"
        )
    read = pictures_at(given, "--input", decoding(config))
    run = load_run(config, workdir, "edit", init_from)
    s, trained = run.built.config.sampling, run.built.config
    if s.guidance_scale != 1 and s.label < 0:
        raise InputError(
            f"config.sampling.guidance_scale = {s.guidance_scale}: say towards which class the "
            "pictures are edited, with config.sampling.label"
        )
    if trained.model.num_classes and not trained.training.label_dropout and s.label < 0:
        raise InputError(
            "config.sampling.label = -1: say of which class the pictures are: the model never "
            "learned to do without a label (config.training.label_dropout = 0)"
        )
    folder = Path(out).expanduser() if out else workdir / "edits"
    check_writable(folder)
    images = read(run.built.image_shape)
    announce(run, workdir)
    edited = _TASKS[task](run, images)
    digest = hashlib.sha256(images.tobytes() + str(images.shape).encode()).hexdigest()[:8]
    n, each = edited.results.shape[:2]
    name = f"{edited.what}_of_{digest}_{run.sample_name(config.sampling.seed, n * each)}"
    flat = edited.results.reshape(-1, *images.shape[1:])
    about = run.provenance(s.seed)
    pictures.save_npz(folder / f"{name}.npz", [flat], flat.shape, about=about)
    rows = edited.rows[:GRID_ROWS]
    pictures.save_grid(
        folder / f"{name}.png",
        rows.reshape(-1, *images.shape[1:]),
        columns=rows.shape[1],
        about=about,
    )
    if edited.report:
        print(edited.report)
    for suffix in ("npz", "png"):
        print(folder / f"{name}.{suffix}")


# --- Inputs


def _keep(run: Run) -> np.ndarray:
    """Returns the mask of pixels to keep, bool[H, W, 1], from config.editing.mask or .box."""
    e, (height, width, _) = run.built.config.editing, run.built.image_shape
    if e.mask:
        file = Path(e.mask).expanduser()
        most = run.built.config.data.max_pixels
        mask = read_image(file, channels=1, image_size=None, background="black", max_pixels=most)
        if mask.shape[:2] != (height, width):
            raise InputError(
                f"config.editing.mask = {e.mask!r} is {by(mask.shape[:2])}, the model's images "
                f"are {by((height, width))} (height x width): make it exactly that size"
            )
        keep = mask < 128
        if keep.all():
            raise InputError(
                f"config.editing.mask = {e.mask!r} has no white, which is what is painted: its "
                f"greatest value is {mask.max()}, white is 128..255"
            )
    else:
        top, left, rows, columns = e.box
        if top + rows > height or left + columns > width:
            raise InputError(
                f"config.editing.box = {tuple(e.box)}: (top, left, height, width) must lie within "
                f"the model's {by((height, width))}"
            )
        keep = np.ones((height, width, 1), bool)
        keep[top : top + rows, left : left + columns] = False
    if not keep.any():
        what = f"mask = {e.mask!r} is white" if e.mask else f"box = {tuple(e.box)} is the image"
        raise InputError(
            f"config.editing.{what} all over: nothing would be kept; use --mode=sample instead"
        )
    return keep


# --- Tasks


def _vary(run: Run, images: np.ndarray) -> Edited:
    t, how = _t(run), _chain(run)

    def one(denoiser: Any, keys: jax.Array, x_0: jax.Array) -> jax.Array:
        return editing.vary(keys, run.built.schedule, denoiser, x_0, t, **how)

    results = _variations(run, one, images)
    return Edited(results, np.concatenate([images[:, None], results], axis=1), f"vary_t{t}")


def _inpaint(run: Run, images: np.ndarray) -> Edited:
    e, built = run.built.config.editing, run.built
    keep = _keep(run)
    how = {"jump_length": e.jump_length, "resamplings": e.resamplings}
    try:  # checks sampler and times
        editing.inpainting(built.sampler, jnp.zeros((1, *built.image_shape)), keep)
        editing.repaint_times(built.times, **how)
    except ValueError as error:
        raise InputError(f"config.editing.task = 'inpaint': {error}") from error

    def one(denoiser: Any, keys: jax.Array, x_0: jax.Array) -> jax.Array:
        return editing.inpaint(keys, built.schedule, denoiser, x_0, keep, **_chain(run), **how)

    results = _variations(run, one, images)
    results = np.where(keep, images[:, None], results)  # the known pixels exactly, without rounding
    holed = np.where(keep, images, np.uint8(HOLE))
    rows = np.concatenate([images[:, None], holed[:, None], results], axis=1)
    mask = hashlib.sha256(keep.tobytes()).hexdigest()[:8]
    jumps = f"_jump{e.jump_length}" if e.resamplings > 1 else ""
    return Edited(results, rows, f"inpaint_mask{mask}_x{e.resamplings}{jumps}")


def _interpolate(run: Run, images: np.ndarray) -> Edited:
    t, how = _t(run), _chain(run)
    if len(images) < 2:
        raise InputError(
            "config.editing.task = 'interpolate' needs two pictures or more in --input, each to be "
            "joined to the next; there is one"
        )
    fractions = np.array(run.built.config.editing.fractions, np.float32)
    size = max(1, run.built.config.sampling.batch_size // len(fractions))

    def pairs(denoiser: Any, number: jax.Array, x_0: jax.Array, other: jax.Array) -> jax.Array:
        found = editing.interpolate(
            _keys(run, number),
            run.built.schedule,
            denoiser,
            x_0,
            other,
            fractions,
            t,
            **how,
        )
        return found.swapaxes(0, 1)

    ends = to_float(images)
    results = _in_batches(run, pairs, size, np.zeros(len(ends) - 1, int), ends[:-1], ends[1:])
    rows = np.concatenate([images[:-1, None], results, images[1:, None]], axis=1)
    digest = hashlib.sha256(fractions.tobytes()).hexdigest()[:4]
    return Edited(results, rows, f"interpolate_t{t}_f{digest}")


def _reconstruct(run: Run, images: np.ndarray) -> Edited:
    schedule, iterations = run.built.schedule, run.built.config.editing.iterations
    how = _chain(run)
    times = how["times"]

    def one(denoiser: Any, number: jax.Array, x_0: jax.Array) -> jax.Array:
        found = editing.invert(schedule, denoiser, x_0, times=times, iterations=iterations)
        back = sample(
            _keys(run, number),
            schedule,
            denoiser,
            x_0.shape,
            x_t=found.x_t,
            **how,
        )
        return jnp.stack([found.x_t, back], axis=1)

    x_0, size = to_float(images), run.built.config.sampling.batch_size
    rows = _in_batches(run, one, size, np.zeros(len(images), int), x_0)
    results = rows[:, 1:]
    off = np.abs(results[:, 0].astype(int) - images)
    report = f"reconstructed to {off.mean():.3g} of 255 levels on average, {off.max()} at most"
    rows = np.concatenate([images[:, None], rows], axis=1)
    return Edited(results, rows, f"reconstruct_i{iterations}", report)


_TASKS: dict[str, Callable[[Run, np.ndarray], Edited]] = dict(
    zip(TASKS, (_vary, _inpaint, _interpolate, _reconstruct), strict=True)
)


def _t(run: Run) -> int:
    return run.built.config.editing.t or max(1, run.built.schedule.num_steps // 2)


def _chain(run: Run) -> dict[str, Any]:
    return {"sampler": run.built.sampler, "times": run.built.times}


def _keys(run: Run, numbers: jax.Array) -> jax.Array:
    return sample_keys(jax.random.key(run.built.config.sampling.seed), numbers)


def _variations(
    run: Run, one: Callable[[Any, jax.Array, jax.Array], jax.Array], images: np.ndarray
) -> np.ndarray:
    """Returns config.editing.num_variations K of each image, [n, K, ..]; the k-th share noise."""
    config = run.built.config
    each = config.editing.num_variations

    def some(denoiser: Any, number: jax.Array, x_0: jax.Array) -> jax.Array:
        return one(denoiser, _keys(run, number), x_0)

    numbers = np.tile(np.arange(each), len(images))
    found = _in_batches(
        run, some, config.sampling.batch_size, numbers, np.repeat(to_float(images), each, axis=0)
    )
    return found.reshape(len(images), each, *images.shape[1:])


def _in_batches(
    run: Run, function: Callable[..., jax.Array], size: int, *arrays: np.ndarray
) -> np.ndarray:
    """Maps function(denoiser, *batch) over the first axis of the arrays, compiled once, to uint8.

    Batches are split over the devices; the last one is padded and cut. Raises InputError for
    results that are not finite.
    """
    n = len(arrays[0])
    size = sharding.rounded_up(min(size, n), run.mesh)

    @jax.jit
    def compiled(params: Any, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = function(run.built.steered_denoiser(params), *batch)
        return to_uint8(found), jnp.isfinite(found).all()

    results = []
    with doing("editing", total=n) as bar:
        for start in range(0, n, size):
            rows = np.minimum(np.arange(start, start + size), n - 1)
            batch = jax.device_put([a[rows] for a in arrays], sharding.split_batch(run.mesh))
            found, finite = compiled(run.params, *batch)
            if not finite:
                raise InputError(
                    "the edits are not finite: the model diverged; try config.sampling.clip = "
                    "True, or an earlier checkpoint"
                )
            results.append(np.asarray(found)[: n - start])
            bar.update(len(results[-1]))
    return np.concatenate(results)
