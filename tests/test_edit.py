"""`--mode=edit`: each task by the real main.py on a tiny run, and what it refuses."""

import ast
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from configs.digits import get_config
from ddpm.build.checks import validate
from ddpm.data import digits
from ddpm.errors import InputError
from ddpm.files.pictures import grid
from ddpm.modes import edit as mode
from tests.runs import TINY, command, run
from tests.test_main import contents, fails

SMALL = {"editing__num_variations": 3, "editing__jump_length": 4, "editing__resamplings": 2}


@pytest.fixture(scope="module")
def workdir(module_run):
    return module_run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pictures of another size and kind than the model's, and those as it is to see them."""
    folder = tmp_path_factory.mktemp("pictures")
    small = digits("test").image[[3, 10], ..., 0]
    for i, image in enumerate(small):
        large = np.zeros((24, 30), np.uint8)  # wider: its middle is taken
        large[:, 3:27] = image.repeat(3, 0).repeat(3, 1)
        Image.fromarray(large).convert("RGB").save(folder / f"{i}.png")
    return folder


def edited(workdir, given, task, capsys=None, **overrides):
    """The images that it wrote, the grid's pixels, and what it printed; in this process by capsys.

    To start another takes several seconds.
    """
    options = SMALL | {"editing__task": task} | overrides
    if capsys is None:
        done = run(command(workdir, "--mode=edit", f"--input={given}", **options))
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        mode.edit(config(**options), workdir, str(given))
        printed = capsys.readouterr().out
    npz, png = printed.split()[-2:]
    assert npz.removesuffix(".npz") == png.removesuffix(".png")
    with np.load(npz) as file:
        images = file["images"]
    with Image.open(png) as picture:
        sheet = np.asarray(picture)
    return images, sheet, printed


def config(**overrides):
    """What the command line of a tiny run says."""
    found = get_config()
    given = TINY | {key.replace("__", "."): value for key, value in overrides.items()}
    for key, value in given.items():
        section, name = key.split(".")
        found[section][name] = ast.literal_eval(value) if str(value).startswith("(") else value
    validate(found)
    return found


def cells(sheet, rows, columns):
    """The images of a grid of 8x8 ones, in rows."""
    factor = sheet.shape[0] // (9 * rows - 1)
    small = sheet[::factor, ::factor]
    assert small.shape == (9 * rows - 1, 9 * columns - 1)
    found = np.pad(small, ((0, 1), (0, 1))).reshape(rows, 9, columns, 9)
    return found.transpose(0, 2, 1, 3)[:, :, :8, :8, None]


def test_variations(workdir, pictures, capsys):
    images, sheet, name = edited(workdir, pictures, "vary", editing__t=20)
    assert images.shape == (6, 8, 8, 1)
    table = cells(sheet, 2, 4)
    assert (table[:, 1:].reshape(images.shape) == images).all()
    # The middle of the pictures, but for the filter that shrinks them.
    given = digits("test").image[[3, 10]].astype(int)
    assert abs(table[:, 0] - given).mean() < 16
    assert abs(table[::-1, 0] - given).mean() > 40
    # From t = T, of the untrained model: the k-th by one noise, whatever the picture was.
    assert abs(images[:3].astype(int) - images[3:]).mean() < 3
    assert abs(images[0].astype(int) - images[1]).mean() > 10

    paths = f"{pictures}/0.png,{pictures}/1.png"
    again, _, same = edited(workdir, paths, "vary", capsys, editing__t=20)
    assert (again == images).all()
    assert same == name
    alone, _, other = edited(workdir, f"{pictures}/1.png", "vary", capsys, editing__t=20)
    assert (alone == images[3:]).all()
    near, _, nearer = edited(workdir, pictures, "vary", capsys, editing__t=1)
    assert abs(near.reshape(2, 3, 8, 8, 1) - table[:, :1].astype(int)).mean() < 10
    half, _, default = edited(workdir, pictures, "vary", capsys)
    assert (half != near).any()
    assert "vary_t10_" in default
    assert len({name, other, nearer, default}) == 4


@pytest.mark.parametrize("kind", ["mask", "transparent", "box"])
def test_inpainting(workdir, pictures, tmp_path, capsys, kind):
    hole = np.zeros((8, 8, 1), bool)
    hole[2:5, 1:8] = True
    mask = hole[..., 0].astype(np.uint8) * 255
    # White strokes on a layer that is transparent, as painting programs save it.
    layers = np.stack([np.full_like(mask, 255), mask], axis=-1) if kind == "transparent" else mask
    Image.fromarray(layers).save(tmp_path / "mask.png")
    by = {"editing__box": "(2,1,3,7)"}
    if kind != "box":
        by = {"editing__mask": str(tmp_path / "mask.png")}
    how = None if kind == "mask" else capsys
    images, sheet, name = edited(workdir, pictures, "inpaint", how, **by)
    table = cells(sheet, 2, 5)
    given, holed, results = table[:, :1], table[:, 1], table[:, 2:]
    assert (results.reshape(images.shape) == images).all()
    assert (np.where(hole, 0, results) == np.where(hole, 0, given)).all()
    assert (holed == np.where(hole, 128, given[:, 0])).all()
    for a, b in itertools.combinations(results[0], 2):
        assert (a != b)[hole].mean() > 0.3
    _, _, other = edited(workdir, pictures, "inpaint", capsys, **by, editing__resamplings=1)
    assert other != name


