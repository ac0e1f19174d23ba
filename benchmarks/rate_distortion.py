"""The bytes that image formats take for given images, and the squared error that they leave.

    python benchmarks/rate_distortion.py --images=test.npz --curves ideal=ideal.json real=real.json

JPEG, WebP, JPEG 2000, PNG and, after `pip install pillow-jxl-plugin`, JPEG XL: at several qualities
and lossless, where the format can; each image is a file of its own. Writes OUT.json and a plot,
OUT.png, and prints the points. Curves to be added, such as a codec's, are JSON lists of points
{"bits_per_dim": .., "psnr": ..}; one whose psnr is null is lossless.

A header is the smallest file, in the same settings, of an image of one colour and the same size.
PSNR is that of the mean squared error of all images.
"""

import argparse
import importlib.util
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401
import numpy as np
from PIL import Image
from PIL import __version__ as pillow

from ddpm.data.folders import folder
from ddpm.data.sources import digits, npz
from ddpm.errors import InputError, first_line
from ddpm.evaluation import report
from ddpm.files.atomic import check_writable, write_atomically

QUALITIES = (5, 10, 20, 35, 50, 65, 80, 90, 95)
DECIBELS = (15, 20, 25, 30, 35, 40, 45)
ONE_COLOUR = (0, 128, 255)


class Setting(NamedTuple):
    """A format of Pillow's with the options that it is saved with; quality None: lossless."""

    name: str
    format: str
    quality: int | None
    options: dict[str, Any]


def settings(side: int) -> Iterator[Setting]:
    """Yields what is measured, for images whose shorter side is given; JPEG XL if it is here."""
    yield Setting("PNG", "PNG", None, {"optimize": True})
    for q in QUALITIES:
        yield Setting("JPEG", "JPEG", q, {"quality": q, "optimize": True})
    for q in QUALITIES:
        yield Setting("WebP", "WEBP", q, {"quality": q, "method": 6})
    yield Setting("WebP", "WEBP", None, {"lossless": True, "quality": 100, "method": 6})
    # The bare code stream, without the boxes of a JP2 file; halved as often as the size allows.
    bare = {"no_jp2": True, "num_resolutions": min(6, 1 + int(math.log2(side)))}
    for q in DECIBELS:
        lossy = {"quality_mode": "dB", "quality_layers": [q], "irreversible": True}
        yield Setting("JPEG 2000", "JPEG2000", q, bare | lossy)
    yield Setting("JPEG 2000", "JPEG2000", None, bare | {"irreversible": False})
    if importlib.util.find_spec("pillow_jxl"):
        import pillow_jxl  # noqa: F401

        for q in QUALITIES:
            yield Setting("JPEG XL", "JXL", q, {"quality": q, "effort": 9})
        yield Setting("JPEG XL", "JXL", None, {"lossless": True, "effort": 9})


def encoded(image: np.ndarray, setting: Setting) -> bytes:
    """Returns the file of an image, uint8[H, W, 1 or 3]."""
    data = io.BytesIO()
    flat = image[..., 0] if image.shape[-1] == 1 else image
    Image.fromarray(flat).save(data, format=setting.format, **setting.options)
    return data.getvalue()


