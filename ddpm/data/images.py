"""One image file of any kind to one uint8 array: 8 bits, no transparency, cropped, resized."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ddpm.errors import InputError

# Registered by Pillow as readable, but stubs, or run by an outside program.
_NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


def extensions() -> frozenset[str]:
    """Returns the file extensions, in lower case and with their dot, that Pillow can read as
    pictures."""
    return frozenset(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_PICTURES
    )


def read_image(
    file: Path | bytes,
    *,
    channels: int,
    image_size: tuple[int, int] | None,
    name: str = "",
    background: str = "white",
) -> np.ndarray:
    """Reads a file, or its bytes, as uint8[height, width, channels]; channels is 1 or 3.

    EXIF orientation is applied, transparency composited on `background`, 16 bits scaled to 8; of
    an animation the first frame is read. With image_size (height, width) the image is cropped to
    that aspect ratio around its centre and resized. Raises InputError, with the name (by default
    the path), where the image cannot be read.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            flat = _flatten(ImageOps.exif_transpose(image), channels, background)
        if image_size is not None:
            flat = crop_and_resize(flat, image_size)
    except Exception as error:  # Pillow's readers raise many kinds: OSError, SyntaxError, ..
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name or file!s}: cannot be read as an image ({reason})") from error
    return np.asarray(flat, np.uint8).reshape(flat.height, flat.width, channels)


def checked_size(image_size: Sequence[int] | None) -> tuple[int, int] | None:
    """Returns (height, width), or None for None or (). Raises InputError for anything else."""
    if image_size is None or (isinstance(image_size, Sequence) and not image_size):
        return None
    if isinstance(image_size, Sequence) and len(image_size) == 2 and min(image_size) > 0:
        return int(image_size[0]), int(image_size[1])
    raise InputError(f"image_size = {image_size!r}: must be (height, width)")


def crop_and_resize(image: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """Crops to the aspect ratio of (height, width), around the centre, and resizes (bicubic).

    Pillow's bicubic filter widens as it shrinks: it is antialiased. The crop may end inside of
    pixels, to keep proportions exact; where nothing is to be scaled it is in whole pixels, which
    stay as they are.
    """
    height, width = image_size
    scale = max(width / image.width, height / image.height)
    if scale == 1:
        column, row = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((column, row, column + width, row + height))
    x, y = min(image.width, width / scale), min(image.height, height / scale)
    left, top = (image.width - x) / 2, (image.height - y) / 2
    box = (left, top, (image.width + x) / 2, (image.height + y) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _flatten(image: Image.Image, channels: int, background: str) -> Image.Image:
    """Converts any mode of Pillow's to 'L' or 'RGB'."""
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales the modes 'I' and 'I;16*': Pillow's own convert() would clip them at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels, of mode {image.mode}, are not of 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257.0).astype(np.uint8))


def check_image_shape(
    found: tuple[int, ...],
    wanted: tuple[int, ...],
    whose: str,
    these: str = "these are",
    *,
    advice: str = "",
) -> None:
    """Raises InputError unless images are of the shape (height, width, channels) that is wanted.

    The error reads: `whose` the wanted shape, `these` the one found, `advice`.
    """
    if tuple(found) != tuple(wanted):
        raise InputError(
            f"{whose} {tuple(wanted)}, {these} {tuple(found)} (height, width, channels){advice}"
        )
