"""Representatives of each class per community, and the loss that pulls misclustered samples towards the nearest of them.

Source: Ho Thanh, "Latent Cluster Correction", arXiv 2501.11919. For a misclustered sample u of class a, and every community b that a
owns, with R_b the correctly clustered samples of b (features of the start of the epoch: constants, no gradient reaches them)

    nearest:  t_b(u) = mean of the k nearest in R_b (all of R_b where there are fewer)
    random:   t_b(u) = the nearest of q samples drawn from R_b without replacement (all of R_b where there are fewer)
    l(u) = min_b |u - t_b(u)| / sqrt(D),   loss = mean of l over the misclustered samples of the batch

A misclustered sample whose class owns nothing to be pulled to counts with l = 0; a batch without misclustered samples has loss 0.

Differs from the authors' code: k is clamped (their search returns -1 where samples are missing, which means the last one); drawn without
replacement; row i is sample i everywhere; classes with too few correctly clustered samples are left alone (ownership.py); samples
suspected to be mislabelled can be left out. Features should be pooled and normalised: the loss is divided by sqrt(D) only.
All tensors lie on one device; only the `ids` of a batch may lie on another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainer.clustering.neighbours import CHUNK_ELEMENTS, lowest
from trainer.clustering.ownership import Ownership, class_counts
from trainer.distance import squared_distances_matmul


@dataclass(frozen=True)
class RepresentativeOptions:
    """`target`: the mean of the `k` nearest, or the nearest of `q` drawn at random per community with `seed`."""

    target: Literal["random", "nearest"] = "random"
    k: int = 5
    q: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Targets:
    """`points` (T, D) for the `rows` (T,) of a batch that have a target; `asked` is how many of the batch are to be pulled at all."""

    rows: Tensor
    points: Tensor
    asked: int


@dataclass(frozen=True)
class ClassRepresentatives:
    """Representatives of one class: `ids` (n,), their features `z` (n, D); `table` (b, s) lists rows of z per community, where `present`."""

    ids: Tensor
    z: Tensor
    table: Tensor
    present: Tensor

    def targets(self, u: Tensor, own_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Nearest target (m, D) of each of u (m, D), and whether there is one (m,); a sample is never its own target.

        Args:
            own_ids: (m,) sample ids of u.
        """
        u, m, (b, s) = u.to(self.z.dtype), len(u), self.table.shape
        d2 = squared_distances_matmul(u, self.z, self.z.mean(0)).masked_fill(own_ids[:, None] == self.ids, torch.inf)
        d2 = d2[:, self.table].masked_fill(~self.present, torch.inf).flatten(0, 1)  # (m b, s)
        columns = lowest(d2, min(k, s))
        counted = d2.gather(1, columns) != torch.inf  # a NaN stays, and shows in the loss
        rows = self.table.repeat(m, 1).gather(1, columns)
        sums = torch.nn.functional.embedding_bag(
            rows, self.z, mode="sum", per_sample_weights=counted.to(self.z.dtype)
        )  # without the (m b, k, D) of an indexed mean
        means = (sums / counted.sum(1, keepdim=True).clamp_min(1)).reshape(m, b, -1)
        exists = counted.any(1).reshape(m, b)
        best = (u[:, None] - means).square().sum(-1).masked_fill(~exists, torch.inf).argmin(1)
        return means[torch.arange(m, device=u.device), best], exists.any(1)


