"""Runs a graph that is being exported for chosen tensors, inner ones too, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from exporters.nodes import copied, prune

Arrays = dict[str, NDArray[np.generic]]


class Probe:
    """A session on `model` that gives `tensors`. `optimise` False: every node by itself, as written."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str], *, optimise: bool = True) -> None:
        copy = copied(model)
        given = {value.name for value in copy.graph.input}
        self._tensors = [name for name in tensors if name not in given]
        known = {value.name: value for value in model.graph.output}
        del copy.graph.output[:]
        copy.graph.output.extend(known.get(name) or onnx.ValueInfoProto(name=name) for name in self._tensors)
        prune(copy.graph)  # onnxruntime would run what nobody asks for, too
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, feed: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """The tensors for one feed; inputs among them are given back."""
        values = self._session.run(self._tensors, dict(feed)) if self._tensors else []
        return {**feed, **dict(zip(self._tensors, values, strict=True))}
