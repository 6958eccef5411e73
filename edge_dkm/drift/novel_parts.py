"""The last novel parts of a camera: are they like one another? A kind of part or of defect is; what chance makes of good parts is not."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

KEPT, COMPARED = 256, 64
MIN_PARTS = 8  # fewer are no family
MIN_SHARE = 0.5  # of the novel parts lie the same way as one of them
SAME_WAY = 0.5  # cosine of two parts as seen from the reference's mean: less than 60 degrees apart
MANY = 0.25  # of all parts novel: another kind of part; fewer: a kind of defect


class NovelParts:
    """Keeps (novelty_score, embedding) of the last KEPT novel parts."""

    def __init__(self) -> None:
        self._parts: deque[tuple[float, NDArray[np.float32]]] = deque(maxlen=KEPT)

    def add(self, novelty_score: float, embedding: NDArray[np.float32]) -> None:
        """One novel part, embedding (D,) before any L2."""
        self._parts.append((novelty_score, embedding))

    def are_family(self, above: float, mean: NDArray[np.float32]) -> bool:
        """Whether at least half of the newest with a score above `above` lie the same way as one of them, seen from `mean` (D,).

        Directions, not distances: a crack that grows goes further the same way, and a far family scatters more than good parts do.
        """
        embeddings = [embedding for score, embedding in self._parts if score > above][-COMPARED:]
        if len(embeddings) < MIN_PARTS:
            return False
        away = directions(np.stack(embeddings), mean)
        return bool((away @ away.T >= SAME_WAY).mean(axis=1).max() >= MIN_SHARE)


def directions(embeddings: NDArray[np.float32], mean: NDArray[np.float32]) -> NDArray[np.float64]:
    """Unit vectors (..., D) in which embeddings (..., D) lie, seen from `mean` (D,)."""
    away = embeddings.astype(np.float64) - mean
    return np.asarray(away / np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-12))
