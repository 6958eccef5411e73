"""Smooths embeddings over the graph of shared nearest neighbours, so that points which keep the same company move together.

Sources: Jarvis and Patrick, "Clustering using a similarity measure based on shared near neighbors", 1973 (the weight); Zhou et al.,
"Learning with local and global consistency", NIPS 2003 (the iteration, alpha = 1 - anchor). Differs from them: weights are Jaccard,
rows sum to 1, and every step ends on the unit sphere.

    w_ij = |N_i and N_j| / |N_i or N_j|  (0 below min_jaccard),  N_i: the k nearest by cosine, i itself the first of them
    F_0 = z / |z|,   F <- L2(anchor F_0 + (1 - anchor) W F),   `steps` times

It only moves the points of its graph; `extend` says where a point from outside would lie. Arrays are float32, rows of unit length.
Points in one place are one point of the graph: as many points they would all have the same neighbours, and a weight for each pair of them
(8,000 frames of a camera that hangs took 3 GB).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array, vstack
from torch import Tensor

from trainer.clustering.neighbours import nearest_neighbours

Rows = NDArray[np.float32]
Index = NDArray[np.intp]
SAME = 1e-6  # of the points' spread: coordinates that round to the same multiple are equal
CHUNK = 1024  # rows of the shared-neighbour matrix at a time


@dataclass(frozen=True)
class SmoothingOptions:
    """`neighbours` of each point; weights below `min_jaccard` are dropped; `anchor` is the share of the original position in a step."""

    neighbours: int = 15
    min_jaccard: float = 0.05
    steps: int = 10
    anchor: float = 0.1


@dataclass(frozen=True)
class Smoothed:
    """`original` and `smoothed` (M, D) of M distinct points, `members` (M, M): row i marks the neighbours of i; `place` (N,) of all points given."""

    original: Rows
    smoothed: Rows
    members: csr_array
    options: SmoothingOptions
    place: Index

    @property
    def all_smoothed(self) -> Rows:
        """(N, D), a row for every point given."""
        return self.smoothed[self.place]


def smooth(z: Tensor, options: SmoothingOptions) -> Smoothed:
    """Smooths z (N, D), of any length; fewer than `neighbours` points are all neighbours of each other."""
    points, place = distinct(_unit(z))
    members = neighbours(points, points, options.neighbours)
    weights = shared_neighbour_weights(members, members, options.min_jaccard)
    anchored = points.cpu().numpy()
    moved = anchored
    for _ in range(options.steps):
        moved = _step(anchored, weights, moved, options.anchor)
    return Smoothed(anchored, moved, members, options, place)


def extend(graph: Smoothed, z: Tensor) -> Rows:
    """Where points z (M, D) that were not in the graph would lie: one step from their own position towards the smoothed ones."""
    queries = _unit(z)
    members = neighbours(queries, torch.from_numpy(graph.original).to(queries.device), graph.options.neighbours)
    weights = shared_neighbour_weights(members, graph.members, graph.options.min_jaccard)
    return _step(queries.cpu().numpy(), weights, graph.smoothed, graph.options.anchor)


def distinct(points: Tensor) -> tuple[Tensor, Index]:
    """Finite points (N, D) whose coordinates do not round to the same multiples, (M, D) in the order of the first; which of them each is (N,)."""
    centred = points.double() - points.double().mean(0)
    unit = centred.square().sum(1).mean().sqrt().clamp_min(1e-300)
    digits = np.ascontiguousarray((centred / unit / SAME).round().to(torch.int64).cpu().numpy())
    keys = digits.view(np.dtype((np.void, digits[0].nbytes))).ravel()
    _, first, found = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return points[torch.from_numpy(first[order]).to(points.device)], np.argsort(order)[found]


def neighbours(queries: Tensor, points: Tensor, count: int) -> csr_array:
    """Marks (M, N) of the `count` points (N, D) most similar to each query (M, D), by cosine; all of unit length, or zero."""
    return marks(nearest_neighbours(_apart(queries), _apart(points), count).ids.cpu().numpy(), len(points))


def _apart(points: Tensor) -> Tensor:
    """(N, D + 1) of unit length: the nearest is the most similar, and a zero row, which has no direction, is as far from all as a right angle."""
    return torch.cat((points, (points == 0).all(1, keepdim=True).to(points.dtype)), dim=1)


def marks(ids: Index, n: int) -> csr_array:
    """(M, n), 1 where one of ids (M, k) is."""
    starts = np.arange(0, ids.size + 1, ids.shape[1])
    return csr_array((np.ones(ids.size, np.float32), ids.ravel(), starts), shape=(len(ids), n))


def shared_neighbour_weights(members: csr_array, others: csr_array, min_jaccard: float) -> csr_array:
    """Weights (M, N), rows summing to 1 (or empty), from two sets of neighbour marks (M, n) and (N, n)."""
    sizes, other_sizes = members.sum(1), others.sum(1)
    transposed = others.T.tocsr()
    rows = []
    for start in range(0, members.shape[0], CHUNK):
        shared = (members[start : start + CHUNK] @ transposed).tocoo()
        union = sizes[start + shared.row] + other_sizes[shared.col] - shared.data
        jaccard = (shared.data / union).astype(np.float32)
        keep = jaccard >= min_jaccard
        rows.append(csr_array((jaccard[keep], (shared.row[keep], shared.col[keep])), shape=shared.shape))
    weights = vstack(rows, format="csr")
    return csr_array(diags_array(1 / np.maximum(weights.sum(1), np.float32(1e-12))) @ weights).astype(np.float32)


def _step(anchored: Rows, weights: csr_array, moved: Rows, anchor: float) -> Rows:
    mixed = anchor * anchored + (1 - anchor) * (weights @ moved)
    return np.asarray(mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12), np.float32)


def _unit(z: Tensor) -> Tensor:
    return torch.nn.functional.normalize(z.detach().float(), dim=1)