def test_interpolation(workdir, pictures, capsys):
    options = {"editing__t": 4, "editing__fractions": "(0.0,0.5,1.0)", "editing__num_variations": 1}
    images, sheet, _ = edited(workdir, pictures, "interpolate", **options)
    assert images.shape == (3, 8, 8, 1)
    table = cells(sheet, 1, 5)[0]
    assert (table[1:4] == images).all()
    ends, _, _ = edited(workdir, pictures, "vary", capsys, **options)
    assert abs(images[[0, 2]].astype(int) - ends).max() <= 1
    given = digits("test").image[[3, 10]].astype(int)
    assert abs(table[[0, 4]] - given).mean() < 16


def test_reconstruction_of_data(workdir, tmp_path):
    given = digits("test").image[:5]
    np.savez(tmp_path / "few.npz", images=given)
    images, sheet, printed = edited(workdir, tmp_path / "few.npz", "reconstruct")
    assert "reconstruct_i20_" in printed
    assert "_ddim20_eta0_" in printed
    table = cells(sheet, 5, 3)
    assert (table[:, 0] == given).all()
    assert (table[:, 2] == images).all()
    # The network is hardly trained; what it comes to is printed.
    off = np.abs(images.astype(int) - given)
    found = re.search(r"reconstructed to ([\d.]+) of 255 levels on average, (\d+) at most", printed)
    assert float(found[1]) == pytest.approx(off.mean(), rel=0.01)
    assert int(found[2]) == off.max()


MASK = {"editing__task": "inpaint"}


@pytest.mark.parametrize(
    ("flags", "overrides", "said"),
    [
        (["--mode=edit"], {}, ["--mode=edit needs --input"]),
        (
            ["--mode=sample", "--input=x.png"],
            {},
            ["--input=x.png goes with --mode=edit, compress, decompress alone"],
        ),
        (["--mode=edit", "--input=x.png"], {"editing__t": 21}, ["editing.t = 21", "T = 20"]),
        (["--mode=edit", "--input=x.png"], MASK, ["needs config.editing.mask", "editing.box"]),
    ],
)
def test_wrong_flags(tmp_path, flags, overrides, said):
    fails(command(tmp_path / "run", *flags, **overrides), *said)
    assert not (tmp_path / "run").exists()


BOX = {"editing__box": "(0,0,4,4)"}


@pytest.mark.parametrize(
    ("given", "overrides", "said"),
    [
        ("0.png", {"editing__task": "inpant"}, "must be one of vary, .*mean 'inpaint'"),
        ("0.png", {"editing__t": -1}, "editing.t = -1"),
        ("0.png", {"editing__fractions": "(0.5,2.0)"}, r"in \[0, 1\]"),
        ("0.png", {"editing__num_variations": 0}, "editing.num_variations = 0"),
        ("0.png", MASK | {"editing__box": "(0,0,1)"}, "editing.box = "),
        ("0.png", MASK | BOX | {"editing__mask": "black.png"}, "one of the two"),
        ("0.png,no.png", {}, "no.png: there is no such file"),
        ("0.png,torn.png", {}, "torn.png: cannot be read as an image"),
        ("empty", {}, "no images there"),
        ("large.npz", {}, r"large.npz are \(9, 8, 1\) \(height, width, channels\)"),
        ("0.png", {"editing__task": "interpolate"}, "two pictures or more"),
        ("0.png", MASK | {"editing__mask": "small.png"}, "is 6x8, the model's images are 8x8"),
        ("0.png", MASK | {"editing__mask": "none.png"}, "none.png: cannot be read"),
        ("0.png", MASK | {"editing__mask": "black.png"}, "no white, .*greatest value is 0, white"),
        ("0.png", MASK | {"editing__mask": "ones.png"}, "no white, .*value is 1, white is 128"),
        ("0.png", MASK | {"editing__mask": "white.png"}, "is white all over: nothing would be"),
        ("0.png", MASK | {"editing__box": "(0,0,8,8)"}, "is the image all over: nothing would"),
        ("0.png", MASK | {"editing__box": "(6,0,3,3)"}, r"\(6, 0, 3, 3\): .*the model's 8x8"),
        ("0.png", MASK | BOX | {"editing__jump_length": 20}, "jump_length = 20.* 20 steps"),
    ],
)
def test_wrong_pictures_masks_and_options(
    workdir, pictures, tmp_path, monkeypatch, given, overrides, said
):
    before = contents(workdir)
    monkeypatch.chdir(tmp_path)
    whole = (pictures / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole)
    (tmp_path / "torn.png").write_bytes(whole[:100])
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "large.npz", images=np.zeros((2, 9, 8, 1), np.uint8))
    Image.new("L", (8, 6), 255).save(tmp_path / "small.png")
    for name, value in (("black", 0), ("ones", 1), ("white", 255)):
        Image.new("L", (8, 8), value).save(tmp_path / f"{name}.png")
    with pytest.raises(InputError, match=said) as caught:
        mode.edit(config(**overrides), workdir, given)
    assert "\n" not in str(caught.value)
    assert contents(workdir) == before


def test_without_a_checkpoint(pictures, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint in .*--mode=edit"):
        mode.edit(config(), tmp_path / "run", str(pictures))
    assert not (tmp_path / "run").exists()


def test_grid_is_read_back_as_the_tests_do():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    sheet = grid(images, columns=3)[..., 0].repeat(2, 0).repeat(2, 1)
    assert (cells(sheet, 2, 3).reshape(images.shape) == images).all()
