"""Samples as files: a grid, a GIF or MP4 of the chain, an .npz of any size."""

import contextlib
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ddpm.diffusion.pixels import HALF_BIN, to_uint8
from ddpm.diffusion.times import whole_number
from ddpm.errors import InputError
from ddpm.files.atomic import write_atomically

PROVENANCE = "provenance"  # what made the images, in the .npz and the PNG: JSON
FARTHEST = 10  # from 0, of a float that may still be noise on [-1, 1]


def grid(images: np.ndarray, *, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Tiles images [n, H, W, C], near square unless `columns` is given: uint8[h, w, C].

    Raises ValueError as `as_pixels` does, and for columns that are no number of them.
    """
    images = as_pixels(images)
    n, height, width, channels = images.shape
    if columns is not None:
        whole_number("columns", columns)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    sheet = np.full((rows, height + gap, columns, width + gap, channels), 255, np.uint8)
    cells = np.full((rows * columns, height, width, channels), 255, np.uint8)
    cells[:n] = images
    sheet[:, :height, :, :width] = cells.reshape(rows, columns, height, width, channels).swapaxes(
        1, 2
    )
    whole = sheet.reshape(rows * (height + gap), columns * (width + gap), channels)
    return whole[: -gap or None, : -gap or None]


def as_pixels(images: Any) -> np.ndarray:
    """Returns pictures [n, H, W, 1 or 3] as uint8: as they are, or from floats in [-1, 1].

    Raises ValueError for other types, shapes and values, which would come out black or white.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        raise ValueError(f"images of shape {images.shape}: must be [n, H, W, 1 or 3]")
    if images.dtype == np.uint8:
        return images
    if not _is_float(images):
        raise ValueError(f"images of {images.dtype}: must be uint8, or floats in [-1, 1]")
    images = images.astype(np.float32)
    least, most = float(images.min()), float(images.max())
    if not -1 - HALF_BIN <= least <= most <= 1 + HALF_BIN:  # what rounds to a pixel may pass
        raise ValueError(
            f"images of floats from {least:g} to {most:g}: floats must be in [-1, 1]: clip "
            "them, np.clip(images, -1, 1), or give pixels as uint8"
        )
    return to_uint8(images)


def _is_float(images: np.ndarray) -> bool:
    return images.dtype.kind in "fV"  # JAX's bfloat16 is of kind V


def show(images: Any, *, columns: int | None = None) -> Image.Image:
    """Returns a grid of images as a Pillow picture, which a notebook displays.

    Takes [n, H, W, 1 or 3], a single [H, W, 1 or 3], or grey ones [n, H, W]; NumPy or JAX, uint8 or
    floats in [-1, 1], of which those a little outside, as noise is, are clipped. Raises ValueError
    for others.
    """
    shown = np.asarray(images)
    if shown.ndim == 3:
        shown = shown[None] if shown.shape[-1] in (1, 3) else shown[..., None]
    if _is_float(shown) and shown.size and np.abs(shown).max(initial=0) <= FARTHEST:
        shown = np.clip(shown.astype(np.float32), -1, 1)
    return to_picture(grid(shown, columns=columns), least_side=400)


def to_picture(image: np.ndarray, *, least_side: int = 0) -> Image.Image:
    """Returns uint8[H, W, 1 or 3] as a Pillow image, enlarged by a whole factor to a side of
    least_side."""
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    factor = max(1, math.ceil(least_side / max(picture.size)))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def save_grid(
    path: Path,
    images: np.ndarray,
    *,
    columns: int | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a PNG of at least 400 pixels; small images are enlarged without blurring.

    images: [n, H, W, 1 or 3], uint8 or floats in [-1, 1]; ValueError for others. `about`, what
    made the images, is the file's text `provenance`, as JSON.
    """
    picture = to_picture(grid(images, columns=columns), least_side=400)
    words = PngInfo()
    if about is not None:
        words.add_text(PROVENANCE, json.dumps(about))
    write_atomically(path, lambda p: picture.save(p, format="PNG", pnginfo=words))


def save_gif(path: Path, frames: np.ndarray, *, milliseconds: int = 60) -> None:
    """Writes a looping GIF of grids that rests on the last one: [frames, n, H, W, C], of what
    `save_grid` takes."""
    pictures = [to_picture(grid(images), least_side=400) for images in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    write_atomically(
        path,
        lambda p: pictures[0].save(
            p, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
        ),
    )


def save_mp4(path: Path, frames: np.ndarray, *, milliseconds: int = 60) -> None:
    """Writes the same as an MP4 (H.264) that plays once; white fills up to even sides.

    Raises InputError where the package imageio-ffmpeg is missing, ValueError for other arrays.
    """
    write_frames = mp4_writer()
    if frames.ndim != 5 or not frames.size:
        raise ValueError(f"frames of shape {frames.shape}: must be [frames, n, H, W, C]")
    first = to_picture(grid(frames[0]), least_side=400)
    size = first.width + first.width % 2, first.height + first.height % 2
    rests = [len(frames) - 1] * round(2000 / milliseconds)

    def write(temporary: Path) -> None:
        video = write_frames(
            str(temporary),
            size,
            fps=1000 / milliseconds,
            codec="libx264",
            quality=8,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=["-f", "mp4"],  # which the name of a half file does not tell
        )
        with contextlib.closing(video):
            video.send(None)
            for i in [*range(len(frames)), *rests]:
                whole = Image.new("RGB", size, "white")
                whole.paste(to_picture(grid(frames[i]), least_side=400))
                video.send(whole.tobytes())

    write_atomically(path, write)


def mp4_writer() -> Any:
    """Returns imageio-ffmpeg's function to write videos; InputError without that package."""
    try:
        from imageio_ffmpeg import write_frames
    except ImportError as error:
        raise InputError(
            "MP4 needs the package imageio-ffmpeg: pip install imageio-ffmpeg"
        ) from error
    return write_frames


def save_npz(
    path: Path,
    batches: Iterable[np.ndarray],
    shape: tuple[int, ...],
    *,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes batches as one array `images`, uint8 of `shape` in all, as they come.

    `about`, what made the images, is the array `provenance` next to it, JSON:
    json.loads(np.load(path)["provenance"].item()). Raises ValueError, and leaves the file of
    before, if the batches are not that array.
    """

    def write(temporary: Path) -> None:
        written = 0
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("images.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for batch in batches:
                    if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                        raise ValueError(
                            f"images of shape {batch.shape[1:]} in {batch.dtype} came for an array "
                            f"of shape {shape} in uint8"
                        )
                    file.write(batch.tobytes())
                    written += len(batch)
            if about is not None:
                with archive.open(f"{PROVENANCE}.npy", "w") as file:
                    np.lib.format.write_array(file, np.array(json.dumps(about).encode()))
        if written != shape[0]:
            raise ValueError(f"{written} images came for an array of {shape}")

    write_atomically(path, write)
