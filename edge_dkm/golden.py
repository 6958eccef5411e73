"""Golden images: pixels and answers that travel with a model, so that each device proves the same answers on its own provider.

`dkm-export` writes the file through `save_golden`; `edge-dkm verify` and the start of `edge-dkm run` call `verify_golden`.
The base codebook is always used: a station's codebook changes answers on purpose.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_dkm.contract import CODEBOOK
from edge_dkm.errors import ModelError, ParityError
from edge_dkm.head import Outputs, to_cluster_space

if TYPE_CHECKING:
    from edge_dkm.inspector import Inspector

COMPARED = ("cluster_id", "distance", "novelty_score", "p_value", "is_novel", "distances", "embedding")
PART, BLACK, WHITE = "part", "black", "white"
# Of providers that lower the whole graph, relative as a golden file's own: some ten roundings to 11 (fp16) or 8 bits (bf16).
TOLERANCE: Mapping[str, float] = {"fp16": 0.005, "bf16": 0.05}


@dataclass(frozen=True)
class Golden:
    """`images`: G arrays (H, W, 3) uint8; `kinds`: part, black or white; `distances` (G, K), `novelty_score` (G,).

    `codebook` holds the base codebook's six tensors. `tolerance` is relative to max(1, |value|): it bounds distances and scores,
    and ids are compared only where the margin between the two nearest centroids exceeds twice that.
    """

    images: list[NDArray[np.uint8]]
    kinds: list[str]
    distances: NDArray[np.float32]
    novelty_score: NDArray[np.float32]
    codebook: Mapping[str, NDArray[np.float32]]
    tolerance: float

    def margin(self, n: int) -> float:
        """Distance to the second nearest centroid minus that to the nearest; infinite where K is 1."""
        ordered = np.sort(self.distances[n])
        return float(ordered[1] - ordered[0]) if len(ordered) > 1 else float("inf")

    def is_decisive(self, n: int, times: float = 2.0) -> bool:
        """Whether the margin of image n exceeds `times` tolerances, so that no provider may answer with another id."""
        return self.margin(n) > times * self.tolerance * max(1.0, float(self.distances[n].min()))


@dataclass(frozen=True)
class GoldenReport:
    """What was compared, the largest difference seen, and what was allowed: `tolerance`, that of the precision that really ran."""

    images: int
    ids_compared: int
    max_score_difference: float
    max_distance_difference: float
    providers: list[str]
    precision: str
    tolerance: float


def save_golden(golden: Golden) -> bytes:
    """The golden file's bytes; their sha256 goes into the model's metadata."""
    arrays: dict[str, Any] = {
        "kinds": np.array(golden.kinds, "U8"),
        "distances": golden.distances,
        "novelty_score": golden.novelty_score,
        "tolerance": np.float32(golden.tolerance),
    }
    arrays |= {f"codebook_{name}": tensor for name, tensor in golden.codebook.items()}
    arrays |= {f"image_{n:03d}": image for n, image in enumerate(golden.images)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def load_golden(path: Path, sha256: str) -> Golden:
    """Reads a golden file.

    Raises:
        ModelError: not there, not the file that the model names, or unreadable.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"golden images {path} cannot be read ({error.strerror or error}); copy them from where the model was exported"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ModelError(
            f"golden images {path} are not those of this model (sha256 differs); copy model, .golden.npz and .sha256 together"
        )
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            kinds = [str(kind) for kind in archive["kinds"]]
            codebook = {spec.name: archive[f"codebook_{spec.name}"] for spec in CODEBOOK}
            return Golden(
                [archive[f"image_{n:03d}"] for n in range(len(kinds))],
                kinds,
                archive["distances"],
                archive["novelty_score"],
                codebook,
                float(archive["tolerance"]),
            )
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"golden images {path} cannot be read: {error}") from None


