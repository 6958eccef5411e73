"""x_sdd: DEC beside its control (the same features and k-means), ACC and NMI over seeds, and how many assignments DEC moves.

Labels serve scoring only. `moved` is the share of images whose cluster differs from the control's under the best one-to-one map.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.metric import score_labels
from trainer.report.assignment_table import read_assignments

CONFIGS = ("x_sdd_ae_kmeans", "x_sdd_dec")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="applies to x_sdd_dec")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONFIGS}
    for seed in range(arguments.seeds):
        control = None
        for name in CONFIGS:
            with tempfile.TemporaryDirectory() as folder:
                started_s = time.monotonic()
                common = [f"train.seed={seed}", f"data.path={real_set('x_sdd')}", WEIGHTS]
                extra = arguments.overrides if name == "x_sdd_dec" else []
                run = fit(name, FitOptions(Path(folder), [*common, *extra]))
                ids = np.array([row.cluster for row in read_assignments(Path(folder))])
            control = ids if control is None else control
            moved = 1 - score_labels(control, ids).acc
            results[name].append({**run.metrics, "moved": moved, "s": time.monotonic() - started_s})
    rows = [
        [name, *(spread([row[key] for row in found]) for key in ("acc", "nmi", "ari", "moved")), f"{found[0]['s']:.0f}"]
        for name, found in results.items()
    ]
    show_table(
        f"x_sdd, 1,360 images, {arguments.seeds} seeds: mean (least to most)",
        ["settings", "ACC", "NMI", "ARI", "moved", "s"],
        rows,
    )


if __name__ == "__main__":
    main()
