"""tfds sets: prepared from originals without TensorFlow, read back, and what can go wrong."""

import gzip
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets
from tensorflow_datasets.core.download import checksums

from ddpm.data import ArraySource, EncodedSource, prepare, tfds
from ddpm.errors import InputError

ROOT = Path(__file__).parents[2]
CLASSES = [f"class {i}" for i in range(10)]


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.tobytes())


def images_and_labels(seed, n, shape, classes=10):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, classes, n).astype(np.uint8)


def write_mnist(folder):
    """Four files as Fashion-MNIST has them, but few examples. {split: (images, labels)}."""
    folder.mkdir(parents=True)
    data = {}
    for split, stem, n in (("train", "train", 37), ("test", "t10k", 11)):
        data[split] = image, label = images_and_labels(n, n, (28, 28))
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(image))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(label))
    return {s: (i[..., None], n) for s, (i, n) in data.items()}


def write_cifar(folder, name):
    """The archive as its authors made it: a record is the labels, then the planes R, G, B."""
    folder.mkdir(parents=True)
    if name == "cifar10":
        prefix, archive = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
        files = {f"data_batch_{i}.bin": 4 for i in range(1, 6)} | {"test_batch.bin": 3}
        names = {"batches.meta.txt": CLASSES}
    else:
        prefix, archive = "cifar-100-binary", "cifar-100-binary.tar.gz"
        files = {"train.bin": 9, "test.bin": 5}
        names = {"coarse_label_names.txt": [f"coarse {i}" for i in range(20)]}
        names["fine_label_names.txt"] = [f"fine {i}" for i in range(100)]
    data = {"train": [], "test": []}
    with tarfile.open(folder / archive, "w:gz") as tar:
        for seed, (file, n) in enumerate(files.items()):
            image, label = images_and_labels(seed, n, (32, 32, 3), 10 if name == "cifar10" else 100)
            data["test" if "test" in file else "train"].append((image, label))
            columns = [label[:, None], image.transpose(0, 3, 1, 2).reshape(n, -1)]
            if name == "cifar100":
                columns.insert(0, label[:, None] // 5)
            add(tar, f"{prefix}/{file}", np.concatenate(columns, axis=1).tobytes())
        for file, lines in names.items():
            add(tar, f"{prefix}/{file}", "\n".join([*lines, "", ""]).encode())
    return {s: tuple(np.concatenate(x) for x in zip(*d, strict=True)) for s, d in data.items()}


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def expect(patch, name, folder):
    """Makes tfds take the files of this folder for the originals of the set, by their checksums."""
    official = tensorflow_datasets.builder_cls(name)
    infos = {}
    for url, info in official.url_infos.items():
        content = (folder / info.filename).read_bytes()
        size = type(info.size)(len(content))
        digest = hashlib.sha256(content).hexdigest()
        infos[url] = checksums.UrlInfo(size=size, checksum=digest, filename=info.filename)
    patch.setattr(official, "url_infos", infos)
    patch.setattr(checksums, "get_all_url_infos", lambda: dict(infos))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A data_dir with a small 'fashion_mnist', and what is in it."""
    data_dir = tmp_path_factory.mktemp("tfds")
    originals = data_dir / "downloads" / "manual" / "fashion_mnist"
    data = write_mnist(originals)
    with pytest.MonkeyPatch.context() as patch:
        expect(patch, "fashion_mnist", originals)
        prepare.prepare("fashion_mnist", data_dir)
    return data_dir, data


def pairs(image, label):
    """Examples in an order of their own: tfds shuffles them once, when it writes."""
    return sorted((i.tobytes(), int(n)) for i, n in zip(image, label, strict=True))


def assert_same(source, image, label):
    examples = source.read(np.arange(len(source)))
    assert examples.image.dtype == np.uint8
    assert examples.label.dtype == np.int32
    assert pairs(*examples) == pairs(image, label)


def test_fashion_mnist_is_what_its_files_hold(fashion):
    data_dir, data = fashion
    for split in ("train", "test"):
        source = tfds("fashion_mnist", split, data_dir)
        assert isinstance(source, ArraySource)
        assert source.image_shape == (28, 28, 1)
        assert source.num_classes == 10
        assert_same(source, *data[split])
    builder = tensorflow_datasets.builder("fashion_mnist", data_dir=data_dir)
    assert builder.info.features["label"].names[9] == "Ankle boot"
    assert builder.info.full_name == "fashion_mnist/3.0.1"
    assert prepare.prepare("fashion_mnist", data_dir).data_dir == builder.data_dir


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_what_its_archive_holds(tmp_path, monkeypatch, name):
    data = write_cifar(tmp_path / "mine", name)
    expect(monkeypatch, name, tmp_path / "mine")
    builder = prepare.prepare(name, tmp_path / "tfds", manual_dir=tmp_path / "mine")
    for split in ("train", "test"):
        source = tfds(name, split, tmp_path / "tfds")
        assert source.image_shape == (32, 32, 3)
        assert_same(source, *data[split])
    assert source.num_classes == (10 if name == "cifar10" else 100)
    names = builder.info.features["label"].names
    assert names == (CLASSES if name == "cifar10" else [f"fine {i}" for i in range(100)])
    first = next(iter(builder.as_data_source("train")))
    number = int(first["id"].decode().removeprefix("train_"))
    assert (first["image"] == data["train"][0][number]).all()
    if name == "cifar100":
        assert first["coarse_label"] == first["label"] // 5


def test_what_is_read_needs_no_tensorflow_and_says_nothing(fashion):
    script = f"""
import sys
from ddpm.data import tfds
source = tfds("fashion_mnist", "train", {str(fashion[0])!r})
assert len(source) == 37
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == ""
    assert done.stderr == ""


def test_splits_may_be_cut_and_joined(fashion):
    data_dir, data = fashion
    whole = tfds("fashion_mnist", "train", data_dir)
    head = tfds("fashion_mnist", "train[:10]", data_dir)
    assert (head.image == whole.image[:10]).all()
    both = tfds("fashion_mnist", "train+test", data_dir)
    assert_same(both, *(np.concatenate([data["train"][k], data["test"][k]]) for k in (0, 1)))


def test_images_are_resized_where_asked_and_decoded_late_where_large(fashion):
    data_dir, _ = fashion
    plain = tfds("fashion_mnist", "test", data_dir)
    late = tfds("fashion_mnist", "test", data_dir, (28, 28), memory_budget=0)
    assert isinstance(late, EncodedSource)
    indices = np.array([3, 3, 10, 0])
    assert (late.read(indices).image == plain.read(indices).image).all()
    assert (late.read(indices).label == plain.read(indices).label).all()
    small = tfds("fashion_mnist", "test", data_dir, (14, 7))
    assert small.image_shape == (14, 7, 1)
    same = plain.read(indices).image[:, :, 7:21, 0].reshape(4, 14, 2, 7, 2).mean(axis=(2, 4))
    got = small.read(indices).image[..., 0]  # bicubic is near to the mean over 2 x 2 pixels
    assert np.corrcoef(got.ravel(), same.ravel())[0, 1] > 0.9


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_names_and_splits_bring_the_nearest(fashion):
    data_dir, _ = fashion
    with pytest.raises(InputError, match="did you mean fashion_mnist") as error:
        tfds("fashion_mnst", "train", data_dir)
    one_line(error)
    with pytest.raises(InputError, match="lsun/church_outdoor") as error:
        tfds("lsun/church", "train", data_dir)
    one_line(error)
    with pytest.raises(InputError, match="no split 'training'; there is train, test") as error:
        tfds("fashion_mnist", "training", data_dir)
    one_line(error)


def test_data_in_a_format_without_random_access_say_so(fashion, tmp_path):
    shutil.copytree(fashion[0] / "fashion_mnist", tmp_path / "fashion_mnist")
    info = tmp_path / "fashion_mnist" / "3.0.1" / "dataset_info.json"
    content = json.loads(info.read_text())
    assert content["fileFormat"] == "array_record"
    info.write_text(json.dumps({**content, "fileFormat": "tfrecord"}))
    with pytest.raises(InputError, match=r"prepared in the format tfrecord.*ddpm\.data\.prepare"):
        tfds("fashion_mnist", "train", tmp_path)


def test_an_incomplete_copy_says_so(fashion, tmp_path):
    shutil.copytree(fashion[0] / "fashion_mnist", tmp_path / "fashion_mnist")
    records = next(tmp_path.rglob("*-train.array_record*"))
    records.unlink()
    with pytest.raises(InputError, match=f"{records.name} is missing"):
        tfds("fashion_mnist", "train", tmp_path)
    next(tmp_path.rglob("dataset_info.json")).unlink()
    with pytest.raises(InputError, match=r"not complete.*remove"):
        tfds("fashion_mnist", "train", tmp_path)


def test_a_wrong_original_is_refused_and_leaves_no_set(tmp_path):
    write_mnist(tmp_path / "mine")  # not the true files: tfds knows their checksums
    with pytest.raises(InputError, match=r"mine/.*wrong checksum.*download it again") as error:
        prepare.prepare("mnist", tmp_path / "tfds", manual_dir=tmp_path / "mine")
    one_line(error)
    assert not list((tmp_path / "tfds").glob("mnist/*"))


def test_without_a_network_it_says_so_within_ten_seconds(tmp_path):
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"))
    environment = {**os.environ, **dict.fromkeys(nowhere, "http://127.0.0.1:9"), "no_proxy": ""}
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "ddpm.data.prepare", "cifar10", f"--data_dir={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert time.time() - start < 10
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "www.cs.toronto.edu cannot be reached" in done.stderr
    assert "python -m ddpm.data.prepare cifar10 --data_dir=FOLDER" in done.stderr
    assert f"cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz to {tmp_path}" in (
        done.stderr
    )


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        start = time.time()
        said = prepare._unreachable(f"http://127.0.0.1:{server.getsockname()[1]}/x", 0.3)
        assert time.time() - start < 2
    assert said


def test_sets_that_need_more_say_what(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install tensorflow-cpu") as error:
        tfds("lsun/church_outdoor", "train", tmp_path)
    one_line(error)
    with pytest.raises(InputError, match="by hand, to") as error:
        tfds("celeb_a_hq/256", "train", tmp_path)
    assert str(tmp_path / "downloads" / "manual") in one_line(error)
    assert not list(Path(tmp_path).rglob("dataset_info.json"))
