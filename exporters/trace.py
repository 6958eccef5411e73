"""Traces the fused model into an ONNX ModelProto of contract 1: names, overridable inputs, versions, standard operators only.

trace:   torch -> nodes -> interface of contract 1 -> folding -> sums of squares -> downscaling (of a fixed frame) -> checked
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from edge_dkm.contract import (
    CODEBOOK,
    IMAGE,
    INPUT,
    IR_VERSION,
    OPSET,
    OVERRIDABLE,
    TensorSpec,
)
from exporters.downscaling import speed_up_downscaling
from exporters.errors import ExportError
from exporters.folding import fold_normalisation
from exporters.graph import FusedModel
from exporters.nodes import prune
from exporters.squares import join_squares

TYPES = {
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(int64)": TensorProto.INT64,
    "tensor(float)": TensorProto.FLOAT,
    "tensor(bool)": TensorProto.BOOL,
}


class _Named(nn.Module):
    """The fused model with the encoder's two ends as outputs, which is how they get their names."""

    def __init__(self, fused: FusedModel) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, image: Tensor, novelty_threshold: Tensor, *codebook: Tensor) -> tuple[Tensor, ...]:
        return self.fused.with_seams(image, novelty_threshold, *codebook)


def trace(fused: FusedModel, frame: tuple[int, int] | None) -> onnx.ModelProto:
    """The graph for frames of `frame` (height, width), or of any size where None."""
    fused.eval()
    preprocess = fused.model.preprocess
    height, width = frame or (
        preprocess.height_px + 13,
        preprocess.width_px + 7,
    )  # odd on purpose: nothing may specialise on it
    values = fused.overridable()
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: dynamic} if frame else {0: dynamic, 1: dynamic, 2: dynamic}
    # M is dynamic: a station's calibration may hold another number of parts. It must be at least 2 while tracing.
    traced = [v.repeat(3) if name.startswith("calibration") else v for name, v in values.items()]
    with _quiet():
        program = torch.onnx.export(
            _Named(fused),
            (torch.zeros(2, height, width, 3, dtype=torch.uint8), *traced),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[IMAGE, *values],
            output_names=[*fused.seams, *(spec.name for spec in fused.outputs)],
            dynamic_shapes=(
                axes,
                {},
                tuple({0: dynamic} if spec.name.startswith("calibration") else {} for spec in CODEBOOK),
            ),
        )
    if program is None:
        raise ExportError("PyTorch's exporter returned nothing for this model")
    proto = program.model_proto
    _rewrite_interface(proto.graph, fused, frame)
    proto.ir_version = IR_VERSION
    prune(proto.graph)
    fold_normalisation(proto.graph)
    join_squares(proto.graph)
    if frame:
        speed_up_downscaling(proto.graph, frame, (preprocess.height_px, preprocess.width_px))
    _check_operators(proto)
    return proto


def _rewrite_interface(graph: onnx.GraphProto, fused: FusedModel, frame: tuple[int, int] | None) -> None:
    """Names the axes, and gives every overridable input its initialiser."""
    values = {name: value.detach().cpu().numpy() for name, value in fused.overridable().items()}
    sizes: dict[str, int] = {"K": values["centroids"].shape[0], "D": values["centroids"].shape[1]}
    if frame:
        sizes |= {"H": frame[0], "W": frame[1]}

    def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(
            spec.name,
            TYPES[spec.dtype],
            [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape],
        )

    for spec in OVERRIDABLE:
        graph.initializer.append(
            numpy_helper.from_array(np.ascontiguousarray(values[spec.name], np.float32), spec.name)
        )
    del graph.input[:], graph.output[:], graph.value_info[:]
    graph.input.extend(value_info(spec) for spec in (INPUT, *OVERRIDABLE))
    graph.output.extend(value_info(spec) for spec in fused.outputs)
    graph.name = "edge_dkm"


def _check_operators(proto: onnx.ModelProto) -> None:
    foreign = sorted({node.domain for node in proto.graph.node} | {f.domain for f in proto.functions})
    if [domain for domain in foreign if domain]:
        raise ExportError(
            f"the traced graph uses operators of {', '.join(filter(None, foreign))}, expected standard ONNX operators only; "
            f"this encoder cannot be exported"
        )
    proto.ClearField("functions")
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", OPSET))
    onnx.checker.check_model(proto, full_check=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The tracer talks of torchvision, of deprecations inside itself and of progress; none of it is the user's business."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
