import json
import os
import sys

import imageio_ffmpeg
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from ddpm.data import sources
from ddpm.diffusion.pixels import to_float
from ddpm.errors import InputError
from ddpm.files.pictures import (
    grid,
    save_gif,
    save_grid,
    save_mp4,
    save_npz,
    show,
    to_picture,
)


def images(n, channels, height=2, width=3):
    """Every pixel of its own value, where there are no more than 255."""
    size = n * height * width * channels
    return (np.arange(size) % 255).astype(np.uint8).reshape(n, height, width, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gap", [0, 1, 2])
@pytest.mark.parametrize(
    ("n", "columns", "layout"),
    [(6, 3, (2, 3)), (5, None, (2, 3)), (4, None, (2, 2)), (1, None, (1, 1)), (2, 5, (1, 5))],
)
def test_grid_places_every_image_row_by_row(n, columns, layout, gap, channels):
    x = images(n, channels)
    sheet = grid(x, columns=columns, gap=gap)
    rows, across = layout
    height, width = rows * (2 + gap) - gap, across * (3 + gap) - gap
    assert sheet.shape == (height, width, channels)
    assert sheet.dtype == np.uint8
    expected = np.full_like(sheet, 255)
    for i in range(n):
        top, left = i // across * (2 + gap), i % across * (3 + gap)
        expected[top : top + 2, left : left + 3] = x[i]
    assert (sheet == expected).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_picture_is_enlarged_pixel_by_pixel(channels, mode):
    x = images(1, channels)[0]
    picture = to_picture(x, least_side=10)
    assert picture.mode == mode
    assert picture.size == (12, 8)
    enlarged = np.asarray(picture).reshape(8, 12, channels)
    assert (enlarged == x.repeat(4, 0).repeat(4, 1)).all()
    assert (np.asarray(to_picture(x)).reshape(x.shape) == x).all()


def test_floats_are_the_pixels_they_stand_for(tmp_path):
    """Samples of -1..1 cast to uint8 would be near black."""
    x = images(4, 3)
    scaled = x / 127.5 - 1
    for same in (scaled, np.float32(scaled), jnp.float32(scaled), scaled * (1 + 1e-6)):
        assert (grid(same) == grid(x)).all()
    save_gif(tmp_path / "a.gif", np.stack([scaled, scaled]))
    save_gif(tmp_path / "b.gif", np.stack([x, x]))
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.float32(images(4, 1)), "from 0 to 23: floats must be in"),
        (images(4, 1) / 127.5 - 1.1, "floats must be in"),
        (np.full((1, 2, 2, 1), np.nan), "floats must be in"),
        (np.int32(images(4, 1)), "of int32: must be uint8, or floats"),
        (images(4, 1) > 3, "of bool: must be uint8, or floats"),
        (images(4, 1)[0], "must be .n, H, W, 1 or 3."),
        (images(2, 3)[..., :2], "must be .n, H, W, 1 or 3."),
        (images(2, 3)[:0], "must be .n, H, W, 1 or 3."),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        save_grid(tmp_path / "grid.png", wrong)
    with pytest.raises(ValueError, match=message):
        save_gif(tmp_path / "chain.gif", wrong[None])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_grid_can_be_read_back(tmp_path, channels):
    x = images(4, channels, 60, 70)
    path = tmp_path / "new" / "grid.png"
    save_grid(path, x)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert max(picture.size) >= 400
        pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    sheet = grid(x)
    assert (pixels == sheet.repeat(3, 0).repeat(3, 1)).all()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_gif_has_every_frame_and_rests_on_the_last(tmp_path, channels):
    frames = np.stack([images(2, channels, 4, 4) + 10 * i for i in range(5)]).astype(np.uint8)
    save_gif(tmp_path / "chain.gif", frames, milliseconds=50)
    with Image.open(tmp_path / "chain.gif") as gif:
        assert gif.n_frames == 5
        assert gif.info["loop"] == 0
        read = [
            (f.info["duration"], np.asarray(f.convert("RGB"))) for f in ImageSequence.Iterator(gif)
        ]
    assert [duration for duration, _ in read] == [50, 50, 50, 50, 2000]
    for (_, found), x in zip(read, frames, strict=True):
        expected = np.asarray(to_picture(grid(x), least_side=400).convert("RGB"))
        assert found.shape == expected.shape
        # A GIF has 256 colours.
        assert abs(found.astype(int) - expected).max() <= (0 if channels == 1 else 8)


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_has_every_frame_and_rests_on_the_last(tmp_path, channels):
    # Slow ramps of grey: what a video keeps well. 401 pixels high, which is odd.
    frames = np.empty((5, 2, 401, 60, channels), np.uint8)
    for i in range(5):
        frames[i] = 40 * i + np.arange(60)[:, None]
    save_mp4(tmp_path / "chain.mp4", frames, milliseconds=100)
    assert [p.name for p in tmp_path.iterdir()] == ["chain.mp4"]
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "chain.mp4"))
    about = next(reader)
    assert about["codec"] == "h264"
    assert about["size"] == (122, 402)
    assert about["fps"] == 10
    read = [np.frombuffer(f, np.uint8).reshape(402, 122, 3).astype(int) for f in reader]
    assert len(read) == 5 + 20
    for found, x in zip(read, [*frames, *[frames[-1]] * 20], strict=True):
        expected = np.asarray(to_picture(grid(x)).convert("RGB"), int)
        assert abs(found[:401, :121] - expected).mean() < 4
        assert found[401].mean() > 150  # filled up with white


