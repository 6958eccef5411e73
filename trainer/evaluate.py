"""Applies a run to images: predictions per image, sorting into folders, and scores where class folders say what is what."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sklearn.metrics import roc_auc_score

from trainer import metric
from trainer.answers import Reader, answers
from trainer.artifact import Run
from trainer.data import truth_of
from trainer.errors import DataError

NOVEL_FOLDER = "novel"


@dataclass(frozen=True)
class Prediction:
    """The answer for one image; `label` is its class folder where there is one."""

    file: str
    cluster: int
    name: str
    distance: float
    novelty_score: float
    is_novel: bool
    label: str | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """One line for people, columns by tabs."""
        return f"{self.file}\t{self.name}\t{self.distance:.4g}\t{self.novelty_score:.3f}{' novel' if self.is_novel else ''}"


@dataclass(frozen=True)
class Evaluation:
    """`clustering`: ACC, NMI, ARI, purity against the class folders (None with fewer than two). `flagged`: share called novel per class.

    `auroc`: novelty score of the class of good parts against all others (None without both).
    """

    images: int
    skipped: int
    clustering: metric.LabelScores | None
    flagged: dict[str, tuple[int, int]]
    auroc: float | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        lines = [f"images    {self.images}, {self.skipped} skipped"]
        if self.clustering is not None:
            scores = self.clustering
            lines.append(
                f"clusters  ACC {scores.acc:.3f}  NMI {scores.nmi:.3f}  ARI {scores.ari:.3f}  purity {scores.purity:.3f}"
            )
        lines += [
            f"novel     {name or 'all'}: {n} of {total} ({n / total:.1%})" for name, (n, total) in self.flagged.items()
        ]
        if self.clustering is None and self.auroc is None:
            lines.append("          no class folders to score against")
        if self.auroc is not None:
            lines.append(f"AUROC     {self.auroc:.4f}  (novelty score, good against the rest)")
        return "\n".join(lines)


def predict(run: Run, path: str, progress: Reader = iter) -> list[Prediction]:
    """One prediction per readable image of the set at `path`."""
    found = answers(run, path, progress)
    names = {row["id"]: row["name"] for row in run.clusters}
    columns = (found.ids.tolist(), found.distances.tolist(), found.scores.tolist(), found.labels)
    return [
        Prediction(file, k, names[k], distance, score, score > 1.0, label)
        for file, k, distance, score, label in zip(found.names, *columns, strict=True)
    ]


def evaluate(run: Run, path: str, progress: Reader = iter) -> Evaluation:
    """Scores the run on the set at `path`, whose class folders are the truth."""
    found = answers(run, path, progress)
    labels, classes, good = truth_of(found.labels, run.settings.data.good)
    novel = found.scores > 1.0
    if (labels < 0).any():
        return Evaluation(len(novel), found.skipped, None, {"": (int(novel.sum()), len(novel))}, None)
    flagged = {name: (int(novel[labels == n].sum()), int((labels == n).sum())) for n, name in enumerate(classes)}
    if len(classes) < 2:
        return Evaluation(len(novel), found.skipped, None, flagged, None)
    auroc = float(roc_auc_score(~good, found.scores)) if good.any() and not good.all() else None
    return Evaluation(len(novel), found.skipped, metric.score_labels(labels, found.ids), flagged, auroc)


def sort_into(rows: list[Prediction], source: Path, folder: Path) -> tuple[int, int]:
    """One folder per cluster name; novel images also into `novel`. Hard links where the file system allows, else copies.

    Returns:
        Numbers of links and copies.

    Raises:
        DataError: the source is not a folder or list of files.
    """
    base = source if source.is_dir() else source.parent
    folders = _cluster_folders(rows)
    linked = copied = 0
    for row in rows:
        original = base / row.file
        if not original.is_file():
            raise DataError(
                f"{original} is no image file; --sort-into works on folders and lists, not on {source.suffix or source.name}"
            )
        for name in (folders[row.cluster], *([NOVEL_FOLDER] if row.is_novel else [])):
            target = folder / name / row.file.replace("/", "__")
            if target.exists() and target.samefile(original):
                continue  # sorted before, or sorted into itself: the user's own file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                target.hardlink_to(original)
                linked += 1
            except OSError:
                shutil.copy2(original, target)
                copied += 1
    return linked, copied


def _cluster_folders(rows: Sequence[Prediction]) -> dict[int, str]:
    """A folder name per cluster id; the id is added where two names would share a folder."""
    slugs = {row.cluster: _slug(row.name) for row in rows}
    taken = [NOVEL_FOLDER, *slugs.values()]
    return {k: slug if taken.count(slug) == 1 else f"{slug}-{k}" for k, slug in slugs.items()}


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).strip(".") or "cluster"
