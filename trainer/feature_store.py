"""Features of all training samples, row i of sample i, always; in memory or in a file that is mapped into it.

Pseudo-labels, kNN graphs and banks all index by sample. A shuffled pass, a batch that was left out or seen twice would scramble
every label after it without a word, so a pass that is not whole is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.errors import DataError


class FeatureStore:
    """(N, D) float32 on the CPU, filled by one pass; `path`: the file it lies in (None: memory), which is overwritten and stays."""

    def __init__(self, n: int, dim: int, path: Path | None = None) -> None:
        self.path = path
        if path is None:
            self._rows = torch.empty(n, dim)
        else:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _allocate(path, n * dim * np.dtype(np.float32).itemsize)
                mapped = np.memmap(path, np.float32, "r+", shape=(n, dim))
            except OSError as error:
                raise DataError(
                    f"{path} cannot hold {n * dim * 4 / 1e6:.0f} MB of features: {error.strerror or error}"
                ) from None
            self._rows = torch.from_numpy(mapped)
        self._seen = torch.zeros(n, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, index: Tensor, rows: Tensor) -> None:
        """Rows (B, D) of samples `index` (B,), each once.

        Raises:
            DataError: a sample comes a second time.
        """
        index = index.cpu()
        values, counts = index.unique(return_counts=True)
        again = values[(counts > 1) | self._seen[values]]
        if len(again):
            raise DataError(
                f"sample {int(again[0])} came twice in one pass over the features; expected every sample once, in any order"
            )
        self._seen[index] = True
        self._rows[index] = rows.detach().float().cpu()

    def whole(self) -> Tensor:
        """All rows (N, D), in sample order; a view, not a copy.

        Raises:
            DataError: the pass missed samples.
        """
        if not bool(self._seen.all()):
            missing = torch.nonzero(~self._seen)[:, 0]
            raise DataError(
                f"{len(missing)} of {len(self)} samples have no features (the first: {int(missing[0])}); expected one whole pass"
            )
        return self._rows


def _allocate(path: Path, size: int) -> None:
    """A file of so many bytes that has its place on the disk: writing into the map of one that has not ends the process without a word."""
    with path.open("wb") as file:
        file.truncate(size)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            path.unlink()
            raise
