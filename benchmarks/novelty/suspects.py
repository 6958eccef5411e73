"""How many planted defects the list of suspects finds: 5 % defects called good among the training images, and none, as a control.

All good tiles of magnetic_tile (groups of `group_r0.60`) or all of train/good of bottle, every part training; defects drawn by seed. The way
of finding (five nearest neighbours of other folds, log-normal null from the middle of the scores) was chosen on x_sdd, one class as the good
one: 42 of 138 planted found among 47 named there, none named of 2,594 without any.

python -m benchmarks.novelty.suspects [--sets bottle tile] [--seeds N] [--level .1]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from benchmarks.novelty.parts import GOOD, Part, write_list
from benchmarks.novelty.tile import tiles
from benchmarks.table import WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.answers import read_like
from trainer.suspects import SuspectOptions, Suspects, suspects


@dataclass(frozen=True)
class Row:
    """One seed."""

    planted: int
    named: int
    found: int
    auroc: float


def bottles() -> list[Part]:
    """Good bottles of the training folder, and the defective ones of the test folder; each is a group."""
    folder = real_set("mvtec_bottle_225")
    paths = [*sorted((folder / "train/good").iterdir()), *sorted((folder / "test").glob("*/*"))]
    parts = [Part(path, GOOD if path.parent.name == "good" else path.parent.name, str(path)) for path in paths]
    return [part for part in parts if part.label != GOOD or "train" in part.path.parts]


PARTS = {"bottle": bottles, "tile": tiles}


def plant(parts: list[Part], share: float, seed: int) -> tuple[list[Part], NDArray[np.bool_]]:
    """All good parts and so many defects that they make up `share`, called good; and which they are."""
    good = [part for part in parts if part.label == GOOD]
    defects = [part for part in parts if part.label != GOOD]
    count = round(share / (1 - share) * len(good))
    chosen = [defects[n] for n in np.random.default_rng(seed).permutation(len(defects))[:count]]
    is_planted = np.repeat([False, True], [len(good), count])
    return [*good, *(replace(part, label=GOOD) for part in chosen)], is_planted


def look(name: str, share: float, seed: int, level: float) -> Row:
    """One training set."""
    parts, is_planted = plant(PARTS[name](), share, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = write_list(parts, Path(folder) / "learned.csv")
        sets = (f"data.path={path}", WEIGHTS, f"train.seed={seed}", "novelty=none")
        run = fit("bottle_ae_kmeans", FitOptions(Path(folder) / "run", sets))
        dataset = read_like(run, str(path))
        z = run.model.embed_dataset(dataset.pixels)
    return _row(suspects(z.numpy(), dataset.groups, None, SuspectOptions(level=level, seed=seed)), is_planted)


def _row(found: Suspects, is_planted: NDArray[np.bool_]) -> Row:
    named = found.is_suspect
    auroc = float(roc_auc_score(is_planted, -found.p_value)) if is_planted.any() else float("nan")
    return Row(int(is_planted.sum()), int(named.sum()), int((named & is_planted).sum()), auroc)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=["bottle", "tile"], choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.05, 0.0])
    parser.add_argument("--level", type=float, default=0.1)
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    for name in arguments.sets:
        for share in arguments.shares:
            found = [look(name, share, seed, arguments.level) for seed in range(arguments.seeds)]
            planted, named, right = (sum(getattr(row, key) for row in found) for key in ("planted", "named", "found"))
            recall = f"{right / planted:.2f}" if planted else "-"
            auroc = spread([row.auroc for row in found]) if planted else "-"
            precision = f"{right / named:.2f}" if named else "-"
            rows.append([name, f"{share:.0%}", planted, named, right, recall, precision, auroc])
    header = ["set", "defects", "planted", "named", "of them planted", "recall", "precision", "AUROC"]
    show_table(f"suspects at level {arguments.level:g}, sums over {arguments.seeds} seeds", header, rows)


if __name__ == "__main__":
    main()
