"""Puts the measurements together: stage by stage, inside the graph, through the line's pipeline, through a broker."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edge_dkm.bench.arithmetic import arithmetic_limit
from edge_dkm.bench.nodes import PLACES
from edge_dkm.bench.profile import count_cost, profile_graph
from edge_dkm.bench.publish import time_publish
from edge_dkm.bench.report import BenchReport, Percentiles
from edge_dkm.bench.stages import open_outbox, scene_of, time_line, time_stages
from edge_dkm.errors import BrokerError
from edge_dkm.health import rss_mb
from edge_dkm.inspector import Inspector

MAX_PUBLISHED = 200


@dataclass(frozen=True)
class BenchOptions:
    """`size` (width, height) of what the model sees (None: the training's); `state`: the folder whose disk takes the commits.

    None: that of temporary files, which may be memory.
    """

    size: tuple[int, int] | None = None
    frames: int = 200
    state: Path | None = None


def bench(inspector: Inspector, options: BenchOptions) -> BenchReport:
    """Measures on noise, which costs a model what pictures cost it. Nothing is left in `state`.

    Raises:
        EdgeError: a stage fails.
    """
    scene = scene_of(inspector, options.size)
    notes: dict[str, str] = {}
    if options.state is not None:
        options.state.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edge-dkm-bench-", dir=options.state) as name:
        folder = Path(name)
        outbox = open_outbox(folder / "stages.db")
        try:
            times = time_stages(inspector, scene, outbox, options.frames)
            line = time_line(inspector, scene, outbox, options.frames)
        finally:
            outbox.close()
        memory = rss_mb()  # before the profiler's own sessions
        stages: dict[str, Percentiles | None] = {"capture": Percentiles.of(times["capture"])}
        profile = profile_graph(inspector, scene.images, options.frames)
        for place in PLACES:
            stages[place] = Percentiles.of(profile.parts_ms[place]) if profile.parts_ms else None
            if profile.why is not None:
                notes[place] = profile.why
        if profile.parts_ms is None:
            stages["whole graph"] = Percentiles.of(times["graph"])
        stages |= {stage: Percentiles.of(times[stage]) for stage in ("decision", "commit")}
        try:
            stages["publish"] = Percentiles.of(time_publish(folder, min(options.frames, MAX_PUBLISHED)))
        except BrokerError as error:
            stages["publish"], notes["publish"] = None, f"no broker ({error})"
    inspect = Percentiles.of(times["inspect"])
    threads = inspector.runtime.threads or len(os.sched_getaffinity(0))
    return BenchReport(
        inspector.metadata.model_id,
        inspector.providers,
        inspector.precision,
        threads,
        scene.size,
        scene.full_size,
        options.frames,
        stages,
        Percentiles.of(times["graph"]),
        Percentiles.of(line.frame_to_commit),
        inspect.p50_ms,
        inspect.p99_ms,
        round(line.frames_per_s, 1),
        memory,
        arithmetic_limit(threads, count_cost(inspector, scene.images[0])),
        notes,
    )
