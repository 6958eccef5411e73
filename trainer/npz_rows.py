"""The images of an .npz array, row by row: from the file where it was written without compression, else from memory."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from trainer.archives import zip_data_offset
from trainer.byte_file import ByteFile
from trainer.items import BadImageError, Image


class FileRows:
    """An array (N, ...) in the bytes of a file; `[n]` reads row n.

    Args:
        offset: where row 0 begins.
    """

    def __init__(self, file: ByteFile, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype, self.ndim = shape, dtype, len(shape)
        self._file, self._offset = file, offset
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, n: int) -> NDArray[Any]:
        data = self._file.read(self._offset + n * self._row_bytes, self._row_bytes)
        return np.frombuffer(bytearray(data), self.dtype).reshape(self.shape[1:])


class RowImage:
    """Image n of an array (N, H, W) or (N, H, W, 3 or 1)."""

    __slots__ = ("n", "x")

    def __init__(self, x: NDArray[np.uint8] | FileRows, n: int) -> None:
        self.x, self.n = x, n

    def __call__(self) -> tuple[Image, str]:
        image = self.x[self.n]
        image = image if image.ndim == 3 else image[..., None]
        return image, hashlib.sha256(image.tobytes()).hexdigest()


def open_rows(path: Path, name: str) -> FileRows | None:
    """Array `name` of an .npz, to be read by rows; None where that cannot be: it is compressed, or laid out by columns."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                return None
            with archive.open(info) as member:
                version = npy.read_magic(member)
                read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                if read_header is None:
                    return None
                shape, is_by_columns, dtype = read_header(member)
                header_bytes = member.tell()
        file = ByteFile(path)
        start = zip_data_offset(file, info.header_offset)
    except (OSError, ValueError, KeyError, zlib.error, zipfile.BadZipFile, BadImageError):
        return None  # np.load will say what is wrong
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if is_by_columns or dtype.hasobject or not shape or header_bytes + size != info.file_size:
        return None
    return FileRows(file, start + header_bytes, shape, dtype)
