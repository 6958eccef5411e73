from __future__ import annotations

import numpy as np
import onnx
import pytest

from edge_dkm.contract import FEATURES, OVERRIDABLE
from exporters import quantize
from exporters.errors import ExportError
from exporters.folding import fold_normalisation
from exporters.graph import FusedModel
from exporters.nodes import producer, prune
from exporters.quantize import quantize_encoder
from exporters.ranges import activation_ranges
from exporters.trace import trace
from tests.exporters.graphs import X, normalised_convolution, operators, output_of, own
from tests.images import draw

RNG = np.random.default_rng(0)
IMAGES = [draw(kind, RNG, 20) for _ in range(20) for kind in ("disc", "square", "bars")]


def folded(pads: int) -> onnx.ModelProto:
    model = normalised_convolution(pads)
    prune(model.graph)
    fold_normalisation(model.graph)
    return model


def features(model: onnx.ModelProto) -> np.ndarray:
    return np.concatenate([output_of(model, image[None], FEATURES) for image in IMAGES])


def error(model: onnx.ModelProto, quantized: onnx.ModelProto) -> float:
    """Relative to how much the features of these images differ."""
    wanted = features(model)
    return float(np.linalg.norm(features(quantized) - wanted) / np.linalg.norm(wanted - wanted.mean(0)))


def test_the_encoder_computes_in_int8_and_gives_nearly_the_same_features() -> None:
    model = folded(pads=0)
    quantized = quantize_encoder(model, own(IMAGES))
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(quantized))
    assert 0 < error(model, quantized) < 0.05


def test_bytes_reach_the_first_convolution_as_they_are() -> None:
    quantized = quantize_encoder(folded(pads=0), own(IMAGES))
    graph = quantized.graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    dequantize = producer(graph, first.input[0])
    assert dequantize is not None and dequantize.op_type == "DequantizeLinear"
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert float(values[dequantize.input[1]]) == 1.0 and int(values[dequantize.input[2]]) == 0
    before = producer(graph, dequantize.input[0])
    assert before is not None and before.op_type == "Transpose" and "Cast" not in operators(quantized)


def test_what_is_left_of_pixels_after_a_subtraction_gets_a_range_of_its_own() -> None:
    model = folded(pads=1)
    quantized = quantize_encoder(model, own(IMAGES))
    assert "Sub" in operators(quantized) and error(model, quantized) < 0.05


def test_the_layer_that_gives_the_features_stays_fp32() -> None:
    quantized = quantize_encoder(folded(pads=0), own(IMAGES))
    assert next(n for n in quantized.graph.node if n.name == "pool").op_type == "ReduceMean"
    second = next(node for node in quantized.graph.node if node.name == "second")
    behind = [node.op_type for node in quantized.graph.node if second.output[0] in node.input]
    assert behind == ["QuantizeLinear"]  # maps are quantised, their mean is not


def test_without_the_correction_of_biases_the_features_are_further_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of both corrections."""
    model = folded(pads=0)
    corrected = error(model, quantize_encoder(model, own(IMAGES)))
    for name in ("correct_biases", "correct_features"):
        monkeypatch.setattr(quantize, name, lambda *arguments: None)
    assert corrected < 0.8 * error(model, quantize_encoder(model, own(IMAGES)))


def test_what_a_concat_joins_shares_one_range() -> None:
    model = folded(pads=0)
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["small"], "small"),
            helper.make_node("Add", ["x", "x"], ["double"], "double"),
            helper.make_node("Concat", ["small", "double"], ["both"], "both", axis=1),
            helper.make_node("Neg", ["both"], ["y"], "y"),
        ],
        "encoder",
        [helper.make_tensor_value_info(X, onnx.TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4])],
    )
    encoder = helper.make_model(graph, ir_version=model.ir_version, opset_imports=list(model.opset_import))
    sample = [RNG.uniform(-1, 3, (1, 2)).astype(np.float32) for _ in range(50)]
    ranges = activation_ranges(encoder, sample, [np.array([[-2, 3]], np.float32)])
    assert ranges["small"] == ranges["double"] == ranges["both"] != ranges[X]
    assert -4.0 <= ranges["both"].low < 0 < ranges["both"].high <= 6.0


def test_a_projection_behind_the_pooling_stays_fp32() -> None:
    """Its eight bits would be in every distance."""
    model = folded(pads=0)
    pool = next(node for node in model.graph.node if node.name == "pool")
    pool.output[0] = "pooled"
    weight = RNG.standard_normal((6, 4)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "inner"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "last"))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["pooled", "inner"], ["projected"], "inner_projection"))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["projected", "last"], [FEATURES], "last_layer"))
    quantized = quantize_encoder(model, own(IMAGES))
    inner = next(node for node in quantized.graph.node if node.name == "inner_projection")
    assert inner.input[1] == "inner" and error(model, quantized) < 0.05


def test_overridable_inputs_and_the_head_are_untouched(tiny_conv_fused: object) -> None:
    model = trace(tiny_conv_fused, None)  # type: ignore[arg-type]
    quantized = quantize_encoder(model, own([draw("disc", RNG, 32) for _ in range(8)]))
    assert [value.name for value in quantized.graph.input] == [value.name for value in model.graph.input]
    known = {tensor.name: tensor for tensor in quantized.graph.initializer}
    for spec in OVERRIDABLE:
        original = next(tensor for tensor in model.graph.initializer if tensor.name == spec.name)
        assert known[spec.name].SerializeToString() == original.SerializeToString()
    head = operators(model)[operators(model).index("ReduceMin") :]
    assert operators(quantized)[-len(head) :] == head


def test_an_encoder_without_weights_is_refused_with_a_reason() -> None:
    model = normalised_convolution(0)
    for node in list(model.graph.node):
        if node.op_type == "Conv":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    with pytest.raises(ExportError, match="cannot be quantised"):
        quantize_encoder(model, own(IMAGES))


def test_an_encoder_that_is_shown_local_contrast_is_quantised_behind_it(tiny_conv_fused: FusedModel) -> None:
    preprocess = tiny_conv_fused.model.preprocess
    preprocess.settings = preprocess.settings.model_copy(update={"local_contrast": 0.5})
    model = trace(tiny_conv_fused, None)
    quantized = quantize_encoder(model, own([draw(kind, RNG, 32) for kind in ("disc", "square", "bars")] * 20))
    first = next(node for node in quantized.graph.node if node.op_type == "Conv")
    dequantize = producer(quantized.graph, first.input[0])
    assert dequantize is not None and dequantize.op_type == "DequantizeLinear"
    assert {"AveragePool", "Resize"} <= set(operators(quantized))  # the contrast itself stays fp32
    assert 0 < error(model, quantized) < 0.2
