from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.squares import join_squares
from tests.exporters.graphs import operators, output_of

X = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


def sum_of_powers(exponent: float = 2.0, is_output: bool = False, second_consumer: bool = False) -> onnx.ModelProto:
    """sum(image ** exponent) over the columns."""
    nodes = [
        helper.make_node("Pow", ["image", "exponent"], ["powers"], "power"),
        helper.make_node("ReduceSum", ["powers", "axes"], ["sums"], "sum", keepdims=0),
        *([helper.make_node("Neg", ["powers"], ["negative"])] if second_consumer else []),
    ]
    names = ["sums", *(["powers"] if is_output else []), *(["negative"] if second_consumer else [])]
    graph = helper.make_graph(
        nodes,
        "squares",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 7])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"] if name == "sums" else ["N", 7])
            for name in names
        ],
        [
            numpy_helper.from_array(np.array(exponent, np.float32), "exponent"),
            numpy_helper.from_array(np.array([1], np.int64), "axes"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_a_sum_of_squares_becomes_one_node_with_the_same_answer() -> None:
    model = sum_of_powers()
    assert join_squares(model.graph) == 1 and operators(model) == ["ReduceSumSquare"]
    onnx.checker.check_model(model, full_check=True)
    assert np.allclose(output_of(model, X, "sums"), np.square(X).sum(1), rtol=1e-6)


@pytest.mark.parametrize("change", [{"exponent": 3.0}, {"is_output": True}, {"second_consumer": True}])
def test_control_other_powers_and_squares_that_somebody_else_uses_stay(change: dict) -> None:
    model = sum_of_powers(**change)
    assert join_squares(model.graph) == 0 and operators(model)[:2] == ["Pow", "ReduceSum"]
