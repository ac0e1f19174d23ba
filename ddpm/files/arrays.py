"""Arrays of an .npz: their headers first, then those that are wanted, where they lie in the file.

A file is taken for what its bytes are, not for what it says of itself: NumPy's own memory maps, and
its unpacking, go by the header alone.
"""

import contextlib
import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from ddpm.files.reading import check_file, check_fits

_CHUNK = 2**20  # bytes read at once
_VERSIONS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Header(NamedTuple):
    """An array's dtype and shape, and where it is: member, and the bytes of it before the data."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    member: zipfile.ZipInfo
    start: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """The bytes of the data."""
        return math.prod(self.shape) * self.dtype.itemsize


def npz_headers(path: Path) -> dict[str, Header]:
    """Returns what an .npz holds, by name.

    Raises InputError for no file, else ValueError, or what zipfile and NumPy raise, for one that is
    no .npz of plain arrays, or whose headers say something else than its members hold.
    """
    check_file(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        found = {m.filename.removesuffix(".npy"): _header(archive, m) for m in members}
    if len(found) < len(members):
        raise ValueError("two arrays have the same name")
    return found


def read_npz(path: Path, headers: Iterable[Header]) -> list[np.ndarray]:
    """Returns these arrays of an .npz; those that are not compressed are memory-mapped, read-only,
    so a set larger than the memory can be read from.

    Raises InputError for compressed arrays beyond the memory, else as above for damage.
    """
    headers = list(headers)
    check_fits(path, sum(h.nbytes for h in headers if h.member.compress_type))
    with zipfile.ZipFile(path) as archive:
        return [_array(path, archive, header) for header in headers]


@contextlib.contextmanager
def _opened(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    with archive.open(member) as file:
        try:
            yield file
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError("its bytes are not what its checksums say") from error


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Header:
    with _opened(archive, member) as file:
        version = np.lib.format.read_magic(file)
        if version not in _VERSIONS:
            raise ValueError(f"{member.filename}: a header of version {version}")
        shape, fortran, dtype = _VERSIONS[version](file)
        header = Header(dtype, shape, fortran, member, file.tell())
    if dtype.hasobject:
        raise ValueError(f"{member.filename}: Python objects, whose reading may run code")
    if min(shape, default=0) < 0 or header.start + header.nbytes != member.file_size:
        raise ValueError(
            f"{member.filename}: its header says {header}, it holds "
            f"{member.file_size - header.start:,} bytes"
        )
    return header


def _array(path: Path, archive: zipfile.ZipFile, header: Header) -> np.ndarray:
    mapped = header.member.compress_type == zipfile.ZIP_STORED and header.nbytes > 0
    data = np.empty(0 if mapped else header.nbytes, np.uint8)
    place = 0
    with _opened(archive, header.member) as file:
        file.read(header.start)
        while chunk := file.read(_CHUNK):  # to the end, where zipfile compares the checksum
            if not mapped:
                data[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
            place += len(chunk)
    if place != header.nbytes:
        raise ValueError(f"{header.member.filename} is cut short")
    order: Literal["F", "C"] = "F" if header.fortran else "C"
    if not mapped:
        return data.view(header.dtype).reshape(header.shape, order=order)
    with path.open("rb") as raw:
        raw.seek(header.member.header_offset + 26)  # of zip's local header: lengths of name, extra
        begin = header.member.header_offset + 30 + sum(struct.unpack("<HH", raw.read(4)))
    # Without the subclass np.memmap, whose every slice pays for being one.
    return np.memmap(path, header.dtype, "r", begin + header.start, header.shape, order).view(
        np.ndarray
    )
