"""What the fused graph costs beside the encoder alone, and what `Inspector.inspect` costs beside the session's own run.

A 1280x720 frame, ROI 448x448, halved with antialias inside the graph: exported for that size (`--frame`) and for any. `frame to outputs`
crops the ROI, makes it contiguous and runs the fused graph; `encoder alone` is a float tensor in, features out, in the same runtime
with the same settings. `full frame` gives the graph all 1280x720 pixels. All take turns, so a busy machine slows all.

python -m benchmarks.edge.graph [--rounds N]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.edge.encoders import (
    ENCODERS,
    ROI_PX,
    Turns,
    encoder_session,
    frames,
    in_turns,
    inspector_of,
    run_of,
    session_of,
)
from benchmarks.table import show_table
from edge_dkm.inspector import FETCHED
from exporters.export import ExportOptions
from exporters.graph import FusedModel
from exporters.trace import trace

ROUNDS = 200
FIXED, ANY, FULL = "frame to outputs, --frame 448x448", "frame to outputs, any size", "full frame, antialiased"
FULL_FIXED = "full frame, antialiased, --frame 720x1280"
ALONE, RUN, INSPECT = "encoder alone", "session.run", "Inspector.inspect"


def measure(name: str, folder: Path, rounds: int) -> Turns:
    """Milliseconds of all ways."""
    run = run_of(name, folder)
    fixed = inspector_of(run, folder / "fixed.onnx", ExportOptions(frame=(ROI_PX, ROI_PX)))
    dynamic = inspector_of(run, folder / "any.onnx", ExportOptions())
    full = session_of(trace(FusedModel(run.model.cpu().eval()), (720, 1280)).SerializeToString())
    encoder, frame = encoder_session(run), frames(1280, 720, 1)[0]
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)

    def crop() -> np.ndarray:
        return np.ascontiguousarray(frame[136:584, 416:864])

    roi = crop()
    return in_turns(
        {
            ALONE: lambda: encoder.run(None, {"x": x}),
            FIXED: lambda: fixed.run(crop()[None], FETCHED),
            ANY: lambda: dynamic.run(crop()[None], FETCHED),
            FULL: lambda: dynamic.run(frame[None], FETCHED),
            FULL_FIXED: lambda: full.run(list(FETCHED), {"image": frame[None]}),
            RUN: lambda: fixed._open().run(list(FETCHED), {"image": roi[None]}),
            INSPECT: lambda: fixed.inspect(roi),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    for name in ENCODERS:
        with tempfile.TemporaryDirectory() as folder:
            turns = measure(name, Path(folder), rounds)
        rows = []
        for step in turns.taken:
            asked = ""
            if step == FIXED:
                asked = "<= 1.08 x" if name == "ResNet-18" else "adds <= 0.6 ms"
            if step == INSPECT:
                asked = f"adds <= 0.3 ms to session.run: {turns.adds(INSPECT, RUN):.3f}"
            rows.append([step, turns.median(step), turns.ratio(step, ALONE), turns.adds(step, ALONE), asked])
        title = f"{name}, 1280x720, ROI 448x448, median of {rounds} rounds, two threads"
        show_table(title, ["step", "ms", "x encoder alone", "adds, ms", "asked"], rows)


if __name__ == "__main__":
    main()
