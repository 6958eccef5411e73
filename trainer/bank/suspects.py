"""Patch scores of training parts by banks that did not see their groups: what a suspect's small defect shows up in. See trainer/suspects.py."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.bank.learning import Material, learn_bank
from trainer.bank.settings import BankSettings
from trainer.model import ClusterModel
from trainer.suspects import SuspectOptions, folds_of

FOLDS = 3  # each costs a bank and two passes of the encoder


def held_out_patch_scores(
    model: ClusterModel, settings: BankSettings, material: Material, seed: int = 0
) -> NDArray[np.float64]:
    """(N,) patch distances, each by a bank learned on the other folds of groups; `model` keeps the bank that it has.

    Raises:
        DataError: the encoder has no such layers, or the parts of a fold are all alike.
    """
    fold = folds_of(material.groups, SuspectOptions(folds=FOLDS, seed=seed))
    scores = np.zeros(len(fold))
    before = model.bank
    try:
        for n in range(FOLDS):
            own, others = np.flatnonzero(fold == n), np.flatnonzero(fold != n)
            if not len(own) or not len(others):
                continue
            model.bank = learn_bank(settings, model, material.take(others))
            found = model.see(material.pixels[torch.from_numpy(own)]).patch_score
            if found is not None:
                scores[own] = found.cpu().double().numpy()
    finally:
        model.bank = before
    return scores