def test_mp4_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(InputError, match="pip install imageio-ffmpeg"):
        save_mp4(tmp_path / "chain.mp4", images(2, 1)[None])
    assert list(tmp_path.iterdir()) == []


def test_mp4_of_other_arrays_is_refused(tmp_path):
    for frames in (
        images(2, 3),
        np.zeros((2, 1, 4, 4, 3), int),
        np.zeros((0, 1, 4, 4, 3), np.uint8),
    ):
        with pytest.raises(ValueError, match="must be"):
            save_mp4(tmp_path / "chain.mp4", frames)
    assert list(tmp_path.iterdir()) == []


def test_npz_is_written_batch_by_batch(tmp_path):
    x = images(7, 3)
    seen = []

    def batches():
        for start in (0, 3, 6):
            # Nothing but the partial file may be there while they come.
            seen.append((tmp_path / "samples.npz").exists())
            yield x[start : start + 3]

    save_npz(tmp_path / "samples.npz", batches(), x.shape)
    assert seen == [False] * 3
    with np.load(tmp_path / "samples.npz") as file:
        assert file.files == ["images"]
        assert file["images"].dtype == np.uint8
        assert (file["images"] == x).all()
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_npz_of_images_in_any_memory_order(tmp_path):
    x = images(4, 3).transpose(0, 2, 1, 3)
    save_npz(tmp_path / "samples.npz", [x], x.shape)
    with np.load(tmp_path / "samples.npz") as file:
        assert (file["images"] == x).all()


@pytest.mark.parametrize("n", [5, 9])
def test_npz_of_too_few_or_too_many_images_is_refused(tmp_path, n):
    x = images(7, 3)
    with pytest.raises(ValueError, match="7 images came"):
        save_npz(tmp_path / "samples.npz", [x], (n, *x.shape[1:]))
    assert list(tmp_path.iterdir()) == []


