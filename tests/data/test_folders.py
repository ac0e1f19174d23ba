"""A folder of images of all kinds: modes, orientation, cropping, classes, broken files."""

import io
import logging
import os

import numpy as np
import pytest
from PIL import Image

from ddpm.config import default
from ddpm.data import ArraySource, EncodedSource, folder, images
from ddpm.data.images import read_image
from ddpm.errors import InputError
from ddpm.modes.inputs import pictures_at


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(path, **options)
    return path


def read(path, channels=3, image_size=None):
    return read_image(path, channels=channels, image_size=image_size)


def extent(image):
    """Height and width of what is bright."""
    rows, columns = np.nonzero(image[..., 0] > 127)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


@pytest.mark.parametrize("image_size", [(32, 32), (64, 32), (20, 60)])
@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (128, 128), (40, 50)])
def test_a_disc_stays_a_disc(tmp_path, shape, image_size):
    y, x = np.mgrid[: shape[0], : shape[1]]
    radius = 7
    centre = ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
    disc = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2) * np.uint8(255)
    image = read(save(tmp_path / "a.png", disc), 1, image_size)
    assert image.shape == (*image_size, 1)
    scale = max(image_size[0] / shape[0], image_size[1] / shape[1])  # the crop fills the target
    height, width = extent(image)
    assert abs(height - width) <= 1
    assert abs(height - 2 * radius * scale) <= 2
    rows, columns = np.nonzero(image[..., 0] > 127)
    assert abs(rows.mean() - (image_size[0] - 1) / 2) <= 1
    assert abs(columns.mean() - (image_size[1] - 1) / 2) <= 1


def test_an_image_of_the_right_size_keeps_its_pixels_and_a_larger_one_is_only_cropped(tmp_path):
    pixels = noise(32, 37)
    path = save(tmp_path / "a.png", pixels)
    assert (read(path) == pixels).all()
    assert (read(path, image_size=(32, 37)) == pixels).all()
    assert (read(path, image_size=(32, 32)) == pixels[:, 2:34]).all()
    tall = noise(41, 16)
    assert (read(save(tmp_path / "b.png", tall), image_size=(20, 16)) == tall[10:30]).all()


