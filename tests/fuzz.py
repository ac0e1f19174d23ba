"""Random mutations of what users give: each is read as others read it, or refused in one.

python -m tests.fuzz --n 1000 --seed 0            # of each kind: config, image, npz, weights
python -m tests.fuzz --kind weights --only 417    # that one again, with its traceback
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib.util
import io
import json
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save

from ddpm.build.checks import check
from ddpm.build.experiment import build
from ddpm.build.network import check_model
from ddpm.config import default, flatten
from ddpm.config.command import parse
from ddpm.data import npz
from ddpm.data.images import read_image
from ddpm.errors import LONGEST, InputError
from ddpm.files.tensors import read_tensors
from ddpm.interop import weights
from ddpm.interop.tensor_names import to_tensors

SECONDS = 20  # that no case may take: it hangs
GROWTH = 2 * 2**30  # bytes that no case may add to the process's largest size
TORCH = importlib.util.find_spec("torch") is not None
Rng = np.random.Generator

NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    2**31,
    2**31 - 1,
    2**32,
    2**63,
    -(2**63),
    10**12,
    10**30,
    10**400,
    0.5,
    1e-300,
    1e300,
    float("inf"),
    float("nan"),
    -0.0,
]
STRINGS = ["", " ", "x", "x" * 5000, "a\nb", "\x00", "\udcff", "é\u2028\u202e", "../..",
           "/dev/zero", "None", "true", "%s{}", "'", '"', "[", "0x10", "1e5", "(1, 2)", "-1",
           "unet", "mse"]  # fmt: skip
VALUES: list[Any] = [*NUMBERS, *STRINGS, None, True, False, [], (), {}, [1], [0, 0], ["a"], [[1]],
                     (1, 2), [2, 2, 2], [None], {"a": 1}, [1] * 3000]  # fmt: skip


def pick(rng: Rng, some: Any) -> Any:
    """One of some things."""
    return list(some)[int(rng.integers(len(some)))]


# --- Mutations


def mutated(rng: Rng, data: bytes) -> bytes:
    """One to three changes of bytes: flips, fields of extreme values, cuts, pieces moved."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        n = max(1, len(out))
        # Half of them near the beginning, where the headers are, or at zip's end.
        place = int(rng.integers(n if rng.random() < 0.5 else min(n, 200)))
        place = n - 1 - place if rng.random() < 0.2 else place
        length = int(rng.integers(1, 40))
        match int(rng.integers(8)):
            case 0 | 1 if out:
                out[place] ^= 1 << int(rng.integers(8))
            case 2:
                field = pick(rng, [b"\0", b"\xff", b"\xff\xff\xff\x7f", b"\xff" * 8, bytes(4)])
                out[place : place + len(field)] = field
            case 3:
                del out[place:]
            case 4:
                del out[place : place + length]
            case 5:
                out[place:place] = out[int(rng.integers(n)) :][:length]
            case 6:
                out[place : place + length] = rng.bytes(length)
            case _:
                out += rng.bytes(length)
    return bytes(out)


def changed(rng: Rng, value: Any, depth: int = 0) -> Any:
    """A tree of dicts and lists with a value, a key or an element changed, dropped or added."""
    if isinstance(value, dict) and value and (depth < 4 and rng.random() < 0.95):
        key, out = pick(rng, value), dict(value)
        match int(rng.integers(10)):
            case 0:
                del out[key]
            case 1:
                out[str(pick(rng, STRINGS))] = pick(rng, VALUES)
            case 2:
                out[str(pick(rng, STRINGS))] = out.pop(key)
            case _:
                out[key] = changed(rng, value[key], depth + 1)
        return out
    if isinstance(value, list | tuple) and value and rng.random() < 0.6:
        out = list(value)
        out[int(rng.integers(len(out)))] = pick(rng, VALUES)
        return out
    if isinstance(value, int | float) and rng.random() < 0.5:
        return pick(rng, [value + 1, value - 1, -value, value * 2, value / 2, float(value)])
    return pick(rng, VALUES)


def as_json(value: Any) -> str:
    return json.dumps(value, default=str)


# --- Configs


