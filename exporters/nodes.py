"""Small surgery on ONNX graphs that the export's passes share: who produces and who consumes a tensor, and what is dead."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edge_dkm.contract import FEATURES, IMAGE, PIXELS
from exporters.errors import ExportError

Message = TypeVar("Message", onnx.ModelProto, onnx.NodeProto, onnx.TensorProto)
EMBEDDING = "embedding"
_NEIGHBOUR = {PIXELS: IMAGE, FEATURES: EMBEDDING, IMAGE: IMAGE, EMBEDDING: EMBEDDING}


def copied(message: Message) -> Message:
    """A copy: what a repeated field holds is gone when the field is emptied."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def producer(graph: onnx.GraphProto, tensor: str) -> onnx.NodeProto | None:
    """The node that gives `tensor`; None for inputs and initialisers."""
    return next((node for node in graph.node if tensor in node.output), None)


def consumers(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    """The nodes that take `tensor`."""
    return [node for node in graph.node if tensor in node.input]


def constant(graph: onnx.GraphProto, name: str) -> NDArray[np.generic] | None:
    """The value of an initialiser; None where `name` is none, or may be overridden."""
    if any(value.name == name for value in graph.input):
        return None
    return next((numpy_helper.to_array(t) for t in graph.initializer if t.name == name), None)


def add_constant(graph: onnx.GraphProto, name: str, value: NDArray[np.generic]) -> str:
    """Appends an initialiser; returns its name."""
    graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))  # a scalar stays one
    return name


def seam(graph: onnx.GraphProto, name: str) -> str:
    """The tensor that plays PIXELS or FEATURES: where pre-processing or projection do nothing it is the image or the embedding."""
    node = producer(graph, name)
    if node is None:
        return _NEIGHBOUR[name]
    return seam(graph, node.input[0]) if node.op_type == "Identity" else name


def replace_nodes(graph: onnx.GraphProto, old: list[onnx.NodeProto], new: list[onnx.NodeProto]) -> None:
    """Puts `new` where the first of `old` stood, so that the order stays topological."""
    gone = {id(node) for node in old}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if id(node) not in gone:
            nodes.append(node)
        elif node is old[0]:
            nodes += new
    kept = [copied(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def prune(graph: onnx.GraphProto) -> None:
    """Removes nodes and initialisers that no output needs; inputs with initialisers stay, whoever uses them."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            kept.append(copied(node))
            needed.update(node.input)
    overridable = {value.name for value in graph.input}
    tensors = [t for t in graph.initializer if t.name in needed or t.name in overridable]
    weights = [copied(t) for t in tensors]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)


def only_consumer(graph: onnx.GraphProto, tensor: str) -> onnx.NodeProto | None:
    """The one node that takes `tensor`; None where there are none or several, or where it is an output."""
    found = consumers(graph, tensor)
    is_output = any(value.name == tensor for value in graph.output)
    return found[0] if len(found) == 1 and not is_output else None


def required(graph: onnx.GraphProto, tensor: str) -> onnx.NodeProto:
    """The node that gives `tensor`.

    Raises:
        ExportError: nothing gives it.
    """
    node = producer(graph, tensor)
    if node is None:
        raise ExportError(f"the traced graph has no node that gives '{tensor}'")
    return node
