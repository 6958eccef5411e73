"""What a run was learned from and how well it did: the contents of model.json and assignments.csv. Labels serve scoring only."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer import metric
from trainer.artifact import SCHEMA
from trainer.codebook import CalibrationParts
from trainer.data import Dataset, has_known_good
from trainer.model import ClusterModel, Seen
from trainer.novelty import Calibration, groups_needed
from trainer.settings import TrainSettings
from trainer.splits import Split

LIBRARIES = ("edge-dkm", "torch", "numpy", "opencv-python-headless", "scikit-learn", "safetensors")


@dataclass(frozen=True)
class Outcome:
    """Where every image of the data set ended: embedding (N, D), cluster id, distance to its centroid and novelty_score (N,)."""

    dataset: Dataset
    split: Split
    z: NDArray[np.float32]
    ids: NDArray[np.int64]
    distance: NDArray[np.float32]
    novelty_score: NDArray[np.float32]

    @classmethod
    def of(cls, model: ClusterModel, dataset: Dataset, split: Split, seen: Seen) -> Outcome:
        """Assigns and scores what was seen of the whole data set; the model is calibrated."""
        ids, distance = model.assign(seen.z)
        return cls(dataset, split, *(t.cpu().numpy() for t in (seen.z, ids, distance, model.novelty_scores(seen))))

    def assignments(self) -> list[list[object]]:
        """One row per image: file, split, label, cluster, distance, novelty_score."""
        parts = np.full(len(self.ids), "train", dtype="U11")
        for name in ("radius", "calibration", "left_out"):
            parts[getattr(self.split, name)] = name
        known, classes = self.dataset.known, self.dataset.classes
        return [
            [
                name,
                str(parts[n]),
                "" if known[n] < 0 else classes[known[n]],
                int(self.ids[n]),
                f"{self.distance[n]:.6g}",
                f"{self.novelty_score[n]:.6g}",
            ]
            for n, name in enumerate(self.dataset.names)
        ]


def describe(
    settings: TrainSettings,
    model: ClusterModel,
    outcome: Outcome,
    parts: CalibrationParts,
    calibration: Calibration,
    clusters: list[dict[str, Any]],
) -> dict[str, Any]:
    """The contents of model.json."""
    dataset, split = outcome.dataset, outcome.split
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "method": settings.method.name,
        "encoder": settings.encoder.name,
        "input": {
            "height_px": model.preprocess.height_px,
            "width_px": model.preprocess.width_px,
            "roi": dataset.roi,
            "frame": dataset.frame,
        },
        "preprocess": {"mean": model.preprocess.mean.tolist(), "std": model.preprocess.std.tolist()},
        "clusters": clusters,
        "novelty": _novelty(settings, parts, calibration),
        "reference": _reference(outcome, model.n_clusters),
        "train": {
            "n": len(dataset),
            "n_train": len(split.train),
            "n_radius": len(split.radius),
            "n_calibration": len(split.calibration),
            "n_left_out": len(split.left_out),
            "skipped": len(dataset.skipped),
            "classes": dataset.classes,
            "known_good": has_known_good(dataset.classes, settings.data.good),
            "manifest_sha256": dataset.manifest_sha256,
            "seed": settings.train.seed,
            "git": _commit(),
        },
        "metrics": _metrics(outcome, settings.train.seed, model.n_clusters),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def novelty_sentence(novelty: dict[str, Any]) -> str:
    """What the threshold promises, in one sentence for people."""
    if novelty["kind"] == "uncalibrated":
        return "novelty is not calibrated (novelty: none): the threshold was taken from training parts and promises nothing"
    what = "new groups will hold a part that is" if novelty["unit"] == "group" else "good parts of new groups will be"
    promise = f"at most {novelty['promised_frr']:.2%} of {what} called novel, in the long run"
    if novelty["promised_frr"] > novelty["target_frr"]:
        return (
            f"WARNING: {novelty['groups']} groups cannot promise the target of {novelty['target_frr']:.2%} "
            f"(that needs {groups_needed(novelty['target_frr'])}); {promise} (counted are the groups of the calibration share)"
        )
    return f"{promise} (calibrated on {novelty['n_calib']} parts of {novelty['groups']} groups)"


def _novelty(settings: TrainSettings, parts: CalibrationParts, calibration: Calibration) -> dict[str, Any]:
    unit = settings.calibration.unit if settings.calibration else "part"
    promise = {"target_frr": calibration.target_frr, "promised_frr": calibration.promised_frr}
    return {
        "kind": f"conformal-{unit}" if parts.is_held_out else "uncalibrated",
        "threshold": 1.0,
        **(promise if parts.is_held_out else {}),  # training parts promise nothing
        "n_calib": calibration.parts,
        "groups": calibration.groups,
        "scale": calibration.scale,
        "unit": unit,
    }


def _reference(outcome: Outcome, n_clusters: int) -> dict[str, Any]:
    """What drift will be measured against: shares of the clusters and quantiles of novelty_score on the parts not trained on."""
    split = outcome.split
    held_out = np.concatenate([split.radius, split.calibration]) if split.is_calibrated else split.train
    shares = metric.occupancy(outcome.ids[split.train], n_clusters) / max(1, len(split.train))
    quantiles = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
    return {
        "shares": shares.tolist(),
        "novelty_quantiles": {str(q): float(np.quantile(outcome.novelty_score[held_out], q)) for q in quantiles},
    }


def _metrics(outcome: Outcome, seed: int, n_clusters: int) -> dict[str, float]:
    shares = metric.occupancy(outcome.ids, n_clusters).astype(np.float64)
    figures: dict[str, float] = {
        "effective_clusters": metric.effective_clusters(shares),
        "largest_share": float(shares.max() / shares.sum()),
    }
    silhouette = metric.silhouette(outcome.z, outcome.ids, seed)
    if silhouette is not None:
        figures["silhouette"] = silhouette
    dataset = outcome.dataset
    if dataset.labels is not None and len(dataset.classes) > 1:
        scores = metric.score_labels(dataset.labels, outcome.ids)
        figures |= {"acc": scores.acc, "nmi": scores.nmi, "ari": scores.ari, "purity": scores.purity}
    return figures


def _commit() -> str | None:
    """The commit of the code where it runs from a checkout, else None."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
