"""What novelty costs in the graph: the fused graph with a bank, and without, against the fp32 encoder alone. SqueezeNet, 224x224, batch 1.

Pixels to all outputs against a float tensor to features, in the same runtime with the same settings (two threads), in turns, so that a busy
machine slows all; the ratio is the median over the rounds. The encoder is timed twice: how far its second row is from 1 says how much
the others can be believed. The int8 graphs are what the quantiser makes, whether or not the exporter's gate would let them pass.
Fits on the good bottles and gives the graph one of them.

python -m benchmarks.novelty.cost [--rounds N] [--recipes ...] [--int8 ...] [--frame PX]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import torch

from benchmarks.edge.encoders import SIDE_PX, THREADS, Turns, encoder_session, in_turns
from benchmarks.table import WEIGHTS, real_set, show_table
from edge_dkm.inspector import Inspector, Runtime
from exporters.errors import ExportError
from exporters.export import ExportOptions, export_run
from exporters.own_images import MAX_RANGES, OwnImage
from exporters.quantize import quantize_encoder
from trainer import FitOptions, Run, fit
from trainer.images import open_images

ROUNDS, LIMIT = 200, 1.30
ALONE, AGAIN, NO_BANK = "encoder alone", "encoder alone, again", "no bank"
KMEANS = "layers: [fire8, fire9], learn: kmeans, size: 512, dim: 128, blur: 2"
GAUSSIAN = "layers: [fire8, fire9], learn: gaussian, dim: 80, stride: 2, blur: 2"
NEIGHBOURS = "cells: image, layers: [fire3, fire5, fire8], dim: 64, whiten: 0.25, learn: sample, size: 1024, neighbours: 16, local: true"
CONTRAST = "preprocess.local_contrast=0.5"
RECIPES = {
    NO_BANK: (),
    "k-means 512, d 128": (f"novelty.bank={{{KMEANS}}}",),
    "k-means 512, d 128, stride 2": (f"novelty.bank={{{KMEANS}, stride: 2}}",),
    "Gaussians d 80, stride 2": (f"novelty.bank={{{GAUSSIAN}}}",),
    "Gaussians d 80, stride 2, local contrast": (f"novelty.bank={{{GAUSSIAN}}}", CONTRAST),
    "local contrast, no bank": (CONTRAST,),
    "whole image, 16 neighbours of 1024": (f"novelty.bank={{{NEIGHBOURS}}}",),
}
INT8 = [NO_BANK, "k-means 512, d 128", "Gaussians d 80, stride 2", "Gaussians d 80, stride 2, local contrast"]


@dataclass(frozen=True)
class Exported:
    """An opened graph, its run, and the size of its file in bytes."""

    run: Run
    inspector: Inspector
    size: int


def write_images(folder: Path, side_px: int) -> None:
    """The good bottles at the size of the frame."""
    (folder / "good").mkdir(parents=True)
    for path in sorted((real_set("mvtec_bottle_225") / "train" / "good").iterdir()):
        image = cv2.resize(np.asarray(cv2.imread(str(path))), (side_px, side_px), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "good" / f"{path.stem}.png"), image)


def exported(name: str, folder: Path, side_px: int) -> Exported:
    """Of one recipe."""
    out = folder / f"{len(list(folder.iterdir()))}"
    torch.set_num_threads(THREADS)
    sets = (
        f"data.path={folder / 'images'}",
        WEIGHTS,
        f"preprocess.height_px={SIDE_PX}",
        f"preprocess.width_px={SIDE_PX}",
    )
    run = fit("bottle_ae_kmeans", FitOptions(out, (*sets, *RECIPES[name])))
    path = folder / f"{out.name}.onnx"
    export_run(run, path, ExportOptions(frame=(side_px, side_px)))
    return Exported(run, Inspector(path, runtime=Runtime(threads=THREADS)), path.stat().st_size)


def quantized(found: Exported) -> tuple[Inspector | None, int, str]:
    """The int8 graph, its size, and a word where there is none."""
    images = [OwnImage(item, 0, True) for item in open_images(found.run.settings.data).items[:MAX_RANGES]]
    try:
        data = quantize_encoder(onnx.ModelProto.FromString(found.inspector.file.data), images).SerializeToString()
    except ExportError as error:
        return None, 0, str(error)
    return Inspector(data, runtime=Runtime(threads=THREADS)), len(data), ""


def rows_of(turns: Turns, sizes: dict[str, int]) -> list[list[object]]:
    """A row for each step."""
    rows: list[list[object]] = []
    for step in turns.taken:
        ratio = turns.ratio(step, ALONE)
        asked = f"<= {LIMIT:.2f}" if step in RECIPES else ""
        size = f"{sizes[step] / 2**20:.2f}" if step in sizes else ""
        rows.append([step, turns.median(step), ratio, turns.adds(step, ALONE), asked, size])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--int8", nargs="*", default=INT8, choices=list(RECIPES), help="of these the int8 graph too")
    parser.add_argument("--frame", type=int, default=SIDE_PX, help="side of the frame; the encoder's is 224")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, side_px = Path(name), arguments.frame
        write_images(folder / "images", side_px)
        frame = np.asarray(cv2.imread(str(next((folder / "images" / "good").iterdir()))), np.uint8)[None]
        graphs = {recipe: exported(recipe, folder, side_px) for recipe in arguments.recipes}
        encoder = encoder_session(next(iter(graphs.values())).run)
        x = np.random.default_rng(0).standard_normal((1, 3, SIDE_PX, SIDE_PX), dtype=np.float32)
        inspectors = {recipe: graph.inspector for recipe, graph in graphs.items()}
        sizes = {recipe: graph.size for recipe, graph in graphs.items()}
        for recipe in arguments.int8:
            if recipe in graphs:
                inspector, size, why = quantized(graphs[recipe])
                if inspector is None:
                    print(f"{recipe}: no int8 graph: {why}")
                    continue
                inspectors[f"{recipe}: int8"], sizes[f"{recipe}: int8"] = inspector, size
        steps: dict[str, Callable[[], object]] = {
            ALONE: lambda: encoder.run(None, {"x": x}),
            AGAIN: lambda: encoder.run(None, {"x": x}),
        }
        steps |= {recipe: lambda i=inspector: i.run(frame, i.fetched) for recipe, inspector in inspectors.items()}
        turns = in_turns(steps, arguments.rounds)
    header = ["graph", "ms", "x encoder alone", "adds, ms", "asked", "MiB"]
    title = f"SqueezeNet, frame {side_px}x{side_px}, encoder 224x224, median of {arguments.rounds} rounds, two threads"
    show_table(title, header, rows_of(turns, sizes))
    for recipe in arguments.int8:
        if f"{recipe}: int8" in turns.taken:
            print(f"int8, {recipe}: {turns.ratio(recipe, f'{recipe}: int8'):.2f} times faster than its fp32 graph")


if __name__ == "__main__":
    main()
