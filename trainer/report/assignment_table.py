"""Reads assignments.csv of a run: one typed row per image."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import ArtifactError


@dataclass(frozen=True)
class Assignment:
    """One image of the run's data set. `split`: train, radius, calibration or left_out; `label` empty where unknown."""

    file: str
    split: str
    label: str
    cluster: int
    distance: float
    novelty_score: float


def read_assignments(folder: Path) -> list[Assignment]:
    """Raises ArtifactError where the file is missing or damaged."""
    path = folder / "assignments.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Assignment(
                    row["file"],
                    row["split"],
                    row["label"],
                    int(row["cluster"]),
                    float(row["distance"]),
                    float(row["novelty_score"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