def config(rng: Rng, folder: Path) -> None:
    """Overrides on the command line, trees of values, and the text of a config file."""
    kind = int(rng.integers(3))
    known = flatten(default())
    if kind == 0:
        given = {key: pick(rng, VALUES) for key in rng.choice(sorted(known), 2, replace=False)}
        texts = {k: v if isinstance(v, str) else as_text(v) for k, v in given.items()}
        argv = [f"--config.{key}={text}" for key, text in texts.items()]
        found = parse(["main.py", "--config=configs/digits.py", *argv]).config
        check(found)
        for key, text in texts.items():
            value = flatten(found)[key]
            assert value == literal(text, known[key]), (key, text, value)
    elif kind == 1:
        tree = default()
        with tree.ignore_type():
            for key in rng.choice(sorted(known), int(rng.integers(1, 3)), replace=False):
                section, _, name = key.rpartition(".")
                place = tree[section] if section else tree
                with contextlib.suppress(OverflowError):  # of ml_collections, which casts
                    place[name] = changed(rng, place[name])
        check(tree)
    else:
        text = (Path(__file__).parents[1] / "configs" / "digits.py").read_bytes()
        (folder / "a.py").write_bytes(mutated(rng, text))
        check(parse(["main.py", f"--config={folder / 'a.py'}"]).config)


def literal(text: str, example: Any) -> Any:
    """Returns the value that a text means for a key with such a value; a bare word is itself."""
    if isinstance(example, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(example, bool) else text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(example, tuple):
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    return value


def as_text(value: Any) -> str:
    """A value as a user would write it; of a number too long for Python, its digits."""
    with contextlib.suppress(ValueError):
        return repr(value)
    return "9" * 5000


# --- Pictures


def picture(rng: Rng) -> tuple[str, Image.Image]:
    mode = pick(rng, ["RGB", "L", "RGBA", "LA", "P", "I;16", "1", "CMYK"])
    size = int(rng.integers(1, 20)), int(rng.integers(1, 20))
    of_bytes = {"RGB": 3, "L": 1, "RGBA": 4, "LA": 2, "P": 1, "I;16": 2, "CMYK": 4}
    if mode == "1":
        image = Image.new("1", size, 1)
    else:
        image = Image.frombytes(mode, size, rng.bytes(size[0] * size[1] * of_bytes[mode]))
    allowed = {"I;16": ["PNG", "TIFF", "PPM"], "CMYK": ["JPEG", "TIFF"], "LA": ["PNG", "WEBP"],
               "P": ["PNG", "GIF", "BMP"], "1": ["PNG", "BMP"],
               "RGBA": ["PNG", "WEBP", "TIFF"]}  # fmt: skip
    plain = ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
    return pick(rng, allowed.get(mode, plain)), image


def image(rng: Rng, folder: Path) -> None:
    """A file of any common format; in grey or colour."""
    kind, made = picture(rng)
    out = io.BytesIO()
    options = {"transparency": 3} if made.mode == "P" and kind != "BMP" else {}
    made.save(out, kind, **options)
    path, channels = folder / f"a.{kind.lower()}", pick(rng, [1, 3])
    path.write_bytes(mutated(rng, out.getvalue()))
    found = read_image(path, channels=channels, image_size=None)
    assert found.dtype == np.uint8
    expected, tolerance = by_pillow(path, channels)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert np.abs(found - expected).max() <= tolerance


def by_pillow(path: Path, channels: int) -> tuple[np.ndarray, float]:
    """The picture as float64[H, W, C], and how far rounding may be off."""
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened)
        mode = "L" if channels == 1 else "RGB"
        if upright.mode[0] == "I":
            grey = np.round(np.asarray(upright, np.float64) / 257)
            return np.repeat(grey[..., None], channels, axis=2), 0
        if upright.has_transparency_data:
            rgba = np.asarray(upright.convert("RGBA"), np.float64)
            alpha = rgba[..., 3:] / 255
            rgb = rgba[..., :3] * alpha + 255 * (1 - alpha)
            weights = np.array([[0.299, 0.587, 0.114]]).T if channels == 1 else np.eye(3)
            return rgb @ weights, 1.5
        plain = np.asarray(upright.convert(mode), np.float64)
        return plain.reshape(*plain.shape[:2], channels), 0


# --- Arrays


