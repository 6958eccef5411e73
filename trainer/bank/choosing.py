"""Chooses a bank without labels: by defects drawn on good parts that it did not learn from, and by whole clusters that it was not shown.

Training parts alone take part, in two folds by group: the promise of the calibration parts stays untouched. Each candidate is learned on
one fold and ranks the other fold's good parts against the same parts with a drawn defect (AUROC) and, where the model has at least
MIN_CLUSTERS clusters, against a cluster that was kept from it. The mean over both decides; within CLOSE of the best, the cheaper one.
Measured on tiles: the ranking of banks agrees with the truth at its ends, not in between (docs/novelty.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from trainer.bank.bank import Bank
from trainer.bank.cost import cost_of
from trainer.bank.defects import with_defect
from trainer.bank.learning import Material, learn_bank, maps_of
from trainer.bank.settings import BankSettings, Reduction
from trainer.errors import DataError
from trainer.model import ClusterModel

MOST_IMAGES = 320
FOLDS = 2
MIN_CLUSTERS = 4
KEPT_CLUSTERS = 3  # how many of them are kept away, one after the other
CLOSE = 0.005
REDUCTIONS: tuple[Reduction, ...] = ("max", "top", "mean")


@dataclass(frozen=True)
class Trial:
    """One candidate: mean AUROC on drawn defects and on kept clusters (None where there are too few), how far its folds lie apart, its cost."""

    settings: BankSettings
    synthetic_auroc: float
    cluster_auroc: float | None
    spread: float
    cost: float

    @property
    def criterion(self) -> float:
        """What is compared."""
        return self.synthetic_auroc if self.cluster_auroc is None else (self.synthetic_auroc + self.cluster_auroc) / 2

    def plain(self) -> dict[str, Any]:
        """For model.json."""
        return {
            "settings": self.settings.model_dump(mode="json"),
            "synthetic_auroc": round(self.synthetic_auroc, 4),
            "cluster_auroc": None if self.cluster_auroc is None else round(self.cluster_auroc, 4),
            "spread": round(self.spread, 4),
            "cost": round(self.cost, 4),
        }


@dataclass(frozen=True)
class Choice:
    """The trials, best first by the criterion, and the one that was taken."""

    trials: Sequence[Trial]
    chosen: Trial

    @property
    def why(self) -> str:
        """One sentence for people."""
        best, chosen = self.trials[0], self.chosen
        what = f"AUROC {chosen.synthetic_auroc:.3f} on drawn defects"
        if chosen.cluster_auroc is not None:
            what += f" and {chosen.cluster_auroc:.3f} on clusters kept from it"
        last = (
            ""
            if chosen is best
            else f"; the best of {len(self.trials)} was {best.criterion - chosen.criterion:.3f} better at a higher cost"
        )
        return f"{what}, folds {chosen.spread:.3f} apart, {chosen.cost:.1%} of the encoder's multiply-adds{last}"

    def plain(self) -> dict[str, Any]:
        """For model.json."""
        return {"why": self.why, "chosen": self.chosen.plain(), "tried": [trial.plain() for trial in self.trials]}


def candidates(layers: Sequence[str]) -> list[BankSettings]:
    """What is tried for an encoder with these maps, from the first to the deepest; `reduce` is tried in each."""
    deep = tuple(layers[-2:])
    spread = tuple(dict.fromkeys(layers[n * len(layers) // 8] for n in (1, 3, 6)))
    middle = tuple(dict.fromkeys((layers[len(layers) // 2], *deep)))
    return [
        BankSettings(layers=deep, blur=2),
        BankSettings(layers=middle, size=256, blur=2),
        BankSettings(layers=deep, learn="coreset", blur=2),
        BankSettings(layers=deep, learn="gaussian", dim=80, stride=2, blur=2),
        BankSettings(layers=deep, learn="gaussian", dim=80, stride=2, whiten=0.25, blur=2),
        BankSettings(layers=spread, cells="image", learn="sample", size=1024, dim=64, whiten=0.25, neighbours=16, local=True),
    ]  # fmt: skip


def choose(model: ClusterModel, material: Material, say: Callable[[str], None]) -> Choice:
    """The best candidate by what can be known without labels.

    Raises:
        DataError: no candidate fits this encoder and these parts; the last one's reason is in the text.
    """
    material = _thinned(material)
    trials: list[Trial] = []
    problem = ""
    for n, settings in enumerate(tried := candidates(model.encoder.map_layers), 1):
        say(
            f"choosing a bank: {n} of {len(tried)} ({settings.learn} on {settings.cells}, {', '.join(settings.layers)})"
        )
        try:
            trials += _tried(settings, model, material)
        except DataError as error:
            problem = str(error)
    if not trials:
        raise DataError(f"novelty.bank is auto, but no bank fits: {problem or 'all cost too much'}")
    trials.sort(key=lambda trial: -trial.criterion)
    close = [trial for trial in trials if trial.criterion >= trials[0].criterion - CLOSE]
    return Choice(trials, min(close, key=lambda trial: trial.cost))


def _tried(settings: BankSettings, model: ClusterModel, material: Material) -> list[Trial]:
    """One trial for each reduction; none where the bank costs too much."""
    fold = _folds(material)
    synthetic, kept, cost = [], [], 0.0
    for n in range(FOLDS):
        learned, tested = np.flatnonzero(fold != n), np.flatnonzero(fold == n)
        bank = learn_bank(settings, model, material.take(learned))
        cost = cost_of(bank, model, material.pixels[:1])
        if cost > settings.max_cost:
            return []
        good = material.take(tested)
        synthetic.append(_aurocs(bank, model, good, _damaged(good)))
    ids = material.clusters.cpu().numpy()
    for k in _clusters_to_keep(ids):
        learned = np.flatnonzero((fold != 0) & (ids != k))
        bank = learn_bank(settings, model, material.take(learned))
        good = material.take(np.flatnonzero((fold == 0) & (ids != k)))
        kept.append(_aurocs(bank, model, good, material.take(np.flatnonzero(ids == k))))
    found = []
    for n, reduction in enumerate(REDUCTIONS if settings.cells == "patches" else REDUCTIONS[:1]):
        values = [row[n] for row in synthetic]
        clusters = float(np.mean([row[n] for row in kept])) if kept else None
        own = settings.model_copy(update={"reduce": reduction})
        found.append(Trial(own, float(np.mean(values)), clusters, max(values) - min(values), cost))
    return found


def _aurocs(bank: Bank, model: ClusterModel, good: Material, strange: Material) -> list[float]:
    """Of each reduction, good parts against strange ones."""
    maps = [_distances(bank, model, part) for part in (good, strange)]
    truth = np.repeat([0, 1], [len(maps[0]), len(maps[1])])
    reductions = REDUCTIONS if bank.settings.cells == "patches" else REDUCTIONS[:1]
    scores = [torch.cat([bank.reduce(m, reduction) for m in maps]).cpu().numpy() for reduction in reductions]
    return [float(roc_auc_score(truth, score)) for score in scores]


@torch.no_grad()
def _distances(bank: Bank, model: ClusterModel, part: Material) -> Tensor:
    found, first = [], 0
    for maps in maps_of(bank.settings, model, part.pixels):
        cells = bank.cells(maps)
        found.append(bank.ordinary(cells, part.clusters[first : first + len(cells)]))
        first += len(cells)
    return torch.cat(found)


def _damaged(good: Material) -> Material:
    """The same parts, each with one drawn defect."""
    rng = np.random.default_rng((good.seed, 11))
    pixels = good.pixels.cpu().numpy()
    others = rng.permutation(len(pixels))
    if pixels.dtype != np.uint8:  # `resize: matmul` gives grey levels as floats
        pixels = np.rint(pixels).clip(0, 255).astype(np.uint8)
    damaged = [with_defect(image, pixels[other], rng) for image, other in zip(pixels, others, strict=True)]
    return replace(good, pixels=torch.from_numpy(np.stack(damaged)).to(good.pixels.dtype))


def _folds(material: Material) -> NDArray[np.int64]:
    """Fold (N,) of each part; a group is in one alone."""
    unique, index = np.unique(material.groups, return_inverse=True)
    if len(unique) < FOLDS:
        raise DataError(
            f"novelty.bank: auto needs {FOLDS} groups of good parts to compare banks, there is {len(unique)}; name a bank"
        )
    order = np.random.default_rng((material.seed, 13)).permutation(len(unique)) % FOLDS
    return np.asarray(order[index], np.int64)


def _clusters_to_keep(ids: NDArray[np.int64]) -> list[int]:
    """The largest clusters; none where there are fewer than MIN_CLUSTERS."""
    found, counts = np.unique(ids, return_counts=True)
    if len(found) < MIN_CLUSTERS:
        return []
    return [int(k) for k in found[np.argsort(-counts, kind="stable")][:KEPT_CLUSTERS]]


def _thinned(material: Material) -> Material:
    if len(material.pixels) <= MOST_IMAGES:
        return material
    index = np.sort(np.random.default_rng((material.seed, 17)).permutation(len(material.pixels))[:MOST_IMAGES])
    return material.take(index)
