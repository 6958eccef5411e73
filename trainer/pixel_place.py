"""Where decoded pixels are kept: in memory, or in a file beside a record of what they are, so that a resumed run need not decode again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from trainer.available_memory import available_bytes
from trainer.decoding import Decoded, Skipped
from trainer.errors import DataError
from trainer.images import DataSettings
from trainer.items import ImageSet, Item
from trainer.preprocess import Preprocess
from trainer.stored_pixels import Pixels, PixelWriter, StoredPixels
from trainer.whole_file import save_tensors

SCHEMA = "dkm.pixels/1"
DIGEST_BYTES = 32
NONE = bytes(DIGEST_BYTES)


def _nobody(text: str) -> None:
    """Where nobody is told."""


@dataclass(frozen=True)
class StorePlace:
    """Where decoded pixels may be kept on disk. Every machine needs a `name` of its own: a folder may be seen by several.

    `processes` of this machine read the same images: with several, one decodes them into the file (`load_dataset`), and the others
    take them from there (`open_dataset`).
    """

    folder: Path
    processes: int = 1
    name: str = "pixels"
    say: Callable[[str], None] = _nobody

    @classmethod
    def of(
        cls,
        settings: DataSettings,
        run_folder: Path,
        processes: int = 1,
        machine: int = 0,
        say: Callable[[str], None] = _nobody,
    ) -> StorePlace:
        """That of a run: its scratch folder, or a folder of its own in `data.scratch`."""
        if settings.scratch is None:
            return cls(run_folder / "scratch", processes, f"pixels-{machine}", say)
        own = hashlib.sha256(str(run_folder.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return cls(Path(settings.scratch) / f"dkm-{own}", processes, f"pixels-{machine}", say)

    @property
    def record(self) -> Path:
        """The file that says what the pixels are; written when they are complete."""
        return self.folder / f"{self.name}.safetensors"

    def pixels(self, channels: int) -> Path:
        """The file of pixels."""
        return self.folder / f"{self.name}-{channels}.raw"

    def remove(self) -> None:
        """Deletes both, and the folder where nothing else lies in it."""
        for path in (self.record, self.pixels(1), self.pixels(3)):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another machine's may lie there still
            self.folder.rmdir()


class Reading:
    """What is known of a set once it has been read: which images are usable, the sha256 of each, the manifest's digest."""

    def __init__(self) -> None:
        self.positions = array("q")  # of the usable ones, in the set
        self.sha256 = bytearray()  # 32 bytes per image of the set, 0 where its bytes cannot be had
        self.skipped: list[Skipped] = []
        self.common_size: tuple[int, int] | None = None  # (height, width) of all frames, where they share it
        self._sizes: set[tuple[int, int]] = set()
        self._manifest = hashlib.sha256()
        self.manifest_sha256 = ""

    def add(self, n: int, found: Decoded) -> None:
        """Image n of the set."""
        self.sha256 += found.sha256 or NONE
        if found.pixels is None:
            self.skipped.append(Skipped(found.item.name, found.reason))
            return
        self.positions.append(n)
        self._sizes.add(found.size)
        self._manifest.update(f"{found.item.name}\0{found.sha256.hex()}\n".encode())

    def close(self) -> Reading:
        """All images were added."""
        self.common_size = next(iter(self._sizes)) if len(self._sizes) == 1 else None
        self.manifest_sha256 = self._manifest.hexdigest()
        return self

    def usable(self) -> NDArray[np.int64]:
        """Positions (N,) of the usable images in the set."""
        return np.frombuffer(self.positions, np.int64) if self.positions else np.zeros(0, np.int64)

    def digests(self) -> NDArray[np.uint8]:
        """(number in the set, 32)."""
        return np.frombuffer(self.sha256, np.uint8).reshape(-1, DIGEST_BYTES)


class _Sink(Protocol):
    def append(self, row: Tensor) -> None: ...
    def close(self) -> Pixels: ...
    def discard(self) -> None: ...


