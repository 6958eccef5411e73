"""`dkm-export --int8`: quantises the fused graph, judges it on the run's own held-out images, and says why where fp32 is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from edge_dkm.golden import Golden
from edge_dkm.inspector import Inspector
from exporters.gate import GateReport, Promise, execution_spread, judge
from exporters.graph import FusedModel
from exporters.own_images import find_own_images, pixels_of
from exporters.quantize import quantize_encoder
from exporters.verify import check_runs, make_golden
from trainer.artifact import Run

MIN_TOLERANCE, MAX_TOLERANCE = 1e-3, 0.05  # beyond the latter golden images would prove nothing
SPREADS = 2.0  # the tolerance in spreads between two ways of running the graph on this machine
SPREAD_IMAGES = 64


@dataclass(frozen=True)
class Accepted:
    """A quantised graph that may stand in for fp32, with golden answers of its own."""

    model: onnx.ModelProto
    golden: Golden


@dataclass(frozen=True)
class Int8:
    """What came of it: `accepted` None where fp32 is kept, for `reasons`."""

    accepted: Accepted | None
    report: GateReport | None
    reasons: list[str]

    def plain(self) -> dict[str, Any]:
        """For `dkm.quantization` and JSON."""
        kept = {"kept": "int8" if self.accepted else "fp32", "reasons": self.reasons}
        return {**kept, **(self.report.plain() if self.report else {})}


@dataclass(frozen=True)
class Fp32:
    """The proven graph to quantise. `frame`: its fixed (height, width) or None; `candidates`: images for golden answers.

    `inspector_of(model)` loads a graph as an int8 file of this run.
    """

    proto: onnx.ModelProto
    fused: FusedModel
    inspector: Inspector
    frame: tuple[int, int] | None
    candidates: Sequence[NDArray[np.uint8]]
    inspector_of: Callable[[onnx.ModelProto], Inspector]


def try_int8(run: Run, fp32: Fp32, promise: Promise | None) -> Int8:
    """Quantises and judges; whatever speaks against it is an answer: the fp32 graph is proven already, and is not lost by it."""
    try:
        return _attempt(run, fp32, promise)
    except Exception as error:  # noqa: BLE001 (the quantiser and onnxruntime raise many types)
        return Int8(None, None, [" ".join(str(error).split())[:300] or type(error).__name__])


def _attempt(run: Run, fp32: Fp32, promise: Promise | None) -> Int8:
    images = find_own_images(run, fp32.frame)
    model = quantize_encoder(fp32.proto, images.ranges)
    inspector = fp32.inspector_of(model)
    report = judge(fp32.inspector, inspector, images.held_out, promise)
    if report.reasons:
        return Int8(None, report, report.reasons)
    spread = SPREADS * execution_spread(model, pixels_of(images.held_out[:SPREAD_IMAGES]))
    if spread > MAX_TOLERANCE:
        return Int8(
            None,
            report,
            [f"two ways of running it differ by {spread / SPREADS:.2g}, expected {MAX_TOLERANCE / SPREADS}"],
        )
    candidates = list(fp32.candidates)
    check_runs(inspector, candidates)
    golden = make_golden(inspector, fp32.fused, candidates, max(MIN_TOLERANCE, spread))
    return Int8(Accepted(model, golden), report, [])
