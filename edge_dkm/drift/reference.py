"""What drift is measured against: how the run's own held-out good parts look, small enough for the model's metadata.

`describe` makes it (the exporter runs the exported model on those parts), `read_reference` reads it back from `dkm.reference_hist`.

Parts of one group (several shots of one part, one lot) say little more than one part, so every mean carries the standard error of a
bootstrap over groups: its limit, the cluster-robust sum over groups (Liang and Zeger 1986; Cameron, Gelbach and Miller 2008).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_dkm.contract import Metadata
from edge_dkm.drift.quality import THUMBNAIL_PX
from edge_dkm.drift.statistic import Frame, Ranks, Sighting, events, sketch

KEY = "drift"  # in dkm.reference_hist
N_DIRECTIONS = 6
DIRECTION_NUMBERS = 12_288  # in all directions together: the metadata stay below 64 KiB
MAX_CLUSTERS = 8  # watched one by one, the largest
MIN_GROUPS = 8  # with fewer nothing can be said about a mean of new groups
Z = 4.0  # normal quantile of the intervals: 3 in 100,000 on each side
RANK_DEVIATION = 1 / math.sqrt(12)  # of a rank that is evenly spread over [0, 1]
MARGIN_RANK = 0.05  # a shift of a mean rank by so little is no drift, however sure

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """`names` (S) of the statistics, `mean` and `error` (S,) of each over the reference; NaN in `error`: not watched against it.

    block: so many parts are one observation, since those of one group are worth no more. rms: typical distance of an embedding from the mean.
    missing: what is not watched, and why.
    """

    frame: Frame | None
    clusters: tuple[int, ...]
    ranks: Ranks
    names: tuple[str, ...]
    mean: Vector
    error: Vector
    groups: int
    block: int
    rms: float
    missing: str = ""

    def observe(self, sighting: Sighting) -> Vector:
        """The statistics (S,) of one part; NaN where it has none."""
        frame = self.frame
        if frame is None:
            values = self.ranks({"novelty": sighting.novelty_score}) | events(sighting, self.clusters)
        else:
            values = self.ranks(frame.raw(sighting)) | events(sighting, self.clusters)
        return np.array([values[name] for name in self.names])

    def interval(self) -> tuple[Vector, Vector]:
        """(S,) between which means of new groups lie if nothing has changed. Both samples are finite: twice the reference's variance."""
        groups = max(self.groups, 1)
        rare = np.array([is_event(name) for name in self.names])
        return intervals(Means(self.mean, math.sqrt(2) * self.error, np.full(len(rare), float(groups))), rare, Z, Z)

    def for_own_codebook(self) -> Reference:
        """With a station's own codebook: it was made of other parts, so only the promised rate of novel ones still holds."""
        error = np.where([name == "beyond-1" for name in self.names], self.error, np.nan)
        return replace(self, error=error, missing="the station's codebook is younger than the model's reference")


@dataclass(frozen=True)
class Means:
    """(S,) means of statistics, their standard errors (NaN: unknown), and how many independent observations are behind each."""

    mean: Vector
    error: Vector
    count: Vector


def intervals(means: Means, rare: NDArray[np.bool_], z: float, z_rare: float) -> tuple[Vector, Vector]:
    """(S,) low and high: z errors and a margin on both sides; of rare events the wider of z_rare errors and the bounds of a Poisson count."""
    half = np.where(rare, z_rare * means.error, z * means.error + MARGIN_RANK)
    high, low = means.mean + half, means.mean - half
    most, fewest = poisson_bounds(means.mean * means.count, z_rare)
    high = np.where(rare, np.maximum(high, most / means.count), high)
    low = np.where(rare, np.minimum(low, fewest / means.count), low)
    unknown = np.isnan(half)
    return np.where(unknown, 0.0, np.clip(low, 0.0, 1.0)), np.where(unknown, 1.0, np.clip(high, 0.0, 1.0))


def student(z: float, n: int) -> float:
    """Student's quantile with n - 1 degrees of freedom where the normal one is z, to first order."""
    return z * (1 + (z * z + 1) / (4 * (n - 1)))


def poisson_bounds(count: Vector, z: float) -> tuple[Vector, Vector]:
    """(S,) the largest and the smallest mean for which `count` events are not surprising at z (Wilson and Hilferty 1931)."""
    more = count + 1
    most = more * (1 - 1 / (9 * more) + z / (3 * np.sqrt(more))) ** 3
    some = np.maximum(count, 1e-9)
    fewest = some * np.maximum(1 - 1 / (9 * some) - z / (3 * np.sqrt(some)), 0.0) ** 3
    return most, fewest


def is_event(name: str) -> bool:
    """Whether the statistic is 0 or 1, and may be rare."""
    return name.startswith(("beyond-", "cluster-"))


def describe(sightings: Sequence[Sighting], groups: NDArray[np.int64], shares: Sequence[float]) -> dict[str, Any]:
    """The reference of held-out good parts, of groups (N,), as plain values. `shares` (K,) of the clusters decide which are watched.

    Raises:
        ValueError: fewer than MIN_GROUPS groups.
    """
    _, group, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if len(counts) < MIN_GROUPS:
        raise ValueError(f"{len(counts)} groups of held-out parts, expected at least {MIN_GROUPS}")
    frame, clusters = _frame(sightings), watched_clusters(shares)
    raw = [frame.raw(sighting) for sighting in sightings]
    sketches = {name: sketch(np.array([values[name] for values in raw])) for name in raw[0]}
    ranks = Ranks(sketches)
    rows = [ranks(values) | events(sighting, clusters) for values, sighting in zip(raw, sightings, strict=True)]
    names = list(rows[0])
    x = np.array([[row[name] for name in names] for row in rows])
    errors, block = _errors(x, group, np.array([is_event(name) for name in names]))
    centred = np.stack([sighting.embedding for sighting in sightings]) - frame.mean
    return {
        "version": 1,
        "parts": len(sightings),
        "groups": len(counts),
        "block": block,
        "sketches": sketches,
        "means": dict(zip(names, x.mean(axis=0).tolist(), strict=True)),
        "errors": dict(zip(names, errors.tolist(), strict=True)),
        "clusters": list(clusters),
        "rms": float(np.sqrt((centred.astype(np.float64) ** 2).sum(axis=1).mean())),
        "mean": _packed(frame.mean, np.float32),
        "directions": _packed(frame.directions, np.float16),
        "thumbnail": _packed(np.round(frame.thumbnail), np.uint8),
    }


