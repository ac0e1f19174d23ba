"""Arrays of an .npz: as NumPy reads them, or refused; never more than the member holds."""

import io
import os
import zipfile

import numpy as np
import pytest

from ddpm.data import npz
from ddpm.errors import InputError
from ddpm.files import reading
from ddpm.files.arrays import npz_headers, read_npz
from ddpm.files.tensors import read_tensors

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]


def member(array, **changes):
    """The bytes of an .npy whose header says something else than the array."""
    out, header = io.BytesIO(), np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(out, header | changes)
    return out.getvalue() + array.tobytes("A")


def pack(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_arrays_are_those_that_numpy_reads(tmp_path, method):
    rng = np.random.default_rng(0)
    arrays = {
        "images": rng.integers(0, 256, (3, 4, 5, 3)).astype(np.uint8),
        "fortran": np.asfortranarray(rng.normal(size=(4, 3))),
        "big": np.arange(7, dtype=">i4"),
        "number": np.array(3.5, np.float16),
        "empty": np.zeros((0, 3)),
    }
    path = pack(tmp_path / "a.npz", {k: member(x) for k, x in arrays.items()}, method)
    headers = npz_headers(path)
    found = dict(zip(headers, read_npz(path, headers.values()), strict=True))
    with np.load(path) as file:
        for name in arrays:
            np.testing.assert_array_equal(found[name], file[name])
            assert found[name].dtype == file[name].dtype
    assert str(headers["images"]) == "uint8[3, 4, 5, 3]"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 4, 5, 3), (2, 4, 5, 3), (-3, -4, 5, 3), (3, 2**62, 5, 3)])
def test_a_member_that_says_something_else_than_it_holds_is_refused(tmp_path, method, shape):
    """Read by the header alone, it would go on into the next member."""
    image, more = np.full((3, 4, 5, 3), 7, np.uint8), np.full((9, 4, 5, 3), 99, np.uint8)
    members = {"images": member(image, shape=shape), "other": member(more)}
    path = pack(tmp_path / "a.npz", members, method)
    for read in (npz, read_tensors):
        with pytest.raises(InputError, match=r"images\.npy: its header says .* it holds 180 bytes"):
            read(path)
    right = pack(tmp_path / "b.npz", {"images": member(image)}, method)
    assert (npz(right).image == 7).all()


def test_what_does_not_fit_in_memory_is_not_unpacked(tmp_path, monkeypatch):
    """Only what is asked for counts, and of that only what is compressed."""
    image = np.zeros((100, 32, 32, 3), np.uint8)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, images=image, other=np.zeros(10**6))
    monkeypatch.setattr(reading, "free_memory", lambda: image.nbytes)
    assert len(npz(path)) == 100
    monkeypatch.setattr(reading, "free_memory", lambda: image.nbytes - 1)
    with pytest.raises(InputError, match=r"unpacked, it takes .* GB of memory; .* GB are free"):
        npz(path)
    np.savez_compressed(path, images=image.astype(np.float32))  # refused for its type, unread
    with pytest.raises(InputError, match=r"must be uint8"):
        npz(path)
    np.savez(path, images=image)
    assert len(npz(path)) == 100
    assert reading.free_memory() > 0


def test_a_list_of_many_arrays_is_cut(tmp_path):
    path = pack(tmp_path / "a.npz", {f"x{i}": member(np.zeros(1)) for i in range(2000)})
    with pytest.raises(InputError, match=r"x0: float64\[1\], .* and 1,995 more; data.split choo"):
        npz(path)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.pth", "a.bin"])
def test_only_regular_files_are_read(tmp_path, name):
    read = npz if name == "a.npz" else read_tensors
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="not a regular file, but a pipe"):
        read(tmp_path / name)
    (tmp_path / "folder" / name).mkdir(parents=True)
    with pytest.raises(InputError, match="a folder, not a file"):
        read(tmp_path / "folder" / name)
    with pytest.raises(InputError, match="there is no such file"):
        read(tmp_path / ("x" * 9999 + name))
