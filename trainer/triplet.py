"""Triplet loss with semi-hard negatives: same labels closer together than different ones, by a margin.

Sources: Schroff, Kalenichenko, Philbin, "FaceNet", 2015, arXiv 1503.03832 (semi-hard); Kozyriev and Norkin, arXiv 2409.02066, who take the
closest admissible negative:
    L = mean over pairs (a, p) of one label of max(0, d(a, p) - d(a, n) + margin),  n = argmin {d(a, n): other label, d(a, n) > d(a, p)}
Where all others are nearer than the positive, the farthest of them serves, and is counted. Differs from the authors' code: every positive
of the batch counts, not a random one; candidates are masked with infinity (theirs multiplies by 0, and then picks a sample of the same
label); the mean is over the pairs that still cost something, so that it does not fade while a few remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TripletLoss:
    """`loss` (scalar, with gradient); of the `pairs` (a, p) of one label, `active` cost something, `fallbacks` found no semi-hard negative."""

    loss: Tensor
    pairs: int
    active: int
    fallbacks: int


def triplet_loss(z: Tensor, labels: Tensor, margin: float) -> TripletLoss:
    """Of embeddings z (B, D) with labels (B,), -1: unknown, in no triplet. Without two labels, or two samples of one, the loss is 0."""
    known = labels >= 0
    same = (labels[:, None] == labels[None, :]) & known[:, None]
    same.fill_diagonal_(False)
    other = (labels[:, None] != labels[None, :]) & known[:, None] & known[None, :]
    anchor, positive = torch.nonzero(same & other.any(1, keepdim=True), as_tuple=True)
    if not len(anchor):
        return TripletLoss(z.sum() * 0.0, 0, 0, 0)
    d = torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")  # exact for equal rows, and their gradient is 0
    negative, fell_back = _semi_hard(d.detach(), other, anchor, positive)
    cost = (d[anchor, positive] - d[anchor, negative] + margin).clamp_min(0.0)
    active = int((cost > 0).sum())
    return TripletLoss(cost.sum() / max(1, active), len(anchor), active, int(fell_back.sum()))


def _semi_hard(d: Tensor, other: Tensor, anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """The negative (M,) of each pair, and whether it is a fallback (M,); d (B, B), other (B, B), anchor and positive (M,)."""
    # Sorted once per anchor: the first negative farther than any positive is then found by bisection, not in (B, B, B).
    ordered, order = d.masked_fill(~other, float("inf")).sort(1)
    count = other.sum(1)[anchor]
    place = torch.searchsorted(ordered, d, right=True)[anchor, positive]
    fell_back = place >= count
    place = torch.where(fell_back, count - 1, place)
    return order[anchor, place], fell_back