def test_npz_of_other_images_than_announced_is_refused(tmp_path):
    """Else the file cannot be read, or the pixels come out in a wrong order."""
    for shape in [(7, 3, 2, 3), (7, 2, 3, 1)]:
        with pytest.raises(ValueError, match="shape"):
            save_npz(tmp_path / "samples.npz", [images(7, 3)], shape)
    with pytest.raises((ValueError, TypeError), match="uint8"):
        save_npz(tmp_path / "samples.npz", [images(7, 3) / 255], (7, 2, 3, 3))
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_file_of_before_and_leaves_no_other(tmp_path):
    path, x = tmp_path / "samples.npz", images(7, 3)
    save_npz(path, [x], x.shape)

    def batches():
        yield x[:3]
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="gone"):
        save_npz(path, batches(), x.shape)
    with np.load(path) as file:
        assert (file["images"] == x).all()
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_two_that_write_the_same_file_do_not_mix(tmp_path):
    """The one that ends last wins, whole."""
    path, (x, y) = tmp_path / "samples.npz", (images(7, 3), 255 - images(7, 3))

    def batches():
        yield x[:3]
        save_npz(path, [y], y.shape)  # of another process, meanwhile
        with np.load(path) as file:
            assert (file["images"] == y).all()
        yield x[3:]

    save_npz(path, batches(), x.shape)
    with np.load(path) as file:
        assert (file["images"] == x).all()
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_what_killed_processes_left_is_removed_a_day_later(tmp_path):
    old, young = tmp_path / ".1.partial", tmp_path / ".2.partial"
    old.touch(), young.touch()
    os.utime(old, (0, 0))
    save_grid(tmp_path / "grid.png", images(1, 3))
    assert {p.name for p in tmp_path.iterdir()} == {"grid.png", young.name}


def test_npz_and_grid_say_what_made_them(tmp_path):
    x, about = images(7, 3), {"seed": 3, "run": "näch\nste"}
    save_npz(tmp_path / "samples.npz", [x], x.shape, about=about)
    save_grid(tmp_path / "samples.png", x, about=about)
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file.files == ["images", "provenance"]
        assert json.loads(file["provenance"].item()) == about
    with Image.open(tmp_path / "samples.png") as picture:
        assert json.loads(picture.text["provenance"]) == about
    assert (sources.npz(tmp_path / "samples.npz").image == x).all()


def test_failure_leaves_no_grid(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        save_grid(tmp_path / "grid.png", images(4, 5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (np.zeros((4, 6, 6, 3), np.float32), (403, 403)),
        (np.zeros((6, 6, 1)), (402, 402)),
        (np.zeros((4, 6, 6), np.uint8), (403, 403)),
        (jnp.zeros((4, 6, 6, 1), jnp.bfloat16), (403, 403)),
    ],
)
def test_show_takes_what_a_notebook_has(given, size):
    picture = show(given)
    assert picture.size == size
    assert hasattr(picture, "_repr_png_")  # what a notebook asks for
    value = 0 if given.dtype == np.uint8 else 128
    assert picture.getpixel((0, 0)) in (value, (value,) * 3)


def test_floats_are_shown_as_they_are_scaled(tmp_path):
    """Also in files; noise beyond the range is clipped."""
    x = images(6, 1)
    floats = to_float(x)
    assert show(floats).tobytes() == show(x).tobytes()
    for name, given in (("a.png", x), ("b.png", floats)):
        save_grid(tmp_path / name, given)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    ends = np.array([-4.2, -1, 1, 3.9]).reshape(1, 2, 2, 1)
    assert show(ends).tobytes() == show(np.clip(ends, -1, 1)).tobytes()
    assert show(x, columns=6).width > show(x, columns=6).height


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.full((1, 4, 4, 1), 200.0), "from 200 to 200: floats must be in"),
        (np.zeros((1, 4, 4, 1), np.int32), "images of int32: must be uint8, or floats in"),
        (np.zeros((1, 4, 4, 1), bool), "images of bool"),
        (np.full((1, 4, 4, 1), np.nan), "from nan to nan"),
        (np.zeros((1, 4, 4, 2)), r"shape \(1, 4, 4, 2\): must be \[n, H, W, 1 or 3\]"),
        (np.zeros((4, 4)), r"shape \(4, 4\)"),
        (np.zeros((0, 4, 4, 1)), r"shape \(0, 4, 4, 1\)"),
    ],
)
def test_what_would_come_out_black_or_white_is_refused(tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        show(given)
    if given.ndim == 4 and given.shape[-1] == 1 and given.size:
        with pytest.raises(ValueError, match=said):
            save_grid(tmp_path / "new.png", given)
        assert not (tmp_path / "new.png").exists()
