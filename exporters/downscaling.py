"""An exact integer down-scaling step as integer convolutions: the same bytes as the antialiased Resize, several times faster.

Scaling down by a whole number f with antialias is the same small filter at every output (a triangle of half-width f), so that on
frames of a fixed size it is a convolution of stride f. Laid out so that whole rows lie in the channels, onnxruntime runs it on
bytes with its depthwise kernel. Measured, 448x448 -> 224x224, two cores: .3 ms against 1.2 ms.

    image (N,H,W,3) -> [N,W,1,3H] --width--> [N,w,1,3H] -> [N,H,1,3w] --height--> [N,h,1,3w] -> pixels (N,h,w,3)

Width first, rounded to bytes after each pass, half upwards: as Resize does it. At the first and last output the filter overhangs the
frame; those two are computed apart, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_dkm.contract import IMAGE, PIXELS
from exporters.nodes import add_constant, producer, prune, replace_nodes

# Resize rounds by weights in whole multiples of 2^-22. Where a sum of bytes can fall on a half and the weights are no such multiples
# (4, 5, 6 and 8, if only at the ends), their rounding decides, and no filter in whole numbers repeats that.
FACTORS = {1, 2, 3, 7}


@dataclass(frozen=True)
class _Pass:
    """One axis: `n_in` -> `n_out` positions, each with `channels` bytes that do not mix."""

    name: str
    n_in: int
    n_out: int
    channels: int

    @property
    def factor(self) -> int:
        return self.n_in // self.n_out

    @property
    def filter(self) -> NDArray[np.int8]:
        """Whole numbers in the proportion of the triangle's weights: 1 3 3 1 for 2, 1 2 3 2 1 for 3."""
        f = self.factor
        rise = range(1, 2 * f, 2) if f % 2 == 0 else range(1, f + 1)
        return np.array([*rise, *list(rise)[::-1][f % 2 :]], np.int8)

    @property
    def overhang(self) -> int:
        """By how many positions the filter reaches over the frame at the first and at the last output."""
        return self.factor // 2


