"""Proves a traced graph: contract, torch against onnxruntime on golden images and other sizes, hard cases. A graph that fails is not written.

What a device repeats later is edge_dkm/golden.py; this adds the comparison with PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from edge_dkm.golden import BLACK, PART, WHITE, Golden
from edge_dkm.inspector import Inspector, Outputs
from exporters.errors import ExportError
from exporters.graph import FusedModel

TOLERANCE = 1e-4  # on scores and, relative to max(1, distance), on distances; fp32
DECISIVE = 10.0  # golden parts have margins of that many tolerances
DECISIVE_INT8 = 3.0  # whose tolerance is a hundred times as wide; 2 is what the comparison of ids needs
MIN_PARTS = 1

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Parity:
    """Largest differences between PyTorch and onnxruntime over all images compared."""

    images: int
    max_score_difference: float
    max_distance_difference: float


def make_golden(
    inspector: Inspector, fused: FusedModel, candidates: list[Image], tolerance: float = TOLERANCE
) -> Golden:
    """Golden answers of the exported graph for decisive candidates, all black and all white.

    Args:
        tolerance: between devices; wider for int8, whose kernels round differently.

    Raises:
        ExportError: no candidate is decisive, or none has the size that the graph takes.
    """
    spec = inspector.metadata.input
    usable = [image for image in candidates if spec.h is None or image.shape[:2] == (spec.h, spec.w)]
    if not usable:
        sizes = sorted({f"{i.shape[1]}x{i.shape[0]}" for i in candidates})
        raise ExportError(
            f"none of the run's golden images ({', '.join(sizes) or 'none kept'}) has the size {spec.w}x{spec.h} of the graph; "
            f"choose --frame among them, or train on images of that size"
        )
    height, width = usable[0].shape[:2]
    images = [*usable, np.zeros((height, width, 3), np.uint8), np.full((height, width, 3), 255, np.uint8)]
    kinds = [PART] * len(usable) + [BLACK, WHITE]
    answers = [inspector.run(image[None], ("distances", "novelty_score"), overrides={}) for image in images]
    codebook = {
        name: value.detach().cpu().numpy() for name, value in fused.overridable().items() if name != "novelty_threshold"
    }
    golden = Golden(
        images,
        kinds,
        np.concatenate([a["distances"] for a in answers]).astype(np.float32),
        np.concatenate([a["novelty_score"] for a in answers]).astype(np.float32),
        codebook,
        tolerance,
    )
    decisive = DECISIVE if inspector.metadata.precision == "fp32" else DECISIVE_INT8
    keep = [n for n in range(len(images)) if kinds[n] != PART or golden.is_decisive(n, decisive)]
    if sum(kinds[n] == PART for n in keep) < MIN_PARTS:
        raise ExportError(
            f"none of {len(usable)} training images lies clearly nearer to one centroid than to the next (by {decisive * tolerance:.2g}); "
            f"the clusters coincide, train again"
        )
    return Golden(
        [images[n] for n in keep],
        [kinds[n] for n in keep],
        golden.distances[keep],
        golden.novelty_score[keep],
        codebook,
        tolerance,
    )


def check_parity(inspector: Inspector, fused: FusedModel, images: list[Image]) -> Parity:
    """Compares every output with PyTorch's on each image; with a dynamic graph on other sizes, too.

    Raises:
        ExportError: naming output, image and both values.
    """
    images = _with_other_sizes(inspector, images)
    worst_score = worst_distance = 0.0
    for n, image in enumerate(images):
        actual = inspector.run(image[None], [s.name for s in fused.outputs], overrides={})
        with torch.inference_mode():
            values = fused(torch.from_numpy(image)[None], *fused.overridable().values())
        expected: Outputs = {s.name: value.cpu().numpy() for s, value in zip(fused.outputs, values, strict=True)}
        score, distance = _compare(n, actual, expected)
        worst_score, worst_distance = max(worst_score, score), max(worst_distance, distance)
    return Parity(len(images), worst_score, worst_distance)


def _with_other_sizes(inspector: Inspector, images: list[Image]) -> list[Image]:
    """`images`, and noise of other sizes where the graph takes any."""
    if inspector.metadata.input.h is not None:
        return images
    rng = np.random.default_rng(0)
    height, width = images[0].shape[:2]
    sizes = ((height, width + 31), (height + 17, width), (max(8, height // 2) | 1, width))
    return [*images, *(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)]


def check_runs(inspector: Inspector, images: list[Image]) -> None:
    """Raises ExportError where an output is not finite, on `images` of the graph's size or on other sizes; for graphs without a twin in PyTorch."""
    spec = inspector.metadata.input
    usable = [image for image in images if spec.h is None or image.shape[:2] == (spec.h, spec.w)]
    for n, image in enumerate(_with_other_sizes(inspector, usable)):
        for name, value in inspector.run(
            image[None], [s.name for s in inspector.metadata.outputs], overrides={}
        ).items():
            if not np.isfinite(value.astype(np.float64)).all():
                raise ExportError(f"output {name} of image {n} is not finite: {value.ravel()[:4]}")


def _compare(n: int, actual: Outputs, expected: Outputs) -> tuple[float, float]:
    for name, value in expected.items():
        if actual[name].shape != value.shape or actual[name].dtype != value.dtype:
            raise ExportError(
                f"output {name} of image {n} is {actual[name].dtype} {actual[name].shape} in onnxruntime, {value.dtype} {value.shape} in PyTorch"
            )
        if not np.isfinite(actual[name].astype(np.float64)).all():
            raise ExportError(f"output {name} of image {n} is not finite in onnxruntime: {actual[name].ravel()[:4]}")
    ordered = np.sort(expected["distances"][0])
    scale = max(1.0, float(ordered[0]))
    wanted_distances = expected["distances"].astype(np.float64)
    distance_gap = float(
        (np.abs(actual["distances"].astype(np.float64) - wanted_distances) / np.maximum(1.0, wanted_distances)).max()
    )
    if distance_gap > TOLERANCE:
        raise ExportError(
            f"distances of image {n} differ by {distance_gap:.2g} between onnxruntime and PyTorch, expected at most {TOLERANCE:g}"
        )
    decisive = len(ordered) == 1 or float(ordered[1] - ordered[0]) > 2 * TOLERANCE * scale
    actual_id, expected_id = int(actual["cluster_id"][0]), int(expected["cluster_id"][0])
    if actual_id != expected_id:
        if decisive:
            raise ExportError(f"image {n} is cluster {actual_id} in onnxruntime, {expected_id} in PyTorch")
        return 0.0, distance_gap
    if "novelty_map" in expected:
        wanted_map = expected["novelty_map"].astype(np.float64)
        map_gap = float(
            (np.abs(actual["novelty_map"].astype(np.float64) - wanted_map) / np.maximum(1.0, wanted_map)).max()
        )
        if map_gap > TOLERANCE:
            raise ExportError(
                f"novelty_map of image {n} differs by {map_gap:.2g} between onnxruntime and PyTorch, expected at most {TOLERANCE:g}"
            )
    score, wanted = float(actual["novelty_score"][0]), float(expected["novelty_score"][0])
    score_gap = abs(score - wanted) / max(1.0, abs(wanted))
    if score_gap > TOLERANCE:
        raise ExportError(
            f"novelty_score of image {n} is {score:.6f} in onnxruntime, {wanted:.6f} in PyTorch, expected within {TOLERANCE:g}"
        )
    return score_gap, distance_gap