def decoded(data: bytes, channels: int) -> np.ndarray:
    """Returns the image of a file, uint8[H, W, channels]."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def measure(images: np.ndarray, setting: Setting) -> dict[str, Any]:
    """Returns the point of one setting: rates, and the PSNR of images that are not equal."""
    channels = images.shape[-1]
    files = [encoded(image, setting) for image in images]
    found = np.stack([decoded(data, channels) for data in files])
    error = float(((found.astype(np.float64) - images) ** 2).mean())
    if setting.quality is None and error:
        raise RuntimeError(f"{setting.name} that should be lossless changes images")
    flat = [np.full_like(images[0], colour) for colour in ONE_COLOUR]
    header = min(len(encoded(image, setting)) for image in flat)
    size = sum(map(len, files)) / len(files)
    bits = 8 / images[0].size
    return {
        "quality": setting.quality,
        "bytes_per_image": size,
        "header_bytes": header,
        "bits_per_dim": size * bits,
        "bits_per_dim_without_header": max(size - header, 0.0) * bits,
        "psnr": 10 * math.log10(255**2 / error) if error else None,
    }


def read_images(path: Path | None, count: int | None) -> np.ndarray:
    """Returns the first images of an .npz or a folder, or of the digits' test set: uint8[n, H, W,
    C], of one channel where all are grey."""
    if path is None:
        source: Any = digits("test")
    else:
        source = folder(path) if path.is_dir() else npz(path)
    images = source.read(np.arange(len(source))[:count]).image
    grey = (images == images[..., :1]).all()
    return images[..., :1] if grey else images


def read_curve(given: str) -> tuple[str, list[dict[str, Any]]]:
    """Returns the name and the points of NAME=FILE. Raises InputError for what is none."""
    name, _, file = given.partition("=")
    try:
        points = json.loads(Path(file).read_text())
        rates = [(float(p["bits_per_dim"]), float(p["psnr"] or 0)) for p in points]
        right = bool(name and rates) and np.isfinite(rates).all()
    except (ValueError, TypeError, KeyError):
        right = False
    if not right:
        raise InputError(
            f"--curves {given}: must be NAME=FILE, of a JSON list of points "
            '{"bits_per_dim": .., "psnr": ..}'
        )
    return name, points


def plot(measured: dict[str, Any], curves: dict[str, Any]) -> Any:
    """Returns the figure: whole files, dashed without headers; lossless ones along its top."""
    figure, axes = report.axes(7.5, 5)
    lossless = []
    for place, (name, points) in enumerate((measured | curves).items()):
        ours, colour = name in curves, f"C{place}"
        lossy = sorted((p for p in points if p["psnr"] is not None), key=lambda p: p["psnr"])
        psnr, rate = [p["psnr"] for p in lossy], [p["bits_per_dim"] for p in lossy]
        how = {"lw": 2.5} if ours else {"lw": 1, "marker": ".", "ms": 4}
        axes.plot(rate, psnr, color=colour, label=name, **how)
        if not ours:
            bare = [p["bits_per_dim_without_header"] for p in lossy]
            axes.plot(bare, psnr, color=colour, lw=0.8, ls="--")
        lossless += [(p["bits_per_dim"], colour) for p in points if p["psnr"] is None]
    for rate, colour in lossless:
        axes.plot(rate, 1, "v", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set(xlabel="bits/dim", ylabel="PSNR (dB)", xlim=(0, None))
    axes.set_title("dashed: without header bytes; on the top edge: lossless", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def table(measured: dict[str, Any], curves: dict[str, Any]) -> str:
    """Returns all points as text."""
    rows = [
        (
            name,
            point.get("quality") or ("" if name in curves else "lossless"),
            report.number(point["bits_per_dim"], 3),
            report.number(point.get("bits_per_dim_without_header"), 3),
            "lossless" if point["psnr"] is None else report.number(point["psnr"], 2),
        )
        for name, points in (measured | curves).items()
        for point in points
    ]
    return report.plain_table(("", "quality", "bits/dim", "without header", "PSNR (dB)"), rows)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help=".npz or folder; default: the digits' test set")
    parser.add_argument("--count", type=int, help="only the first of them")
    parser.add_argument("--curves", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, default=Path("runs/rate_distortion"))
    args = parser.parse_args()
    if args.count is not None and args.count < 1:
        parser.error(f"--count={args.count}: must be >= 1")
    try:
        check_writable(args.out.resolve().parent)
        curves = dict(read_curve(given) for given in args.curves)
        images = read_images(args.images, args.count)
    except (InputError, OSError) as error:
        parser.error(first_line(error))
    measured: dict[str, Any] = {}
    for setting in settings(min(images.shape[1:3])):
        measured.setdefault(setting.name, []).append(measure(images, setting))
    about = {
        "images": str(args.images or "digits"),
        "shape": list(images.shape),
        "pillow": pillow,
        "formats": measured,
        "curves": curves,
    }
    text, figure = json.dumps(about, indent=1) + "\n", plot(measured, curves)
    write_atomically(args.out.with_suffix(".json"), lambda path: path.write_text(text))
    write_atomically(
        args.out.with_suffix(".png"), lambda path: figure.savefig(path, format="png", dpi=144)
    )
    print(table(measured, curves))
    print(f"{args.out.with_suffix('.json')} has these, {args.out.with_suffix('.png')} the plot")


if __name__ == "__main__":
    main()
