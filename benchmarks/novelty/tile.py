"""magnetic_tile: image and pixel AUROC, defects caught and good parts rejected at 5 %, by group, with and without defects in training.

Groups are those of `group_r0.60`. 80 % of the groups of good tiles are given to fit, which splits them again into train, radius and
calibration; groups of more than 10 % of the good tiles are among them, and train. Defects whose group fit has seen are left out. With
`--contaminate .05` that share of the tiles given to fit are defects, called good; they are left out of the test in both rows.

python -m benchmarks.novelty.tile [--seeds N] [--config tile_bank] [--set ...] [--contaminate SHARE]
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.novelty.parts import GOOD, Judged, Part, judge, write_list
from benchmarks.table import WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.artifact import Run

TEST_SHARE, LARGE = 0.2, 0.1
NO_GROUPS = ("data.groups=null", "data.group_column=group", "data.classes=null")  # the list has them
GRID_PX = 112  # masks and maps are compared on this grid


@dataclass(frozen=True)
class Row:
    """Figures of one seed."""

    image: float
    by_group: float
    patches: float
    pixel: float
    caught: float
    false_rejects: float
    seconds: float


def tiles() -> list[Part]:
    """All tiles with their groups."""
    folder = real_set("magnetic_tile")
    with (folder / "groups.csv").open(encoding="utf-8", newline="") as file:
        return [
            Part(folder.parent / row["path"], GOOD if row["class"] == "Free" else row["class"], row["group_r0.60"])
            for row in csv.DictReader(file)
        ]


def split(parts: list[Part], seed: int, contaminate: float) -> tuple[list[Part], list[Part]]:
    """Parts for fit and for the test."""
    rng = np.random.default_rng(seed)
    counts = Counter(part.group for part in parts if part.label == GOOD)
    large = {group for group, n in counts.items() if n > LARGE * sum(counts.values())}
    order = rng.permutation(sorted(set(counts) - large)).tolist()
    tested = set(order[: round(TEST_SHARE * len(counts))])
    given = set(counts) - tested
    learned = [part for part in parts if part.label == GOOD and part.group in given]
    test = [part for part in parts if part.label != GOOD or part.group in tested]
    test = [part for part in test if part.label == GOOD or part.group not in given]
    defects = [part for part in test if part.label != GOOD]
    planted = [defects[n] for n in rng.permutation(len(defects))[: round(contaminate * len(learned))]]
    gone = {part.path for part in planted} | {
        part.path for part in test if part.group in {p.group for p in planted} and part.label != GOOD
    }
    test = [part for part in test if part.path not in gone]
    return [*learned, *(replace(part, label=GOOD) for part in planted)], test


def pixel_auroc(run: Run, judged: Judged) -> float:
    """Of the novelty maps against the masks, over good and defective tiles alike."""
    scores, truth = [], []
    for first in range(0, len(judged.dataset), 32):
        maps = run.model.novelty_map(judged.dataset.pixels[first : first + 32])
        up = torch.nn.functional.interpolate(maps[:, None], size=(GRID_PX, GRID_PX), mode="bilinear")[:, 0]
        scores.append(up.numpy())
    for item, good in zip(judged.dataset.items, judged.is_good, strict=True):
        truth.append(np.zeros((GRID_PX, GRID_PX), bool) if good else mask_of(Path(item.name)))
    return float(roc_auc_score(np.stack(truth).ravel(), np.concatenate(scores).ravel()))


def mask_of(path: Path) -> np.ndarray:
    """(GRID_PX, GRID_PX) bool: where the defect is."""
    mask = cv2.imread(str(path.parent.parent / "masks" / path.parent.name / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE)
    if mask is None:
        raise SystemExit(f"{path} has no mask; the set is not complete")
    if (image := cv2.imread(str(path))) is None or image.shape[:2] != mask.shape:
        size = "no picture" if image is None else f"{image.shape[1]}x{image.shape[0]}"
        raise SystemExit(
            f"the mask of {path} is {mask.shape[1]}x{mask.shape[0]}, the picture {size}; use the mask that was drawn on this picture"
        )
    share = cv2.resize((mask > 127).astype(np.float32), (GRID_PX, GRID_PX), interpolation=cv2.INTER_AREA)
    return np.asarray(share > 0.25)


def measure(config: str, overrides: list[str], seed: int, contaminate: float) -> Row:
    """Fits and judges one split."""
    learned, test = split(tiles(), seed, contaminate)
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        path = write_list(learned, Path(folder) / "learned.csv")
        sets = (f"data.path={path}", *NO_GROUPS, WEIGHTS, f"train.seed={seed}", *overrides)
        run = fit(config, FitOptions(Path(folder) / "run", sets))
        seconds = time.monotonic() - started_s
        judged = judge(run, test, Path(folder) / "test.csv")
        patches = judged.auroc() if judged.patch_score is None else judged.auroc(judged.patch_score)
        pixel = float("nan") if run.model.bank is None else pixel_auroc(run, judged)
    caught, false_rejects = judged.flagged(good=False), judged.flagged(good=True)
    return Row(judged.auroc(), judged.auroc_by_group(), patches, pixel, caught, false_rejects, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", default="tile_bank")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--contaminate", type=float, nargs="*", default=[0.0])
    arguments = parser.parse_args()
    rows = []
    for share in arguments.contaminate:
        found = [measure(arguments.config, arguments.overrides, seed, share) for seed in arguments.seeds]
        names = ("image", "by_group", "patches", "pixel", "caught", "false_rejects")
        rows.append([f"{share:.0%}", *(spread([getattr(row, name) for row in found]) for name in names)])
        rows[-1].append(f"{np.mean([row.seconds for row in found]):.0f}")
    header = [
        "defects in training",
        "image AUROC",
        "groups alike",
        "of the bank alone",
        "pixel AUROC",
        "defects caught",
        "good rejected",
        "s per fit",
    ]
    show_table(f"magnetic tile, seeds {arguments.seeds}, target 5 %", header, rows)


if __name__ == "__main__":
    main()
