"""FID's Inception against pytorch-fid at the same random weights; its weights from every format."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import torchvision
from pytorch_fid import inception
from safetensors.numpy import load_file, save_file

from ddpm.errors import InputError
from ddpm.evaluation import features
from ddpm.evaluation.inception import Inception, preprocess, resize_matrix
from ddpm.evaluation.inception_weights import load_inception
from ddpm.training import sharding
from tests.runs import command, run


@pytest.fixture(scope="module")
def state():
    """Of the published file's names and shapes, scaled to keep activations of order 1."""
    net = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, weights=None, init_weights=False
    )
    rng, found = np.random.default_rng(0), {}
    for name, tensor in net.state_dict().items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif name.endswith("running_var"):
            value = rng.uniform(0.5, 1.5, shape)
        elif name.endswith("bn.weight"):
            value = rng.uniform(0.8, 1.2, shape)
        elif tensor.ndim == 1:
            value = 0.1 * rng.normal(size=shape)
        else:
            value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        found[name] = torch.from_numpy(np.asarray(value)).to(tensor.dtype)
    return found


@pytest.fixture(scope="module")
def pth(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def safetensors(pth):
    path = pth.with_suffix(".safetensors")
    done = convert(pth, path)
    assert done.returncode == 0, done.stderr
    assert load_inception(path).sha256 in done.stdout
    return path


def convert(*arguments):
    program = [sys.executable, "-m", "ddpm.evaluation.inception_weights", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, timeout=300)


def reference(state, monkeypatch, **options):
    """pytorch-fid's network at these weights."""
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
    return inception.InceptionV3((0, 1, 2, 3), **options).eval()


def nchw(x):
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 32, 40, 3)).astype(np.uint8)


def check_blocks(found, expected):
    for ours, theirs in zip(found[:4], expected, strict=True):
        theirs = theirs.numpy().transpose(0, 2, 3, 1).reshape(ours.shape)
        assert np.abs(theirs).mean() > 0.01
        error = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
        assert error < 1e-4


@pytest.mark.parametrize("resize", ["half_pixel", "tf1"])
def test_all_four_blocks_equal_those_of_pytorch_fid(state, pth, images, monkeypatch, resize):
    variables = load_inception(pth).variables
    network = jax.jit(lambda v, x: Inception().apply(v, preprocess(x, resize)))
    found = network(variables, images)
    assert [x.shape[1:] for x in found] == [
        (73, 73, 64),
        (35, 35, 192),
        (17, 17, 768),
        (2048,),
        (1008,),
    ]
    with torch.no_grad():
        if resize == "half_pixel":  # its own resizing and scaling
            theirs = reference(state, monkeypatch)
            expected = theirs(nchw(images.astype(np.float32) / 255))
        else:
            theirs = reference(state, monkeypatch, resize_input=False, normalize_input=False)
            expected = theirs(nchw(by_corners(images)))
    check_blocks(found, expected)
    logits = expected[3][:, :, 0, 0].numpy() @ state["fc.weight"].numpy().T
    np.testing.assert_allclose(found.logits, logits, rtol=0, atol=1e-4 * np.abs(logits).max())


def by_corners(images):
    """TensorFlow 1's bilinear resizing as its documentation has it, pixel by pixel."""
    x = (images.astype(np.float64) - 128) / 128
    height, width = x.shape[1:3]
    out = np.zeros((len(x), 299, 299, 3))
    for i in range(299):
        top, down = divmod(i * height / 299, 1)
        bottom = min(int(top) + 1, height - 1)
        for j in range(299):
            left, across = divmod(j * width / 299, 1)
            right = min(int(left) + 1, width - 1)
            upper = x[:, int(top), int(left)] * (1 - across) + x[:, int(top), right] * across
            lower = x[:, bottom, int(left)] * (1 - across) + x[:, bottom, right] * across
            out[:, i, j] = upper * (1 - down) + lower * down
    return out.astype(np.float32)


@pytest.mark.parametrize("size", [8, 32, 299, 300, 640])
def test_resizing_by_pixel_centres_is_that_of_pytorch(size):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 1, size, 1)))
    expected = torch.nn.functional.interpolate(x, size=(299, 1), mode="bilinear")
    found = resize_matrix(size, 299, "half_pixel") @ x[0, 0].numpy()
    np.testing.assert_allclose(found, expected[0, 0], atol=1e-5)


def test_the_same_weights_in_every_format(pth, safetensors):
    first = load_inception(pth)
    np.savez(pth.with_suffix(".npz"), **load_file(safetensors))
    for path in (safetensors, pth.with_suffix(".npz")):
        again = load_inception(path)
        assert again.sha256 == first.sha256
        jax.tree.map(np.testing.assert_array_equal, again.variables, first.variables)


def test_features_of_grey_images_by_inception(safetensors):
    network = features.of_inception(safetensors, "half_pixel")
    extract = features.Extractor(network, sharding.data_mesh(), batch_size=3)
    grey = np.random.default_rng(2).integers(0, 256, (4, 28, 28, 1)).astype(np.uint8)
    found = extract(grey)
    assert found.vectors.shape == (4, 2048)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-5)
    of_colour = extract(np.repeat(grey[:1], 3, axis=-1))
    np.testing.assert_allclose(of_colour.vectors, found.vectors[:1], rtol=1e-3, atol=1e-5)


