"""MNIST, 70,000 images, fitted and scored on all as in the papers: ACC, NMI, ARI and minutes over seeds.

A fit takes most of an hour on two cores, so runs made before (`--runs`, run folders of the same settings) can be put into the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.table import real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.progress import Terminal


def measure(config: str, seed: int) -> dict[str, Any]:
    """Fits one seed; returns its model.json."""
    overrides = [f"train.seed={seed}", f"data.path={real_set('mnist.npz')}"]
    with tempfile.TemporaryDirectory() as folder:
        return fit(config, FitOptions(Path(folder), overrides, progress=Terminal())).info


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="mnist_dec", help="mnist_dec or mnist_dec_layerwise")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, nargs="*", help="run folders to tabulate instead of fitting")
    arguments = parser.parse_args()
    if arguments.runs:
        found = [json.loads((run / "model.json").read_text()) for run in arguments.runs]
    else:
        found = [measure(arguments.config, seed) for seed in range(arguments.seeds)]
    rows = [
        [info["train"]["seed"], *(info["metrics"][key] for key in ("acc", "nmi", "ari")), info["train"]["minutes"]]
        for info in found
    ]
    rows.append(["all", *(spread([info["metrics"][key] for info in found]) for key in ("acc", "nmi", "ari")), ""])
    show_table(f"MNIST, {arguments.config}", ["seed", "ACC", "NMI", "ARI", "minutes"], rows)


if __name__ == "__main__":
    main()