def verify_golden(inspector: Inspector, golden: Golden) -> GoldenReport:
    """Runs the golden images with the base codebook and compares.

    Raises:
        ParityError: naming the first image that answers differently, with both answers.
    """
    # A provider that lowers the graph has passed the gate at its own precision's tolerance; that is what it is held to.
    golden = replace(golden, tolerance=max(golden.tolerance, TOLERANCE.get(inspector.ran.precision, 0.0)))
    worst_score = worst_distance = 0.0
    for n, image in enumerate(golden.images):
        score_gap, distance_gap = _compare(inspector, golden, n, inspector.run(image[None], COMPARED, overrides={}))
        worst_score, worst_distance = max(worst_score, score_gap), max(worst_distance, distance_gap)
    _verify_zero_distance(inspector, golden)
    decisive = sum(golden.is_decisive(n) for n in range(len(golden.images)))
    return GoldenReport(
        len(golden.images),
        decisive,
        worst_score,
        worst_distance,
        inspector.providers,
        inspector.precision,
        golden.tolerance,
    )


def _compare(inspector: Inspector, golden: Golden, n: int, outputs: Outputs) -> tuple[float, float]:
    """Relative differences of score and distances of image n; raises ParityError where they matter."""
    what = f"{inspector.file.name}: golden image {n} ({golden.kinds[n]})"
    where = inspector.providers[0]
    for name in COMPARED:
        if not np.isfinite(np.asarray(outputs[name], np.float64)).all():
            raise ParityError(f"{what} gives a {name} that is not finite on {where}")
    expected_id, cluster_id = int(golden.distances[n].argmin()), int(outputs["cluster_id"][0])
    if golden.is_decisive(n) and cluster_id != expected_id:
        raise ParityError(
            f"{what} is cluster {cluster_id} on {where}, expected {expected_id}; this device or a change of the file gives another answer"
        )
    score, expected = float(outputs["novelty_score"][0]), float(golden.novelty_score[n])
    # Between two equally near clusters the other one, with its own radius, is a right answer too.
    score_gap = abs(score - expected) / max(1.0, abs(expected)) if cluster_id == expected_id else 0.0
    distance_gap = float(
        (np.abs(outputs["distances"][0] - golden.distances[n]) / np.maximum(1.0, golden.distances[n])).max()
    )
    if score_gap > golden.tolerance:
        raise ParityError(
            f"{what} has novelty_score {score:.6f} on {where}, expected {expected:.6f} +- {golden.tolerance:g}"
        )
    if distance_gap > golden.tolerance:
        raise ParityError(
            f"{what} has distances {distance_gap:.2g} away from the golden ones on {where}, expected at most {golden.tolerance:g}"
        )
    return score_gap, distance_gap


def _verify_zero_distance(inspector: Inspector, golden: Golden) -> None:
    """Puts centroid 0 exactly onto a golden image's own embedding: the distance must be 0 and nothing NaN (a root of a tiny negative)."""
    image = golden.images[0][None]
    embedding = np.asarray(inspector.run(image, ("embedding",), overrides={})["embedding"], np.float32)
    placed = to_cluster_space(embedding, inspector.metadata.l2)
    overrides = {name: tensor.copy() for name, tensor in golden.codebook.items()}
    overrides["centroids"][0], overrides["cluster_mean"][0] = placed[0], embedding[0]
    outputs = inspector.run(image, COMPARED, overrides=overrides)
    distance, score = float(outputs["distance"][0]), float(outputs["novelty_score"][0])
    scale = max(1.0, float(np.linalg.norm(placed)))
    if (
        int(outputs["cluster_id"][0]) != 0
        or not distance <= max(1e-3, golden.tolerance) * scale
        or not np.isfinite(score)
    ):
        raise ParityError(
            f"{inspector.file.name}: with centroid 0 placed on a golden image's own embedding, the image is cluster "
            f"{int(outputs['cluster_id'][0])} at distance {distance} with novelty_score {score}, expected cluster 0 at distance 0"
        )
