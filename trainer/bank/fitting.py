"""Gives a trained model its bank: chosen or as set, learned on the training parts, its radius taken from the held-out ones of F."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.bank.bank import Bank
from trainer.bank.choosing import affordable, choose
from trainer.bank.cost import check_cost
from trainer.bank.learning import Material, empty_bank, learn_bank, maps_of
from trainer.data import Dataset
from trainer.model import ClusterModel, Seen
from trainer.settings import TrainSettings
from trainer.splits import Split
from trainer.stored_pixels import Pixels, select

RADIUS_FLOOR = 1e-6


def equip(
    model: ClusterModel, settings: TrainSettings, data: tuple[Dataset, Split], seen: Seen, say: Callable[[str], None]
) -> dict[str, Any]:
    """Sets `model.bank` as `novelty.bank` says; returns what model.json keeps of it, {} where none is wanted.

    Args:
        seen: embeddings of the whole data set.

    Raises:
        DataError: the encoder has no such layers, the parts are all alike, or the bank costs too much.
    """
    dataset, split = data
    wanted = settings.calibration.bank if settings.calibration else None
    if wanted is None:
        return {}
    train = split.train[dataset.good[split.train]]
    material = material_of(model, dataset, train, seen, settings.train.seed)
    choice = None
    if wanted == "auto":
        choice = choose(model, material, say)
        say(f"bank: {choice.why}")
        wanted = choice.chosen.settings
    bank = learn_bank(wanted, model, material)
    cost = check_cost(bank, model, material.pixels[:1])
    model.bank = bank
    set_radius(model, bank, select(dataset.pixels, torch.from_numpy(split.radius if len(split.radius) else train)))
    kept: dict[str, Any] = {
        "settings": bank.settings.model_dump(mode="json"),
        "patch_radius": float(bank.patch_radius),
        "cost": round(cost, 4),
    }
    return {"bank": kept | ({} if choice is None else {"choice": choice.plain()})}


def check_bank(model: ClusterModel, settings: TrainSettings, pixels: torch.Tensor) -> None:
    """Before anything is trained: whether the encoder has the maps of `novelty.bank`, and whether it costs too much.

    Args:
        pixels: (1, h, w, C) of any part; only their size counts.

    Raises:
        DataError: what is wrong, and what would fit.
    """
    wanted = settings.calibration.bank if settings.calibration else None
    if wanted == "auto":
        affordable(model, pixels)
    elif wanted is not None:
        model.encoder.check_layers(wanted.layers)
        check_cost(empty_bank(wanted, next(maps_of(wanted.layers, model, pixels))), model, pixels)


def material_of(model: ClusterModel, dataset: Dataset, index: NDArray[np.int64], seen: Seen, seed: int) -> Material:
    """The parts `index` of the data set."""
    rows = torch.from_numpy(index)
    ids, _ = model.assign(seen.z[rows.to(seen.z.device)])
    return Material(select(dataset.pixels, rows), dataset.groups[index], ids, seed)


def set_radius(model: ClusterModel, bank: Bank, pixels: Pixels) -> None:
    """The median over these good parts becomes the patch_score `weight`."""
    bank.patch_radius.fill_(1.0)
    scores = model.see(pixels).patch_score
    if scores is not None:
        bank.patch_radius.fill_(max(float(scores.quantile(0.5)) / bank.settings.weight, RADIUS_FLOOR))
