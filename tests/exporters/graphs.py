"""Small ONNX graphs that the tests of the export's passes work on."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_dkm.contract import FEATURES, PIXELS
from exporters.own_images import OwnImage
from exporters.probe import Probe
from trainer.images import Item

IMAGE, X = "image", "x"


def model_of(nodes: list[onnx.NodeProto], output: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A graph from `image` uint8 [N,H,W,3] to `output`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(IMAGE, TensorProto.UINT8, ["N", "H", "W", 3])],
        [_value(output)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])


def _value(output: str) -> onnx.ValueInfoProto:
    if output == PIXELS:
        return helper.make_tensor_value_info(output, TensorProto.UINT8, ["N", "h", "w", 3])
    return helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", "F"])


def resized(size: tuple[int, int], antialias: int = 1) -> onnx.ModelProto:
    """The antialiased Resize to `size` (height, width), as the tracer writes it."""
    node = helper.make_node(
        "Resize",
        [IMAGE, "", "", "sizes"],
        [PIXELS],
        mode="linear",
        coordinate_transformation_mode="half_pixel",
        antialias=antialias,
        exclude_outside=antialias,
    )
    return model_of([node], PIXELS, {"sizes": np.array([1, *size, 3])})


def normalised_convolution(pads: int, mean: tuple[float, ...] = (103.5, 116.3, 123.7)) -> onnx.ModelProto:
    """Transpose, Cast, (x - mean) / std, a 3x3 convolution, a mean over positions."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Identity", [IMAGE], [PIXELS]),
        helper.make_node("Transpose", [IMAGE], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["turned"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], [X]),
        helper.make_node("Conv", [X, "weight", "bias"], ["maps"], "first", kernel_shape=[3, 3], pads=[pads] * 4),
        helper.make_node("Relu", ["maps"], ["active"], "relu"),
        helper.make_node("Conv", ["active", "weight2", "bias2"], ["maps2"], "second", kernel_shape=[1, 1]),
        helper.make_node("ReduceMean", ["maps2", "axes"], [FEATURES], "pool", keepdims=0),
    ]
    weights = {
        "mean": np.array(mean, np.float32)[:, None, None],
        "std": np.array([57.4, 57.1, 58.4], np.float32)[:, None, None],
        "weight": rng.standard_normal((8, 3, 3, 3)).astype(np.float32),
        "bias": rng.standard_normal(8).astype(np.float32),
        "weight2": rng.standard_normal((6, 8, 1, 1)).astype(np.float32),
        "bias2": rng.standard_normal(6).astype(np.float32),
        "axes": np.array([2, 3]),
    }
    return model_of(nodes, FEATURES, weights)


def own(images: list[np.ndarray], groups: list[int] | None = None, is_good: bool = True) -> list[OwnImage]:
    """The images as a run's own; each a group of its own unless told."""
    numbers = groups or list(range(len(images)))
    return [
        OwnImage(Item(f"{n}.png", None, str(group), lambda image=image: (image, "")), group, is_good)
        for n, (image, group) in enumerate(zip(images, numbers, strict=True))
    ]


def output_of(model: onnx.ModelProto, image: np.ndarray, tensor: str) -> np.ndarray:
    """One tensor of the graph for `image` (N, H, W, 3)."""
    return Probe(model, [tensor])({IMAGE: image})[tensor]


def operators(model: onnx.ModelProto) -> list[str]:
    """The operators in order."""
    return [node.op_type for node in model.graph.node]