def arrays(rng: Rng, folder: Path) -> None:
    """Images and labels; half of the mutations are of the headers, in a sound archive."""
    n = int(rng.integers(1, 5))
    made = {"images": rng.integers(0, 256, (n, 4, 5, 3)).astype(np.uint8),
            "labels": rng.integers(0, 9, n), "other": rng.normal(size=3)}  # fmt: skip
    if rng.random() < 0.3:
        made["images"] = np.asfortranarray(made["images"])
    method = pick(rng, [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    out, in_headers = io.BytesIO(), rng.random() < 0.5
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, array in made.items():
            data = io.BytesIO()
            np.save(data, array)
            whole = data.getvalue()
            archive.writestr(f"{name}.npy", header_changed(rng, whole) if in_headers else whole)
    path = folder / "a.npz"
    path.write_bytes(out.getvalue() if in_headers else mutated(rng, out.getvalue()))
    found = npz(path)
    with np.load(path) as file:
        expected = file["images"]
        assert (found.image == expected.reshape(found.image.shape)).all()
        if found.label is not None:
            assert (found.label == file["labels"]).all()
            assert found.num_classes == file["labels"].max() + 1


def header_changed(rng: Rng, data: bytes) -> bytes:
    """An .npy whose header says another shape or type, or is odd; or whose data are cut."""
    length = struct.unpack("<H", data[8:10])[0]
    header = ast.literal_eval(data[10 : 10 + length].decode())
    rest = data[10 + length :]
    match int(rng.integers(6)):
        case 0:
            return data
        case 1:
            header = changed(rng, header)
        case 2:
            header["shape"] = tuple(pick(rng, VALUES) for _ in range(int(rng.integers(5))))
        case 3:
            header["descr"] = pick(
                rng, ["|u1", "<f4", "<i8", ">i8", "|O", "|S3", "<U2", "<M8[s]", "x"]
            )
        case 4:
            rest = mutated(rng, rest)
        case _:
            header["fortran_order"] = not header["fortran_order"]
    text = repr(header).encode("utf-8", "replace")[:9000] + b"\n"
    return data[:8] + struct.pack("<H", len(text)) + text + rest


# --- Weights


def tiny() -> Any:
    """A config of a network of a few hundred numbers, with labels."""
    made = default()
    made.model.channels, made.model.channel_multipliers, made.model.num_groups = 4, (1,), 2
    made.model.num_res_blocks, made.model.attention_resolutions = 1, (8,)
    made.model.num_classes, made.diffusion.num_steps = 3, 20
    return made


class Published:
    """Weights as others publish them, made once: the settings' files, and the tensors."""

    def __init__(self) -> None:
        built = build(tiny(), (8, 8, 1))
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: rng.normal(size=x.shape).astype(np.float32),
            check_model(built.model, built.image_shape),
        )
        with tempfile.TemporaryDirectory() as place:
            weights.export(Path(place) / "a", built, params)
            names = ("unet/config.json", "scheduler/scheduler_config.json")
            self.settings = {n: json.loads((Path(place) / "a" / n).read_text()) for n in names}
        self.tensors = to_tensors(params)


@functools.cache
def published() -> Published:
    """The weights; and whatever takes long at first is imported, outside of the cases' time."""
    if TORCH:
        importlib.import_module("torch")
    return Published()


def weight_files(rng: Rng, folder: Path) -> None:
    """A folder with settings: of these, or of the files of tensors, something is changed."""
    files = copy.deepcopy(published().settings)
    tensors = dict(published().tensors)
    stem, kind = "diffusion_pytorch_model", pick(rng, [".safetensors", ".bin"][: 1 + TORCH])
    what = pick(rng, ["settings", "tensors", "bytes", "bytes", "header", "index"])
    if what == "settings":
        name = pick(rng, files)
        files[name] = changed(rng, files[name])
    if what == "tensors":
        tensors = tensors_changed(rng, tensors)
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(as_json(value))
    unet = folder / "unet"
    if what == "index":
        names = sorted(tensors)
        half = {f"{stem}-{i}{kind}": names[i::2] for i in range(2)}
        for file, part in half.items():
            (unet / file).write_bytes(pack({n: tensors[n] for n in part}, kind))
        index = {"metadata": {}, "weight_map": {n: f for f, part in half.items() for n in part}}
        if rng.random() < 0.9:
            index = changed(rng, index)
        path = unet / f"{stem}{kind}.index.json"
        path.write_text(as_json(index))
    else:
        data = pack(tensors, kind)
        if what == "bytes":
            data = mutated(rng, data)
        if what == "header" and kind == ".safetensors":
            (length,) = struct.unpack("<Q", data[:8])
            header = as_json(changed(rng, json.loads(data[8 : 8 + length]))).encode()
            data = struct.pack("<Q", len(header)) + header + data[8 + length :]
        path = unet / f"{stem}{kind}"
        path.write_bytes(data)
    if what in ("bytes", "header"):  # whatever is in it
        with contextlib.suppress(InputError):
            same(read_tensors(path), by_others(path))
    given = default()
    given.training.label_dropout = pick(rng, [0.0, 0.1])
    found = weights.load(folder, given)
    expected = tensors
    if what != "index":
        expected = {k: np.asarray(v, np.float32) for k, v in by_others(path).items()}
    table = "class_embedding.weight"
    read = to_tensors(found.params)
    if table in expected:
        read[table] = read[table][: len(expected[table])]  # without labels a row is added
    same(read, expected)


def tensors_changed(rng: Rng, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    name = pick(rng, tensors)
    x = tensors[name]
    with warnings.catch_warnings(action="ignore"):
        other: Any = pick(rng, [
            x.astype(np.float64) * pick(rng, [1.0, 1e38, 1e39, np.inf, np.nan]),
            x.astype(np.float16), x.astype(np.int32), x.astype(bool), x[:1], x[..., None], x.T,
            x.ravel(), np.zeros((0, 3), np.float32), np.float32(1),
        ])  # fmt: skip
    out = tensors | {name: np.ascontiguousarray(other)}
    if rng.random() < 0.2:
        out[str(pick(rng, STRINGS)).replace("\udcff", "")] = out.pop(name)
    return out


def pack(tensors: dict[str, np.ndarray], kind: str) -> bytes:
    if kind == ".safetensors":
        return save(tensors, {"format": "pt"})
    import torch

    out = io.BytesIO()
    old = {"_use_new_zipfile_serialization": bool(sum(map(len, tensors)) % 2)}
    torch.save({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, out, **old)
    return out.getvalue()


def by_others(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return load_file(path)
    import torch

    found = torch.load(path, weights_only=True)
    return {name: tensor.detach().float().numpy() for name, tensor in found.items()}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, np.asarray(expected[name]), name)


KINDS: dict[str, Callable[[Rng, Path], None]] = {
    "config": config,
    "image": image,
    "npz": arrays,
    "weights": weight_files,
}


# --- The runs


class TooLong(BaseException):
    """Raised in a case that hangs; no reader's `except Exception` hides it."""


def run(kind: str, seed: int, number: int) -> str:
    """Runs one case: 'right', 'refused', or what is wrong with it."""
    rng = np.random.default_rng([seed, number, sorted(KINDS).index(kind)])
    published()
    before = largest()
    try:
        with (
            limited(),
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            KINDS[kind](rng, Path(folder))
        said = "right"
    except InputError as error:
        text, said = str(error), "refused"
        if len(text) > LONGEST or not text.isprintable() or not text:
            said = f"not one short line: {text!r}"
    except (Exception, TooLong) as error:
        line = " ".join(str(error).split())[:200]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "ddpm" in f.filename]
        last = (ours or traceback.extract_tb(error.__traceback__))[-1]
        said = f"{type(error).__name__}: {line} ({Path(last.filename).name}:{last.lineno})"
    if largest() - before > GROWTH:
        said = f"took {(largest() - before) / 2**30:.1f} GB"
    return said


def largest() -> int:
    """The bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def too_long(*_: Any) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--n", type=int, default=1000, help="mutations of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), help="this kind alone")
    parser.add_argument("--only", type=int, help="this number alone, with its traceback")
    given = parser.parse_args()
    # Whatever asks for more is refused at once, by a MemoryError, instead of filling the machine.
    resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, resource.RLIM_INFINITY))
    faults = 0
    for kind in [given.kind] if given.kind else KINDS:
        if given.only is not None:
            rng = np.random.default_rng([given.seed, given.only, sorted(KINDS).index(kind)])
            with limited(), tempfile.TemporaryDirectory() as folder:
                KINDS[kind](rng, Path(folder))
            continue
        counts, start, slowest = {"right": 0, "refused": 0}, time.time(), 0.0
        for number in range(given.n):
            begin = time.time()
            said = run(kind, given.seed, number)
            slowest = max(slowest, time.time() - begin)
            if said in counts:
                counts[said] += 1
            else:
                faults += 1
                print(f"{kind} {number}: {said}", flush=True)
        print(f"{kind}: {counts}, {time.time() - start:.0f} s, the slowest {slowest:.1f} s, "
              f"{largest() / 2**30:.2f} GB at most", flush=True)  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    sys.exit(main())
