"""The embedded digits, .npz files, and the cache under all sources."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ddpm.data import EncodedSource, cache, digits, npz
from ddpm.data.sources import decoded_once
from ddpm.errors import InputError

ROOT = Path(__file__).parents[2]


def test_digits_are_scikit_learns():
    theirs = load_digits()
    ours = digits("all")
    assert ours.image_shape == (8, 8, 1)
    assert ours.num_classes == 10
    assert ours.image.dtype == np.uint8
    assert (ours.image[..., 0] == np.round(theirs.images * 255 / 16)).all()
    assert (ours.image.min(), ours.image.max()) == (0, 255)
    assert ours.label.dtype == np.int32
    assert (ours.label == theirs.target).all()


def test_splits_of_digits_part_the_whole():
    whole, train, test = digits("all"), digits("train"), digits("test")
    assert len(train) + len(test) == len(whole) == 1797
    both = np.concatenate([train.image, test.image])
    assert sorted(map(bytes, both)) == sorted(map(bytes, whole.image))
    # A split by place alone would hold mostly two classes: they come in the order of the digits.
    counts = np.bincount(test.label)
    np.testing.assert_allclose(counts, np.bincount(whole.label) / 5, atol=1)
    with pytest.raises(InputError, match=r"'valid'.* train, test, all"):
        digits("valid")


def test_read_gives_new_arrays_in_the_order_asked():
    source = digits()
    examples = source.read(np.array([5, 0, 5]))
    assert (examples.image == source.image[[5, 0, 5]]).all()
    examples.image[:] = 0
    assert source.image[5].any()


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_npz_takes_images_with_and_without_channels_and_labels(tmp_path):
    grey = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    rgb = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    a = npz(save(tmp_path / "a.npz", images=grey, labels=np.array([3, 0])))
    assert a.image_shape == (4, 5, 1)
    assert (a.image[..., 0] == grey).all()
    assert a.label.dtype == np.int32
    assert (a.label.tolist(), a.num_classes) == ([3, 0], 4)
    b = npz(str(save(tmp_path / "b.npz", arr_0=rgb)))
    assert (b.image == rgb).all()
    assert b.label is None
    assert b.num_classes is None
    both = save(tmp_path / "c.npz", x_train=rgb, x_test=rgb[:1], y_test=np.array([1]))
    assert len(npz(both, "train")) == 2
    assert npz(both, "test").label.tolist() == [1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.float32)}, r"must be uint8.*images: float32\[2, 4, 4\]"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"channels last.*uint8\[2, 3, 8, 8\]"),
        ({"images": np.zeros((0, 8, 8), np.uint8)}, r"uint8\[0, 8, 8\]"),
        ({"pictures": np.zeros((2, 8, 8), np.uint8)}, r"no array images .*pictures: uint8"),
        ({}, "it holds nothing"),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.zeros((2, 10), int)},
            r"labels must be integers.*labels: int64\[2, 10\]",
        ),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0.0, 1.0])},
            r"labels must be integers.*float64\[2\]",
        ),
        (
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([-1, 0])},
            r"labels holds -1\.\.0: labels must be in 0\.\.2\^31 - 2",
        ),
        (  # which would wrap in int32
            {"images": np.zeros((2, 8, 8), np.uint8), "labels": np.array([0, 2**31])},
            r"labels holds 0\.\.2147483648: labels must be in 0\.\.2\^31 - 2",
        ),
    ],
)
def test_npz_says_what_it_found_instead(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message) as error:
        npz(save(tmp_path / "x.npz", **arrays))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "x.npz") in str(error.value)


def test_npz_that_is_none(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        npz(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_text("hello")
    with pytest.raises(InputError, match=r"cannot be read as an \.npz"):
        npz(tmp_path / "x.npz")
    with pytest.raises(InputError, match="x_valid"):
        npz(save(tmp_path / "y.npz", images=np.zeros((2, 8, 8), np.uint8)), "valid")


def counting(n=1300, labels=True):
    """A source that decodes, and a list that grows at each image decoded."""
    decoded = []

    def decode(i):
        decoded.append(i)
        return np.full((2, 3, 1), i % 251, np.uint8)

    def fetch(indices):
        return indices.tolist(), indices.astype(np.int32) if labels else None

    return EncodedSource((2, 3, 1), n if labels else None, n, fetch, decode), decoded


@pytest.mark.parametrize("labels", [True, False])
def test_decoding_happens_once_and_the_cache_holds_the_same(labels):
    plain, decoded = counting(labels=labels)
    kept = decoded_once(plain, "a set/of images", {"a": (1, None)}, 10**6)
    assert len(decoded) == 1300
    again = decoded_once(plain, "a set/of images", {"a": (1, None)}, 10**6)
    assert len(decoded) == 1300
    indices = np.array([1299, 0, 0, 700, 251])
    for source in (kept, again):
        assert len(source) == 1300
        assert source.image_shape == (2, 3, 1)
        assert source.num_classes == plain.num_classes
        assert (source.read(indices).image == plain.read(indices).image).all()
        if labels:
            assert source.read(indices).label.tolist() == indices.tolist()
        else:
            assert source.read(indices).label is None
    decoded_once(plain, "a set/of images", {"a": (2, None)}, 10**6)
    assert len(decoded) > 2600  # another key: another cache


def test_beyond_the_budget_nothing_is_decoded_beforehand(own_cache):
    plain, decoded = counting()
    assert decoded_once(plain, "x", {}, 1300 * 6 - 1) is plain
    assert not decoded
    assert not list(own_cache.iterdir())


def test_a_failure_while_decoding_leaves_nothing_behind(own_cache):
    def blocks():
        yield {"image": np.zeros((3, 2), np.uint8)}
        raise InputError("broken")

    with pytest.raises(InputError, match="broken"):
        cache.cached("x", {}, blocks)
    assert not list((own_cache / "ddpm").iterdir())


def test_a_killed_process_leaves_no_half_cache_in_use(own_cache):
    killed = """
