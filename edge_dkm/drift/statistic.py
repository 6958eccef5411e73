"""What is watched of every part, as numbers in [0, 1]: ranks against the reference, and whether something rare has happened.

light contrast burnt focus right down    rank of the picture's measure among the reference's (edge_dkm/drift/quality.py)
novelty                                  rank of novelty_score
beyond-1 beyond-1.25 ..                  1 where novelty_score exceeds that
direction-0 ..                           rank of the embedding along a main direction of the reference's scatter
cluster-3 ..                             1 where the part is of that cluster; clusters beyond the largest count together
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_dkm.drift.quality import Quality, offset

LEVELS = (1.0, 1.25, 1.5, 2.0)  # of novelty_score
N_QUANTILES = 33
PICTURE = ("light", "contrast", "burnt", "focus", "right", "down")

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Sighting:
    """One part, as drift sees it. `embedding` (D,) before any L2; `quality` None where there is no picture."""

    embedding: NDArray[np.float32]
    cluster_id: int
    novelty_score: float
    quality: Quality | None


@dataclass(frozen=True)
class Frame:
    """What sightings are compared with. `mean` (D,), `directions` (P, D) orthonormal, `thumbnail` (32, 32)."""

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]
    thumbnail: NDArray[np.float32]

    def raw(self, sighting: Sighting) -> dict[str, float]:
        """Every measure by name, as it is measured; those of the picture only where there is one."""
        values: dict[str, float] = {}
        quality = sighting.quality
        if quality is not None:
            right, down = offset(quality.thumbnail, self.thumbnail)
            values |= dict(
                zip(
                    PICTURE,
                    (quality.light, quality.contrast, quality.burnt, quality.focus, right, down),
                    strict=True,
                )
            )
        values["novelty"] = sighting.novelty_score
        along = self.directions @ (sighting.embedding - self.mean)
        values |= {f"direction-{n}": float(value) for n, value in enumerate(along)}
        return values


def events(sighting: Sighting, clusters: Sequence[int]) -> dict[str, float]:
    """Every 0 or 1 by name; `clusters`: those watched one by one."""
    values = {f"beyond-{level:g}": float(sighting.novelty_score > level) for level in LEVELS}
    if clusters:
        values |= {f"cluster-{k}": float(sighting.cluster_id == k) for k in clusters}
        values["cluster-other"] = float(sighting.cluster_id not in clusters)
    return values


def sketch(values: Vector) -> list[float]:
    """Quantiles of a measure, evenly spaced from the smallest to the largest."""
    return [float(value) for value in np.quantile(values, np.linspace(0, 1, N_QUANTILES))]


class Ranks:
    """Turns measures into their ranks: 0 below all of the reference, 1 above, in the middle of those that are equal."""

    def __init__(self, sketches: Mapping[str, Sequence[float]]) -> None:
        self._steps = {}
        for name, quantiles in sketches.items():
            level = np.linspace(0, 1, len(quantiles))
            points, index = np.unique(np.asarray(quantiles, np.float64), return_inverse=True)
            middle = np.bincount(index, weights=level) / np.bincount(index)
            self._steps[name] = points, middle

    def __call__(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of the measures that the reference holds."""
        return {
            name: float(np.interp(values[name], *steps, left=0.0, right=1.0)) if name in values else float("nan")
            for name, steps in self._steps.items()
        }
