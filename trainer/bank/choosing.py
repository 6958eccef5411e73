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
from trainer.bank.cost import bank_operations, cost_of, encoder_operations
from trainer.bank.defects import with_defect
from trainer.bank.learning import Material, empty_bank, learn_banks, maps_of, union_of
from trainer.bank.settings import BankSettings, Reduction
from trainer.errors import DataError
from trainer.model import ClusterModel

MOST_IMAGES = 320
FOLDS = 2
MIN_CLUSTERS = 4
KEPT_CLUSTERS = 3  # how many of them are kept away, one after the other
MIN_OTHERS = 8  # parts of other clusters in a fold, to learn from and to compare with
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
    wanted = affordable(model, material.pixels[:1])
    say(f"choosing one of {len(wanted)} banks on drawn defects")
    fold, ids = _folds(material), material.clusters.cpu().numpy()
    synthetic, kept = [], []
    for n in range(FOLDS):
        good = material.take(np.flatnonzero(fold == n))
        banks = learn_banks(wanted, model, material.take(np.flatnonzero(fold != n)))
        synthetic.append(_aurocs(banks, model, good, _damaged(good)))
    for k in _clusters_to_keep(ids, fold):
        banks = learn_banks(wanted, model, material.take(np.flatnonzero((fold != 0) & (ids != k))))
        good = material.take(np.flatnonzero((fold == 0) & (ids != k)))
        kept.append(_aurocs(banks, model, good, material.take(np.flatnonzero(ids == k))))
    trials = []
    for b, bank in enumerate(banks):
        cost = cost_of(bank, model, material.pixels[:1])
        for r, reduction in enumerate(_reductions(bank.settings)):
            values = [row[b][r] for row in synthetic]
            clusters = float(np.mean([row[b][r] for row in kept])) if kept else None
            settings = wanted[b].model_copy(update={"reduce": reduction})
            trials.append(Trial(settings, float(np.mean(values)), clusters, max(values) - min(values), cost))
    return pick(trials)


def pick(trials: Sequence[Trial]) -> Choice:
    """The best by the criterion; of those that are as good, the cheapest."""
    ranked = sorted(trials, key=lambda trial: -trial.criterion)
    close = [trial for trial in ranked if trial.criterion >= ranked[0].criterion - CLOSE]
    return Choice(ranked, min(close, key=lambda trial: trial.cost))


def affordable(model: ClusterModel, pixels: Tensor) -> list[BankSettings]:
    """The candidates that leave a cell of the maps and whose cost is within their bound; `pixels` (1, h, w, C) of any part.

    Raises:
        DataError: the encoder has no maps, or too few operations for any of them.
    """
    model.encoder.check_layers(())
    wanted = candidates(model.encoder.map_layers)
    maps = next(maps_of(union_of(wanted), model, pixels))
    of_encoder = encoder_operations(model, pixels)
    found = []
    for settings in wanted:
        empty = empty_bank(settings, maps)
        if 0 not in empty.cells(maps).shape and bank_operations(empty, maps) <= settings.max_cost * of_encoder:
            found.append(settings)
    if not found:
        raise DataError(
            f"novelty.bank is auto, but every bank that is tried costs more than its bound for encoder {model.encoder.settings.name} "
            f"(novelty.bank.max_cost); name a smaller one"
        )
    return found


def _reductions(settings: BankSettings) -> tuple[Reduction, ...]:
    return REDUCTIONS if settings.cells == "patches" else REDUCTIONS[:1]


@torch.no_grad()
def _aurocs(banks: Sequence[Bank], model: ClusterModel, good: Material, strange: Material) -> list[list[float]]:
    """Of each bank and reduction, good parts against strange ones."""
    of_good, of_strange = (_scores(banks, model, part) for part in (good, strange))
    truth = np.repeat([0, 1], [len(good.pixels), len(strange.pixels)])
    return [
        [float(roc_auc_score(truth, np.concatenate(pair))) for pair in zip(a, b, strict=True)]
        for a, b in zip(of_good, of_strange, strict=True)
    ]


def _scores(banks: Sequence[Bank], model: ClusterModel, part: Material) -> list[list[NDArray[np.float32]]]:
    """Of each bank and reduction: (N,)."""
    found: list[list[list[Tensor]]] = [[[] for _ in _reductions(bank.settings)] for bank in banks]
    first = 0
    for maps in maps_of(union_of(bank.settings for bank in banks), model, part.pixels):
        for bank, rows in zip(banks, found, strict=True):
            cells = bank.cells(maps)
            distances = bank.ordinary(cells, part.clusters[first : first + len(cells)])
            for reduction, row in zip(_reductions(bank.settings), rows, strict=True):
                row.append(bank.reduce(distances, reduction))
        first += len(next(iter(maps.values())))
    return [[torch.cat(row).cpu().numpy() for row in rows] for rows in found]


def _damaged(good: Material) -> Material:
    """The same parts, each with one drawn defect."""
    rng = np.random.default_rng((good.seed, 11))
    pixels = good.pixels[:].cpu().numpy()
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


def _clusters_to_keep(ids: NDArray[np.int64], fold: NDArray[np.int64]) -> list[int]:
    """The largest clusters that leave MIN_OTHERS parts in each fold; none where there are fewer than MIN_CLUSTERS."""
    found, counts = np.unique(ids, return_counts=True)
    if len(found) < MIN_CLUSTERS:
        return []
    largest = [int(k) for k in found[np.argsort(-counts, kind="stable")]]
    return [k for k in largest if np.bincount(fold[ids != k], minlength=FOLDS).min() >= MIN_OTHERS][:KEPT_CLUSTERS]


def _thinned(material: Material) -> Material:
    if len(material.pixels) <= MOST_IMAGES:
        return material
    index = np.sort(np.random.default_rng((material.seed, 17)).permutation(len(material.pixels))[:MOST_IMAGES])
    return material.take(index)