import os, numpy as np
from ddpm.data import cache
def blocks():
    yield {"image": np.ones((1000, 1000), np.uint8)}
    os.kill(os.getpid(), 9)
cache.cached("x", {"k": 1}, blocks)
"""
    done = subprocess.run([sys.executable, "-c", killed], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert list((own_cache / "ddpm").iterdir())
    arrays = cache.cached("x", {"k": 1}, lambda: [{"image": np.full((4, 2), 7, np.uint8)}])
    assert arrays["image"].tolist() == [[7, 7]] * 4
    leftover = next((own_cache / "ddpm").glob(".unfinished-*"))
    for path in (*leftover.iterdir(), leftover):
        os.utime(path, (0, 0))
    cache.cached("x", {"k": 2}, lambda: [{"image": np.zeros((1, 1), np.uint8)}])
    assert not list((own_cache / "ddpm").glob(".unfinished-*"))


def test_two_processes_at_once_both_end_with_a_whole_cache():
    def blocks(depth):
        yield {"image": np.arange(3, dtype=np.uint8)}
        if depth:  # another one begins later and is ready earlier
            inner = cache.cached("x", {}, lambda: blocks(0))
            assert inner["image"].tolist() == [0, 1, 2, 3, 4]
        yield {"image": np.arange(3, 5, dtype=np.uint8)}

    outer = cache.cached("x", {}, lambda: blocks(1))
    assert outer["image"].tolist() == [0, 1, 2, 3, 4]


def test_a_cache_file_cut_short_is_made_again(own_cache):
    def blocks():
        return [{"image": np.arange(1000, dtype=np.uint8)}]

    cache.cached("x", {}, blocks)
    (file,) = own_cache.rglob("image.npy")
    os.truncate(file, 500)
    assert (cache.cached("x", {}, blocks)["image"] == np.arange(1000) % 256).all()


def test_where_no_cache_can_be_written_images_are_decoded_at_each_use(
    tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    plain, _ = counting()
    with caplog.at_level(logging.WARNING):
        assert decoded_once(plain, "x", {}, 10**9) is plain
    assert "XDG_CACHE_HOME" in caplog.text


def test_cache_header_has_room_for_any_count():
    like = np.zeros((1, 256, 256, 3), np.uint8)
    assert len({len(cache._header(like, n)) for n in (0, 1, 10**6, 10**15)}) == 1


def test_npz_is_read_where_it_lies_and_damage_is_found(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (5, 8, 9, 3)).astype(np.uint8)
    source = npz(save(tmp_path / "a.npz", images=rgb, labels=np.arange(5)))
    assert isinstance(source.image.base, np.memmap)
    assert (source.image == rgb).all()
    assert source.num_classes == 5
    np.savez_compressed(tmp_path / "b.npz", images=rgb)
    assert (npz(tmp_path / "b.npz").image == rgb).all()
    assert (npz(save(tmp_path / "c.npz", images=np.asfortranarray(rgb))).image == rgb).all()
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[300] ^= 1
    (tmp_path / "d.npz").write_bytes(data)
    with pytest.raises(InputError, match="its bytes are not what its checksums say"):
        npz(tmp_path / "d.npz")
