"""x_sdd: each of the seven classes in turn unseen; AUROC of the unseen class against held-out images of the six known ones, without labels.

60 % of the known images train, 10 % set radii, 30 % calibrate and are scored; there are no groups. The AUROC looks at the ranking alone,
so that it does not matter that the scored good images also set the edge; false rejects are measured elsewhere.

python -m benchmarks.novelty.x_sdd [--seeds N ...] [--set ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.novelty.parts import Part, judge, write_list
from benchmarks.table import WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.report.assignment_table import read_assignments


def measure(config: str, overrides: list[str], seed: int, unseen: str) -> tuple[float, float]:
    """AUROC and the share of the unseen class above the edge."""
    images = sorted(real_set("x_sdd").glob("*/*"))
    known = [Part(path, "", str(path)) for path in images if path.parent.name != unseen]
    new = [Part(path, unseen, str(path)) for path in images if path.parent.name == unseen]
    with tempfile.TemporaryDirectory() as folder:
        sets = (f"data.path={write_list(known, Path(folder) / 'known.csv')}", WEIGHTS, f"train.seed={seed}", *overrides)
        run = fit(config, FitOptions(Path(folder) / "run", sets))
        rows = read_assignments(Path(folder) / "run")
        held_out = np.array([row.novelty_score for row in rows if row.split == "calibration"])
        strange = judge(run, new, Path(folder) / "new.csv").novelty_score
    truth = np.repeat([0, 1], [len(held_out), len(strange)])
    return float(roc_auc_score(truth, np.concatenate([held_out, strange]))), float((strange > 1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--config", default="x_sdd_novelty")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    arguments = parser.parse_args()
    classes = sorted(path.name for path in real_set("x_sdd").iterdir() if path.is_dir())
    found = {
        unseen: [measure(arguments.config, arguments.overrides, seed, unseen) for seed in arguments.seeds]
        for unseen in classes
    }
    rows = [
        [unseen, spread([a for a, _ in figures]), spread([c for _, c in figures])] for unseen, figures in found.items()
    ]
    by_seed = np.array([[auroc for auroc, _ in figures] for figures in found.values()])  # (classes, seeds)
    caught = np.array([[share for _, share in figures] for figures in found.values()])
    rows.append(["mean of the classes", spread(by_seed.mean(0).tolist()), spread(caught.mean(0).tolist())])
    rows.append(["worst class", spread(by_seed.min(0).tolist()), spread(caught.min(0).tolist())])
    title = f"x_sdd, each class in turn unseen, seeds {arguments.seeds}"
    show_table(title, ["unseen class", "AUROC", "called novel at a 5 % target"], rows)


if __name__ == "__main__":
    main()
