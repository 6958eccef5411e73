"""The gate of a provider that lowers the whole graph (OpenVINO bf16, TensorRT fp16): the golden images decide at load, or fp32 is kept.

Everything is lowered there, the distances and the novelty too, so a fast wrong answer is what such a setting gives by default
(measured, OpenVINO bf16 on two models: scores off by up to .4, Spearman .96 and .82). The promise of one answer is that of fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_dkm.contract import IMAGE, Metadata
from edge_dkm.errors import ModelError
from edge_dkm.golden import TOLERANCE, Golden, load_golden
from edge_dkm.model_file import ModelFile, golden_path
from edge_dkm.paired_runs import paired_ms
from edge_dkm.runtime import Lowering, Runtime, check_runtime
from edge_dkm.session import First, Opened, first_line, noise, open_tried

MIN_AGREEMENT, MIN_SPEARMAN = 0.995, 0.99
PAIRS = 15  # of runs, lowered and fp32 in turns
MAX_RATIO, MIN_WINS = 0.95, 12  # 12 of 15 pairs by chance: 2 %

log = logging.getLogger(__name__)
Vector = NDArray[np.float32]


def open_lowered(file: ModelFile, metadata: Metadata, runtime: Runtime, first: First) -> Opened:
    """Opens in `runtime.precision` where that passes the gate on this device, else in fp32 with the reason in `ran.why`.

    Raises:
        ModelError: it does not open in fp32 either.
        UsageError: a precision that the provider does not have, or an option that says otherwise; before minutes go into fp32.
    """
    check_runtime(runtime)
    full = open_tried(file, metadata, replace(runtime, precision="fp32"), first)
    golden, why = _golden(file, metadata)
    lowered: Opened | None = None
    if golden is not None:
        try:
            lowered = open_tried(file, metadata, runtime, first)
            why = None if lowered.ran.precision == runtime.precision else f"{runtime.providers[0]} does not run it"
            why = why or answers_problem(golden, *_answers(lowered.session, golden), runtime.precision)
            why = why or speed_problem(*_times_ms(lowered.session, full.session, noise(metadata.input)))
        except ModelError as error:
            why = str(error)
    if lowered is not None and why is None:
        log.info("%s runs in %s on %s: its golden images agree, and it is faster", file.name, *_on(runtime))
        return lowered
    log.warning("%s does not run in %s on %s: %s; fp32 is kept", file.name, *_on(runtime), why)
    return Opened(full.session, replace(full.ran, asked=runtime.precision, why=why))


def answers_problem(golden: Golden, distances: Vector, scores: Vector, precision: Lowering) -> str | None:
    """What speaks against `distances` (G, K) and `scores` (G,) of the golden images, or None."""
    golden = replace(golden, tolerance=max(golden.tolerance, TOLERANCE[precision]))
    if not (np.isfinite(distances).all() and np.isfinite(scores).all()):
        return "an answer is not finite"
    expected, ids = golden.distances.argmin(1), distances.argmin(1)
    for n in np.flatnonzero(ids != expected):
        if golden.is_decisive(int(n)):
            return f"golden image {n} ({golden.kinds[n]}) is cluster {ids[n]}, expected {expected[n]}"
    agreement = float((ids == expected).mean())
    if agreement < MIN_AGREEMENT:
        return f"{agreement:.1%} of the golden images keep their cluster, expected {MIN_AGREEMENT:.1%}"
    correlation = spearman(scores, golden.novelty_score)
    if not correlation >= MIN_SPEARMAN:
        return f"its novelty scores correlate by {correlation:.3f} (Spearman), expected {MIN_SPEARMAN:g}"
    for what, got, wanted in (
        ("novelty_score", scores, golden.novelty_score),
        ("distance", distances, golden.distances),
    ):
        gap = float((np.abs(got - wanted) / np.maximum(1, np.abs(wanted))).max())
        if gap > golden.tolerance:
            return f"a {what} is {gap:.2g} away, expected at most {golden.tolerance:g}"
    return None


def speed_problem(lowered_ms: Sequence[float], full_ms: Sequence[float]) -> str | None:
    """What speaks against the times of paired runs, or None where the lowered ones are measurably faster."""
    ratio = float(np.median(np.asarray(lowered_ms) / np.asarray(full_ms)))
    wins = sum(a < b for a, b in zip(lowered_ms, full_ms, strict=True))
    if ratio <= MAX_RATIO and wins >= MIN_WINS * len(full_ms) / PAIRS:
        return None
    return (
        f"it takes {ratio:.2f} times as long as fp32 here and is faster in {wins} of {len(full_ms)} pairs of runs, "
        f"expected at most {MAX_RATIO:g} times and {MIN_WINS * len(full_ms) // PAIRS} of them"
    )


def spearman(a: Vector, b: Vector) -> float:
    """Rank correlation, equal values sharing their mean rank; not a number where one of them is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x * x).sum() * (y * y).sum()))
    return float((x * y).sum()) / scale if scale else float("nan")


def _ranks(values: Vector) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place.ravel()]


def _golden(file: ModelFile, metadata: Metadata) -> tuple[Golden | None, str | None]:
    if file.path is None:
        return None, "a model given as bytes has no golden images to try it on"
    try:
        return load_golden(golden_path(file.path), metadata.golden_sha256), None
    except ModelError as error:
        return None, str(error)


def _answers(session: ort.InferenceSession, golden: Golden) -> tuple[Vector, Vector]:
    """Distances (G, K) and scores (G,), image by image: they may have several sizes."""
    try:
        rows = [session.run(["distances", "novelty_score"], {IMAGE: image[None]}) for image in golden.images]
    except Exception as error:  # onnxruntime raises many types
        raise ModelError(f"a golden image fails: {first_line(error)}") from error
    return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


def _times_ms(
    lowered: ort.InferenceSession, full: ort.InferenceSession, image: NDArray[np.uint8]
) -> tuple[list[float], list[float]]:
    """Of one run each, in pairs."""
    taken = paired_ms(
        {"lowered": lambda: lowered.run(None, {IMAGE: image}), "full": lambda: full.run(None, {IMAGE: image})}, PAIRS
    )
    return taken["lowered"], taken["full"]


def _on(runtime: Runtime) -> tuple[str, str]:
    return runtime.precision, runtime.device or runtime.providers[0]
