"""A bounded sample of a camera's recent parts on disk, for `edge-dkm recentre`: embedding, scores, cluster, group, and how it was judged.

    header (512 bytes: magic, JSON, crc)  |  row  |  row  |  ...        each row with its own crc, so a torn one is recognised

Recent parts are preferred: once the file is full, each new part takes the place of one drawn at random, so that the chance to be still
there falls with age like exp(-parts since / rows). That is the biased reservoir of Aggarwal ("On biased reservoir sampling in the
presence of stream evolution", VLDB 2006) with lambda = 1 / rows; Vitter's (1985) uniform one would keep a station's first week for ever.
Rows are written in place with `pwrite` and never flushed: they survive a kill of the process, and a full disk is an OSError, where a
memory map would end the process with SIGBUS. One process writes; others may read meanwhile.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_dkm.errors import StorageError
from edge_dkm.set_aside import set_aside

MAGIC = "dkm.reservoir/1"
HEADER_BYTES = 512
NOVEL, REJECTED = 1, 2  # bits of `flags`
BASE = "base"
SUFFIX = ".rows"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spec:
    """Whose rows a file holds, and how many at most."""

    camera: str
    model_sha256: str
    embed_dim: int
    capacity: int


@dataclass(frozen=True)
class Row:
    """One judged part. `is_rejected`: for another reason than being novel. `patch_score` None: the graph has no patch bank."""

    embedding: NDArray[np.float32]
    patch_score: float | None
    cluster: int
    novelty_score: float
    group: int
    is_novel: bool
    is_rejected: bool
    codebook: str
    minute: int


@dataclass(frozen=True)
class Rows:
    """N rows in the order in which the parts came; `seq` counts the camera's parts. `patch_score` is NaN where there is none."""

    embedding: NDArray[np.float32]
    patch_score: NDArray[np.float32]
    cluster: NDArray[np.int64]
    novelty_score: NDArray[np.float32]
    group: NDArray[np.uint64]
    is_novel: NDArray[np.bool_]
    is_rejected: NDArray[np.bool_]
    seq: NDArray[np.int64]
    minute: NDArray[np.int64]
    codebook: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.cluster)

    def where(self, mask: NDArray[np.bool_]) -> Rows:
        """The rows of a mask or an index."""
        return Rows(*(getattr(self, field.name)[mask] for field in fields(self)))


def reservoir_path(state: Path, camera: str, model_sha256: str) -> Path:
    """`<state>/reservoir/<camera>.<sha12 of the model>.rows`."""
    return state / "reservoir" / f"{camera}.{model_sha256[:12]}{SUFFIX}"


def row_type(embed_dim: int) -> np.dtype[Any]:
    """One row, little-endian and packed."""
    return np.dtype(
        [
            ("crc", "<u4"),
            ("minute", "<u4"),
            ("seq", "<u8"),
            ("group", "<u8"),
            ("codebook", "u1", (6,)),
            ("cluster", "<u2"),
            ("flags", "u1"),
            ("novelty_score", "<f4"),
            ("patch_score", "<f4"),
            ("embedding", "<f2", (embed_dim,)),
        ]
    )


class Reservoir:
    """Opens the file of `spec`, or makes it. What is there and of no use is set aside; rows beyond a smaller capacity go, oldest first.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path, spec: Spec, seed: int | None = None) -> None:
        self.path, self.spec = path, spec
        self._type = row_type(spec.embed_dim)
        self._rng = np.random.default_rng(seed)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists() and not self._is_usable():
            log.warning("S-CORRUPT %s holds no rows of this model, moved to %s", path, set_aside(path))
        if not path.exists():
            _write_new(path, spec, np.zeros(0, self._type))
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        rows, is_whole = _load(path, self._type)
        self._count = len(rows)
        self._seq = int(rows["seq"][is_whole].max(initial=0))
        self._free = list(np.flatnonzero(~is_whole))  # torn ones first

    def __len__(self) -> int:
        return self._count

    def add(self, row: Row) -> bool:
        """Writes one row; False where a value does not fit into float16.

        Raises:
            OSError: the disk did not take it; what was there stays.
        """
        record = np.zeros((), self._type)
        with np.errstate(over="ignore"):
            record["embedding"] = row.embedding
        if not np.isfinite(record["embedding"]).all() or not np.isfinite(row.novelty_score):
            return False
        record["minute"], record["group"], record["cluster"] = row.minute, row.group, row.cluster
        record["flags"] = NOVEL * row.is_novel | REJECTED * row.is_rejected
        record["novelty_score"] = row.novelty_score
        record["patch_score"] = np.nan if row.patch_score is None else row.patch_score
        record["codebook"] = _packed(row.codebook)
        record["seq"] = self._seq + 1
        slot = self._slot()
        written = os.pwrite(self._file, _sealed(record), HEADER_BYTES + slot * self._type.itemsize)
        if written < self._type.itemsize:  # a disk that fills up takes a part and says nothing
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._seq += 1
        self._count = max(self._count, slot + 1)
        if self._free:
            self._free.pop()
        return True

    def close(self) -> None:
        """Releases the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _slot(self) -> int:
        if self._free:
            return int(self._free[-1])
        return self._count if self._count < self.spec.capacity else int(self._rng.integers(self.spec.capacity))

    def _is_usable(self) -> bool:
        """Whether the file is this spec's; one of another capacity is written anew."""
        try:
            found = _read_header(self.path)
        except StorageError:
            return False
        if (found.model_sha256, found.embed_dim) != (self.spec.model_sha256, self.spec.embed_dim):
            return False
        if found.capacity != self.spec.capacity:
            rows, is_whole = _load(self.path, self._type)
            rows = rows[is_whole]
            _write_new(self.path, self.spec, rows[np.argsort(rows["seq"])[-self.spec.capacity :]])
        return True


