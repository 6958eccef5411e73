"""Orders in which an epoch shows its samples, where it is not a plain shuffle. Each is a function of labels and a seeded generator.

Sources: Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", 2018, arXiv 1807.05520, section 3.2 (`balanced`:
the same number of draws from every non-empty cluster); Hermans et al., "In Defense of the Triplet Loss", 2017, arXiv 1703.07737,
section 2 (`classes_by_images`: P classes with Q images each make a batch).
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced(labels: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) sample indices for labels (N,), -1: never drawn. Every label that occurs gets floor(N / labels) + 1 draws, the whole is cut to N.

    A cluster smaller than its share comes several times over, so one of a single sample fills as much of the epoch as any other.
    """
    labels = labels.cpu()
    occurring = torch.unique(labels[labels >= 0])
    share = len(labels) // max(1, len(occurring)) + 1
    draws = [_draw(torch.nonzero(labels == label)[:, 0], share, generator) for label in occurring]
    drawn = torch.cat(draws)
    return drawn[torch.randperm(len(drawn), generator=generator)][: len(labels)]


def soft_balanced(ids: Tensor, weights: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """(N,) sample indices: first a live cluster at random, then a sample by its weight in it.

    Args:
        ids, weights: (N, m) clusters and weights of every sample; a row sums to 1, or to 0 where the sample is left out.
    """
    n, m = ids.shape
    flat_ids, flat_weights = ids.reshape(-1).cpu().long(), weights.reshape(-1).cpu().double()
    mass = torch.zeros(n_clusters, dtype=torch.float64).index_add_(0, flat_ids, flat_weights)
    # A sample's chance in one draw: the sum over its clusters of weight / mass, each live cluster being equally likely.
    chance = torch.where(flat_weights > 0, flat_weights / mass.clamp_min(1e-12)[flat_ids], 0.0).reshape(n, m).sum(1)
    cumulative = chance.cumsum(0)
    points = torch.rand(n, generator=generator, dtype=torch.float64) * cumulative[-1]
    return torch.searchsorted(cumulative, points).clamp(max=n - 1)


def classes_by_images(labels: Tensor, classes: int, images: int, batches: int, generator: torch.Generator) -> Tensor:
    """(batches x classes x images,) sample indices for labels (N,), -1: never drawn; every batch holds `images` of each of `classes` classes.

    Fewer classes than asked for: all of them, with more images each, so that a batch keeps its size. Classes take turns, so each
    comes equally often; a class with fewer images gives them several times.
    """
    labels = labels.cpu()
    occurring = torch.unique(labels[labels >= 0])
    members = [torch.nonzero(labels == label)[:, 0] for label in occurring]
    per_batch = min(classes, len(occurring))
    each = -(-classes * images // per_batch)
    turns = torch.zeros(len(members))
    rows = []
    for _ in range(batches):
        # Those that came least often so far; of equals, at random.
        chosen = torch.argsort(turns + torch.rand(len(members), generator=generator) / 2)[:per_batch]
        turns[chosen] += 1
        drawn = torch.cat([_draw(members[label], each, generator) for label in chosen.tolist()])
        rows.append(drawn[: classes * images])
    return torch.cat(rows)


def _draw(members: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `members` (n,); all of them come as often as they go into it, before any comes once more."""
    rounds = [torch.randperm(len(members), generator=generator) for _ in range(-(-count // len(members)))]
    return members[torch.cat(rounds)[:count]]
