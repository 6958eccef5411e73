"""Which training images look as if they did not belong: a list to look at, where a few per cent of "good" parts are not. trainer/fitting.py calls it.

A defect among the training parts hides itself: a model that has seen it finds it normal. So every part is judged by parts of other groups only:

    1 folds     groups are dealt to folds
    2 score     s = mean distance of the embedding to its `neighbours` nearest among the parts of the other folds that are no suspects so far
    3 null      log s of good parts is taken for normal; place and spread come from the middle of all parts (median, 15 % and 85 % points),
                which a few per cent of strange ones hardly move: an empirical null (Efron 2004, doi 10.1198/016214504000000089)
    4 p-value   of each s under that null; suspects by Benjamini and Hochberg (1995) at `level`: of those named, about that share may be good
    5 again     2 to 4 without the suspects, which hid each other, until nothing changes

Conformal p-values (Bates, Candes, Lei, Romano and Sesia 2023, arXiv 2104.08279) need a clean reference set; among contaminated parts their
ranks are uniform whatever lies there, so nothing could ever be rejected. The price: `level` is no guarantee, it is as good as the null.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm

from trainer.clustering.neighbours import nearest_neighbours
from trainer.errors import ArtifactError
from trainer.whole_file import write_whole

FILE = "suspects.csv"
MIN_PARTS, MIN_GROUPS = 30, 5  # below, the middle of the scores says too little of their spread
MAX_REFERENCE = 20_000  # parts that others are compared with
SPARE = 15  # neighbours beyond those that are asked for
ALIKE = 1e-3  # distances below this share of the whole scatter are those of equal images, and rounding
MIDDLE = 0.85  # the spread is that between the median and this quantile, or its mirror where that is wider
SHRINK_PARTS = 10  # a cluster's own place counts as n parts against 10 of all clusters'


@dataclass(frozen=True)
class SuspectOptions:
    """`level`: the share of good parts among the suspects that is aimed at."""

    level: float = 0.1
    folds: int = 5
    neighbours: int = 5
    rounds: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Suspects:
    """`score` (N,): distance to the others over what is usual, 1 = usual; `p_value` (N,); `is_suspect` (N,). `problem`: why nothing could be said."""

    score: NDArray[np.float64]
    p_value: NDArray[np.float64]
    is_suspect: NDArray[np.bool_]
    level: float
    problem: str | None = None

    @property
    def order(self) -> NDArray[np.int64]:
        """Rows of the suspects, the strangest first."""
        rows = np.flatnonzero(self.is_suspect)
        return rows[np.argsort(-self.score[rows], kind="stable")]


def suspects(
    z: NDArray[np.float32],
    groups: NDArray[np.int64],
    clusters: NDArray[np.int64] | None = None,
    options: SuspectOptions | None = None,
) -> Suspects:
    """Judges every part by parts of other groups.

    Args:
        z: (N, D) embeddings of the training parts, before any L2.
        groups: (N,); parts of one group never judge each other, and count as one in the null.
        clusters: (N,) cluster of each part: a wide cluster's parts lie far from each other by nature, so each has its own usual score.
    """
    options = options or SuspectOptions()
    problem = _problem(z, groups)
    is_suspect = np.zeros(len(z), bool)
    if problem is not None:
        return Suspects(np.ones(len(z)), np.ones(len(z)), is_suspect, options.level, problem)
    fold = folds_of(groups, options)
    clusters = np.zeros(len(z), np.int64) if clusters is None else clusters
    nearest = _Nearest(z, fold, options)
    seen = [is_suspect]
    score, p = np.ones(len(z)), np.ones(len(z))
    for _ in range(options.rounds):
        distance = nearest.distances(is_suspect)
        if np.median(distance) <= ALIKE * np.sqrt(z.var(0).sum()):
            return Suspects(score, p, is_suspect, options.level, "more than half of the images are alike")
        score, p = _judged(distance, groups, clusters)
        is_suspect = _rejected(p, options.level)
        if any(np.array_equal(is_suspect, before) for before in seen):
            break
        seen.append(is_suspect)
    return Suspects(score, p, is_suspect, options.level)


def write_suspects(folder: Path, names: Sequence[str], found: Suspects) -> None:
    """suspects.csv of a run: file, score, p_value, the strangest first; `names` (N,) of the training images.

    No row: none was found. No file: nothing could be said, which is something else.
    """
    if found.problem is not None:
        (folder / FILE).unlink(missing_ok=True)
        return
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("file", "score", "p_value"))
    writer.writerows((names[n], f"{found.score[n]:.4g}", f"{found.p_value[n]:.3g}") for n in found.order)
    write_whole(folder / FILE, text.getvalue())


def read_suspects(folder: Path) -> list[tuple[str, float, float]] | None:
    """(file, score, p_value), the strangest first; None where the run was not looked over.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [(row["file"], float(row["score"]), float(row["p_value"])) for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def _problem(z: NDArray[np.float32], groups: NDArray[np.int64]) -> str | None:
    n_groups = len(np.unique(groups))
    if len(z) < MIN_PARTS or n_groups < MIN_GROUPS:
        return f"{len(z)} training images of {n_groups} groups are too few, expected {MIN_PARTS} of {MIN_GROUPS}"
    return None if np.isfinite(z).all() else "an embedding is not finite"


def folds_of(groups: NDArray[np.int64], options: SuspectOptions) -> NDArray[np.int64]:
    """(N,) 0 .. folds - 1; parts of one group share a fold."""
    unique, index = np.unique(groups, return_inverse=True)
    dealt = np.random.default_rng((options.seed, 11)).permutation(len(unique)) % options.folds
    return np.asarray(dealt[index], np.int64)


class _Nearest:
    """The nearest parts of the other folds to each of z (N, D): some more than are asked for, so that suspects drop out without a new search."""

    def __init__(self, z: NDArray[np.float32], fold: NDArray[np.int64], options: SuspectOptions) -> None:
        self._z, self._count = torch.from_numpy(z), options.neighbours
        rng = np.random.default_rng((options.seed, 12))
        self._folds: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []  # rows of a fold, and those that judge them
        self._ids = np.full((len(z), self._count + SPARE), -1, np.int64)
        self._distance = np.zeros(self._ids.shape)
        for n in range(options.folds):
            own, others = np.flatnonzero(fold == n), np.flatnonzero(fold != n)
            if len(others) > MAX_REFERENCE:
                others = rng.choice(others, MAX_REFERENCE, replace=False)
            self._folds.append((own, others))
            ids, distance = self._search(own, others, self._ids.shape[1])
            self._ids[own, : ids.shape[1]], self._distance[own, : ids.shape[1]] = ids, distance

    def distances(self, is_suspect: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(N,) mean distance to the nearest ones that are no suspects."""
        usable = ~is_suspect[self._ids] & (self._ids >= 0)
        taken = usable & (usable.cumsum(1) <= self._count)
        found = (self._distance * taken).sum(1) / taken.sum(1).clip(1)
        is_short = taken.sum(1) < self._count
        for own, others in self._folds:
            short, judges = own[is_short[own]], others[~is_suspect[others]]
            if len(short):
                found[short] = self._search(short, judges, self._count)[1].mean(1) if len(judges) else 0.0
        return found

    def _search(
        self, own: NDArray[np.int64], others: NDArray[np.int64], count: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Rows and distances (n, count) of those nearest to `own` (n,) among `others`; fewer where there are fewer."""
        if not len(own) or not len(others):
            return np.zeros((len(own), 0), np.int64), np.zeros((len(own), 0))
        near = nearest_neighbours(self._z[own], self._z[others], count)
        return others[near.ids.numpy()], np.sqrt(np.maximum(near.d2.numpy(), 0))


def _judged(
    distance: NDArray[np.float64], groups: NDArray[np.int64], clusters: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Score and p-value (N,): the distance over the usual one of its cluster, under the null."""
    _, index, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1.0 / counts[index]
    log_s = np.log(np.maximum(distance, 1e-6 * np.median(distance)))
    pooled = _quantile(log_s, weight, 0.5)
    usual = np.full(len(log_s), pooled)
    for k in np.unique(clusters):
        own = clusters == k
        place = _quantile(log_s[own], weight[own], 0.5)
        usual[own] = (own.sum() * place + SHRINK_PARTS * pooled) / (own.sum() + SHRINK_PARTS)
    log_s = log_s - usual
    middle = _quantile(log_s, weight, 0.5)
    up, down = _quantile(log_s, weight, MIDDLE) - middle, middle - _quantile(log_s, weight, 1 - MIDDLE)
    spread = max(up, down, 1e-6) / norm.ppf(MIDDLE)
    return np.exp(log_s - middle), np.asarray(norm.sf((log_s - middle) / spread))


def _quantile(values: NDArray[np.float64], weight: NDArray[np.float64], q: float) -> float:
    """The smallest value at or below which the share q of the weight lies."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weight[order])
    return float(values[order[min(len(order) - 1, int(np.searchsorted(total, q * total[-1])))]])


def _rejected(p: NDArray[np.float64], level: float) -> NDArray[np.bool_]:
    """Benjamini and Hochberg: the largest k with the k smallest p-values at or below level k / N."""
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= level * np.arange(1, len(p) + 1) / len(p))
    rejected = np.zeros(len(p), bool)
    if len(below):
        rejected[order[: below[-1] + 1]] = True
    return rejected