def read_rows(path: Path, model_sha256: str, embed_dim: int) -> Rows:
    """The whole rows of a file that may be written meanwhile; torn ones are left out.

    Raises:
        StorageError: no such file, damaged, or of another model.
    """
    spec = _read_header(path)
    if (spec.model_sha256, spec.embed_dim) != (model_sha256, embed_dim):
        raise StorageError(
            f"{path} holds parts of the model {spec.model_sha256[:12]} with {spec.embed_dim} dimensions, expected those of "
            f"{model_sha256[:12]} with {embed_dim}; let the station run with this model for a while"
        )
    try:
        rows, is_whole = _load(path, row_type(embed_dim))
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from None
    rows = rows[is_whole]
    rows = rows[np.argsort(rows["seq"], kind="stable")]
    return Rows(
        rows["embedding"].astype(np.float32),
        rows["patch_score"].astype(np.float32),
        rows["cluster"].astype(np.int64),
        rows["novelty_score"].astype(np.float32),
        rows["group"].astype(np.uint64),
        (rows["flags"] & NOVEL) > 0,
        (rows["flags"] & REJECTED) > 0,
        rows["seq"].astype(np.int64),
        rows["minute"].astype(np.int64),
        np.array([_unpacked(code) for code in rows["codebook"]], dtype="U12"),
    )


def room_for(rows: int, max_bytes: int, embed_dim: int) -> int:
    """How many rows fit, at most `rows`."""
    return min(rows, max(0, max_bytes - HEADER_BYTES) // row_type(embed_dim).itemsize)


def others_than(own: Collection[Path], folder: Path) -> list[Path]:
    """Files of other models and of cameras that are gone, newest first."""
    found = [path for path in folder.glob(f"*{SUFFIX}") if path not in own]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _sealed(record: NDArray[Any]) -> bytes:
    data = record.tobytes()
    return zlib.crc32(data[4:]).to_bytes(4, "little") + data[4:]


def _packed(codebook: str) -> list[int]:
    return [0] * 6 if codebook == BASE else list(bytes.fromhex(codebook))


def _unpacked(code: NDArray[np.uint8]) -> str:
    return code.tobytes().hex() if code.any() else BASE


def _write_new(path: Path, spec: Spec, rows: NDArray[Any]) -> None:
    text = json.dumps({"magic": MAGIC, **spec.__dict__}).encode()
    text = text.ljust(HEADER_BYTES - 4)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(zlib.crc32(text).to_bytes(4, "little") + text)
            file.write(rows.tobytes())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_header(path: Path) -> Spec:
    try:
        with path.open("rb") as file:
            data = file.read(HEADER_BYTES)
    except FileNotFoundError:
        raise StorageError(f"{path} is not there yet: the station writes it while it inspects parts") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        if len(data) < HEADER_BYTES or zlib.crc32(data[4:]) != int.from_bytes(data[:4], "little"):
            raise ValueError
        header = json.loads(data[4:])
        if header.pop("magic") != MAGIC:
            raise ValueError
        return Spec(**header)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise StorageError(
            f"S-CORRUPT {path} is damaged; the station sets it aside at its next start and begins a new one"
        ) from None


def _load(path: Path, kind: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """All rows, and which of them are whole."""
    with path.open("rb") as file:
        file.seek(HEADER_BYTES)
        data = file.read()
    n = len(data) // kind.itemsize
    rows = np.frombuffer(data[: n * kind.itemsize], kind)
    size = kind.itemsize
    crcs = np.fromiter((zlib.crc32(data[i * size + 4 : (i + 1) * size]) for i in range(n)), np.uint32, n)
    return rows, rows["crc"] == crcs
