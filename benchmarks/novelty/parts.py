"""What the novelty measurements share: lists of parts with class and group, scores of a run on them, AUROC with weights."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from trainer.answers import read_like
from trainer.artifact import Run
from trainer.data import Dataset

GOOD = "good"
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """One image. `label` is GOOD or the kind of defect; parts of one group are never split."""

    path: Path
    label: str
    group: str


@dataclass(frozen=True)
class Judged:
    """Parts as a run judges them: novelty_score, the embedding's and the bank's share of it (N,), labels and groups."""

    dataset: Dataset
    novelty_score: Scores
    embedding_score: Scores
    patch_score: Scores | None

    @property
    def is_good(self) -> NDArray[np.bool_]:
        """Per part (N,)."""
        return self.dataset.good

    def auroc(self, scores: Scores | None = None) -> float:
        """Good against all defects, part by part."""
        return float(roc_auc_score(~self.is_good, self.novelty_score if scores is None else scores))

    def auroc_by_group(self) -> float:
        """The same with every group counting once on its side."""
        weights = np.zeros(len(self.is_good))
        for side in (self.is_good, ~self.is_good):
            _, index, counts = np.unique(self.dataset.groups[side], return_inverse=True, return_counts=True)
            weights[side] = 1 / counts[index]
        return float(roc_auc_score(~self.is_good, self.novelty_score, sample_weight=weights))

    def flagged(self, *, good: bool) -> float:
        """Share of the good parts, or of the defects, above the edge."""
        return float((self.novelty_score > 1)[self.is_good == good].mean())


def write_list(parts: Sequence[Part], path: Path) -> Path:
    """A list that `data.path` takes, with class and group."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [(str(part.path.resolve()), part.label, part.group) for part in parts]
        csv.writer(file).writerows([("file", "label", "group"), *rows])
    return path


def judge(run: Run, parts: Sequence[Part], path: Path) -> Judged:
    """Scores of `parts`, read through a list that is written to `path`."""
    dataset = read_like(run, str(write_list(parts, path)))
    seen = run.model.see(dataset.pixels)
    alone, _ = run.model.raw_scores(type(seen)(seen.z))
    scale = float(run.model.novelty_scale)
    return Judged(
        dataset,
        run.model.novelty_scores(seen).double().numpy(),
        alone.double().numpy() / scale,
        None if seen.patch_score is None else seen.patch_score.double().numpy() / scale,
    )
