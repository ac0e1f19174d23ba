"""Decompression of what --mode=compress wrote, in whole or of any beginning of a file."""

from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ddpm.codec import coder, tiles
from ddpm.codec.container import HEADER_BYTES, Header, read_header
from ddpm.diffusion.pixels import to_uint8
from ddpm.diffusion.predictions import Denoiser
from ddpm.errors import InputError
from ddpm.files import pictures
from ddpm.files.atomic import check_writable, write_atomically
from ddpm.files.progress import doing
from ddpm.modes.compress import (
    SUFFIX,
    check_codes,
    denoiser_of,
    model_name,
    refuse_existing,
    repeated,
)
from ddpm.modes.inputs import by, existing
from ddpm.modes.loading import Run, announce, load_run

PROGRESSIVE = "progressive.png"
STAGES = 10
ROWS = 8


def decompress(
    config: ConfigDict,
    workdir: Path,
    given: str,
    init_from: str = "",
    out: str = "",
    *,
    rate: float | None = None,
) -> None:
    """Decompresses the files named by `given`, FILE[,FILE..] or a folder of them.

    A file that is cut off gives coarser images, as does a rate in bits/dim: no more of each is
    read. Writes <name>.png to `out`, or else workdir/decompressed, of several images in one file
    <name>_<number>.png; and of the first file progressive.png, its images by more and more of its
    packets. Raises InputError for what the user can fix; overwrites nothing.
    """
    files = _files(given)
    run = load_run(config, workdir, "decompress", init_from)
    check_codes(run)
    folder = Path(out).expanduser() if out else workdir / "decompressed"
    check_writable(folder)
    names = [name for _, name in files]
    if twice := repeated([*names, Path(PROGRESSIVE).with_suffix("")]):
        raise InputError(f"--input: {twice[0]}.png would be written twice: rename a file")
    made = [folder / f"{name}{end}.png" for name in names for end in ("", "_000")]
    refuse_existing([file for file in [*made, folder / PROGRESSIVE] if file.exists()])
    announce(run, workdir)
    denoiser, exact, cut_off = denoiser_of(run), 0, 0
    with doing("decompressing", total=len(files), unit="file") as bar:
        for number, (file, name) in enumerate(files):
            try:
                images, stages, lossless = _decoded(run, denoiser, file.read_bytes(), rate)
            except ValueError as error:
                raise InputError(f"{file}: {error}") from error
            exact, cut_off = exact + lossless, cut_off + (not lossless)
            several = [Path(f"{name}_{i:03}") for i in range(len(images))]
            for image, one in zip(images, [name] if len(images) == 1 else several, strict=True):
                _save(folder / f"{one}.png", image)
            if number == 0:
                flat = stages.reshape(-1, *stages.shape[2:])
                pictures.save_grid(folder / PROGRESSIVE, flat, columns=stages.shape[1])
            bar.update(1)
    print(f"{len(files):,} files: {exact:,} without loss, {cut_off:,} by packets alone")
    print(folder)


def _decoded(
    run: Run, denoiser: Denoiser, data: bytes, rate: float | None
) -> tuple[list[np.ndarray], np.ndarray, bool]:
    """Returns a file's images, the first of them by more and more packets, uint8[n, H, W, C] row by
    row, and whether it has the very pixels."""
    header, schedule = read_header(data), run.built.schedule
    if header.layout.shape != run.built.image_shape:
        raise ValueError(
            f"is of images of {by(header.layout.shape)}, the model's are "
            f"{by(run.built.image_shape)}"
        )
    if rate is not None:
        data = _read_to(data, header, rate)
    stages = []
    for last in coder.decodings(schedule, denoiser, data, model=model_name(run)):
        stages.append(to_uint8(np.asarray(last.x_0[:ROWS])))
    c = run.built.config.codec
    last = coder.finished(schedule, denoiser, last, c.decoder, jax.random.key(c.seed))
    images = to_uint8(np.asarray(last.x_0))
    stages[-1] = images[:ROWS]
    shown = np.unique(np.linspace(0, len(stages) - 1, STAGES).round().astype(int))
    rows = np.stack([stages[i] for i in shown], axis=1)
    if header.picture is not None:
        return [tiles.joined(images, header.picture)], rows, last.lossless
    return list(images), rows, last.lossless


def _read_to(data: bytes, header: Header, rate: float) -> bytes:
    """Returns the bytes of the packets of a rate, or all if a file has no more bits/dim."""
    bits, packet = rate * header.layout.dimensions, header.layout.packet_bits
    count = int(bits / packet + 1e-6)  # a rate of the curve may be a little less than its packets
    if count == 0:
        raise ValueError(
            f"--rate={rate:g}: its first packet is of {packet / header.layout.dimensions:.3g} "
            "bits/dim"
        )
    whole = bits >= 8 * (len(data) - HEADER_BYTES)
    return data if whole else data[: HEADER_BYTES + -(-count * packet // 8)]


def _files(given: str) -> list[tuple[Path, Path]]:
    """Returns the files of --input with the names of what they become."""
    found = []
    for path in existing(given, "--input"):
        if path.is_dir():
            below = sorted(path.rglob(f"*{SUFFIX}"))
            if not below:
                raise InputError(f"--input: {path}: no {SUFFIX} files there or below")
            found += [(file, file.relative_to(path).with_suffix("")) for file in below]
        else:
            found.append((path, Path(path.name).with_suffix("")))
    return found


def _save(path: Path, image: np.ndarray) -> None:
    write_atomically(path, lambda p: pictures.to_picture(image).save(p, format="PNG"))