def read_reference(metadata: Metadata) -> Reference:
    """From a model's metadata; of an older model, what that holds: shares of the clusters and quantiles of novelty_score."""
    values = json.loads(metadata.raw.get("dkm.reference_hist") or "{}")
    known: Mapping[str, Any] = values if isinstance(values, Mapping) else {}
    found = known.get(KEY)
    if isinstance(found, Mapping) and found.get("version") == 1:
        names = tuple(found["means"])
        return Reference(
            Frame(
                _unpacked(found["mean"], np.float32, (metadata.embed_dim,)),
                _unpacked(found["directions"], np.float16, (-1, metadata.embed_dim)),
                _unpacked(found["thumbnail"], np.uint8, (THUMBNAIL_PX, THUMBNAIL_PX)),
            ),
            tuple(found["clusters"]),
            Ranks(found["sketches"]),
            names,
            np.array([found["means"][name] for name in names]),
            np.array([found["errors"][name] for name in names]),
            int(found["groups"]),
            int(found["block"]),
            float(found["rms"]),
        )
    return _of_older_model(known, metadata)


def _of_older_model(known: Mapping[str, Any], metadata: Metadata) -> Reference:
    quantiles = {float(level): float(value) for level, value in (known.get("novelty_quantiles") or {}).items()}
    shares = [float(share) for share in known.get("shares") or ()]
    novelty: Mapping[str, Any] = metadata.novelty
    groups = int(novelty.get("groups") or 0)
    names, mean, sketches = [], [], {}
    if quantiles and groups >= MIN_GROUPS:
        levels, values = zip(*sorted(quantiles.items()), strict=True)
        sketches = {"novelty": [float(v) for v in np.interp(np.linspace(0, 1, len(levels) * 5), levels, values)]}
        names, mean = ["novelty", "beyond-1"], [0.5, float(novelty.get("target_frr", 0.0))]
    if len(shares) > 1 and groups >= MIN_GROUPS:
        watched = watched_clusters(shares)
        names += [f"cluster-{k}" for k in watched]
        mean += [shares[k] for k in watched]
    x = np.array(mean)
    spread = np.array(
        [1 / 12 if name == "novelty" else max(p * (1 - p), 0.25 / groups) for name, p in zip(names, mean, strict=True)]
    )
    missing = (
        f"the model's reference has no pictures and embeddings ({known.get('why', 'exported by an older version')})"
    )
    return Reference(
        None,
        watched_clusters(shares),
        Ranks(sketches),
        tuple(names),
        x,
        np.sqrt(spread / max(groups, 1)),
        groups,
        1,
        0.0,
        missing,
    )


def watched_clusters(shares: Sequence[float]) -> tuple[int, ...]:
    """The largest; none where there is only one."""
    if len(shares) < 2:
        return ()
    largest = sorted(range(len(shares)), key=lambda k: (-shares[k], k))[:MAX_CLUSTERS]
    return tuple(sorted(largest))


def _frame(sightings: Sequence[Sighting]) -> Frame:
    pictures = [sighting.quality.thumbnail for sighting in sightings if sighting.quality is not None]
    embeddings = np.stack([sighting.embedding for sighting in sightings])
    mean = embeddings.mean(axis=0)
    _, _, directions = np.linalg.svd(embeddings - mean, full_matrices=False)
    thumbnail = np.mean(pictures, axis=0) if pictures else np.zeros((THUMBNAIL_PX, THUMBNAIL_PX))
    return Frame(
        mean.astype(np.float32),
        directions[: min(N_DIRECTIONS, DIRECTION_NUMBERS // len(mean))]
        .astype(np.float16)
        .astype(np.float32),  # as they are stored
        np.round(thumbnail).astype(np.float32),  # as it is stored
    )


def _errors(x: Vector, group: NDArray[np.int64], rare: NDArray[np.bool_]) -> tuple[Vector, int]:
    """(S,) standard errors of the means of x (N, S) over groups, and how many parts are worth one independent part at most.

    The error is that of independent parts at least; where parts share groups, Student's quantile of so few groups is in it.
    """
    n, n_groups = len(x), int(group.max()) + 1
    sums = np.zeros((n_groups, x.shape[1]))
    np.add.at(sums, group, x - x.mean(axis=0))
    errors = np.sqrt(n_groups / (n_groups - 1) * (sums**2).sum(axis=0)) / n
    alone = np.where(rare, x.std(axis=0), RANK_DEVIATION) / math.sqrt(n)
    if n_groups == n:
        return np.maximum(errors, alone), 1
    worth = (errors / np.maximum(alone, 1e-9)) ** 2
    largest = math.ceil(float((np.bincount(group) ** 2).sum() / n))  # how many parts a part's group has
    block = min(largest, math.ceil(float(worth[~rare].max())))
    return np.maximum(errors * student(Z, n_groups) / Z, alone), max(1, block)


def _packed(values: NDArray[Any], dtype: type[np.generic]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _unpacked(text: str, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[np.float32]:
    values = np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<"))
    return values.reshape(shape).astype(np.float32)
