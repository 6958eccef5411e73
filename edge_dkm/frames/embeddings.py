"""The embeddings of kept frames: `embeddings-<sha12 of the model>.bin` beside index.csv, float16, a record per frame.

    header   8 bytes magic, 4 bytes D (little-endian)
    record   16 bytes result_id, D float16 (little-endian)

Another model has another embedding space, so it has another file. A record that was cut off is left out by who reads.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from edge_dkm.frames.append_file import AppendFile

MAGIC = b"DKMEMB1\n"
HEADER_BYTES = len(MAGIC) + 4
ID_BYTES = 16
LARGEST = float(np.finfo(np.float16).max)
log = logging.getLogger(__name__)


def embeddings_path(folder: Path, model_sha256: str) -> Path:
    """The file of a model's embeddings."""
    return folder / f"embeddings-{model_sha256[:12]}.bin"


def read_embeddings(path: Path) -> dict[str, NDArray[np.float32]]:
    """(D,) by result_id; empty where there is no such file, or none of ours."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


class EmbeddingFile:
    """The file of one model in one folder, for the thread that keeps frames.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, folder: Path, model_sha256: str, n_dims: int) -> None:
        self._header = MAGIC + n_dims.to_bytes(4, "little")
        self._record_bytes = ID_BYTES + 2 * n_dims
        self.path = embeddings_path(folder, model_sha256)
        self._file = AppendFile(self.path)
        found = self.path.read_bytes()
        whole = max(0, len(found) - HEADER_BYTES) // self._record_bytes * self._record_bytes + HEADER_BYTES
        if found[:HEADER_BYTES] != self._header:
            self._file.replace(self._header)
        elif len(found) != whole:
            self._file.replace(found[:whole])

    def __len__(self) -> int:
        """Bytes."""
        return len(self._file)

    def append(self, result_id: str, embedding: NDArray[np.float32]) -> None:
        """Raises OSError where there is no room."""
        self._file.append(_record(result_id, embedding))

    def keep(self, result_ids: Collection[str]) -> None:
        """Forgets all others. Raises OSError where there is no room; nothing is forgotten then."""
        rows = _parsed(self.path.read_bytes())
        kept = [_record(key, row) for key, row in rows.items() if key in result_ids]
        if len(kept) < len(rows):
            self._file.replace(self._header + b"".join(kept))

    def close(self) -> None:
        """Nothing is appended after this."""
        self._file.close()


def forget(path: Path, result_ids: Collection[str]) -> None:
    """The same as `EmbeddingFile.keep` for a model that does not run any more; a file that holds nothing is removed."""
    data = path.read_bytes()
    kept: Mapping[str, NDArray[np.float32]] = {key: row for key, row in _parsed(data).items() if key in result_ids}
    if not kept:
        path.unlink(missing_ok=True)
    elif len(kept) < len(_parsed(data)):
        file = AppendFile(path)
        file.replace(data[:HEADER_BYTES] + b"".join(_record(key, row) for key, row in kept.items()))
        file.close()


def _record(result_id: str, embedding: NDArray[np.float32]) -> bytes:
    return UUID(result_id).bytes + np.clip(embedding, -LARGEST, LARGEST).astype("<f2").tobytes()


def _parsed(data: bytes) -> dict[str, NDArray[np.float32]]:
    if data[: len(MAGIC)] != MAGIC or len(data) < HEADER_BYTES:
        return {}
    n_dims = int.from_bytes(data[len(MAGIC) : HEADER_BYTES], "little")
    size = ID_BYTES + 2 * n_dims
    count = (len(data) - HEADER_BYTES) // size
    found = {}
    for n in range(count):
        record = data[HEADER_BYTES + n * size : HEADER_BYTES + (n + 1) * size]
        found[str(UUID(bytes=record[:ID_BYTES]))] = np.frombuffer(record[ID_BYTES:], "<f2").astype(np.float32)
    return found
