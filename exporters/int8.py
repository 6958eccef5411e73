"""`dkm-export --int8`: quantises the fused graph, judges it on the run's own held-out images, and says why where fp32 is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx

from edge_dkm.inspector import Inspector
from exporters.errors import ExportError
from exporters.gate import GateReport, Promise, execution_spread, judge
from exporters.own_images import read_own_images
from exporters.quantize import CALIBRATION_IMAGES, quantize_encoder
from trainer.artifact import Run

MIN_TOLERANCE = 1e-3
SPREADS = 2.0  # the tolerance in spreads between two ways of running the graph on this machine
SPREAD_IMAGES = 64


@dataclass(frozen=True)
class Int8:
    """What came of it: `model` None where fp32 is kept, for `reasons`. `tolerance`: of the golden images on other devices."""

    model: onnx.ModelProto | None
    tolerance: float
    report: GateReport | None
    reasons: list[str]

    def plain(self) -> dict[str, Any]:
        """For `dkm.quantization` and JSON."""
        kept = {"kept": "int8" if self.model is not None else "fp32", "reasons": self.reasons}
        return {**kept, **(self.report.plain() if self.report else {})}


@dataclass(frozen=True)
class Fp32:
    """The graph to quantise: its nodes, its inspector, its fixed `frame` (height, width) or None; `inspector_of` adds the metadata."""

    proto: onnx.ModelProto
    inspector: Inspector
    frame: tuple[int, int] | None
    inspector_of: Callable[[onnx.ModelProto], Inspector]


def try_int8(run: Run, fp32: Fp32) -> Int8:
    """Quantises and judges; every reason against it is an answer, not an error."""
    try:
        images = read_own_images(run, fp32.frame, CALIBRATION_IMAGES)
        model = quantize_encoder(fp32.proto, images.ranges)
    except ExportError as error:
        return Int8(None, 0.0, None, [str(error)])
    novelty = run.info["novelty"]
    promise = Promise(novelty["promised_frr"], novelty["groups"]) if run.parts.is_held_out else None
    report = judge(fp32.inspector, fp32.inspector_of(model), images.held_out, promise)
    if report.reasons:
        return Int8(None, 0.0, report, report.reasons)
    spread = execution_spread(model, [frame.image for frame in images.held_out[:SPREAD_IMAGES]])
    return Int8(model, max(MIN_TOLERANCE, SPREADS * spread), report, [])
