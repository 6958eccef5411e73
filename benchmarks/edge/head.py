"""What many clusters cost: K = 10,000 centroids of D = 128 in the graph, head against encoder, from onnxruntime's own profiler.

The centroids are drawn, since a run of so many clusters would need as many images. Beside them the head of 8 clusters.

python -m benchmarks.edge.head [--runs N] [--nodes]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.edge.encoders import ENCODERS, ROI_PX, frames, run_of, session_of
from benchmarks.table import show_table
from edge_dkm.bench.nodes import place_nodes, place_of, read_nodes
from edge_dkm.bench.profile import Event, by_run, node_name, part_times, profiled_events
from exporters.graph import FusedModel
from exporters.trace import trace
from trainer.model import ClusterModel
from trainer.projection import Projection, ProjectionSettings

RUNS, WARM_UP = 100, 10
CLUSTERS, DIM, CALIBRATION = 10_000, 128, 1000
ASKED = {"ResNet-18": "<= 10 %", "SqueezeNet": "stated"}


def with_clusters(model: ClusterModel, count: int) -> ClusterModel:
    """The model with a drawn projection to D = 128 and `count` drawn centroids."""
    generator = torch.Generator().manual_seed(0)
    projection = Projection(ProjectionSettings(kind="pca", dim=DIM, l2=True), model.encoder.out_dim, count + DIM + 1)
    centroids = torch.nn.functional.normalize(torch.randn(count, DIM, generator=generator))
    drawn = ClusterModel(model.preprocess, model.encoder, projection, count)
    drawn.set_centroids(centroids)
    drawn.cluster_mean = centroids.clone()
    drawn.calibration = torch.rand(CALIBRATION, generator=generator).sort().values
    drawn.calibration_weight = torch.ones(CALIBRATION)
    return drawn.eval()


def profile(model: ClusterModel, folder: Path, runs: int) -> tuple[dict[str, float], list[tuple[str, str, float]]]:
    """Median milliseconds of each part, and of every node of the head (name, operator), slowest first."""
    data = trace(FusedModel(model), (ROI_PX, ROI_PX)).SerializeToString()
    places = place_nodes(read_nodes(data))
    events = profiled_events(session_of(data, folder / "profile"), frames(ROI_PX, ROI_PX), WARM_UP + runs)
    groups = by_run(events)[WARM_UP:]
    parts = [times for group in groups if (times := part_times(group, places)) is not None]
    medians = {place: float(np.median([times[place] for times in parts])) / 1000 for place in parts[0]}
    return medians, head_nodes(groups, places)


def head_nodes(groups: Sequence[Sequence[Event]], places: dict) -> list[tuple[str, str, float]]:
    """(name, operator, median milliseconds) of the head's nodes, slowest first."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for group in groups:
        for event in group:
            if place_of(node_name(event), places) == "head":
                taken[node_name(event), event["args"]["op_name"]].append(event["dur"] / 1000)
    rows = [(name, kind, float(np.median(values))) for (name, kind), values in taken.items()]
    return sorted(rows, key=lambda row: -row[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--nodes", action="store_true", help="the slowest nodes of the head besides")
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    for name in ENCODERS:
        with tempfile.TemporaryDirectory() as folder:
            model = run_of(name, Path(folder)).model.cpu().eval()
            for count in (8, CLUSTERS):
                parts, nodes = profile(with_clusters(model, count), Path(folder), arguments.runs)
                share = 100 * parts["head"] / parts["encoder"]
                asked = ASKED[name] if count == CLUSTERS else ""
                rows.append(
                    [name, f"{count:,}", parts["pre-process"], parts["encoder"], parts["head"], f"{share:.1f} %", asked]
                )
                if arguments.nodes:
                    show_table(f"{name}, K {count:,}: head", ["node", "operator", "ms"], nodes[:12])
    title = f"D = {DIM}, ROI {ROI_PX}x{ROI_PX}, kernel times, median of {arguments.runs} runs, two threads"
    header = ["network", "K", "pre-process, ms", "encoder, ms", "head, ms", "head / encoder", "asked"]
    show_table(title, header, rows)


if __name__ == "__main__":
    main()
