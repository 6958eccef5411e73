"""Sums of squares in one pass: what PyTorch's exporter writes as two nodes goes twice over K x D values of many centroids.

ReduceSum(x ** 2)  =  ReduceSumSquare(x)
"""

from __future__ import annotations

import numpy as np
import onnx

from exporters.nodes import constant, only_consumer, prune


def join_squares(graph: onnx.GraphProto) -> int:
    """Joins them in place; returns how many."""
    joined = 0
    for power in graph.node:
        total = only_consumer(graph, power.output[0]) if _is_square(graph, power) else None
        if total is not None and total.op_type == "ReduceSum":
            total.op_type, total.input[0] = "ReduceSumSquare", power.input[0]
            joined += 1
    if joined:
        prune(graph)
    return joined


def _is_square(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    if node.op_type != "Pow":
        return False
    exponent = constant(graph, node.input[1])
    return exponent is not None and exponent.size == 1 and float(np.asarray(exponent).ravel()[0]) == 2
