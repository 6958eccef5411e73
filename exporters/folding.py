"""Folds the pixels' mean and standard deviation into the encoder's first convolution, so that normalising costs nothing.

    conv(w, b)((x - mean) / std)  =  conv(w / std, b - sum w mean / std)(x)

With padding the sum does not hold at the border, where the padded value 0 stands for `mean`: there only `std` is folded and the
subtraction stays. Batch norms are folded by PyTorch's exporter already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from exporters.nodes import add_constant, constant, only_consumer, prune, replace_nodes, required


def fold_normalisation(graph: onnx.GraphProto) -> bool:
    """Folds in place where a convolution follows the normalisation directly; returns whether it did."""
    for divide in graph.node:
        found = _chain(graph, divide)
        if found is not None:
            _fold(graph, divide, *found)
            prune(graph)
            return True
    return False


def _chain(graph: onnx.GraphProto, divide: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    """The subtraction before and the convolution after `divide`, where it is the normalisation's."""
    if divide.op_type != "Div" or constant(graph, divide.input[1]) is None:
        return None
    convolution = only_consumer(graph, divide.output[0])
    if convolution is None or convolution.op_type != "Conv" or _attribute(convolution, "group", 1) != 1:
        return None
    if any(constant(graph, name) is None for name in convolution.input[1:]):
        return None
    subtract = next((node for node in graph.node if divide.input[0] in node.output), None)
    if subtract is None or subtract.op_type != "Sub" or constant(graph, subtract.input[1]) is None:
        return None
    return subtract, convolution


def _fold(
    graph: onnx.GraphProto, divide: onnx.NodeProto, subtract: onnx.NodeProto, convolution: onnx.NodeProto
) -> None:
    weight = _values(graph, convolution.input[1])  # (O, C, kh, kw)
    channels = weight.shape[1]
    std = np.broadcast_to(_values(graph, divide.input[1]).ravel(), channels)
    mean = np.broadcast_to(_values(graph, subtract.input[1]).ravel(), channels)
    weight = weight / std[None, :, None, None]
    bias = _values(graph, convolution.input[2]) if len(convolution.input) > 2 else np.zeros(len(weight))
    x = subtract.output[0]
    is_padded = any(_attribute(convolution, "pads", [0])) or _attribute(convolution, "auto_pad", b"NOTSET") != b"NOTSET"
    if not is_padded or not mean.any():
        bias = bias - (weight * mean[None, :, None, None]).sum((1, 2, 3))
        x = subtract.input[0]
    name = convolution.output[0]
    folded = helper.make_node(
        "Conv",
        [
            x,
            add_constant(graph, f"{name}_folded_weight", weight.astype(np.float32)),
            add_constant(graph, f"{name}_folded_bias", bias.astype(np.float32)),
        ],
        [name],
        convolution.name,
    )
    folded.attribute.extend(convolution.attribute)
    replace_nodes(graph, [required(graph, name)], [folded])


def _values(graph: onnx.GraphProto, name: str) -> NDArray[np.float64]:
    """A constant in double precision: the fold rounds once."""
    return np.asarray(constant(graph, name), np.float64)


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
