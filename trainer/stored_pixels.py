"""The pixels of a set that is larger than memory: one file, written once, read by rows. `Pixels` is that or a tensor.

Row i lies at i times its bytes. Reads are positioned reads into a buffer of their own: a mapped file would count as this process's
memory as it is touched, and several threads and forked processes may read from one descriptor.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.byte_file import MOST_READ, ByteFile
from trainer.errors import DataError

BUFFER_BYTES = 1 << 20
Index: TypeAlias = "Tensor | NDArray[np.int64] | slice"


class StoredPixels:
    """(N, h, w, c) uint8 or float32 in a file; an index of rows, or a slice, gives them as a tensor on `device`.

    Args:
        rows: (N,) which rows of the file, in which order; None: all.

    Raises:
        DataError: when it is read, the file is gone or has become shorter.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.uint8,
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self.path, self.dtype, self.device = path, dtype, torch.device("cpu")
        self._whole = tuple(shape)
        self._rows = rows
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        self._file = ByteFile(path)
        self._keeps: Any = None  # of a temporary folder: it goes with the last of those who read there

    @property
    def shape(self) -> torch.Size:
        """(N, h, w, c)."""
        return torch.Size((len(self), *self._whole[1:]))

    def __len__(self) -> int:
        return self._whole[0] if self._rows is None else len(self._rows)

    def __getitem__(self, index: Index | int) -> Tensor:
        if isinstance(index, int):
            return self[slice(index, index + 1) if index != -1 else slice(-1, None)][0]
        rows = self._rows_of(index)
        out = torch.empty((len(rows), *self._whole[1:]), dtype=self.dtype, pin_memory=self.device.type == "cuda")
        if out.numel():
            self._read(rows, out)
        return out.to(self.device, non_blocking=True)

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, `size` at a time; one piece is held at once. Of no rows one empty piece, as of a tensor."""
        for first in range(0, max(1, len(self)), size):
            yield self[first : first + size]

    def take(self, index: Index) -> StoredPixels:
        """Some of the rows, still in the file."""
        return self._like(self._rows_of(index), self.device)

    def to(self, device: torch.device | str) -> StoredPixels:
        """The same, its rows given on `device`."""
        return self._like(self._rows, torch.device(device))

    def prefetch(self, index: Tensor) -> None:
        """Tells the kernel that rows `index` are read next: it fetches them from disk meanwhile. Costs no memory of this process."""
        self._announce(list(_runs(self._rows_of(index))))

    def keep(self, what: Any) -> StoredPixels:
        """Holds on to what the file lives in (a temporary folder) as long as these pixels are used."""
        self._keeps = what
        return self

    def _like(self, rows: NDArray[np.int64] | None, device: torch.device) -> StoredPixels:
        other = StoredPixels(self.path, self._whole, self.dtype, rows)
        other.device, other._file, other._keeps = device, self._file, self._keeps
        return other

    def _rows_of(self, index: Index) -> NDArray[np.int64]:
        """Rows of the file (n,) for an index of ours."""
        if isinstance(index, slice):
            if self._rows is not None:
                return self._rows[index]
            return np.arange(*index.indices(len(self)), dtype=np.int64)
        asked = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        asked = np.flatnonzero(asked) if asked.dtype == np.bool_ else asked.astype(np.int64, copy=False)
        if asked.size and not -len(self) <= int(asked.min()) <= int(asked.max()) < len(self):
            raise IndexError(f"row {int(asked.max())} (or {int(asked.min())}) of {len(self)} stored images")
        asked = np.where(asked < 0, asked + len(self), asked)
        return asked if self._rows is None else self._rows[asked]

    def _read(self, rows: NDArray[np.int64], out: Tensor) -> None:
        view = out.numpy().reshape(-1).view(np.uint8).data
        descriptor, size = self._descriptor(), self._row_bytes
        runs = list(_runs(rows))
        if len(runs) > 1:  # the disk then serves many at a time: one by one, each would wait for the one before
            self._announce(runs)
        for row, count, place in runs:
            start, end = row * size, (row + count) * size
            while start < end:
                part = view[place * size + start - row * size :][: min(end - start, MOST_READ)]
                got = os.preadv(descriptor, [part], start)
                if not got:
                    raise DataError(
                        f"{self.path} ends after {start} bytes, expected {self._whole[0] * size}; delete it and start again"
                    )
                start += got

    def _announce(self, runs: list[tuple[int, int, int]]) -> None:
        if hasattr(os, "posix_fadvise"):
            descriptor, size = self._descriptor(), self._row_bytes
            for row, count, _ in runs:
                os.posix_fadvise(descriptor, row * size, count * size, os.POSIX_FADV_WILLNEED)

    def _descriptor(self) -> int:
        try:
            return self._file.descriptor()
        except OSError as error:
            raise DataError(f"the pixels in {self.path} cannot be read: {error.strerror or error}") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keeps": None}


Pixels: TypeAlias = "Tensor | StoredPixels"


def select(pixels: Pixels, index: Tensor | slice) -> Pixels:
    """Rows `index`: as a tensor's own index gives them, of a store a view that reads nothing."""
    return pixels.take(index) if isinstance(pixels, StoredPixels) else pixels[index]


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(first row, how many, place in `rows`) of stretches that follow each other in the file too, in the order of the file."""
    if not len(rows):
        return
    starts = np.flatnonzero(np.concatenate([[True], np.diff(rows) != 1]))
    counts = np.diff(np.append(starts, len(rows)))
    order = np.argsort(rows[starts], kind="stable")
    yield from zip(rows[starts][order].tolist(), counts[order].tolist(), starts[order].tolist(), strict=True)


class PixelWriter:
    """Writes rows (h, w, c) one after the other into `path`; `close` makes them `StoredPixels`.

    Args:
        rows: how many there will be at most: there has to be room for so many.

    Raises:
        DataError: there is no room, at the start or later; nothing is left then.
    """

    def __init__(self, path: Path, row: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
        self.path, self._row, self._dtype, self._count = path, row, dtype, 0
        self.needed = rows * int(np.prod(row)) * dtype.itemsize
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            if free < self.needed:
                raise DataError(
                    f"the decoded pixels need {self.needed / 1e9:.3g} GB in {path.parent}, which has {free / 1e9:.3g} GB free; make room, "
                    f"name another place with data.scratch, or use a smaller preprocess.height_px and width_px"
                )
            self._file = io.BufferedWriter(io.FileIO(path, "xb"), BUFFER_BYTES)
        except OSError as error:
            raise self._problem(error) from None

    def append(self, row: Tensor) -> None:
        """One more row."""
        try:
            self._file.write(row.contiguous().numpy().data)
        except OSError as error:
            raise self._problem(error) from None
        self._count += 1

    def close(self) -> StoredPixels:
        """All that was appended; on disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._problem(error) from None
        return StoredPixels(self.path, (self._count, *self._row), self._dtype)

    def discard(self) -> None:
        """Gives the place back."""
        with contextlib.suppress(OSError, AttributeError):
            self._file.raw.close()  # not through the buffer, which would try to write what it holds
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _problem(self, error: OSError) -> DataError:
        self.discard()
        return DataError(
            f"{self.path} cannot take {self.needed / 1e9:.3g} GB of decoded pixels: {error.strerror or error} after {self._count} images; "
            f"make room, or name another place with data.scratch"
        )