class Evil:
    def __reduce__(self):
        return (print, ("code was run",))


def torn(path, source):
    data = source.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def changed(**changes):
    def write(path, source):
        tensors = load_file(source)
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        save_file({k: v for k, v in tensors.items() if v is not None}, path)

    return write


def with_nan(x):
    x = x.copy()
    x.flat[5] = np.nan
    return x


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("a.safetensors", torn, r"cannot be read as \.safetensors"),
        ("a.npz", torn, r"cannot be read as \.npz"),
        ("a.pth", torn, r"cannot be read as \.pth"),
        ("a.safetensors", lambda path, _: path.write_bytes(b""), "cannot be read"),
        ("a.pth", lambda path, _: torch.save({"x": Evil()}, path), r"cannot be read as \.pth"),
        ("a.pth", lambda path, _: torch.save([1], path), "cannot be read"),
        ("a.txt", torn, "must end in one of .pth, .safetensors, .npz|must end in one of"),
        ("a.npz", lambda path, _: None, "there is no such file"),
        (
            "a.safetensors",
            changed(**{"fc.weight": lambda _: None}),
            r"1 tensors are missing, the first fc\.weight",
        ),
        (
            "a.safetensors",
            changed(**{"fc.weight": lambda x: x[:1000].copy()}),
            r"fc\.weight is float32\[1000, 2048\], not that of FID's Inception",
        ),
        (
            "a.safetensors",
            changed(**{"Mixed_5b.branch1x1.conv.weight": with_nan}),
            r"Mixed_5b\.branch1x1\.conv\.weight holds values that no trained network has",
        ),
        (  # finite in float64, infinite in float32
            "a.safetensors",
            changed(**{"Conv2d_1a_3x3.bn.running_var": lambda x: x.astype(np.float64) + 1e39}),
            "holds values that no trained network has",
        ),
        (
            "a.safetensors",
            changed(**{"Conv2d_1a_3x3.bn.running_var": lambda x: -x}),
            "holds values that no trained network has",
        ),
    ],
)
def test_files_that_are_not_the_weights(safetensors, tmp_path, capsys, name, write, said):
    write(tmp_path / name, safetensors)
    with pytest.raises(InputError, match=said) as error:
        load_inception(tmp_path / name)
    assert name in str(error.value)
    assert "pt_inception-2015-12-05-6726825d.pth" in str(error.value)
    assert "\n" not in str(error.value)
    assert "code was run" not in capsys.readouterr().out


def test_without_pytorch_a_pth_says_what_to_do(pth, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install torch, or convert it where there is one"):
        load_inception(pth)


def test_converting_what_cannot_be(tmp_path, safetensors):
    kept = tmp_path / "kept.safetensors"
    kept.write_text("kept")
    for arguments, said in (
        ((tmp_path / "none.pth", kept), "there is no such file"),
        ((safetensors, tmp_path / "out.npz"), "must end in .safetensors"),
        ((safetensors, kept / "out.safetensors"), "cannot be written"),
        ((safetensors,), "usage:"),
    ):
        done = convert(*arguments)
        assert done.returncode == 2
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    assert kept.read_text() == "kept"


def test_a_run_is_evaluated_by_inception(safetensors, state, tmp_path, monkeypatch):
    """The Fréchet distance in the end, from pytorch-fid's features by another formula."""
    rng = np.random.default_rng(3)
    sets = {
        name: rng.integers(0, 256, (n, 8, 8, 1)).astype(np.uint8) // divisor
        for name, n, divisor in (("train", 11, 1), ("test", 10, 1), ("samples", 10, 3))
    }
    np.savez(tmp_path / "data.npz", x_train=sets["train"], x_test=sets["test"])
    np.savez(tmp_path / "samples.npz", images=sets["samples"])
    options = {
        "data__name": "npz",
        "data__path": tmp_path / "data.npz",
        "data__split": "train",
        "evaluation__parts": "('distances',)",
        "evaluation__inception_path": safetensors,
        "evaluation__samples": tmp_path / "samples.npz",
        "evaluation__num_samples": 10,
        "evaluation__batch_size": 11,
    }
    done = run(command(tmp_path / "run", **options))
    assert done.returncode == 0, done.stderr
    done = run(command(tmp_path / "run", "--mode=evaluate", **options))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())["distances"]
    assert found["features"]["sha256"] == load_inception(safetensors).sha256
    network = reference(state, monkeypatch)
    pools = {}
    for name, images in sets.items():
        with torch.no_grad():
            colour = np.broadcast_to(images, (*images.shape[:3], 3))
            blocks = network(nchw(colour.astype(np.float32) / 255))
        pools[name] = blocks[3][:, :, 0, 0].double().numpy()
    for name, value in (
        ("samples", found["samples"]["frechet_distance"]["mean"]),
        ("test", found["floor"]["values"]["frechet_distance"]),
    ):
        assert value == pytest.approx(frechet_distance(pools["train"], pools[name]), rel=1e-3)


def frechet_distance(a, b):
    """By the nuclear norm: the trace of the root for fewer vectors than dimensions."""
    means, centred = zip(*((x.mean(axis=0), x - x.mean(axis=0)) for x in (a, b)), strict=True)
    x, y = (c / np.sqrt(len(c) - 1) for c in centred)
    root = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return ((means[0] - means[1]) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * root
