"""The pictures of docs/novelty.md: maps over defects, score histograms and the false-reject curve, from drawn parts alone.

A small autoencoder learns from 500 good parts of the synthetic belt, twice with the same seed, layers and splits: with a bank of 512 centres, and
with a coreset of 2,048 cells without whitening, as PatchCore keeps them (Roth et al. 2022, arXiv 2106.08265; without its re-weighting). A
second belt, drawn with another seed, is judged by both. Shown are the first parts of each kind, not the best ones. The figures say nothing
about real parts: layers and the one kind of part were taken after a look at a first picture, so that there is something to see.

python -m benchmarks.novelty.pictures [--out docs/pictures]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.novelty.canvas import AMBER, BLUE, GREEN, GREY, RED, Axes, Canvas
from benchmarks.novelty.drawn import DrawnPart, drawn_parts
from benchmarks.table import show_table
from configs import load_text
from devices.sources.synthetic import ConveyorOptions
from trainer import FitOptions, Run, fit
from trainer.report.novelty_curve import FalseRejects, curve_of
from trainer.report.novelty_maps import TOP, heat, overlay, seen_by
from trainer.settings import TrainSettings

LEARNED, JUDGED, INPUT_PX = 500, 1500, 80
SHOWN = (None, "scratch", "scratch", "stain", "stain", "foreign")
BANKS = {
    "bank, 512": "{layers: [conv2, conv3], size: 512, dim: 96, local: true, max_cost: 10}",
    "coreset, 2048": "{layers: [conv2, conv3], size: 2048, dim: 96, whiten: 0, learn: coreset, max_cost: 10}",
}
SETTINGS = """
data: {{path: {path}}}
preprocess: {{height_px: {side}, width_px: {side}}}
encoder: {{name: conv, channels: [16, 32, 64], dim: 64}}
pretrain: {{epochs: 20}}
method: {{name: ae_kmeans, n_clusters: 1}}
novelty: {{target_frr: 0.05, bank: {bank}}}
train: {{batch_size: 64, device: cpu}}
"""
SIDE_PX, GAP_PX, HEAD_PX = 116, 4, 26
NEAR = (0.85, 1.2)  # thresholds around the edge


@dataclass(frozen=True)
class Judged:
    """Novelty scores (N,) of the second belt, and AUROC by image and by pixel."""

    scores: NDArray[np.float64]
    image_auroc: float
    pixel_auroc: float


def learn(path: Path, bank: str, out: Path) -> Run:
    text = SETTINGS.format(path=path, side=INPUT_PX, bank=bank)
    return fit(load_text(TrainSettings, text, "pictures.yaml"), FitOptions(out=out))


def judge(run: Run, parts: list[DrawnPart]) -> Judged:
    pixels = torch.cat([run.model.preprocess.geometry(torch.from_numpy(part.image)[None]) for part in parts])
    scores = run.model.novelty_scores(run.model.see(pixels)).double().numpy()
    is_defect = np.array([part.defect is not None for part in parts])
    found, truth = [], []
    for part in parts:
        if part.defect in {"scratch", "stain"}:
            found.append(cv2.resize(seen_by(run.model, part.image)[1], (INPUT_PX, INPUT_PX)).ravel())
            size = (INPUT_PX, INPUT_PX)
            truth.append(cv2.resize(part.mask.astype(np.float32), size, interpolation=cv2.INTER_AREA).ravel() > 0.5)
    pixel = roc_auc_score(np.concatenate(truth), np.concatenate(found))
    return Judged(scores, float(roc_auc_score(is_defect, scores)), float(pixel))


def draw_maps(runs: dict[str, Run], parts: list[DrawnPart], path: Path) -> None:
    """A column for each of the first parts of a kind: the part, where its defect is, and its map by each run."""
    shown: list[DrawnPart] = []
    for kind in SHOWN:
        shown.append(next(part for part in parts if part.defect == kind and not any(part is s for s in shown)))
    label_px, step = 92, SIDE_PX + GAP_PX
    canvas = Canvas(label_px + step * len(shown), HEAD_PX + step * (len(runs) + 1) + 40)
    for n, part in enumerate(shown):
        left = label_px + n * step
        canvas.text(part.defect or "good", (left + SIDE_PX / 2, 17), anchor="middle")
        small = cv2.resize(part.image, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        marked = small.copy()
        mask = cv2.resize(part.mask.astype(np.uint8), (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        closed = cv2.dilate(mask, np.ones((5, 5), np.uint8))
        cv2.drawContours(marked, cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], -1, GREEN, 1)
        canvas.paste(marked, (left, HEAD_PX))
        for row, run in enumerate(runs.values(), 1):
            canvas.paste(overlay(small, seen_by(run.model, part.image)[1]), (left, HEAD_PX + row * step))
    for row, name in enumerate(("the part", *runs)):
        canvas.text(name, (6, HEAD_PX + row * step + SIDE_PX / 2 + 4))
    top = HEAD_PX + (len(runs) + 1) * step + 8
    edges = np.repeat(np.linspace(0, TOP, 240, dtype=np.float32)[None], 12, 0)
    canvas.paste(heat(np.full_like(edges, 128), edges), (label_px, top))
    for value, label in ((0, "0"), (1, "1 = the edge (white line)"), (TOP, f"{TOP:g} or more")):
        canvas.text(label, (label_px + 240 * value / TOP, top + 26), anchor="start" if value == 0 else "middle")
    canvas.text("green: where the defect was drawn", (label_px + 330, top + 11), colour=GREY)
    canvas.save(path)


def draw_curve(curve: FalseRejects, good: NDArray[np.float64], strange: NDArray[np.float64], path: Path) -> None:
    """Above, the scores; below, what the calibration says and what the good parts of the second belt do."""
    canvas = Canvas(780, 460)
    right = 2.2
    scores = Axes(canvas, (60, 24, 700, 150), (0.4, right), (0.0, 1.0))
    bins = np.linspace(0.4, right, 60)
    for n, (name, values, colour) in enumerate(
        (("good parts of a second belt", good, BLUE), ("defects", strange, AMBER))
    ):
        heights = np.histogram(np.clip(values, bins[0], bins[-1]), bins)[0]
        scores.fill((bins[:-1] + bins[1:]) / 2, heights / heights.max() * 0.92, colour)
        canvas.text(f"{name} ({len(values)})", (756, 40 + 17 * n), colour=colour, anchor="end")
    scores.vertical(1.0, RED, "edge")
    scores.frame(
        [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2], [], "novelty_score, outermost bins hold what lies beyond"
    )
    below = Axes(canvas, (60, 236, 700, 170), NEAR, (0.0, 0.25))
    x = [NEAR[0], *(t for t in curve.threshold.tolist() if NEAR[0] < t < NEAR[1]), NEAR[1]]
    values = np.array([curve.at(t) for t in x])
    below.band(x, np.append(values[1:, 1], values[-1, 1]) * (np.array(x) <= curve.threshold[-1]), values[:, 2])
    below.steps(x, values[:, 0], BLUE)
    fresh = np.linspace(*NEAR, 251)
    below.steps(fresh.tolist(), np.array([(good > t).mean() for t in fresh]), GREEN)
    below.horizontal(0.05, AMBER, "target 5 %")
    below.vertical(1.0, RED, "edge")
    low, high = curve.at(1.0)[1:]
    canvas.text(f"calibration: {curve.groups} held-out parts", (756, 252), colour=BLUE, anchor="end")
    canvas.text(f"band: 95 of 100 lines, {low:.1%} to {high:.1%} at the edge", (756, 269), colour=BLUE, anchor="end")
    canvas.text(f"the second belt: {(good > 1).mean():.1%} at the edge", (756, 286), colour=GREEN, anchor="end")
    ticks = [0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
    below.frame(ticks, [0, 0.05, 0.1, 0.15, 0.2, 0.25], "threshold; share of good parts above it")
    canvas.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder) / "parts/good"
        good.mkdir(parents=True)
        for n, part in enumerate(drawn_parts(ConveyorOptions(seed=1, parts=LEARNED, types=1, scratch=0.0))):
            cv2.imwrite(str(good / f"{n:04d}.png"), part.image)
        runs = {name: learn(good.parent, bank, Path(folder) / name) for name, bank in BANKS.items()}
    belt = ConveyorOptions(seed=2, parts=JUDGED, types=1, scratch=0.05, stain=0.05, foreign=0.02)
    parts = list(drawn_parts(belt))
    judged = {name: judge(run, parts) for name, run in runs.items()}
    is_defect = np.array([part.defect is not None for part in parts])
    rows = [
        [name, j.image_auroc, j.pixel_auroc, (j.scores[~is_defect] > 1).mean(), (j.scores[is_defect] > 1).mean()]
        for name, j in judged.items()
    ]
    show_table(
        f"drawn parts: {(~is_defect).sum()} good, {is_defect.sum()} defects",
        [
            "novelty by",
            "AUROC",
            "pixel AUROC of scratches and stains",
            "good parts called novel",
            "defects called novel",
        ],
        rows,
    )
    draw_maps(runs, parts, arguments.out / "novelty_maps.png")
    scores = judged[next(iter(BANKS))].scores
    curve = curve_of(runs[next(iter(BANKS))].model)
    draw_curve(curve, scores[~is_defect], scores[is_defect], arguments.out / "false_rejects.png")
    for path in sorted(arguments.out.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
