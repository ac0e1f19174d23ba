"""One image file of any kind to one uint8 array: 8 bits, no transparency, cropped, resized."""

import io
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ddpm.errors import InputError
from ddpm.files.reading import unreadable

MAX_PIXELS = 50_000_000  # of a file, by default: a whole picture is decoded before it is resized
_STRIP = 2**20  # pixels converted at once
_lock = threading.Lock()
_log = logging.getLogger(__name__)
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
    max_pixels: int = MAX_PIXELS,
    transparent: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Reads a file, or its bytes, as uint8[height, width, channels]; channels is 1 or 3.

    EXIF orientation is applied, transparency composited on `background`, a colour of Pillow's, and
    `transparent` called where there is some; 16 bits are scaled to 8; of an animation the first
    frame is read. With image_size (height, width) the image is cropped to that aspect ratio around
    its centre and resized. Raises InputError, with the name (by default the path), where the image
    cannot be read, or has more than max_pixels.
    """
    broken = f"{name or file!s}: cannot be read as an image"
    if not isinstance(file, bytes) and (reason := unreadable(file)):
        raise InputError(f"{broken} ({reason})")
    try:
        with _open(file) as image:
            if image.width * image.height > max_pixels:
                raise InputError(
                    f"{name or file!s}: {image.width}x{image.height} pixels (width x height): "
                    f"config.data.max_pixels = {max_pixels} at most; make it smaller, or raise that"
                )
            ImageOps.exif_transpose(image, in_place=True)
            flat = _flatten(image, channels, background, transparent)
        if image_size is not None:
            flat = crop_and_resize(flat, image_size)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds: OSError, SyntaxError, ..
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{broken} ({reason})") from error
    return np.asarray(flat, np.uint8).reshape(flat.height, flat.width, channels)


class Transparency:
    """A call for each picture with transparency: the first of them is reported, in the log."""

    def __init__(self, where: object, background: str) -> None:
        self.seen = False
        self._said = (
            f"{where}: transparent pictures are put on {background}, config.data.background"
        )

    def __call__(self) -> None:
        with _lock:
            first, self.seen = not self.seen, True
        if first:
            _log.warning(self._said)


def _open(file: Path | bytes) -> Image.Image:
    """Opens an image without Pillow's own limit of pixels, a warning and then an error."""
    with _lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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


def _flatten(
    image: Image.Image, channels: int, background: str, transparent: Callable[[], None]
) -> Image.Image:
    """Converts any mode of Pillow's to 'L' or 'RGB', in strips, whose copies take little memory."""
    mode, see_through = "L" if channels == 1 else "RGB", image.has_transparency_data
    if image.mode == mode and not see_through:
        image.load()
        return image
    flat, rows = Image.new(mode, image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if image.mode[0] in "IF":
            strip = _eight_bits(strip)
        elif see_through:
            strip = strip.convert("RGBA")
            if any(strip.getchannel("A").histogram()[:255]):
                transparent()
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, background), strip)
        flat.paste(strip.convert(mode), (0, top))
    return flat


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales the modes 'I' and 'I;16*': Pillow's own convert() would clip them at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels, of mode {image.mode}, are not of 8 or 16 bits")
    return Image.fromarray(np.rint(np.arange(65536) / 257).astype(np.uint8)[values])


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