class _Memory:
    """Rows in one tensor, made once: a list of them would be held twice when it is put together."""

    def __init__(self, row: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
        try:
            self._rows, self._count = torch.empty((rows, *row), dtype=dtype), 0
        except RuntimeError:
            raise DataError(
                f"{rows * int(np.prod(row)) * dtype.itemsize / 1e9:.3g} GB of pixels ({rows} images of {row[1]}x{row[0]}) do not fit into memory; "
                f"set data.memory: disk"
            ) from None

    def append(self, row: Tensor) -> None:
        self._rows[self._count] = row
        self._count += 1

    def close(self) -> Tensor:
        return self._rows[: self._count]

    def discard(self) -> None:
        self._rows = torch.empty(0)


class Keeper:
    """Takes the pixels of a set, image by image, into memory or onto disk, as the settings say and memory allows.

    Grey images take one channel until a coloured one comes; then all have three.
    """

    def __init__(self, settings: DataSettings, place: StorePlace | None, module: Preprocess, count: int) -> None:
        self._settings, self._module, self._count = settings, module, count
        self.place = place
        self._temporary: _TemporaryFolder | None = None
        self._channels = 0
        self._sink: _Sink | None = None

    def add(self, pixels: Tensor) -> None:
        """The pixels (h, w, 3 or 1) of the next image."""
        channels = pixels.shape[-1]
        if self._sink is None:
            self._sink, self._channels = self._open(channels), channels
        elif channels > self._channels:
            self._widen(self._sink, channels)
        self._sink.append(pixels.expand(-1, -1, self._channels))

    def close(self) -> Pixels:
        """All that were added."""
        if self._sink is None:
            raise ValueError("no image was added")
        pixels = self._sink.close()
        return pixels.keep(self._temporary) if isinstance(pixels, StoredPixels) else pixels

    def discard(self) -> None:
        """Gives memory and disk back."""
        if self._sink is not None:
            self._sink.discard()

    def _open(self, channels: int) -> _Sink:
        row = (self._module.height_px, self._module.width_px, channels)
        why = why_disk(self._settings, self._count * self._row_bytes(row), self.place)
        shared = self.place is not None and self.place.processes > 1
        if why is None and not shared:
            return _Memory(row, self._module.stored_dtype, self._count)
        if self.place is None:
            self._temporary = _TemporaryFolder(self._settings.scratch)
            self.place = StorePlace(self._temporary.path)
        if self._sink is None:
            self.place.remove()  # what a process that was killed may have left
        path = self.place.pixels(channels)
        if why is not None:
            self.place.say(f"pixels are kept in {path}: {why}")
        return PixelWriter(path, row, self._module.stored_dtype, self._count)

    def _row_bytes(self, row: tuple[int, ...]) -> int:
        return int(np.prod(row)) * self._module.stored_dtype.itemsize

    def _widen(self, narrow: _Sink, channels: int) -> None:
        so_far = narrow.close()
        self._sink, self._channels = self._open(channels), channels
        for part in so_far.split(64):
            for row in part:
                self._sink.append(row.expand(-1, -1, channels))
        narrow.discard()


def why_disk(settings: DataSettings, needed: int, place: StorePlace | None) -> str | None:
    """Why `needed` bytes of pixels are better kept on disk, in words; None where they are not."""
    if settings.memory != "auto":
        return "data.memory is disk" if settings.memory == "disk" else None
    available = available_bytes()
    copies = 1 if place is None else place.processes
    if available is None or needed * copies <= settings.ram_share * available:
        return None
    times = f"{copies} x " if copies > 1 else ""
    return f"{times}{needed / 1e9:.3g} GB are more than {settings.ram_share:.0%} of the {available / 1e9:.3g} GB of memory that is available"


class _TemporaryFolder:
    """A folder that goes when nobody holds this any more."""

    def __init__(self, parent: str | None) -> None:
        try:
            self.path = Path(tempfile.mkdtemp(prefix="dkm-pixels-", dir=parent))
        except OSError as error:
            raise DataError(
                f"data.scratch is {parent}, where no folder for pixels can be made: {error.strerror or error}"
            ) from None
        weakref.finalize(self, shutil.rmtree, self.path, True)


@dataclass(frozen=True)
class Record:
    """A complete store as it was found: what was read, and its pixels."""

    reading: Reading
    pixels: StoredPixels


def write_record(place: StorePlace, images: ImageSet, module: Preprocess, found: Record) -> None:
    """Says what the pixels in `place` are."""
    reading, pixels = found.reading, found.pixels
    plain = {
        **_identity(images, module),
        "shape": list(pixels.shape),
        "manifest_sha256": reading.manifest_sha256,
        "common_size": reading.common_size,
        "skipped": [[skipped.name, skipped.reason] for skipped in reading.skipped],
    }
    tensors = {
        "record": torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8),
        "positions": torch.from_numpy(reading.usable().copy()),
        "sha256": torch.from_numpy(reading.digests().copy()),
    }
    try:
        save_tensors(place.record, tensors)
    except OSError as error:
        raise DataError(f"{place.record} cannot be written: {error.strerror or error}") from None


def read_record(
    place: StorePlace, images: ImageSet, module: Callable[[tuple[int, int]], Preprocess]
) -> tuple[Record, Preprocess] | None:
    """The store in `place` if it is complete, of the same list of images and the same pre-processing; whether their bytes are too, it does not say.

    Args:
        module: makes the pre-processing module for a size (height, width).
    """
    try:
        tensors = load_file(place.record)
        plain = json.loads(tensors["record"].numpy().tobytes())
        shape = tuple(plain["shape"])
        made = module((shape[1], shape[2]))
        if any(plain[key] != value for key, value in _identity(images, made).items()):
            return None
        path = place.pixels(shape[3])
        pixels = StoredPixels(path, shape, made.stored_dtype)
        if path.stat().st_size != int(np.prod(shape)) * made.stored_dtype.itemsize:
            return None
        reading = Reading()
        reading.positions = array("q", tensors["positions"].numpy().tobytes())
        reading.sha256 = bytearray(tensors["sha256"].numpy().tobytes())
        reading.skipped = [Skipped(name, reason) for name, reason in plain["skipped"]]
        reading.common_size = None if plain["common_size"] is None else tuple(plain["common_size"])
        reading.manifest_sha256 = plain["manifest_sha256"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return None  # written anew
    return Record(reading, pixels), made


def _identity(images: ImageSet, module: Preprocess) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "listing": _listing(images.items),
        "preprocess": module.settings.model_dump(mode="json"),
        "size": [module.height_px, module.width_px],
    }


def _listing(items: Sequence[Item]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.name}\0{item.label}\0{item.group}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
