"""An exact integer down-scaling step as integer convolutions: the same bytes as the antialiased Resize, several times faster.

Scaling down by a whole number f with antialias is the same small filter at every output (a triangle of half-width f), so that on
frames of a fixed size it is a convolution of stride f. Laid out so that whole rows lie in the channels, onnxruntime runs it on
bytes with its depthwise kernel. Measured, 448x448 -> 224x224, two cores: 0.3 ms against 1.2 ms.

    image (N,H,W,3) -> [N,W,3H] --width--> [N,w,3H] -> [N,H,3w] --height--> [N,h,3w] -> pixels (N,h,w,3)

Width first, rounded to bytes after each pass, half upwards: as Resize does it. At the first and last output the filter overhangs the
frame; those two are computed apart, with Resize's own fixed-point weights (trainer/preprocess.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edge_dkm.contract import IMAGE
from exporters.nodes import PIXELS, add_constant, producer, prune, replace_nodes
from trainer.preprocess import FIXED_POINT_BITS, fixed_weights

# 6 is missing: its weights are no whole multiples of 2^-22, and Resize decides a half by their rounding. Odd steps have no halves.
FACTORS = {1, 2, 3, 4, 5, 7, 8}


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
        nodes += _reshaped(graph, current, "down_rows", (0, height_in, 3 * width_in))
        nodes.append(helper.make_node("Transpose", ["down_rows"], ["down_turned"], perm=[0, 2, 1]))  # [N, 3W, H]
        nodes += _reshaped(graph, "down_turned", "down_columns", (0, width_in, 3 * height_in))
        nodes += _pass(graph, across, "down_columns", "down_narrow")  # [N, w, 3H]
        nodes += _reshaped(graph, "down_narrow", "down_narrow_turned", (0, 3 * width, height_in))
        nodes.append(helper.make_node("Transpose", ["down_narrow_turned"], ["down_wide_rows"], perm=[0, 2, 1]))
        current = "down_wide_rows"  # [N, H, 3w]
    if down.factor > 1:
        if current == IMAGE:
            nodes += _reshaped(graph, IMAGE, "down_wide_rows", (0, height_in, 3 * width))
        nodes += _pass(graph, down, "down_wide_rows", "down_small")  # [N, h, 3w]
        current = "down_small"
    return [*nodes, *_reshaped(graph, current, PIXELS, (0, height, width, 3))]


def _reshaped(graph: onnx.GraphProto, source: str, target: str, shape: tuple[int, ...]) -> list[onnx.NodeProto]:
    """0 keeps the number of frames."""
    return [helper.make_node("Reshape", [source, add_constant(graph, f"{target}_shape", np.array(shape))], [target])]


def _pass(graph: onnx.GraphProto, step: _Pass, source: str, target: str) -> list[onnx.NodeProto]:
    """[N, n_in, channels] uint8 -> [N, n_out, channels] uint8."""
    inner, (first, last) = f"{step.name}_inner", (f"{step.name}_first", f"{step.name}_last")
    return [
        *_inner(graph, step, source, inner),
        *_ends(graph, step, source, (first, last)),
        helper.make_node("Concat", [first, inner, last], [target], axis=1),
    ]


def _inner(graph: onnx.GraphProto, step: _Pass, source: str, target: str) -> list[onnx.NodeProto]:
    """All outputs but the first and the last: one depthwise convolution on bytes."""

    def own(name: str, value: object, dtype: type[np.generic]) -> str:
        return add_constant(graph, f"{step.name}_{name}", np.array(value, dtype))

    taps = step.filter
    # Resize rounds halves upwards, the requantisation to even: twice the weights and a bias of 1 lift a half over the edge, and
    # nothing below it. An odd divisor gives no halves, and the same bias would make some.
    times, lift = (2, 1) if int(taps.sum()) % 2 == 0 else (1, 0)
    weight = np.tile(times * taps[None, None, :, None], (step.channels, 1, 1, 1)).astype(np.int8)
    one, zero = own("scale", 1.0, np.float32), own("zero", 0, np.uint8)
    convolution = helper.make_node(
        "QLinearConv",
        [
            f"{step.name}_planes",
            one,
            zero,
            add_constant(graph, f"{step.name}_weight", weight),
            own("weight_scale", 1.0 / (times * int(taps.sum())), np.float32),
            own("weight_zero", 0, np.int8),
            one,
            zero,
            add_constant(graph, f"{step.name}_bias", np.full(step.channels, lift, np.int32)),
        ],
        [f"{step.name}_filtered"],
        group=step.channels,
        kernel_shape=[len(taps), 1],
        strides=[step.factor, 1],
        pads=[step.overhang, 0, step.overhang, 0],
    )
    return [
        *_reshaped(graph, source, f"{step.name}_pixels", (0, step.n_in, 1, step.channels)),
        helper.make_node("Transpose", [f"{step.name}_pixels"], [f"{step.name}_planes"], perm=[0, 3, 1, 2]),
        convolution,
        helper.make_node("Transpose", [f"{step.name}_filtered"], [f"{step.name}_back"], perm=[0, 2, 3, 1]),
        *_reshaped(graph, f"{step.name}_back", f"{step.name}_all", (0, step.n_out, step.channels)),
        helper.make_node(
            "Slice",
            [
                f"{step.name}_all",
                own("from", [1], np.int64),
                own("to", [step.n_out - 1], np.int64),
                own("axis", [1], np.int64),
            ],
            [target],
        ),
    ]


def _ends(graph: onnx.GraphProto, step: _Pass, source: str, targets: tuple[str, str]) -> list[onnx.NodeProto]:
    """The first and the last output: (sum of weight x byte + 2^21) / 2^22, rounded down.

    In float32, where every number is a whole one below 2^24: weights of 22 bits as two halves of 11. (In int32 OpenVINO is wrong.)
    """
    half_bits = FIXED_POINT_BITS // 2
    unit = np.array(2.0**-half_bits, np.float32)
    weights = fixed_weights(step.n_in, step.n_out).numpy().astype(np.int64)  # (n_out, n_in)
    reach = len(step.filter) - step.overhang
    columns = np.array([range(reach), range(step.n_in - reach, step.n_in)])  # (2, reach)
    taps = np.stack([weights[0, columns[0]], weights[-1, columns[1]]])[None, :, :, None]  # (1, 2, reach, 1)

    def named(part: str) -> str:
        return f"{step.name}_end_{part}"

    def value(part: str, array: NDArray[np.generic]) -> str:
        return add_constant(graph, named(part), array)

    high = value("high_taps", (taps >> half_bits).astype(np.float32))
    low = value("low_taps", (taps & ((1 << half_bits) - 1)).astype(np.float32))
    half = value("half", np.array(2.0 ** (FIXED_POINT_BITS - 1), np.float32))
    shift, axis = value("shift", unit), value("axis", np.array([2]))
    chain = [
        ("Gather", (source, value("columns", columns)), "bytes", {"axis": 1}),
        ("Cast", (named("bytes"),), "floats", {"to": TensorProto.FLOAT}),
        ("Mul", (named("floats"), high), "high_products", {}),
        ("ReduceSum", (named("high_products"), axis), "high", {"keepdims": 0}),
        ("Mul", (named("floats"), low), "low_products", {}),
        ("ReduceSum", (named("low_products"), axis), "low", {"keepdims": 0}),
        ("Add", (named("low"), half), "low_half", {}),
        ("Mul", (named("low_half"), shift), "low_shifted", {}),
        ("Floor", (named("low_shifted"),), "carry", {}),
        ("Add", (named("high"), named("carry")), "sum", {}),
        ("Mul", (named("sum"), shift), "sum_shifted", {}),
        ("Floor", (named("sum_shifted"),), "rounded", {}),
        ("Cast", (named("rounded"),), "out", {"to": TensorProto.UINT8}),
    ]
    nodes = [helper.make_node(op, inputs, [named(out)], **attributes) for op, inputs, out, attributes in chain]
    sizes = value("sizes", np.array([1, 1]))
    return [*nodes, helper.make_node("Split", [named("out"), sizes], list(targets), axis=1)]
