"""Images in a .zip or an uncompressed .tar, read where they lie: by offset, from any thread or process, without unpacking.

A member of a .tar.gz can only be reached through all that stands before it, so that is refused with what to do. Formats: PKWARE's
APPNOTE 6.3 (local header, section 4.3.7; methods 0 stored and 8 deflated), POSIX.1-2017 pax for tar, through Python's tarfile.
"""

from __future__ import annotations

import posixpath
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.byte_file import ByteFile
from trainer.errors import DataError
from trainer.items import BadImageError, Encoded

ARCHIVE_SUFFIXES = frozenset({".zip", ".tar"})
COMPRESSED_TARS = (".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".tar.zst")
MAX_IMAGE_BYTES = 1 << 29  # of one unpacked image file: a few bytes can claim to be any number of them
LOCAL_HEADER, LOCAL_SIGNATURE = struct.Struct("<4s22xHH"), b"PK\x03\x04"
IS_ENCRYPTED = 1


@dataclass(frozen=True)
class Members:
    """Where the members of an archive lie. `table` (n, 5): offset, bytes there, bytes unpacked, method, checksum; of a tar the last two are 0."""

    file: ByteFile
    names: list[str]
    table: NDArray[np.int64]
    is_zip: bool

    def data(self, n: int) -> bytes:
        """The bytes of member n; raises BadImageError where they are damaged."""
        offset, packed, size, method, checksum = self.table[n].tolist()
        if size > MAX_IMAGE_BYTES:
            raise BadImageError(f"is {size / 1e6:.0f} MB, expected at most {MAX_IMAGE_BYTES / 1e6:.0f} MB for an image")
        if not self.is_zip:
            return self.file.read(offset, size)
        if method < 0:
            raise BadImageError("is encrypted; unpack the archive, or pack it again without a password")
        data = _unpacked(self.file.read(zip_data_offset(self.file, offset), packed), size, method)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise BadImageError(f"is damaged in {self.file.path.name}: its checksum is not that of the archive")
        return data


class MemberImage(Encoded):
    """Member n of an archive."""

    __slots__ = ("members", "n")

    def __init__(self, members: Members, n: int) -> None:
        self.members, self.n = members, n

    def data(self) -> bytes:
        return self.members.data(self.n)


def open_archive(path: Path) -> Members:
    """The files in an archive; of a name that comes twice the last one, as unpacking would leave it.

    Raises:
        DataError: it is damaged, or no .zip or .tar.
    """
    if path.name.lower().endswith(COMPRESSED_TARS):
        raise DataError(
            f"data.path is {path}, a compressed tar, in which no image can be reached without unpacking all before it; unpack it, or pack "
            f"the images into a .zip or an uncompressed .tar (image files do not get smaller anyway)"
        )
    is_zip = path.suffix.lower() == ".zip"
    try:
        found = _zipped(path) if is_zip else _tarred(path)
        table = np.array(list(found.values()), np.int64).reshape(-1, 5)
    except (OSError, ValueError, OverflowError, NotImplementedError, zipfile.BadZipFile, tarfile.TarError) as error:
        kind = "zip" if is_zip else "tar"
        raise DataError(f"data.path is {path}, which is no readable {kind} archive: {error}") from None
    return Members(ByteFile(path), list(found), table, is_zip)


def _zipped(path: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                method = -1 if info.flag_bits & IS_ENCRYPTED else info.compress_type
                place = (info.header_offset, info.compress_size, info.file_size, method, info.CRC)
                found[info.filename.removeprefix("./")] = place
    return found


def _tarred(path: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    links: dict[str, str] = {}
    with tarfile.open(path, "r:") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isreg() and not info.issparse():
                found[name] = (info.offset_data, info.size, info.size, 0, 0)
                links.pop(name, None)
            elif info.islnk() or info.issym():
                base = posixpath.dirname(name) if info.issym() else ""
                links[name] = posixpath.normpath(posixpath.join(base, info.linkname))
            archive.members = []  # type: ignore[attr-defined]  # it would keep all of them: a kilobyte each
    # A folder has an image at each of its links too (`predict --sort-into` makes them); what lies outside the archive is not there.
    return found | {name: found[target] for name, target in links.items() if target in found}


def zip_data_offset(file: ByteFile, header_offset: int) -> int:
    """Where a member's bytes begin: behind its local header, whose extra field is not that of the directory."""
    signature, name, extra = LOCAL_HEADER.unpack(file.read(header_offset, LOCAL_HEADER.size))
    if signature != LOCAL_SIGNATURE:
        raise BadImageError(f"is damaged in {file.path.name}: its header is not there")
    return header_offset + LOCAL_HEADER.size + int(name) + int(extra)


def _unpacked(data: bytes, size: int, method: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return data
    if method != zipfile.ZIP_DEFLATED:
        raise BadImageError(f"is packed by zip method {method}, expected stored (0) or deflated (8); pack it again")
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise BadImageError(f"cannot be unpacked: {error}") from None
