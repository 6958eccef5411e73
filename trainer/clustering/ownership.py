"""Which class owns each community, and with that which samples are well placed and which lie among another class.

Source: Ho Thanh, "Latent Cluster Correction", arXiv 2501.11919. With y_i the class of sample i and c_i its community,

    n_ab = #{i: y_i = a, c_i = b},   n_a = sum_b n_ab
    owner(b) = argmax_a n_ab         "majority"; of equals the larger n_ab / n_a, then the lowest a
    owner(b) = argmax_a n_ab / n_a   "normalised", for rare classes; of equals the larger n_ab, then the lowest a
    correctly clustered: owner(c_i) = y_i;   misclustered: owner(c_i) != y_i

Differs from the authors' code: a vote instead of a min-cost flow (the same, as no class has a capacity); the normalised vote; a class
with fewer than `min_correct` well placed samples is not acted on. Samples without a label (y = -1) neither vote nor are either kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import DataError


@dataclass(frozen=True)
class OwnershipOptions:
    """Which `vote`; classes with fewer than `min_correct` correctly clustered samples are not acted on."""

    vote: Literal["majority", "normalised"] = "majority"
    min_correct: int = 5


@dataclass(frozen=True)
class Ownership:
    """Of the classes `y` (N,) and `communities` (N,): `owners` (number of communities,), -1 where no member has a label.

    `correct` (N,) and `misclustered` (N,) mark samples; `correct_counts` (C,) is per class; `active` (C,) marks the classes that own
    enough correctly clustered samples to be acted on.
    """

    y: Tensor
    communities: Tensor
    owners: Tensor
    correct: Tensor
    misclustered: Tensor
    correct_counts: Tensor
    active: Tensor

    @property
    def owner_of_sample(self) -> Tensor:
        """Owner class (N,) of the community that each sample is in."""
        return self.owners[self.communities]

    def figures(self) -> dict[str, float]:
        """What to log: communities per class, share of classes owning none, share of labelled samples correctly clustered."""
        n_classes = int((class_counts(self.y) > 0).sum())
        owning = len(torch.unique(self.owners[self.owners >= 0]))
        return {
            "communities": float(len(self.owners)),
            "communities_per_class": len(self.owners) / n_classes,
            "classes_owning_none": 1 - owning / n_classes,
            "correctly_clustered": float(self.correct.sum()) / float((self.y >= 0).sum()),
        }


def decide_owners(y: Tensor, communities: Tensor, options: OwnershipOptions | None = None) -> Ownership:
    """Lets the labelled samples of every community vote.

    Args:
        y: (N,) class of each sample, -1 where unknown.
        communities: (N,) community of each sample, 0 and up.

    Raises:
        DataError: no image is labelled.
        ValueError: the lengths differ.
    """
    options = options or OwnershipOptions()
    if y.shape != communities.shape:
        raise ValueError(f"{len(y)} classes but {len(communities)} communities; expected one of each per sample")
    sizes = class_counts(y)
    n_classes, n_communities = len(sizes), int(communities.max()) + 1
    labelled = y >= 0
    codes = y[labelled] * n_communities + communities[labelled]
    counts = torch.bincount(codes, minlength=n_classes * n_communities).reshape(n_classes, n_communities)
    shares = counts.double() / sizes.clamp_min(1).double()[:, None]  # float64: equal fractions are equal numbers
    first, second = (counts.double(), shares) if options.vote == "majority" else (shares, counts.double())
    owners = torch.where(counts.sum(0) > 0, _winner(first, second), -1)
    own = owners[communities]
    correct, misclustered = labelled & (own == y), labelled & (own != y)
    correct_counts = torch.bincount(y[correct], minlength=n_classes)
    active = correct_counts >= max(options.min_correct, 1)
    return Ownership(y, communities, owners, correct, misclustered, correct_counts, active)


def class_counts(y: Tensor) -> Tensor:
    """Samples (C,) of each class of y (N,), C being the highest class + 1.

    Raises:
        DataError: no image is labelled.
    """
    labelled = y[y >= 0]
    if len(labelled) == 0:
        raise DataError(
            f"none of the {len(y)} images has a class; this method learns from labels: "
            f"expected a data.path with one folder of images per class"
        )
    return torch.bincount(labelled)


def _winner(first: Tensor, second: Tensor) -> Tensor:
    """Row (columns,) with the largest `first` (rows, columns); of equals the largest `second`, then the lowest row."""
    leads = first == first.max(0).values
    second = torch.where(leads, second, -1.0)
    leads &= second == second.max(0).values
    rows = torch.arange(len(first), device=first.device)[:, None]
    return torch.where(leads, rows, len(first)).min(0).values  # argmax does not promise the lowest of equals
