"""mvtec_bottle_225, trained on train/good alone: image AUROC, false rejects of test/good, defects flagged at 5 % target.

The interval for test/good is that of `interval.py`. The seeds share the 20 test images, so their counts rise and fall together. Neighbours
of the shipped recipe can be shown beside it (`--recipes`); `bank` adds a bank of patches to it.

python -m benchmarks.novelty.bottle [--seeds N] [--recipes shipped bank]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from benchmarks.novelty.interval import false_reject_interval
from benchmarks.table import WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.evaluate import Evaluation, evaluate

RECIPES = {
    "shipped": (),
    "K 4": ("method.n_clusters=4",),
    "K 8": ("method.n_clusters=8",),
    "fire4 too": ("encoder.layers=[fire4, fire8, fire9]",),
    "full whitening": ("projection.whiten=0.5",),
    "bank": ("novelty.bank={layers: [fire8, fire9], learn: kmeans, size: 512, reduce: max}",),
}


def measure(overrides: tuple[str, ...], seed: int) -> tuple[Evaluation, int, float]:
    """Scores on the test folder, the number of calibration parts, seconds to fit."""
    data = real_set("mvtec_bottle_225")
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        overrides = (*overrides, f"train.seed={seed}", f"data.path={data / 'train'}", WEIGHTS)
        run = fit("bottle_ae_kmeans", FitOptions(Path(folder), overrides))
        seconds = time.monotonic() - started_s
        return evaluate(run, str(data / "test")), int(run.info["novelty"]["n_calib"]), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=["shipped"], choices=list(RECIPES))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.recipes:
        results = [measure(RECIPES[name], seed) for seed in range(arguments.seeds)]
        flagged = [result.flagged for result, _, _ in results]
        good = [counts.pop("good") for counts in flagged]
        defects = [[sum(column) for column in zip(*counts.values(), strict=True)] for counts in flagged]
        low, high = false_reject_interval(results[0][1], good[0][1], 0.05)
        rows.append(
            [
                name,
                spread([result.auroc or 0.0 for result, _, _ in results]),
                ", ".join(f"{n}" for n, _ in good) + f" of {good[0][1]}",
                f"{low} to {high}",
                spread([n / total for n, total in defects]),
                f"{sum(seconds for *_, seconds in results) / len(results):.0f}",
            ]
        )
    header = ["recipe", "AUROC", "test/good flagged, per seed", "95 % interval", "defects flagged", "s per fit"]
    show_table(f"bottle, {arguments.seeds} seeds, target 5 %", header, rows)


if __name__ == "__main__":
    main()
