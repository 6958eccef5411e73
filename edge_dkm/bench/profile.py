"""What the parts of the graph cost, from onnxruntime's own profiler: kernel times, and the multiply-adds that they stand for."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_dkm.bench.nodes import PLACES, Place, place_nodes, place_of, read_nodes
from edge_dkm.contract import IMAGE
from edge_dkm.errors import ModelError
from edge_dkm.inspector import FETCHED, Inspector
from edge_dkm.session import open_profiled

WARM_UP = 5
RUN, SUFFIX = "model_run", "_kernel_time"
KNOWN_SHARE = (
    0.9  # of the kernel time must be placed; a provider that runs the graph as one piece leaves nothing to tell apart
)

Event = Mapping[str, Any]
WHOLE = "the provider runs the graph as one piece"
UNNAMED = "the file does not name the encoder's ends; export it again"


@dataclass(frozen=True)
class GraphProfile:
    """Milliseconds per run of each part, of the kernels alone; None, with the reason in `why`, where they cannot be told apart."""

    parts_ms: Mapping[Place, NDArray[np.float64]] | None
    why: str | None = None


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one frame in layers with weights: of the whole graph, and of the encoder where it can be told apart."""

    macs: int
    encoder_macs: int | None


def profile_graph(inspector: Inspector, images: Sequence[NDArray[np.uint8]], runs: int) -> GraphProfile:
    """Runs the model `runs` times in a session of its own, on the providers that the inspector runs on. `images`: (H, W, 3) uint8."""
    places = place_nodes(read_nodes(inspector.file.data))
    if not places:
        return GraphProfile(None, UNNAMED)
    events = _profiled(inspector, images, WARM_UP + runs, plain=False)
    taken = [part_times(group, places) for group in by_run(events)[WARM_UP:]]
    placed = [parts for parts in taken if parts is not None]
    if len(placed) < max(1, len(taken)):
        return GraphProfile(None, WHOLE)
    return GraphProfile({place: np.array([parts[place] for parts in placed]) / 1000 for place in PLACES})


def count_cost(inspector: Inspector, image: NDArray[np.uint8]) -> Cost | None:
    """From the shapes of one run on the CPU with nothing fused; None where that run is not possible."""
    places = place_nodes(read_nodes(inspector.file.data))
    try:
        events = _profiled(inspector, [image], 1, plain=True)
        counts = [(place_of(node_name(event), places), _macs(event["args"])) for event in events]
    except (ModelError, ValueError, KeyError, IndexError):
        return None
    encoder = sum(macs for place, macs in counts if place == "encoder") if places else None
    return Cost(sum(macs for _, macs in counts), encoder)


def _profiled(inspector: Inspector, images: Sequence[NDArray[np.uint8]], runs: int, *, plain: bool) -> list[Event]:
    runtime = replace(inspector.runtime, precision=inspector.ran.precision)
    with tempfile.TemporaryDirectory(prefix="edge-dkm-") as folder:
        session = open_profiled(inspector.file, runtime, Path(folder) / "profile", plain=plain)
        return profiled_events(session, images, runs)


def profiled_events(session: Any, images: Sequence[NDArray[np.uint8]], runs: int) -> list[Event]:
    """Nodes and runs in the order of time, of an onnxruntime session that was opened with profiling; ends that.

    Raises:
        ModelError: a run fails, or there is no profile.
    """
    try:
        for n in range(runs):
            session.run(list(FETCHED), {IMAGE: images[n % len(images)][None]})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    except Exception as error:  # onnxruntime raises many types
        raise ModelError(f"the model cannot be profiled: {error}") from error
    wanted = [event for event in events if event.get("cat") == "Node" or event.get("name") == RUN]
    return sorted(wanted, key=lambda event: (int(event["ts"]), event["name"] != RUN))


def node_name(event: Event) -> str:
    """As onnxruntime calls it."""
    return str(event["name"]).removesuffix(SUFFIX)


def by_run(events: Sequence[Event]) -> list[list[Event]]:
    """The nodes of each run."""
    groups: list[list[Event]] = []
    for event in events:
        if event["name"] == RUN:
            groups.append([])
        elif groups and str(event["name"]).endswith(SUFFIX):
            groups[-1].append(event)
    return groups


def part_times(nodes: Sequence[Event], places: Mapping[str, Place]) -> dict[Place, float] | None:
    """Microseconds of each part in one run. None where a provider runs the graph as one piece.

    A node that the optimiser made (a change of layout) belongs to what ran before it.
    """
    taken: dict[Place, float] = dict.fromkeys(PLACES, 0.0)
    known: set[Place] = set()
    last: Place = "pre-process"
    for node in nodes:
        place = place_of(node_name(node), places)
        if place is not None:
            known.add(place)
            last = place
        taken[last] += float(node["dur"])
    return taken if {"encoder", "head"} <= known else None


def _macs(args: Mapping[str, Any]) -> int:
    """Of one node, from the shapes that the profiler notes: [{"float": [1, 3, 224, 224]}, ..]."""
    kind = str(args.get("op_name", ""))
    inputs, outputs = _shapes(args.get("input_type_shape", [])), _shapes(args.get("output_type_shape", []))
    if not outputs:
        return 0
    size = math.prod(outputs[0])
    if "ConvTranspose" in kind:
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if "Conv" in kind:
        return size * math.prod(inputs[3 if kind.startswith("QLinear") else 1][1:])
    if "Gemm" in kind or "MatMul" in kind:
        return size * inputs[0][-1]
    return 0


def _shapes(noted: Sequence[Mapping[str, list[int]]]) -> list[list[int]]:
    return [next(iter(entry.values()), []) for entry in noted]
