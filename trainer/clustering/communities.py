"""Communities of a graph of nearest neighbours, by Leiden or Louvain, and the resolution that gives classes communities to own.

Sources: Traag, Waltman and van Eck, "From Louvain to Leiden: guaranteeing well-connected communities", 2019, arXiv 1810.08473
(graspologic-native); Blondel et al., "Fast unfolding of communities in large networks", 2008, arXiv 0803.0476 (networkx: slow beyond
some 50,000 points, and its communities may fall apart); graph and use: Ho Thanh, arXiv 2501.11919. Both maximise modularity

    Q = 1/(2m) sum_ij [A_ij - gamma d_i d_j / (2m)] 1[c_i = c_j],   A_ij = 1 where i is among the k nearest of j, or j of i

with gamma the resolution, d_i the number of edges at i and m their number. Differs from the authors' code: Leiden on every device, a
seed, and edges in the order of ids, so that equal seeds give equal communities. Both algorithms start from the ids' order: points
stored in another order may get another of several nearly equal optima. Keep row i = sample i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.clustering.ownership import OwnershipOptions, class_counts, decide_owners
from trainer.errors import DataError

MAX_TRIALS = 12  # gammas tried at most: from 1 that reaches 1/2048 or 2048


@dataclass(frozen=True)
class CommunityOptions:
    """`resolution` is gamma > 0: higher gives more communities."""

    algorithm: Literal["leiden", "louvain"] = "leiden"
    resolution: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Trial:
    """What one `resolution` gave: `communities`, and the share `owning` of the classes, but the smallest, that own at least one."""

    resolution: float
    communities: int
    owning: float


@dataclass(frozen=True)
class Tuned:
    """`communities` (N,) at `resolution`; whether they `fit` the aim, and all that was `tried`, in order."""

    communities: Tensor
    resolution: float
    fit: bool
    tried: tuple[Trial, ...]


@dataclass(frozen=True)
class TuningAim:
    """From C to `most_per_class` x C communities for C classes, and a share of `owning` of the classes with one of their own."""

    most_per_class: int = 10
    owning: float = 0.95

    def too_many(self, trial: Trial, n_classes: int) -> bool:
        """More communities than the aim allows."""
        return trial.communities > self.most_per_class * n_classes

    def is_met(self, trial: Trial, n_classes: int) -> bool:
        """Neither too many communities, nor too few, nor too few classes that own one."""
        in_range = trial.communities >= n_classes and not self.too_many(trial, n_classes)
        return in_range and trial.owning >= self.owning


def neighbour_edges(neighbour_ids: Tensor) -> Tensor:
    """Undirected edges (E, 2) of a neighbour table (N, k): each pair once, lower id first, in ascending order, no self-loops.

    Raises:
        ValueError: an id is outside 0 .. N - 1.
    """
    n, k = neighbour_ids.shape
    if neighbour_ids.numel() and not 0 <= int(neighbour_ids.min()) <= int(neighbour_ids.max()) < n:
        raise ValueError(
            f"neighbour ids run from {int(neighbour_ids.min())} to {int(neighbour_ids.max())}, expected 0 to {n - 1}"
        )
    own = torch.arange(n, device=neighbour_ids.device)[:, None].expand(n, k)
    low, high = torch.minimum(own, neighbour_ids), torch.maximum(own, neighbour_ids)
    codes = torch.unique((low * n + high)[low != high])
    return torch.stack([codes // n, codes % n], 1)


def find_communities(edges: Tensor, n: int, options: CommunityOptions | None = None) -> Tensor:
    """Community (n,) of each of n nodes, numbered in the order of their lowest members; a node without edges is one by itself.

    Args:
        edges: (E, 2) ids, from `neighbour_edges`.
        n: number of nodes.

    Raises:
        ValueError: the resolution is not a positive number.
    """
    options = options or CommunityOptions()
    if not 0 < options.resolution < float("inf"):
        raise ValueError(f"the resolution is {options.resolution}, expected a number > 0")
    pairs: list[tuple[int, int]] = sorted((min(a, b), max(a, b)) for a, b in edges.tolist())
    found = (_leiden if options.algorithm == "leiden" else _louvain)(pairs, n, options)
    return torch.from_numpy(_by_lowest_member(found)).to(edges.device)


def tune_resolution(
    edges: Tensor,
    y: Tensor,
    options: CommunityOptions | None = None,
    *,
    vote: OwnershipOptions | None = None,
    aim: TuningAim | None = None,
) -> Tuned:
    """Doubles or halves the resolution, from that of `options`, until the communities fit the classes.

    It stops, too, where the next resolution was tried already (one is too few, twice of it too many) or after `MAX_TRIALS`. Then it
    keeps the trial that came nearest: not too many first, then classes owning one, then as few communities beyond the aim as possible.

    Args:
        edges: (E, 2) ids, from `neighbour_edges`.
        y: (N,) class of each node, -1 where unknown.

    Raises:
        DataError: no image is labelled.
    """
    options, aim = options or CommunityOptions(), aim or TuningAim()
    sizes, min_correct = class_counts(y), (vote or OwnershipOptions()).min_correct
    # A class too small to be acted on cannot ask for a community of its own: only single images would give it one.
    counted = sizes >= min(min_correct, int(sizes.max()))
    n_classes = int(counted.sum())
    found: dict[float, tuple[Trial, Tensor]] = {}
    gamma = options.resolution
    while gamma not in found and len(found) < MAX_TRIALS:
        communities = find_communities(edges, len(y), replace(options, resolution=gamma))
        owners = decide_owners(y, communities, vote).owners
        owning = float(counted[torch.unique(owners[owners >= 0])].sum()) / n_classes
        trial = Trial(gamma, len(owners), owning)
        found[gamma] = trial, communities
        if aim.is_met(trial, n_classes):
            break
        gamma = gamma / 2 if aim.too_many(trial, n_classes) else gamma * 2
    best, communities = max(found.values(), key=lambda pair: _closeness(pair[0], aim, n_classes))
    return Tuned(communities, best.resolution, aim.is_met(best, n_classes), tuple(trial for trial, _ in found.values()))


def _closeness(trial: Trial, aim: TuningAim, n_classes: int) -> tuple[bool, bool, float, int]:
    beyond = max(trial.communities - aim.most_per_class * n_classes, n_classes - trial.communities, 0)
    # Not too many before all else: where every image is a community, every class owns one.
    return aim.is_met(trial, n_classes), not aim.too_many(trial, n_classes), min(trial.owning, aim.owning), -beyond


def _leiden(pairs: list[tuple[int, int]], n: int, options: CommunityOptions) -> NDArray[np.int64]:
    if not pairs:
        return np.arange(n, dtype=np.int64)  # the library refuses a graph without edges
    try:
        import graspologic_native
    except ImportError:  # there is no wheel for every processor
        raise DataError(
            "method.communities is leiden, but graspologic-native is not installed; `pip install graspologic-native`, or use louvain"
        ) from None
    _, found = graspologic_native.leiden(
        [(str(a), str(b), 1.0) for a, b in pairs], resolution=options.resolution, seed=options.seed
    )
    # The library knows only nodes with edges; numbers from n on are free for the others.
    return np.array([found.get(str(node), n + node) for node in range(n)], dtype=np.int64)


def _louvain(pairs: list[tuple[int, int]], n: int, options: CommunityOptions) -> NDArray[np.int64]:
    import networkx as nx  # a fifth of a second, for those who ask for it

    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(pairs)
    labels = np.empty(n, dtype=np.int64)
    found = nx.community.louvain_communities(graph, resolution=options.resolution, seed=options.seed)
    for number, members in enumerate(found):
        labels[list(members)] = number
    return labels


def _by_lowest_member(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    names = np.empty(len(first), dtype=np.int64)
    names[np.argsort(first)] = np.arange(len(first))
    return names[inverse]
