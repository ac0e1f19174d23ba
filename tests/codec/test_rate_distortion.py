"""benchmarks/rate_distortion.py: its points against files and errors computed by hand."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.errors import InputError
from tests.exact import close

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import rate_distortion


@pytest.mark.parametrize("channels", [1, 3])
def test_points_of_every_format(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 20, channels)).astype(np.uint8)
    found = {}
    for setting in rate_distortion.settings(16):
        if setting.quality in (None, 20, 90):
            point = rate_distortion.measure(images, setting)
            found[setting.name, setting.quality] = point
            assert (point["psnr"] is None) == (setting.quality is None)
            assert 0 < point["header_bytes"] < point["bytes_per_image"]
    # Noise cannot be compressed: 8 bits/dim and the header.
    for name in ("PNG", "WebP", "JPEG 2000"):
        assert found[name, None]["bits_per_dim"] > 8
    assert found["JPEG", 20]["psnr"] < found["JPEG", 90]["psnr"]
    sizes, squares = [], []
    for image in images:
        file = io.BytesIO()
        flat = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        flat.save(file, "JPEG", quality=90, optimize=True)
        sizes.append(file.tell())
        read = np.asarray(Image.open(file)).reshape(image.shape)
        squares.append((read.astype(float) - image) ** 2)
    point = found["JPEG", 90]
    close(point["bits_per_dim"], 8 * sum(sizes) / images.size)
    close(point["psnr"], 10 * np.log10(255**2 / np.mean(squares)))
    without = point["bits_per_dim_without_header"] + 8 * point["header_bytes"] / images[0].size
    close(without, point["bits_per_dim"])


def test_grey_pictures_have_one_channel(tmp_path):
    grey = np.random.default_rng(1).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    for i, image in enumerate(grey):
        Image.fromarray(image).convert("RGB").save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(rate_distortion.read_images(tmp_path, 2)[..., 0], grey[:2])


def test_curves(tmp_path):
    points = [{"bits_per_dim": 0.5, "psnr": 20.0}, {"bits_per_dim": 4, "psnr": None}]
    file = tmp_path / "ideal.json"
    file.write_text(json.dumps(points))
    assert rate_distortion.read_curve(f"ideal={file}") == ("ideal", points)
    text = rate_distortion.table({}, {"ideal": points})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["ideal", "0.500", "n/a", "20.00"],
        ["ideal", "4.000", "n/a", "lossless"],
    ]
    for wrong in ("{}", "[]", '[{"psnr": 1}]', "[1]", '[{"bits_per_dim": NaN, "psnr": 1}]', "?"):
        file.write_text(wrong)
        with pytest.raises(InputError, match="must be NAME=FILE"):
            rate_distortion.read_curve(f"ideal={file}")
