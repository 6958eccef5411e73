"""Finds families among novel parts: compact groups of parts that resemble each other, lie apart from the known clusters and keep coming.

Called by `edge-dkm families` on the ring of novel frames, and by the drift monitor. Pure numpy.

    1 link      two parts are linked where they lie within REACH typical scatters of each other; a part with `min_links` links is a core
    2 connect   linked cores are one component, with what is linked to them (density linking: Ester, Kriegel, Sander and Xu, DBSCAN, 1996)
    3 refine    its parts are those nearer to its mean than to any known cluster's (in many dimensions, links reach from one into the other)
    4 judge     it is a family if it is all of
        frequent    min_parts parts of min_groups groups, seen in min_periods separate periods
        compact     the median distance to its mean is at most `max_scatter` typical radii of the known clusters
        apart       its mean lies at least `min_distance` of its own scatter from the nearest known cluster's, and it is no tail of that cluster:
                    with ordinary parts to compare with, it lies `min_deviations` of their standard deviations out, in its own direction;
                    without, its mean itself is novel and nine tenths of its parts score above `clear` times the edge

The last rule tells a family from a known cluster that is long in one direction (brightness, say): the novel parts at its end resemble
each other, too, but in that direction the cluster's own spread is large. Parts that are strange each in its own way are far from each other
in many dimensions: no links; and if there are some all around a cluster, their mean is the cluster's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Index = NDArray[np.int64]
ROUNDS = 5
MIN_ORDINARY = 50  # parts from which a spread in one direction can be told
MAX_PARTS = 4000  # distances between all are held at once; the newest count
# Two draws from one cluster lie sqrt(2) scatters apart in many dimensions, where all distances are alike; a quarter more for a looser family.
REACH = 1.25 * float(np.sqrt(2.0))


@dataclass(frozen=True)
class FamilyOptions:
    """`edge`: the raw score from which a part is novel (novelty_scale times the threshold). Periods are of `period_s` seconds."""

    edge: float = 1.0
    min_parts: int = 8
    min_groups: int = 4
    min_periods: int = 3
    period_s: float = 600.0
    min_links: int = 3
    max_scatter: float = 1.75
    min_distance: float = 0.5
    min_deviations: float = 6.0
    clear: float = 1.1


@dataclass(frozen=True)
class Beside:
    """What helps to judge. `moments_s` (N,): when each part was seen; `ordinary` (M, D): embeddings of recent parts that were not novel."""

    moments_s: NDArray[np.float64] | None = None
    ordinary: Vectors | None = None


@dataclass(frozen=True)
class _Known:
    """`residuals` (M, D) of ordinary parts from the mean of their cluster, `ids` (M,) of that."""

    mean: Vectors
    radius: Vectors
    residuals: Vectors
    ids: Index

    @property
    def typical(self) -> float:
        return float(np.median(self.radius))

    def deviations(self, family: Family) -> float | None:
        """How many standard deviations of ordinary parts the family lies out in its own direction; None where too few are known."""
        own = self.residuals[self.ids == family.nearest_cluster]
        rows = own if len(own) >= MIN_ORDINARY else self.residuals
        if len(rows) < MIN_ORDINARY or not family.distance > 0:
            return None
        direction = (family.centre - self.mean[family.nearest_cluster]) / family.distance
        # Of the middle two thirds: the family's own parts that passed as ordinary must not widen what it is measured with.
        low, middle, high = np.quantile(rows @ direction, [0.16, 0.5, 0.84])
        return float((family.distance - middle) / max(float(high - low) / 2, 1e-6 * family.distance))


@dataclass(frozen=True)
class Family:
    """`members` (n,) rows of the input. `scatter`: median distance to `centre` (D,). `distance`: of the centre to the nearest known cluster.

    `raw_score`: that distance in radii of the cluster. `first_s`, `last_s`: of the moments given, None without.
    """

    members: Index
    centre: Vectors
    scatter: float
    nearest_cluster: int
    distance: float
    raw_score: float
    n_groups: int
    first_s: float | None = None
    last_s: float | None = None

    @property
    def rate_per_h(self) -> float | None:
        """Parts an hour between first and last; None where that is no time."""
        if self.first_s is None or self.last_s is None or self.last_s <= self.first_s:
            return None
        return (len(self.members) - 1) / (self.last_s - self.first_s) * 3600


def find_families(
    embeddings: Vectors,
    groups: NDArray[np.generic],
    cluster_mean: Vectors,
    cluster_radius: Vectors,
    beside: Beside | None = None,
    options: FamilyOptions | None = None,
) -> list[Family]:
    """Families among novel parts, the largest first.

    Args:
        embeddings: (N, D) of novel parts, before any L2, oldest first.
        groups: (N,) group of each part (any comparable type): several frames of one part count once.
        cluster_mean: (K, D), cluster_radius: (K,), of the codebook that judged them.
        beside: without moments the rule on periods is left out; without ordinary parts only a family far from all is found.
    """
    options, beside = options or FamilyOptions(), beside or Beside()
    first = max(0, len(embeddings) - MAX_PARTS)
    z = np.asarray(embeddings[first:], np.float32)
    usable = np.flatnonzero(np.isfinite(z).all(1))
    if len(usable) < options.min_parts:
        return []
    z, rows = z[usable], usable + first
    known = _known(cluster_mean, cluster_radius, beside.ordinary)
    families = []
    for linked in _components(_linked(z, REACH * known.typical), options.min_links):
        component = _refined(z, linked, known)
        if len(component) < options.min_parts:
            continue
        moments = None if beside.moments_s is None else np.asarray(beside.moments_s)[rows[component]]
        family = _described(z[component], rows[component], known, (groups, moments))
        if _is_frequent(family, moments, options) and _is_family(family, z[component], known, options):
            families.append(family)
    return sorted(families, key=lambda family: -len(family.members))


def _known(mean: Vectors, radius: Vectors, ordinary: Vectors | None) -> _Known:
    z = np.zeros((0, mean.shape[1]), np.float32) if ordinary is None else np.asarray(ordinary, np.float32)
    z = z[np.isfinite(z).all(1)]
    ids = _nearest(z, mean, radius)[0] if len(z) else np.zeros(0, np.int64)
    return _Known(mean, radius, z - mean[ids], ids)


def _linked(z: Vectors, reach: float) -> NDArray[np.bool_]:
    """(N, N) whether two lie within reach; none with itself."""
    centred = z - z.mean(0)  # the expansion below cancels far from the origin
    norms = np.einsum("nd,nd->n", centred, centred)
    d2 = norms[:, None] + norms[None, :] - 2.0 * (centred @ centred.T)
    linked: NDArray[np.bool_] = d2 <= reach * reach
    np.fill_diagonal(linked, False)
    return linked


def _components(linked: NDArray[np.bool_], min_links: int) -> list[Index]:
    """Connected cores with what is linked to them; each row is in at most one."""
    is_core = linked.sum(1) >= min_links
    label = np.full(len(linked), -1)
    found: list[Index] = []
    for start in np.flatnonzero(is_core):
        if label[start] >= 0:
            continue
        label[start] = len(found)
        waiting = [int(start)]
        while waiting:
            row = waiting.pop()
            new = np.flatnonzero(linked[row] & (label < 0))
            label[new] = len(found)
            waiting.extend(int(n) for n in new if is_core[n])
        found.append(np.flatnonzero(label == len(found)))
    return found


def _refined(z: Vectors, component: Index, known: _Known) -> Index:
    """The rows of a component that are nearer to its mean than to a known one; the mean moves with them."""
    to_known = _nearest(z[component], known.mean, known.radius)[1]
    own = np.ones(len(component), bool)
    for _ in range(ROUNDS):
        centre = z[component[own]].mean(0)
        nearer = np.linalg.norm(z[component] - centre, axis=1) < to_known
        if not nearer.any() or np.array_equal(nearer, own):
            break
        own = nearer
    return component[own]


def _nearest(z: Vectors, mean: Vectors, radius: Vectors) -> tuple[Index, Vectors, Vectors]:
    """Id, distance and raw score (N,) by the nearest cluster mean."""
    distances = np.stack([np.linalg.norm(z - row, axis=1) for row in mean], 1)  # (N, K), direct: no cancellation
    ids = distances.argmin(1)
    distance = distances[np.arange(len(z)), ids]
    return ids, distance, distance / radius[ids]


def _described(
    z: Vectors,
    rows: Index,
    known: _Known,
    seen: tuple[NDArray[np.generic], NDArray[np.float64] | None],
) -> Family:
    groups, moments = seen
    centre = z.mean(0)
    ids, distance, score = _nearest(centre[None], known.mean, known.radius)
    return Family(
        members=rows,
        centre=centre,
        scatter=float(np.median(np.linalg.norm(z - centre, axis=1))),
        nearest_cluster=int(ids[0]),
        distance=float(distance[0]),
        raw_score=float(score[0]),
        n_groups=len(np.unique(groups[rows])),
        first_s=None if moments is None else float(moments.min()),
        last_s=None if moments is None else float(moments.max()),
    )


def _is_frequent(family: Family, moments: NDArray[np.float64] | None, options: FamilyOptions) -> bool:
    periods = None if moments is None else len(np.unique(moments // options.period_s))
    return (
        len(family.members) >= options.min_parts
        and family.n_groups >= options.min_groups
        and (periods is None or periods >= options.min_periods)
    )


def _is_family(family: Family, z: Vectors, known: _Known, options: FamilyOptions) -> bool:
    is_compact = family.scatter <= options.max_scatter * known.typical
    is_elsewhere = family.distance >= options.min_distance * family.scatter
    if not (is_compact and is_elsewhere):
        return False
    deviations = known.deviations(family)
    if deviations is not None:
        return deviations >= options.min_deviations
    scores = _nearest(z, known.mean, known.radius)[2]
    return family.raw_score > options.edge and float(np.quantile(scores, 0.1)) > options.clear * options.edge