@dataclass(frozen=True)
class Bank:
    """All representatives of one epoch: `classes` by class id; `y` (N,) and `pulled` (N,) by sample id; `k` nearest are averaged.

    A class without representatives is not among `classes`.
    """

    y: Tensor
    pulled: Tensor
    classes: dict[int, ClassRepresentatives]
    k: int

    def loss(self, u: Tensor, ids: Tensor) -> Tensor:
        """Scalar of u (B, D), the features with gradient of samples `ids` (B,); 0, still in the graph, where none is to be pulled."""
        found = self.targets(u, ids)
        gaps = torch.linalg.vector_norm(u[found.rows] - found.points, dim=1)  # its gradient at 0 is 0, not NaN
        return gaps.sum() / (math.sqrt(u.shape[1]) * max(found.asked, 1))

    def targets(self, u: Tensor, ids: Tensor) -> Targets:
        """Where the samples `ids` (B,) with features u (B, D) are pulled to; constants."""
        asking = torch.nonzero(self.pulled[ids.to(self.pulled.device)])[:, 0]
        return self._targets_of(u, ids, asking)

    def lengths(self, u: Tensor, ids: Tensor) -> Tensor:
        """Lengths l (B,) of any samples `ids` (B,) with features u (B, D), pulled or not; NaN where the class, or the label, is missing."""
        everyone = torch.nonzero(self.y[ids.to(self.y.device)] >= 0)[:, 0]
        found = self._targets_of(u, ids, everyone)
        lengths = torch.full((len(u),), torch.nan, dtype=found.points.dtype, device=found.points.device)
        gaps = torch.linalg.vector_norm(u.detach()[found.rows] - found.points, dim=1)
        lengths[found.rows] = gaps / math.sqrt(u.shape[1])
        return lengths

    def share(self) -> Tensor:
        """Share (C,) of the labelled samples of each class that are representatives; 0 for a class without samples."""
        counts = torch.zeros_like(sizes := class_counts(self.y))
        for a, found in self.classes.items():
            counts[a] = len(found.ids)
        return counts.double() / sizes.clamp_min(1).double()

    @torch.no_grad()
    def _targets_of(self, u: Tensor, ids: Tensor, asking: Tensor) -> Targets:
        """`asking`: the rows of u that want a target."""
        with torch.autocast(u.device.type, enabled=False):  # distances in bfloat16 would find other neighbours
            return self._search(u, ids.to(self.y.device), asking)

    def _search(self, u: Tensor, ids: Tensor, asking: Tensor) -> Targets:
        classes = self.y[ids[asking]]
        rows, points = [asking[:0]], [_constant(u[:0])]
        for a in torch.unique(classes).tolist():
            if (representatives := self.classes.get(a)) is None:
                continue
            per_sample = max(representatives.table.numel(), len(representatives.table) * u.shape[1])
            for part in asking[classes == a].split(max(1, CHUNK_ELEMENTS // per_sample)):
                found, exists = representatives.targets(_constant(u[part]), ids[part], self.k)
                rows.append(part[exists])
                points.append(found[exists])
        return Targets(torch.cat(rows), torch.cat(points), len(asking))


def build_bank(
    features: Tensor,
    ownership: Ownership,
    options: RepresentativeOptions | None = None,
    *,
    skipped: Tensor | None = None,
) -> Bank:
    """The bank of one epoch: it pulls misclustered samples towards correctly clustered ones of their class.

    Args:
        features: (N, D) of the start of the epoch, row i for sample i.
        skipped: (N,) marks misclustered samples that are not to be pulled, as if they were not misclustered.

    Raises:
        ValueError: the numbers of samples differ, or k or q is below 1.
    """
    options = options or RepresentativeOptions()
    _check(features, ownership.y, options)
    y = ownership.y
    members = torch.nonzero(ownership.correct & ownership.active[y.clamp_min(0)])[:, 0]
    if options.target == "random":
        members = _draw(members, ownership.communities, options)
    pulled = ownership.misclustered if skipped is None else ownership.misclustered & ~skipped
    k = options.k if options.target == "nearest" else 1
    return Bank(y, pulled, _by_class(features, y, ownership.communities, members), k)


def build_same_class_bank(features: Tensor, y: Tensor, options: RepresentativeOptions | None = None) -> Bank:
    """The control without communities: every labelled sample is pulled to the mean of its k nearest others of its class.

    It is what Latent Cluster Correction must beat. All labelled samples are pulled, since without communities none is misclustered; a
    class with one image has no other, which counts with 0. With target "random", to the nearest of q drawn from the class.

    Args:
        features: (N, D) of the start of the epoch, row i for sample i.
        y: (N,) class, -1 where unknown.

    Raises:
        DataError: no image is labelled.
        ValueError: the numbers of samples differ, or k or q is below 1.
    """
    options = options or RepresentativeOptions()
    _check(features, y, options)
    class_counts(y)
    members = torch.nonzero(y >= 0)[:, 0]
    if options.target == "random":
        members = _draw(members, y, options)
    k = options.k if options.target == "nearest" else 1
    return Bank(y, y >= 0, _by_class(features, y, torch.zeros_like(y), members), k)


@dataclass(frozen=True)
class Suspects:
    """Misclustered samples for a review of their labels: `ids`, `classes`, `owner_classes`, `lengths`, all (M,).

    `lengths` says how far each lies from its own class, farthest first; NaN, at the end, where that class has no representatives.
    """

    ids: Tensor
    classes: Tensor
    owner_classes: Tensor
    lengths: Tensor


def suspected_mislabels(bank: Bank, ownership: Ownership, features: Tensor) -> Suspects:
    """All misclustered samples, those left out of `bank` too; features (N, D) are those that it was built from."""
    ids = torch.nonzero(ownership.misclustered)[:, 0]
    lengths = bank.lengths(features[ids], ids)
    order = lengths.nan_to_num(-1.0).argsort(descending=True, stable=True)
    ids = ids[order]
    return Suspects(ids, ownership.y[ids], ownership.owner_of_sample[ids], lengths[order])


class MisclusteredRounds:
    """Counts in how many successive rounds each of N samples was misclustered; `rounds` (N,) is all its state.

    Args:
        min_rounds: from so many on, a sample that the model puts confidently into the owner's class is taken for mislabelled.
        min_confidence: the model's probability, 0 .. 1, from which it is confident.
    """

    def __init__(self, n: int, *, min_rounds: int = 3, min_confidence: float = 0.9) -> None:
        self.min_rounds, self.min_confidence = min_rounds, min_confidence
        self.rounds = torch.zeros(n, dtype=torch.int64)

    def advance(self, ownership: Ownership, predicted: Tensor, confidence: Tensor) -> Tensor:
        """Counts this round, and marks (N,) the samples to skip in it; call it once per clustering.

        Args:
            predicted: (N,) class that the model gives each sample.
            confidence: (N,) its probability.
        """
        self.rounds = torch.where(ownership.misclustered, self.rounds.to(ownership.y.device) + 1, 0)
        sure = (predicted == ownership.owner_of_sample) & (confidence >= self.min_confidence)
        return (self.rounds >= self.min_rounds) & sure


def _draw(members: Tensor, groups: Tensor, options: RepresentativeOptions) -> Tensor:
    """At most q of `members` (n,) from each of `groups` (N,), all equally likely, in ascending order."""
    generator = torch.Generator().manual_seed(options.seed)
    shuffled = members[torch.randperm(len(members), generator=generator).to(members.device)]
    grouped = shuffled[groups[shuffled].argsort(stable=True)]
    return grouped[_place_in_run(groups[grouped]) < options.q].sort().values


def _by_class(features: Tensor, y: Tensor, communities: Tensor, members: Tensor) -> dict[int, ClassRepresentatives]:
    """`members` (n,): sample ids in ascending order."""
    classes = {}
    for a in torch.unique(y[members]).tolist():
        ids = members[y[members] == a]
        ids = ids[communities[ids].argsort(stable=True)]
        _, row, counts = torch.unique_consecutive(communities[ids], return_inverse=True, return_counts=True)
        table = torch.full((len(counts), int(counts.max())), -1, device=ids.device)
        table[row, _place_in_run(communities[ids])] = torch.arange(len(ids), device=ids.device)
        classes[a] = ClassRepresentatives(ids, _constant(features[ids]), table.clamp_min(0), table >= 0)
    return classes


def _place_in_run(values: Tensor) -> Tensor:
    """0, 1, 2 ... (n,) within each run of equal `values` (n,)."""
    _, counts = torch.unique_consecutive(values, return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return torch.arange(len(values), device=values.device) - starts


def _constant(z: Tensor) -> Tensor:
    z = z.detach()
    return z if z.dtype == torch.float64 else z.float()


def _check(features: Tensor, y: Tensor, options: RepresentativeOptions) -> None:
    if features.dim() != 2 or len(features) != len(y):
        raise ValueError(
            f"features are {tuple(features.shape)} for {len(y)} samples, expected ({len(y)}, D), row i for sample i"
        )
    if min(options.k, options.q) < 1:
        raise ValueError(f"k is {options.k} and q is {options.q}, expected integers >= 1")