def test_shrinking_is_antialiased(tmp_path):
    stripes = np.zeros((128, 128), np.uint8)
    stripes[:, ::2] = 255  # the finest stripes there are: grey when shrunk, never black or white
    image = read(save(tmp_path / "a.png", stripes), 1, (16, 16))
    assert (abs(image[:, 1:-1].astype(int) - 127) < 12).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = noise(8, 12)
    stored = {  # how a camera holds each, from the EXIF standard: where row 0 and column 0 are
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    assert (read(path) == upright).all()


def test_every_mode_becomes_eight_bits_of_grey_or_colour(tmp_path):
    grey = noise(6, 6, 1)
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    assert (read(save(tmp_path / "grey.png", grey)) == as_rgb).all()
    assert (read(save(tmp_path / "grey1.png", grey), 1)[..., 0] == grey).all()

    black_white = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    one_bit = read(save(tmp_path / "bits.png", black_white), 1)
    assert (one_bit[..., 0] == np.where(grey >= 128, 255, 0)).all()

    sixteen = grey.astype(np.uint16) * 257
    assert (read(save(tmp_path / "16.png", sixteen), 1)[..., 0] == grey).all()
    assert (read(save(tmp_path / "16.tif", sixteen)) == as_rgb).all()
    dark = np.full((4, 4), 1000, np.uint16)  # not clipped to white
    assert (read(save(tmp_path / "dark.png", dark)) == 4).all()

    palette = Image.fromarray(grey).convert("P")
    assert (read(save(tmp_path / "palette.png", palette)) == as_rgb).all()
    colours = Image.fromarray(noise(6, 6)).quantize(16)
    expected = np.asarray(colours.convert("RGB"))
    assert (read(save(tmp_path / "colours.gif", colours)) == expected).all()

    cmyk = Image.new("CMYK", (6, 6), (0, 255, 255, 0))
    assert np.allclose(read(save(tmp_path / "cmyk.tif", cmyk)), (255, 0, 0), atol=3)
    assert np.allclose(read(save(tmp_path / "cmyk.jpg", cmyk)), (255, 0, 0), atol=30)


def test_a_sixteen_bit_pgm(tmp_path):
    values = np.array([[0, 25700], [65535, 257]], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535\n" + values.tobytes())
    assert read(tmp_path / "a.pgm", 1)[..., 0].tolist() == [[0, 100], [255, 1]]


def test_transparency_shows_white(tmp_path):
    rgba = np.concatenate([noise(4, 4), np.zeros((4, 4, 1), np.uint8)], axis=2)
    rgba[1:, :, 3] = 255
    image = read(save(tmp_path / "a.png", rgba))
    assert (image[0] == 255).all()
    assert (image[1:] == rgba[1:, :, :3]).all()
    half = np.full((4, 4, 2), (0, 128), np.uint8)
    assert (
        abs(read(save(tmp_path / "b.png", Image.fromarray(half)), 1).astype(int) - 127) < 2
    ).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    image = read(save(tmp_path / "c.png", palette, transparency=0))
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[1, 1].tolist() == [40, 50, 60]


def see_through(path, count=1):
    """Pictures of which the upper half is not there."""
    rgba = np.concatenate([noise(4, 4), np.full((4, 4, 1), 255, np.uint8)], axis=2)
    rgba[:2, :, 3] = 0
    for i in range(count):
        save(path / f"{i}.png", rgba)
    return rgba


@pytest.mark.parametrize("budget", [0, 10**6])
def test_transparency_shows_the_background_and_is_said_once(tmp_path, caplog, budget):
    rgba = see_through(tmp_path, 3)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        source = folder(tmp_path, background="#0a141e", memory_budget=budget)
        for _ in range(2):
            images = source.read(np.arange(3)).image
        assert (images[:, :2] == [10, 20, 30]).all()
        assert (images[:, 2:] == rgba[2:, :, :3]).all()
        (record,) = caplog.records
        assert "are put on #0a141e, config.data.background" in record.getMessage()
    assert (folder(tmp_path).read(np.arange(3)).image[:, :2] == 255).all()


def test_of_an_alpha_channel_without_effect_nothing_is_said(tmp_path, caplog):
    save(tmp_path / "a.png", np.full((4, 4, 4), 255, np.uint8))
    assert (folder(tmp_path).read(np.arange(1)).image == 255).all()
    assert not caplog.records


def test_input_pictures_too_are_put_on_the_background(tmp_path, caplog):
    see_through(tmp_path, 2)
    how = {"background": "black", "max_pixels": 16}
    for given in (tmp_path, f"{tmp_path / '0.png'},{tmp_path / '1.png'}"):
        caplog.clear()
        assert (pictures_at(str(given), "--input", how)((4, 4, 3))[:, :2] == 0).all()
        assert len(caplog.records) == 1
    with pytest.raises(InputError, match=r"config\.data\.max_pixels = 15 at most"):
        pictures_at(str(tmp_path / "0.png"), "--input", how | {"max_pixels": 15})((4, 4, 3))


def test_large_pictures_are_converted_as_small_ones(tmp_path, monkeypatch):
    """In strips, of which the last is lower."""
    for mode, size in (("RGBA", 4), ("LA", 2), ("I;16", 2), ("P", 1)):
        image = Image.frombytes(mode, (7, 13), noise(13, 7 * size, 1).tobytes())
        path = save(tmp_path / f"{mode}.png", image)
        for channels in (1, 3):
            whole = read(path, channels)
            with monkeypatch.context() as patch:
                patch.setattr(images, "_STRIP", 21)
                np.testing.assert_array_equal(read(path, channels), whole)


def screen(width, height):
    """A GIF of one pixel on a screen of any size: Pillow makes a picture of that size."""
    image = io.BytesIO()
    Image.new("P", (1, 1)).save(image, "GIF")
    data = bytearray(image.getvalue())
    data[6:10] = np.array([width, height], "<u2").tobytes()
    return bytes(data)


@pytest.mark.filterwarnings("error")
def test_pixels_are_bounded_before_they_are_decoded(tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_bytes(screen(65_535, 65_535))
    said = r"a\.gif: 65535x65535 pixels .*config\.data\.max_pixels = 50000000 at most; make it"
    with pytest.raises(InputError, match=said):
        read(tmp_path / "a.gif")
    with pytest.raises(InputError, match="7072x7071 pixels"):
        read_image(screen(7072, 7071), channels=1, image_size=None, name="x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # of Pillow's own nothing is seen
    small = screen(7, 8)
    assert read_image(small, channels=1, image_size=None, max_pixels=56).shape == (8, 7, 1)
    with pytest.raises(InputError, match="max_pixels = 55"):
        read_image(small, channels=1, image_size=None, max_pixels=55)
    assert Image.MAX_IMAGE_PIXELS == 20
    assert default().data.max_pixels == images.MAX_PIXELS == 50_000_000


def test_a_pipe_is_no_picture(tmp_path):
    save(tmp_path / "a.png", noise(4, 4))
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png: .*not a regular file, but a pipe"):
        folder(tmp_path)
    assert len(folder(tmp_path, broken="skip")) == 1
    with pytest.raises(InputError, match=r"b\.png: .*not a regular file"):
        read(tmp_path / "b.png")


def test_pixels_that_are_not_eight_or_sixteen_bits_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.random.default_rng(0).random((4, 4), np.float32))
    with pytest.raises(InputError, match=r"a\.tif: cannot be read .*mode F"):
        read(path)


def three_images(root):
    for i, name in enumerate(("b.png", "a.jpg", "deep/er/c.webp")):
        save(root / name, noise(30 + i, 40, seed=i))
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_text("nor this")
    (root / ".thumbnails").mkdir()
    save(root / ".thumbnails" / "a.png", noise(3, 3))


def test_a_folder_is_read_in_order_of_the_paths(tmp_path):
    three_images(tmp_path)
    source = folder(tmp_path, (16, 16))
    assert isinstance(source, ArraySource)
    assert len(source) == 3
    assert source.image_shape == (16, 16, 3)
    assert source.num_classes is None
    for i, name in enumerate(("a.jpg", "b.png", "deep/er/c.webp")):
        expected = read(tmp_path / name, image_size=(16, 16))
        assert (source.read(np.array([i])).image[0] == expected).all()
    lazy = folder(tmp_path, (16, 16), memory_budget=0)
    assert isinstance(lazy, EncodedSource)
    assert (lazy.read(np.array([2, 0])).image == source.read(np.array([2, 0])).image).all()
    assert folder(tmp_path, (16, 24), channels=1).image_shape == (16, 24, 1)


def test_changed_files_are_decoded_again(tmp_path):
    path = save(tmp_path / "a.png", noise(8, 8, seed=1))
    folder(tmp_path)
    save(path, noise(8, 8, seed=2))
    os.utime(path, ns=(1, 1))
    assert (folder(tmp_path).read(np.array([0])).image[0] == noise(8, 8, seed=2)).all()
    save(tmp_path / "b.png", noise(8, 8, seed=3))
    assert len(folder(tmp_path)) == 2


def test_sub_folders_are_classes_if_no_image_is_outside(tmp_path):
    for i, name in enumerate(("dog/1.png", "cat/x/2.png", "emu/0.png", "cat/1.png")):
        save(tmp_path / name, noise(8, 8, seed=i))
    for budget in (0, 10**6):
        source = folder(tmp_path, memory_budget=budget)
        assert source.num_classes == 3
        assert source.read(np.arange(4)).label.tolist() == [0, 0, 1, 2]  # cat cat dog emu
        assert source.read(np.arange(4)).label.dtype == np.int32
    save(tmp_path / "0.png", noise(8, 8))
    assert folder(tmp_path).num_classes is None
    assert folder(tmp_path).read(np.arange(1)).label is None


def test_linked_folders_are_followed_but_not_for_ever(tmp_path):
    save(tmp_path / "elsewhere" / "1.png", noise(8, 8))
    root = tmp_path / "root"
    save(root / "a" / "0.png", noise(8, 8))
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    source = folder(root)
    assert len(source) == 2
    assert source.num_classes == 2


def test_a_folder_with_links_to_it_keeps_its_own_class(tmp_path):
    """Only a folder's own ancestors end a walk; so do loops through several links."""
    root = tmp_path / "root"
    for name in ("cat/0", "cat/1", "dog/puppies/0", "dog/puppies/1", "dog/puppies/2"):
        save(root / f"{name}.png", noise(8, 8))
    (root / "animals").symlink_to(root / "dog" / "puppies")
    source = folder(root)
    assert (len(source), source.num_classes) == (8, 3)
    assert np.bincount(source.read(np.arange(8)).label).tolist() == [3, 2, 3]
    (root / "cat" / "friends").symlink_to(root / "dog")  # cat -> dog -> cat -> ..
    (root / "dog" / "friends").symlink_to(root / "cat")
    assert np.bincount(folder(root).read(np.arange(13)).label).tolist() == [3, 5, 5]

    shared = tmp_path / "shared"
    for i in range(5):
        save(shared / f"{i}.png", noise(8, 8))
    (tmp_path / "links").mkdir()
    for name in "ab":
        (tmp_path / "links" / name).symlink_to(shared)
    source = folder(tmp_path / "links")
    assert (len(source), source.num_classes) == (10, 2)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(InputError, match=r"no images there .*1 other"):
        folder(tmp_path / "empty")
    with pytest.raises(InputError, match="is not a folder"):
        folder(tmp_path / "empty" / "x.txt")
    with pytest.raises(InputError, match="channels = 4"):
        folder(tmp_path, channels=4)
    with pytest.raises(InputError, match=r"image_size = \(8,\): must be"):
        folder(tmp_path, (8,))
    with pytest.raises(InputError, match="'error' or 'skip'"):
        folder(tmp_path, broken="ignore")


def test_without_a_size_all_must_be_of_one(tmp_path):
    save(tmp_path / "a.png", noise(8, 10))
    save(tmp_path / "b.png", noise(8, 10))
    assert folder(tmp_path).image_shape == (8, 10, 3)
    save(tmp_path / "c.png", noise(10, 8))
    with pytest.raises(InputError, match=r"c\.png is 10x8 .*a\.png is 8x10: set image_size"):
        folder(tmp_path)


def broken_folder(root):
    for i in range(6):
        save(root / f"{i % 2}" / f"{i}.jpg", noise(64, 64, seed=i))
    truncated = root / "0" / "2.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-800])
    (root / "1" / "3.jpg").write_text("no image at all")
    return truncated


def test_a_broken_image_is_named(tmp_path):
    truncated = broken_folder(tmp_path)
    with pytest.raises(InputError, match="cannot be read as an image") as error:
        folder(tmp_path, (8, 8))
    assert str(truncated) in str(error.value)
    assert "\n" not in str(error.value)
    lazy = folder(tmp_path, (8, 8), memory_budget=0)
    with pytest.raises(InputError, match=r"2\.jpg"):
        lazy.read(np.arange(4))


@pytest.mark.parametrize("budget", [0, 10**6])
def test_broken_images_can_be_left_out(tmp_path, caplog, budget):
    truncated = broken_folder(tmp_path)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            source = folder(tmp_path, (8, 8), broken="skip", memory_budget=budget)
        (record,) = caplog.records
        assert "2 of 6" in record.getMessage()
        assert str(truncated) in record.getMessage()
        examples = source.read(np.arange(len(source)))
        good = ["0/0.jpg", "0/4.jpg", "1/1.jpg", "1/5.jpg"]
        for image, name in zip(examples.image, good, strict=True):
            assert (image == read(tmp_path / name, image_size=(8, 8))).all()
        assert examples.label.tolist() == [0, 0, 1, 1]


def test_a_folder_of_broken_images_only(tmp_path):
    (tmp_path / "a.png").write_text("x")
    with pytest.raises(InputError, match="1 of 1 images are broken"):
        folder(tmp_path, (8, 8), broken="skip")
