"""Proposes new clusters from a station's ring of novel frames. `edge-dkm families` calls it; the station may run or not.

Only frames on disk and their embeddings are read. Parts that are novel by their patches alone, and whose embedding lies inside a known
cluster, form no family here: a cluster of the embedding could not hold them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edge_dkm.clock import rfc3339, utc_at_epoch, wall_s
from edge_dkm.codebook_record import CodebookRecord
from edge_dkm.errors import StorageError, UsageError
from edge_dkm.families.finding import Beside, Family, FamilyOptions, find_families
from edge_dkm.frames.embeddings import embeddings_path, read_embeddings
from edge_dkm.frames.index import INDEX, DamagedIndexError, FrameRow, read_index
from edge_dkm.frames.novel_frames import FOLDER
from edge_dkm.golden import load_golden
from edge_dkm.inspector import Inspector, Runtime
from edge_dkm.model_file import golden_path
from edge_dkm.recentring.reservoir import read_rows, reservoir_path
from edge_dkm.settings import LineSettings
from edge_dkm.station_codebooks import in_force

SHOWN_KNOWN = 8


@dataclass(frozen=True)
class Proposal:
    """One family, to be looked at as a new cluster. `rows`: its frames, the most typical first. `known`: frames of the nearest cluster."""

    camera: str
    family: Family
    nearest_name: str
    rows: list[FrameRow]
    known: list[FrameRow]
    folder: Path

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        family = self.family
        return {
            "camera": self.camera,
            "n": len(family.members),
            "groups": family.n_groups,
            "first": _time(family.first_s),
            "last": _time(family.last_s),
            "kept_per_h": None if family.rate_per_h is None else round(family.rate_per_h, 3),
            "scatter": round(family.scatter, 4),
            "nearest": {
                "id": family.nearest_cluster,
                "name": self.nearest_name,
                "distance": round(family.distance, 4),
                "raw_score": round(family.raw_score, 3),
            },
            "files": [str(self.folder / row.file) for row in self.rows],
        }


@dataclass(frozen=True)
class Searched:
    """One camera: what was looked through, and what was found."""

    camera: str
    frames: int
    novel: int
    without_embedding: int
    proposals: list[Proposal]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "camera": self.camera,
            "frames": self.frames,
            "novel": self.novel,
            "without_embedding": self.without_embedding,
            "families": [proposal.plain() for proposal in self.proposals],
        }

    def text(self) -> str:
        """For people."""
        left = f" ({self.without_embedding} of them of another model)" if self.without_embedding else ""
        count = len(self.proposals)
        found = f"{count or 'no'} famil{'y' if count == 1 else 'ies'}"
        lines = [f"{self.camera:<9} {self.frames} frames kept, {self.novel} novel{left}: {found}"]
        for n, proposal in enumerate(self.proposals, 1):
            plain, near = proposal.plain(), proposal.plain()["nearest"]
            lines.append(
                f"family {n}  {plain['n']} parts of {plain['groups']} groups, {plain['first']} to {plain['last']}; "
                f"nearest: {near['name']}, {near['raw_score']} radii away"
            )
        return "\n".join(lines)


def search(settings: LineSettings, camera: str | None, hours: float | None) -> Iterator[Searched]:
    """Each camera's families; `hours`: only frames of the last hours.

    Raises:
        UsageError: no such camera.
        StorageError: the station has kept no frames.
        ModelError: the model or its golden images cannot be read.
    """
    names = list(settings.cameras)
    if camera is not None and camera not in names:
        raise UsageError(f"--camera is {camera}, expected one of {', '.join(names)}")
    frames = settings.state / FOLDER
    if not frames.is_dir():
        raise StorageError(f"{frames} is not there: the station has kept no frames yet (or frames.keep is never)")
    opened: dict[str, Inspector] = {}
    try:
        for name in names if camera is None else [camera]:
            model = settings.cameras[name].model or settings.model or ""
            if model not in opened:
                opened[model] = Inspector(model, runtime=Runtime(threads=1))
            yield _search_one(settings, name, opened[model], hours)
    finally:
        for inspector in opened.values():
            inspector.close()


def _search_one(settings: LineSettings, camera: str, inspector: Inspector, hours: float | None) -> Searched:
    folder = settings.state / FOLDER / camera
    rows = _rows(folder)
    if hours is not None:
        rows = [row for row in rows if row.taken_s >= wall_s() - hours * 3600]
    threshold = settings.novelty_threshold or inspector.default_threshold
    novel = [row for row in rows if _score(row) > threshold]
    found = read_embeddings(embeddings_path(folder, inspector.file.sha256))
    known = [row for row in novel if row.result_id in found]
    tensors = _codebook(settings, camera, inspector)
    options = FamilyOptions(edge=float(tensors["novelty_scale"][0]) * threshold)
    families = []
    if known:
        families = find_families(
            np.stack([found[row.result_id] for row in known]),
            np.array([row.group for row in known]),
            tensors["cluster_mean"],
            tensors["cluster_radius"],
            Beside(np.array([row.taken_s for row in known]), _ordinary(settings, camera, inspector, rows, threshold)),
            options,
        )
    names = {cluster.id: cluster.name for cluster in inspector.clusters}
    proposals = []
    for family in families:
        nearest = names.get(family.nearest_cluster, f"cluster-{family.nearest_cluster}")
        ordinary = [row for row in rows if row.cluster == nearest and _score(row) <= threshold]
        members = _typical_first(family, known, found)
        proposals.append(Proposal(camera, family, nearest, members, ordinary[-SHOWN_KNOWN:], folder))
    return Searched(camera, len(rows), len(novel), len(novel) - len(known), proposals)


def _rows(folder: Path) -> list[FrameRow]:
    try:
        return read_index(folder / INDEX)
    except FileNotFoundError:
        return []
    except (OSError, DamagedIndexError) as error:
        raise StorageError(f"S-CORRUPT {error}; the station mends it at its next start") from None


def _ordinary(
    settings: LineSettings, camera: str, inspector: Inspector, rows: list[FrameRow], threshold: float
) -> NDArray[np.float32]:
    """Embeddings of parts that were not novel: of the station's reservoir, else of kept frames."""
    sha256, n_dims = inspector.file.sha256, inspector.metadata.embed_dim
    try:
        kept = read_rows(reservoir_path(settings.state, camera, sha256), sha256, n_dims)
        return np.asarray(kept.embedding[~kept.is_novel], np.float32)
    except StorageError:  # none yet, or damaged: the station says so itself
        found = read_embeddings(embeddings_path(settings.state / FOLDER / camera, sha256))
        chosen = [found[row.result_id] for row in rows if row.result_id in found and _score(row) <= threshold]
        return np.stack(chosen) if chosen else np.zeros((0, n_dims), np.float32)


def _codebook(settings: LineSettings, camera: str, inspector: Inspector) -> Mapping[str, NDArray[np.float32]]:
    """The one that judges: the station's, else the model's own."""
    running = in_force(CodebookRecord(settings.state), camera, inspector).codebook
    if running is not None:
        return running.tensors
    return load_golden(golden_path(cast(Path, inspector.file.path)), inspector.metadata.golden_sha256).codebook


def _typical_first(family: Family, known: list[FrameRow], found: Mapping[str, NDArray[np.float32]]) -> list[FrameRow]:
    rows = [known[n] for n in family.members]
    return sorted(rows, key=lambda row: float(np.linalg.norm(found[row.result_id] - family.centre)))


def _score(row: FrameRow) -> float:
    try:
        return float(row.novelty_score)
    except ValueError:
        return 0.0


def _time(moment_s: float | None) -> str | None:
    return None if moment_s is None else rfc3339(utc_at_epoch(moment_s))