def speed_up_downscaling(graph: onnx.GraphProto, frame: tuple[int, int], size: tuple[int, int]) -> bool:
    """Replaces the Resize of `frame` (height, width) to `size` in place where it is an exact integer step; returns whether it did."""
    node = producer(graph, PIXELS)
    if node is None or node.op_type != "Resize" or node.input[0] != IMAGE or not _is_antialiased(node):
        return False
    (height_in, width_in), (height, width) = frame, size
    if height_in % height or width_in % width or not FACTORS.issuperset({height_in // height, width_in // width}):
        return False
    passes = [_Pass("down_w", width_in, width, 3 * height_in), _Pass("down_h", height_in, height, 3 * width)]
    if any(p.n_out < 3 and p.factor > 1 for p in passes):
        return False  # first, last and at least one between
    replace_nodes(graph, [node], _steps(graph, passes, frame, size))
    prune(graph)
    return True


def _is_antialiased(node: onnx.NodeProto) -> bool:
    return any(a.name == "antialias" and a.i == 1 for a in node.attribute)


def _steps(
    graph: onnx.GraphProto, passes: list[_Pass], frame: tuple[int, int], size: tuple[int, int]
) -> list[onnx.NodeProto]:
    across, down = passes
    (height_in, width_in), (height, width) = frame, size
    nodes: list[onnx.NodeProto] = []
    current = IMAGE
    if across.factor > 1:
        nodes += _reshaped(graph, IMAGE, "down_rows", (0, height_in, 3 * width_in))
        nodes.append(_node("Transpose", ["down_rows"], "down_turned", perm=[0, 2, 1]))  # [N, 3W, H]
        nodes += _reshaped(graph, "down_turned", "down_columns", (0, width_in, 1, 3 * height_in))
        nodes += _pass(graph, across, "down_columns", "down_narrow")  # [N, w, 1, 3H]
        nodes += _reshaped(graph, "down_narrow", "down_narrow_turned", (0, 3 * width, height_in))
        nodes.append(_node("Transpose", ["down_narrow_turned"], "down_wide", perm=[0, 2, 1]))  # [N, H, 3w]
        current = "down_wide"
    if down.factor > 1:
        nodes += _reshaped(graph, current, "down_wide_rows", (0, height_in, 1, 3 * width))
        nodes += _pass(graph, down, "down_wide_rows", "down_small")  # [N, h, 1, 3w]
        current = "down_small"
    return [*nodes, *_reshaped(graph, current, PIXELS, (0, height, width, 3))]


def _node(operator: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
    """Named for what it gives: `edge-dkm bench` tells stages by names."""
    return helper.make_node(operator, inputs, [output], f"{output}_node", **attributes)


def _reshaped(graph: onnx.GraphProto, source: str, target: str, shape: tuple[int, ...]) -> list[onnx.NodeProto]:
    """0 keeps the number of frames."""
    return [_node("Reshape", [source, add_constant(graph, f"{target}_shape", np.array(shape))], target)]


def _pass(graph: onnx.GraphProto, step: _Pass, source: str, target: str) -> list[onnx.NodeProto]:
    """[N, n_in, 1, channels] uint8 -> [N, n_out, 1, channels] uint8."""
    inner, (first, last) = f"{step.name}_inner", (f"{step.name}_first", f"{step.name}_last")
    return [
        *_inner(graph, step, source, inner),
        *_ends(graph, step, source, (first, last)),
        _node("Concat", [first, inner, last], target, axis=1),
    ]


def _inner(graph: onnx.GraphProto, step: _Pass, source: str, target: str) -> list[onnx.NodeProto]:
    """All outputs but the first and the last: one depthwise convolution on bytes."""

    def own(name: str, value: object, dtype: type[np.generic]) -> str:
        return add_constant(graph, f"{step.name}_{name}", np.array(value, dtype))

    # Taps of 0 in front, so that the first window is that of the second output: cheaper than cutting rows off.
    taps = np.concatenate([np.zeros(step.factor - step.overhang, np.int8), step.filter])
    # Resize rounds halves upwards, the requantisation to even: twice the weights and a bias of 1 lift a half over the edge, and
    # nothing below it. An odd divisor gives no halves, and the same bias would make some.
    times, lift = (2, 1) if int(taps.sum()) % 2 == 0 else (1, 0)
    weight = np.tile(times * taps[None, None, :, None], (step.channels, 1, 1, 1)).astype(np.int8)
    one, zero = own("scale", 1.0, np.float32), own("zero", 0, np.uint8)
    inputs = [
        f"{step.name}_planes",
        one,
        zero,
        add_constant(graph, f"{step.name}_weight", weight),
        own("weight_scale", 1.0 / (times * int(taps.sum())), np.float32),
        own("weight_zero", 0, np.int8),
        one,
        zero,
        add_constant(graph, f"{step.name}_bias", np.full(step.channels, lift, np.int32)),
    ]
    shape = {"group": step.channels, "kernel_shape": [len(taps), 1], "strides": [step.factor, 1]}
    return [
        _node("Transpose", [source], f"{step.name}_planes", perm=[0, 3, 1, 2]),
        _node("QLinearConv", inputs, f"{step.name}_filtered", **shape),
        _node("Transpose", [f"{step.name}_filtered"], target, perm=[0, 2, 3, 1]),
    ]


def _ends(graph: onnx.GraphProto, step: _Pass, source: str, targets: tuple[str, str]) -> list[onnx.NodeProto]:
    """The first and the last output: the part of the filter that lies inside, its weights adding up to 1."""
    inside = step.filter[step.overhang :].astype(np.float64)
    weights = np.stack([inside, inside[::-1]])[:, None] / inside.sum()  # (2, 1, reach)
    reach = len(inside)
    columns = np.array([range(reach), range(step.n_in - reach, step.n_in)])  # (2, reach)

    def named(part: str) -> str:
        return f"{step.name}_end_{part}"

    half = add_constant(graph, named("half"), np.array(0.5, np.float32))
    taps = add_constant(graph, named("taps"), weights.astype(np.float32))
    shape = add_constant(graph, named("shape"), np.array([0, 2, reach, step.channels]))
    split = helper.make_node(
        "Split", [named("out"), add_constant(graph, named("sizes"), np.array([1, 1]))], targets, named("split"), axis=1
    )
    return [
        _node("Gather", [source, add_constant(graph, named("columns"), columns)], named("bytes"), axis=1),
        _node("Reshape", [named("bytes"), shape], named("rows")),
        _node("Cast", [named("rows")], named("floats"), to=TensorProto.FLOAT),
        _node("MatMul", [taps, named("floats")], named("sums")),  # [N, 2, 1, channels]
        _node("Add", [named("sums"), half], named("halves")),
        _node("Cast", [named("halves")], named("out"), to=TensorProto.UINT8),  # rounds down
        split,
    ]
