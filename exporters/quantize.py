"""Static int8 quantisation (QDQ) of the encoder, with its folded normalisation; projection, distances and novelty stay fp32.

Weights per channel, signed; activations per tensor, unsigned, their ranges (ranges.py) and the biases (bias_correction.py) from images
of the run's own training part.
onnxruntime's quantiser works on the encoder alone, cut out at its two seams: given the whole graph it deletes overridable inputs.
The layer that gives the features stays fp32: eight bits there would be eight bits in every distance.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from edge_dkm.contract import FEATURES, IMAGE, MAP, PIXELS
from exporters.bias_correction import correct_biases, correct_features
from exporters.errors import ExportError
from exporters.nodes import consumers, copied, producer, prune, replace_nodes, required, seam
from exporters.own_images import OwnImage, pixels_of
from exporters.probe import Probe
from exporters.ranges import Range, activation_ranges

WEIGHTED = {"Conv", "Gemm", "MatMul"}
POOLING = {"ReduceMean", "GlobalAveragePool"}
SAMPLE = 48  # images for mean outputs and for where to cut, which settle sooner than the widest values


def quantize_encoder(proto: onnx.ModelProto, images: Sequence[OwnImage]) -> onnx.ModelProto:
    """A copy of the fused model whose encoder computes in int8.

    Args:
        images: for the ranges of the activations; of a size that the graph takes.

    Raises:
        ExportError: the encoder has no layer that can be quantised.
    """
    model = copied(proto)
    graph = model.graph
    entry, features = _entry(graph), seam(graph, FEATURES)
    sample = list(_entry_values(model, entry, images[:SAMPLE]))
    encoder = _cut_out(model, entry, [features, *maps_of(graph)], sample[0].shape)
    ranges = activation_ranges(encoder, sample, _entry_values(model, entry, images[SAMPLE:]))
    if _takes_bytes(graph, entry):
        ranges[entry] = Range(0.0, 255.0)  # a step of 1: bytes lose nothing
    quantized = _quantized(encoder, sample[:1], _stays_float(encoder.graph, features), ranges)
    correct_biases(quantized, encoder, sample)
    correct_features(quantized, encoder, _entry_values(model, entry, images))
    _put_back(graph, encoder.graph, quantized.graph)
    _feed_bytes(graph, entry)
    prune(graph)
    onnx.checker.check_model(model, full_check=True)
    return model


def _entry(graph: onnx.GraphProto) -> str:
    """What the first layer with weights takes; before it, pixels may be normalised by several nodes."""
    from_pixels = {seam(graph, PIXELS)}
    for node in graph.node:
        if not from_pixels.intersection(node.input):
            continue
        if node.op_type in WEIGHTED:
            return next(name for name in node.input if name in from_pixels)
        from_pixels.update(node.output)
    raise ExportError("the encoder cannot be quantised: no layer with weights takes its pixels")


def maps_of(graph: onnx.GraphProto) -> list[str]:
    """The inner tensors that a bank looks at: as outputs of the encoder they keep their names, and are quantised like its other tensors."""
    return [name for node in graph.node for name in node.output if name.startswith(MAP)]


def _cut_out(model: onnx.ModelProto, entry: str, ends: Sequence[str], shape: tuple[int, ...]) -> onnx.ModelProto:
    """The nodes between `entry` and `ends` as a model of its own; `shape` is that of `entry` for one frame."""
    needed, nodes = set(ends), []
    for node in reversed(model.graph.node):
        if any(name in needed for name in node.output) and entry not in node.output:
            nodes.append(node)
            needed.update(node.input)
    graph = helper.make_graph(
        list(reversed(nodes)),
        "encoder",
        [helper.make_tensor_value_info(entry, TensorProto.FLOAT, ["N", *shape[1:]])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    return helper.make_model(graph, ir_version=model.ir_version, opset_imports=list(model.opset_import))


def _entry_values(model: onnx.ModelProto, entry: str, images: Sequence[OwnImage]) -> Iterator[NDArray[np.float32]]:
    """What the graph itself gives to its encoder for each image."""
    probe = Probe(model, [entry])
    for image in pixels_of(images):
        yield np.asarray(probe({IMAGE: image[None]})[entry], np.float32)


def _stays_float(graph: onnx.GraphProto, features: str) -> list[str]:
    """Names of what is not quantised: the layer that gives the features, and all behind the pooling of feature maps.

    There a vector is left: next to nothing to compute, and projections among it, whose eight bits would be in every distance.
    """
    pooled: set[str] = set()
    names = []
    for node in graph.node:
        is_last = features in node.output and node.op_type in WEIGHTED
        if node.op_type in POOLING or pooled.intersection(node.input):
            pooled.update(node.output)
        if is_last or pooled.intersection(node.output):
            names.append(node.name)
    return names


def _takes_bytes(graph: onnx.GraphProto, entry: str) -> bool:
    """Whether the encoder takes pixels as they are, and not what is left of them after a subtraction."""
    node = producer(graph, entry)
    return node is not None and node.op_type == "Cast"


def _put_back(graph: onnx.GraphProto, encoder: onnx.GraphProto, quantized: onnx.GraphProto) -> None:
    """Replaces the nodes and weights of `encoder` by those of `quantized`, which gives some weights by nodes of the same name."""
    inner = {name for node in encoder.node for name in node.output}
    replace_nodes(graph, [node for node in graph.node if node.output[0] in inner], list(quantized.node))
    given = {name for node in quantized.node for name in node.output} | {t.name for t in quantized.initializer}
    kept = [copied(t) for t in graph.initializer if t.name not in given]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *quantized.initializer])


class _Reader(CalibrationDataReader):
    def __init__(self, name: str, values: Iterable[NDArray[np.float32]]) -> None:
        self._name, self._values = name, iter(values)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        value = next(self._values, None)
        return None if value is None else {self._name: value}


def _quantized(
    encoder: onnx.ModelProto, values: Iterable[NDArray[np.float32]], excluded: list[str], ranges: Mapping[str, Range]
) -> onnx.ModelProto:
    name = encoder.graph.input[0].name
    overrides = {
        tensor: [{"rmin": np.float32(found.low), "rmax": np.float32(found.high)}] for tensor, found in ranges.items()
    }
    logging.getLogger().addFilter(_is_no_advice)
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "encoder.onnx"
            # Of a copy: it moves the weights of what it is given to a file.
            quantize_static(
                copied(encoder),
                out,
                _Reader(name, values),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=excluded,
                extra_options={"TensorQuantOverrides": overrides},
            )
            return onnx.load(out)
    finally:
        logging.getLogger().removeFilter(_is_no_advice)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """The quantiser advises a pre-processing of its own; the exporter has done it."""
    return "pre-process" not in record.getMessage()


def _feed_bytes(graph: onnx.GraphProto, entry: str) -> None:
    """Bytes -> Cast -> QuantizeLinear with scale 1 is the bytes again: leaves out both."""
    if not _takes_bytes(graph, entry):
        return
    pixels = required(graph, entry).input[0]
    for node in consumers(graph, entry):
        if node.op_type != "QuantizeLinear":
            return
        for reader in consumers(graph, node.output[0]):
            reader.input[0] = pixels
