"""Compression of pictures with a run: --mode=compress writes files that --mode=decompress reads."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ddpm.build.data import decoding
from ddpm.codec import coder, tiles
from ddpm.codec.container import HEADER_BYTES, MODEL_BYTES, read_header
from ddpm.codec.packets import Layout, in_chunks
from ddpm.diffusion.pixels import to_float
from ddpm.diffusion.predictions import Denoiser, Prediction
from ddpm.errors import InputError
from ddpm.files.atomic import check_writable, write_atomically
from ddpm.files.progress import doing, say
from ddpm.modes.inputs import Named, by, named_pictures
from ddpm.modes.loading import Run, announce, load_run

SUFFIX = ".ddpm"
CURVE = "rate_distortion.json"


def compress(
    config: ConfigDict,
    workdir: Path,
    given: str,
    init_from: str = "",
    out: str = "",
    *,
    rate: float | None = None,
    psnr: float | None = None,
) -> None:
    """Compresses the pictures named by `given` with the weights that sample uses.

    Without loss, or as far as a rate in bits/dim or a PSNR in dB. Each picture becomes a file
    <name>.ddpm in `out`, or else workdir/compressed; with config.codec.together = n, n pictures of
    the model's size one file together_<number>.ddpm. Those of another size are cut into tiles.
    Writes rate_distortion.json too, of the pictures of the model's size, and prints sizes and
    errors. Raises InputError for what the user can fix; overwrites nothing.
    """
    pictures = named_pictures(given, "--input", decoding(config))
    run = load_run(config, workdir, "compress", init_from)
    check_codes(run)
    folder = Path(out).expanduser() if out else workdir / "compressed"
    check_writable(folder)
    _check_new(folder, pictures.names, run.built.config.codec.together)
    announce(run, workdir)
    denoiser, name = denoiser_of(run), model_name(run)
    c, shape = run.built.config.codec, run.built.image_shape
    layouts: dict[int, Layout] = {}  # by the images in a file
    written: list[coder.Encoded] = []
    whole: list[coder.Encoded] = []
    dimensions = 0
    with doing("compressing", total=len(pictures.names)) as bar:
        for names, images in _batches(run, pictures):
            picture = None if images.shape[2:] == shape else images.shape[2:4]
            given_images = images
            if picture is not None:
                given_images = tiles.cut(images[0, 0], shape[:2])[None]
                say(
                    f"{names[0]} is {by(picture)} (height x width): coded as "
                    f"{given_images.shape[1]} tiles of {by(shape[:2])}"
                )
            together = given_images.shape[1]
            try:
                found = coder.encode_files(
                    run.built.schedule,
                    denoiser,
                    jnp.asarray(to_float(given_images)),
                    c.seed,
                    rate=rate,
                    target_psnr=psnr,
                    lossless=rate is None and psnr is None,
                    nu=c.nu,
                    model=name,
                    layout=layouts.get(together) if picture is None else None,
                    picture=picture,
                )
            except ValueError as error:
                raise InputError(f"{names[0]}: {error}") from error
            if picture is None:
                layouts[together] = read_header(found[0].data).layout
                whole += found
            for file, encoded in zip(names, found, strict=True):
                _write(folder / f"{file}{SUFFIX}", encoded.data)
            written += found
            dimensions += images.size
            bar.update(images.shape[0] * images.shape[1])
    short = sum(file.curve[-1].psnr < psnr for file in written) if psnr is not None else 0
    if short:
        say(
            f"{short:,} of {len(written):,} files end before --psnr={psnr:g}: the schedule's last "
            "steps are longer than a packet"
        )
    print(_summary(written, dimensions, len(pictures.names)))
    if whole:
        curve = folder / CURVE
        text = json.dumps(_mean_curve(whole), indent=1)
        write_atomically(curve, lambda path: path.write_text(text))
        print(curve)
    print(folder)


def check_codes(run: Run) -> None:
    """Raises InputError for a model that has no codec: one that enlarges, or needs a label."""
    m = run.built.config.model
    if m.low_resolution:
        raise InputError(
            f"config.model.low_resolution = {m.low_resolution}: this model enlarges, and codes no "
            "images by themselves"
        )
    if m.num_classes and not run.built.config.training.label_dropout:
        raise InputError(
            "the model never learned to do without a label (config.training.label_dropout = 0): "
            "train one without labels, or with some dropped"
        )


def denoiser_of(run: Run) -> Denoiser:
    """Returns the run's denoiser with its parameters, as `codec.encode` takes it. The network has
    config.sampling.batch_size images at once."""

    def denoise(params: Any, x_t: jax.Array, t: jax.Array) -> Prediction:
        denoiser = run.built.denoiser(params)
        most = run.built.config.sampling.batch_size
        found: Prediction = in_chunks(lambda given: denoiser(*given), (x_t, t), most)
        return found

    return Partial(denoise, run.params)


def model_name(run: Run) -> bytes:
    """Returns the digest of weights, model, schedule and clipping that a file has of its model."""
    about = f"{run.fingerprint()} clip={run.built.config.sampling.clip}"
    return hashlib.sha256(about.encode()).digest()[:MODEL_BYTES]


def _batches(run: Run, pictures: Named) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Yields names of files and their images, uint8[F, G, H, W, C], as many as a batch has."""
    s, together = run.built.config.sampling, run.built.config.codec.together
    shape = run.built.image_shape
    most = max(1, s.batch_size // together) * together
    names: list[Path] = []
    images: list[np.ndarray] = []
    files = 0

    def flush() -> Iterator[tuple[list[Path], np.ndarray]]:
        nonlocal files
        full = len(images) // together * together
        for part, each in ((slice(0, full), together), (slice(full, None), len(images) - full)):
            if not images[part] or not each:
                continue
            stacked = np.stack(images[part]).reshape(-1, each, *shape)
            several = [Path(f"together_{files + i:05}") for i in range(len(stacked))]
            yield (names[part] if together == 1 else several), stacked
            files += len(stacked)
        names.clear()
        images.clear()

    for i, name in enumerate(pictures.names):
        image = pictures.read(i, shape[-1])
        if image.shape != shape:
            yield [name], image[None, None]
            continue
        names.append(name)
        images.append(image)
        if len(images) == most:
            yield from flush()
    yield from flush()


def _check_new(folder: Path, names: list[Path], together: int) -> None:
    """Raises InputError where two pictures have one name, or a file to be written is there."""
    if twice := repeated(names):
        raise InputError(f"--input: two pictures are named {twice[0]}: rename one")
    there = [folder / CURVE, *(folder / f"{name}{SUFFIX}" for name in names)]
    there += sorted(folder.glob(f"together_*{SUFFIX}")) if together > 1 else []
    refuse_existing([file for file in there if file.exists()])


def repeated(names: list[Path]) -> list[Path]:
    """Returns the names that stand there more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def refuse_existing(files: list[Path]) -> None:
    """Raises InputError if there are any of these files."""
    if files:
        raise InputError(f"{files[0]} is there already: remove it, or name another folder by --out")


def _write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def _mean_curve(files: list[coder.Encoded]) -> list[dict[str, float]]:
    """Returns the files' mean rate and PSNR by the number of packets; a file that has ended stays
    as it is."""
    found = []
    for k in range(1, max(len(file.curve) for file in files)):
        points = [file.curve[min(k, len(file.curve) - 1)] for file in files]
        rate, ideal, error = np.mean(points, axis=0)
        found.append({"bits_per_dim": rate, "ideal_bits_per_dim": ideal, "psnr": coder.psnr(error)})
    return found


def _summary(files: list[coder.Encoded], dimensions: int, images: int) -> str:
    """Returns what is printed of all files."""
    total = sum(len(file.data) for file in files)
    headers = HEADER_BYTES * len(files)
    pixels = sum(file.pixel_bytes for file in files)
    last = np.mean([file.curve[-1] for file in files], axis=0)
    text = (
        f"{images:,} images in {len(files):,} files, {total:,} bytes: "
        f"{8 * (total - headers) / dimensions:.3f} bits/dim and headers of "
        f"{8 * headers / dimensions:.3f}"
    )
    packets = (
        f"the packets {last[0]:.3f} bits/dim at {coder.psnr(last[2]):.1f} dB, an ideal coder of "
        f"the same steps {last[1]:.3f}"
    )
    exact = f"lossless, {8 * pixels / dimensions:.3f} of it the pixels; " if pixels else ""
    return f"{text}; {exact}{packets}"
