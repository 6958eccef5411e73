"""The int8 graph against the fp32 graph of the same run: pixels to novelty, ROI 448x448, the two in turns.

The exporter writes an int8 graph only if it agrees with the fp32 one on held-out images and is faster here. Where it refuses, the
reason is printed, and the time is that of the refused graph. ResNet-18 has random weights, so for it only the time means something.

python -m benchmarks.edge.int8 [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import onnx

from benchmarks.edge.encoders import ENCODERS, ROI_PX, THREADS, frames, in_turns_of, inspector_of, run_of
from benchmarks.table import show_table
from edge_dkm.inspector import FETCHED, Inspector, Runtime
from exporters.export import ExportOptions
from exporters.own_images import find_own_images
from exporters.quantize import quantize_encoder
from trainer import Run

ROUNDS, RUNS = 30, 15
ASKED = {"ResNet-18": 2.3, "SqueezeNet": 1.7}


@dataclass(frozen=True)
class Pair:
    """Both graphs of one run; `verdict` says what the exporter thinks of the int8 one."""

    fp32: Inspector
    int8: Inspector
    verdict: str


def pair(name: str, folder: Path) -> Pair:
    """Of a run on real pictures."""
    run, size = run_of(name, folder, real=True), (ROI_PX, ROI_PX)
    fp32 = inspector_of(run, folder / "fp32.onnx", ExportOptions(frame=size))
    int8 = inspector_of(run, folder / "int8.onnx", ExportOptions(frame=size, int8=True))
    found = json.loads(int8.metadata.raw["dkm.quantization"])
    if int8.metadata.precision == "int8":
        return Pair(fp32, int8, f"written: {said(found)}")
    return Pair(fp32, refused(run, fp32), f"refused: {'; '.join(found['reasons'])}")


def said(found: dict[str, object]) -> str:
    """The gate's figures."""
    return ", ".join(f"{key} {value}" for key, value in found.items() if isinstance(value, float))


def refused(run: Run, fp32: Inspector) -> Inspector:
    """The graph that was not written, to measure its time."""
    images = find_own_images(run, (ROI_PX, ROI_PX))
    model = quantize_encoder(onnx.ModelProto.FromString(fp32.file.data), images.ranges)
    return Inspector(model.SerializeToString(), runtime=Runtime(threads=THREADS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    rows: list[list[object]] = []
    image = frames(ROI_PX, ROI_PX, 1)[0][None]
    for name in ENCODERS:
        with tempfile.TemporaryDirectory() as folder:
            both = pair(name, Path(folder))
        models = {"fp32": both.fp32, "int8": both.int8}
        turns = in_turns_of(RUNS, {key: lambda m=model: m.run(image, FETCHED) for key, model in models.items()}, rounds)
        ratio = turns.ratio("fp32", "int8")
        rows.append([name, turns.median("fp32"), turns.median("int8"), ratio, f">= {ASKED[name]}", both.verdict])
    title = f"whole graph, ROI 448x448, {rounds} rounds of {RUNS} runs, two threads"
    show_table(title, ["network", "fp32, ms", "int8, ms", "times faster", "asked", "the exporter"], rows)


if __name__ == "__main__":
    main()
