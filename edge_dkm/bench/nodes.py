"""Which node of an exported graph belongs to pre-processing, encoder or head: those before, between and behind `pixels` and `features` (or a `map_`).

onnxruntime's profiler names nodes and not tensors, and a device has no onnx package, so the few fields that are needed are read here.
Field numbers are those of onnx.proto: ModelProto.graph 7, GraphProto.node 1, NodeProto.input 1, .output 2, .name 3, .op_type 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from edge_dkm.contract import FEATURES, MAP, PIXELS
from edge_dkm.errors import ModelError

Place = Literal["pre-process", "encoder", "head"]
PLACES: tuple[Place, ...] = ("pre-process", "encoder", "head")
WEIGHTED = ("Conv", "Gemm", "MatMul")  # parts of the names of operators with weights, quantised and fused ones included
GRAPH, NODE = 7, 1
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Node:
    """One node, its tensors by name."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass
class _Draft:
    texts: dict[int, list[str]] = field(default_factory=lambda: {1: [], 2: [], 3: [""], 4: [""]})


def read_nodes(model: bytes) -> list[Node]:
    """The nodes in their order; weights are passed over.

    Raises:
        ModelError: not the bytes of a model.
    """
    try:
        nodes = []
        for number, graph in _fields(memoryview(model)):
            if number != GRAPH:
                continue
            for part, body in _fields(graph):
                if part == NODE:
                    draft = _Draft()
                    for key, text in _fields(body):
                        if key in draft.texts:
                            draft.texts[key].append(bytes(text).decode())
                    t = draft.texts
                    nodes.append(Node(t[3][-1], t[4][-1], tuple(t[1]), tuple(t[2])))
        return nodes
    except (IndexError, ValueError) as error:
        raise ModelError(f"the nodes of the model cannot be read: {error}") from None


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(number, content) of every field that has a length; the others are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            _, at = _varint(data, at)
        elif kind in {FIXED64, FIXED32}:
            at += 8 if kind == FIXED64 else 4
        elif kind == LENGTH:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError(f"a field of {size} bytes where {len(data) - at} are left")
            yield key >> 3, data[at : at + size]
            at += size
        else:
            raise ValueError(f"a field of the unknown kind {kind}")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def place_nodes(nodes: Sequence[Node]) -> dict[str, Place]:
    """Where each node, and each tensor that one gives, belongs. Empty where the graph does not name `features`.

    Pre-processing ends before the first layer with weights: the conversion of the pixels to numbers is part of it.
    """
    by_tensor = {tensor: node for node in nodes for tensor in node.outputs}
    if FEATURES not in by_tensor:
        return {}
    ends = [FEATURES, *(tensor for tensor in by_tensor if tensor.startswith(MAP))]
    before_features, before_pixels = _ancestors(by_tensor, ends), _ancestors(by_tensor, [PIXELS])
    has_weights: dict[str, bool] = {}
    comes_from_image: dict[str, bool] = {"image": True}
    places: dict[str, Place] = {}
    for n, node in enumerate(nodes):
        is_geometry = id(node) in before_pixels
        weighted = any(word in node.op_type for word in WEIGHTED) or any(has_weights.get(t, False) for t in node.inputs)
        from_image = any(comes_from_image.get(t, False) for t in node.inputs)
        place: Place = "head"
        if is_geometry:
            place = "pre-process"
        elif id(node) in before_features:
            place = "pre-process" if from_image and not weighted else "encoder"
        for tensor in node.outputs:
            has_weights[tensor] = weighted and not is_geometry
            comes_from_image[tensor] = from_image
            places[tensor] = place
        places[node.name or f"{node.op_type}_{n}"] = (
            place  # as onnxruntime names those without one; models of earlier versions have some
        )
    return places


def _ancestors(by_tensor: Mapping[str, Node], tensors: Sequence[str]) -> set[int]:
    """Identities of the nodes that `tensors` are computed by."""
    found: set[int] = set()
    waiting = list(tensors)
    while waiting:
        node = by_tensor.get(waiting.pop())
        if node is not None and id(node) not in found:
            found.add(id(node))
            waiting += node.inputs
    return found


def place_of(name: str, places: Mapping[str, Place]) -> Place | None:
    """Of a node as it runs: optimised ones are named after a node or tensor of the file, with something behind (`relu_1_nchwc`)."""
    while name and name not in places:
        name = name.rpartition("_")[0]
    return places.get(name)
