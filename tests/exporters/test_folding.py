from __future__ import annotations

import numpy as np
import onnx
import pytest

from edge_dkm.contract import FEATURES
from exporters.folding import fold_normalisation
from tests.exporters.graphs import normalised_convolution, operators, output_of

IMAGE = np.random.default_rng(1).integers(0, 256, (2, 9, 11, 3), dtype=np.uint8)


def test_without_padding_nothing_of_the_normalisation_is_left() -> None:
    model = normalised_convolution(pads=0)
    before = output_of(model, IMAGE, "maps")
    assert fold_normalisation(model.graph)
    onnx.checker.check_model(model, full_check=True)
    assert not {"Sub", "Div"} & set(operators(model))
    assert np.allclose(output_of(model, IMAGE, "maps"), before, rtol=1e-4, atol=1e-4)


def test_with_padding_the_mean_stays_since_the_border_is_padded_with_it() -> None:
    model = normalised_convolution(pads=1)
    before = output_of(model, IMAGE, "maps")
    assert fold_normalisation(model.graph)
    assert "Sub" in operators(model) and "Div" not in operators(model)
    assert np.allclose(output_of(model, IMAGE, "maps"), before, rtol=1e-4, atol=1e-4)


def test_with_padding_and_a_mean_of_zero_all_of_it_goes() -> None:
    model = normalised_convolution(pads=1, mean=(0.0, 0.0, 0.0))
    before = output_of(model, IMAGE, "maps")
    assert fold_normalisation(model.graph) and not {"Sub", "Div"} & set(operators(model))
    assert np.allclose(output_of(model, IMAGE, "maps"), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["second consumer", "overridable"])
def test_what_somebody_else_uses_is_not_folded(change: str) -> None:
    model = normalised_convolution(pads=0)
    if change == "second consumer":
        model.graph.output.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, "h", "w"]))
    else:
        model.graph.input.append(onnx.helper.make_tensor_value_info("std", onnx.TensorProto.FLOAT, [3, 1, 1]))
    before = output_of(model, IMAGE, FEATURES)
    assert not fold_normalisation(model.graph) and np.array_equal(output_of(model, IMAGE, FEATURES), before)
