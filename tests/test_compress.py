"""`--mode=compress` and `--mode=decompress` by the real command on a tiny run."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ddpm.codec.container import HEADER_BYTES, read_header
from ddpm.data import digits
from ddpm.errors import InputError
from ddpm.modes.compress import _batches, check_codes
from ddpm.modes.inputs import Named
from tests.runs import command, run
from tests.test_edit import config
from tests.test_main import contents, fails

SMALL = {"codec__nu": 6}
DIGITS = digits("test").image[..., 0]
BIG = np.tile(DIGITS[5], (2, 3))[:9, :12]


@pytest.fixture(scope="module")
def workdir(module_run):
    return module_run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of the model's size and of another, grey and in colour; one in a folder below."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    Image.fromarray(DIGITS[0]).save(folder / "0.png")
    Image.fromarray(DIGITS[1]).convert("RGB").save(folder / "1.v2.png")
    Image.fromarray(DIGITS[2]).save(folder / "below" / "0.png")
    Image.fromarray(BIG).save(folder / "big.png")
    return folder


def does(workdir, mode, given, out, *flags, **overrides):
    """Runs it and returns what it printed, and said as it went."""
    flags = [f"--mode={mode}", f"--input={given}", f"--out={out}", *flags]
    done = run(command(workdir, *flags, **(SMALL | overrides)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(out)
    return done


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def compressed(workdir, pictures, tmp_path_factory):
    """A folder of files without loss, and what the command printed."""
    folder = tmp_path_factory.mktemp("out") / "compressed"
    return folder, does(workdir, "compress", pictures, folder)


def test_pictures_come_back_to_the_last_bit(workdir, compressed, tmp_path):
    folder, _ = compressed
    assert names(folder) == {"0.ddpm", "1.v2.ddpm", "below/0.ddpm", "big.ddpm",
                             "rate_distortion.json"}  # fmt: skip
    header = read_header((folder / "big.ddpm").read_bytes())
    assert (header.picture, header.layout.images) == ((9, 12), 4)
    found = tmp_path / "found"
    # In batches of another size, where a network's last bits are others.
    done = does(workdir, "decompress", folder, found, sampling__batch_size=1)
    assert done.stdout.startswith("4 files: 4 without loss, 0 by packets alone\n")
    assert names(found) == {"0.png", "1.v2.png", "below/0.png", "big.png", "progressive.png"}
    exact = does(workdir, "decompress", folder / "0.ddpm", tmp_path / "all", "--rate=8")
    assert exact.stdout.startswith("1 files: 1 without loss")
    for name, expected in (("0", DIGITS[0]), ("1.v2", DIGITS[1]), ("below/0", DIGITS[2])):
        np.testing.assert_array_equal(read(found / f"{name}.png"), expected)
    np.testing.assert_array_equal(read(found / "big.png"), BIG)


def test_what_is_printed_and_the_curve(compressed):
    folder, done = compressed
    assert "big is 9x12 (height x width): coded as 4 tiles of 8x8" in done.stderr
    files = [path.read_bytes() for path in folder.rglob("*.ddpm")]
    size = sum(len(data) for data in files)
    pixels = 3 * 64 + BIG.size
    rate, headers, of_pixels = (
        float(re.search(f"{words}", done.stdout)[1])
        for words in (r"bytes: ([\d.]+) bits/dim", r"headers of ([\d.]+);", r"lossless, ([\d.]+) ")
    )
    assert f"4 images in 4 files, {size} bytes" in done.stdout
    assert rate == pytest.approx(8 * (size - 4 * HEADER_BYTES) / pixels, abs=1e-3)
    assert headers == pytest.approx(8 * 4 * HEADER_BYTES / pixels, abs=1e-3)
    coded = sum(read_header(data).pixel_bytes for data in files)
    assert of_pixels == pytest.approx(8 * coded / pixels, abs=1e-3)
    points = json.loads((folder / "rate_distortion.json").read_text())
    rates = [point["bits_per_dim"] for point in points]
    assert rates == sorted(rates)
    assert all(np.isfinite(list(point.values())).all() for point in points)


def test_a_cut_off_file_and_a_rate_to_read_to(workdir, compressed, tmp_path):
    """Without its last byte a file is coarse; so it is where no more of it is read."""
    whole = (compressed[0] / "0.ddpm").read_bytes()
    (tmp_path / "0.ddpm").write_bytes(whole[:-1])
    cut = does(workdir, "decompress", tmp_path / "0.ddpm", tmp_path / "cut")
    assert cut.stdout.startswith("1 files: 0 without loss, 1 by packets alone\n")
    header = read_header(whole)
    # As in rate_distortion.json: no less is read by rounding.
    rate = np.float32(header.packets * header.layout.packet_bits / 64)
    given = compressed[0] / "0.ddpm"
    does(workdir, "decompress", given, tmp_path / "read", f"--rate={rate - 1e-8}")
    coarse = read(tmp_path / "cut" / "0.png")
    assert (coarse != DIGITS[0]).any()
    np.testing.assert_array_equal(read(tmp_path / "read" / "0.png"), coarse)
    sample = does(workdir, "decompress", tmp_path / "0.ddpm", tmp_path / "sample",
                  codec__decoder="ancestral")  # fmt: skip
    assert "1 by packets alone" in sample.stdout
    assert (read(tmp_path / "sample" / "0.png") != coarse).any()
    (tmp_path / "0.ddpm").write_bytes(whole[: HEADER_BYTES + 1])
    flags = ["--mode=decompress", f"--input={tmp_path / '0.ddpm'}", f"--out={tmp_path / 'none'}"]
    fails(command(workdir, *flags, **SMALL), "0.ddpm: 41 bytes: cut off before the first packet")


def test_several_in_one_file_to_a_rate_or_a_psnr(workdir, tmp_path):
    given = tmp_path / "few.npz"
    np.savez(given, images=DIGITS[:3, ..., None])
    out = tmp_path / "rate"
    done = does(workdir, "compress", given, out, "--rate=1.2", codec__together=3)
    assert "lossless" not in done.stdout
    assert names(out) == {"together_00000.ddpm", "rate_distortion.json"}
    data = (out / "together_00000.ddpm").read_bytes()
    header = read_header(data)
    assert (header.layout.images, header.lossless) == (3, False)
    bits = header.packets * header.layout.packet_bits / header.layout.dimensions
    assert 1.2 - header.layout.packet_bits / header.layout.dimensions < bits <= 1.2
    does(workdir, "decompress", out, tmp_path / "found")
    assert names(tmp_path / "found") == {*(f"together_00000_00{i}.png" for i in range(3)),
                                         "progressive.png"}  # fmt: skip
    far = does(workdir, "compress", given, tmp_path / "far", "--psnr=90", codec__together=3)
    assert "1 of 1 files end before --psnr=90: " in far.stderr
    near = does(workdir, "compress", given, tmp_path / "psnr", "--psnr=9", codec__together=3)
    assert "end before" not in near.stderr
    points = json.loads((tmp_path / "psnr" / "rate_distortion.json").read_text())
    assert points[-1]["psnr"] >= 9


def test_batches_of_files():
    """Files of two, in batches of at most five images; the rest is a smaller file, and a picture of
    another size one by itself."""
    images = [np.full((8, 8, 1), i, np.uint8) for i in range(7)]
    images.insert(3, np.zeros((9, 9, 1), np.uint8))
    built = SimpleNamespace(config=config(codec__together=2, sampling__batch_size=5),
                            image_shape=(8, 8, 1))  # fmt: skip
    given = Named([Path(str(i)) for i in range(8)], lambda i, channels: images[i])
    found = list(_batches(SimpleNamespace(built=built), given))
    assert [(len(names), x.shape[:2]) for names, x in found] == [
        (1, (1, 1)),
        (2, (2, 2)),
        (1, (1, 2)),
        (1, (1, 1)),
    ]
    assert [int(i) for _, x in found[1:] for i in x[..., 0, 0, 0].ravel()] == list(range(7))
    several = [str(name) for names, _ in found[1:] for name in names]
    assert several == [f"together_{i:05}" for i in range(4)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mode=compress"], ["--mode=compress needs --input"]),
        (["--mode=decompress"], ["--mode=decompress needs --input"]),
        (["--mode=compress", "--input=x.png", "--rate=0"], ["--rate=0: must be a number > 0"]),
        (["--mode=compress", "--input=x.png", "--psnr=nan"], ["--psnr=nan: must be a number > 0"]),
        (["--mode=decompress", "--input=x.ddpm", "--psnr=30"], ["--psnr=30 goes with", "compress"]),
        (["--mode=sample", "--rate=1"], ["--rate=1 goes with --mode=compress, decompress alone"]),
        (["--mode=compress", "--input=no.png"], ["--input: no.png: there is no such file"]),
        (["--mode=compress", "--input=x.png", "--config.codec.nu=17"], ["codec.nu = 17"]),
        (["--mode=compress", "--input=x.png", "--config.codec.decoder=best"], ["codec.decoder"]),
    ],
)
def test_wrong_flags(tmp_path, flags, said):
    fails(command(tmp_path / "run", *flags), *said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mode", "given", "flags", "said"),
    [
        ("compress", "0.png", ["--rate=0.001"], "0: not one packet can be sent"),
        ("compress", "0.png,other/0.png", [], "two pictures are named 0: rename one"),
        ("compress", "there.png", [], "out/there.ddpm is there already"),
        ("decompress", "0.png", [], "0.png: not a compressed file: it does not begin with DDPM"),
        ("decompress", "empty", [], "empty: no .ddpm files there or below"),
        ("decompress", "there.ddpm", [], "out/there.png is there already"),
        ("decompress", "0.ddpm,other/0.ddpm", [], "0.png would be written twice"),
        ("decompress", "progressive.ddpm", [], "progressive.png would be written twice"),
        ("decompress", "0.ddpm", ["--config.sampling.clip=False"], "made with another model"),
        ("decompress", "0.ddpm", ["--rate=0.01"], "0.ddpm: --rate=0.01: its first packet is of 0."),
        ("decompress", "broken.ddpm", [], "broken.ddpm: the header is damaged"),
        ("decompress", "larger.ddpm", [], "is of images of 9x8x1, the model's are 8x8x1"),
    ],
)
def test_wrong_pictures_and_files(
    workdir, pictures, compressed, tmp_path, monkeypatch, mode, given, flags, said
):
    from tests.codec.test_container import changed

    before = contents(workdir)
    monkeypatch.chdir(tmp_path)
    whole = (compressed[0] / "0.ddpm").read_bytes()
    for folder in ("other", "empty", "out"):
        (tmp_path / folder).mkdir()
    for name in ("0", "there", "other/0"):
        Image.fromarray(DIGITS[0]).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.ddpm").write_bytes(whole)
    (tmp_path / "out" / "there.ddpm").write_bytes(b"")
    (tmp_path / "out" / "there.png").write_bytes(b"")
    (tmp_path / "progressive.ddpm").write_bytes(whole)
    (tmp_path / "broken.ddpm").write_bytes(whole[:20] + b"?" + whole[21:])
    (tmp_path / "larger.ddpm").write_bytes(changed(whole, height=9))
    flags = [f"--mode={mode}", f"--input={given}", "--out=out", *flags]
    fails(command(workdir, *flags, **SMALL), said)
    assert contents(workdir) == before
    assert names(tmp_path / "out") == {"there.ddpm", "there.png"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"model__low_resolution": 4}, "low_resolution = 4: this model enlarges"),
        ({"model__num_classes": 10, "training__label_dropout": 0.0}, "without a label"),
    ],
)
def test_models_without_a_codec(overrides, said):
    about = SimpleNamespace(built=SimpleNamespace(config=config(**overrides)))
    with pytest.raises(InputError, match=said):
        check_codes(about)
