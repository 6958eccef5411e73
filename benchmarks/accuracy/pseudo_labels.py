"""DeepCluster in both forms from scratch on a CIFAR-10 subset: NMI with the truth over the epochs, the closing k-means, a linear probe.

Labels serve scoring only. The control is the same encoder with its random weights. The probe is a logistic regression on standardised
features of the training images, scored on the subset's test images. Runs are kept in --out and reused.

    python -m benchmarks.accuracy.pseudo_labels --rows deepcluster deepcluster_v2 --seeds 0
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.preprocessing import StandardScaler

from benchmarks.accuracy.cifar import cifar_subset
from benchmarks.table import show_table
from trainer.artifact import Run, load_run
from trainer.methods.pseudo_label import LOG
from trainer.model import evaluating
from trainer.progress import Terminal
from trainer.trials import changed, fit_or_reuse, load_base

ROWS = {"deepcluster": "cifar_deepcluster", "deepcluster_v2": "cifar_deepcluster_v2"}
CONTROL = "random weights"


def measure(row: str, seed: int, out: Path, overrides: list[str]) -> list[object]:
    """One line of the table."""
    base, _ = load_base(
        ROWS.get(row, "cifar_deepcluster"),
        [f"data.path={cifar_subset(out / 'sets', 'train')}", f"train.seed={seed}", *overrides],
    )
    if row == CONTROL:
        base = changed(base, {"method": {"name": "ae_kmeans", "n_clusters": 10}}, "the control")
    folder = out / "cifar" / f"{row.replace(' ', '_')}-{seed}"
    fit_or_reuse(base, folder, Terminal())
    run = load_run(folder)  # on the CPU, wherever it was learned
    nmi = trace(run, np.load(base.data.path)["y"])
    shown = [nmi[0], nmi[len(nmi) // 2], nmi[-1]] if nmi else ["", "", ""]
    probe = linear_probe(run, out)
    metrics: dict[str, Any] = run.info["metrics"]
    return [row, seed, *shown, metrics["nmi"], metrics["acc"], probe, run.info["train"]["minutes"]]


def trace(run: Run, truth: NDArray[np.int64]) -> list[float]:
    """NMI of the pseudo-labels with the truth, clustering by clustering."""
    if run.path is None:
        return []
    return [
        float(normalized_mutual_info_score(truth, np.load(path))) for path in sorted((run.path / LOG).glob("*.npy"))
    ]


def linear_probe(run: Run, out: Path) -> float:
    """Share of the test images that a linear classifier on the encoder's features gets right."""
    (x, y), (x_test, y_test) = (features(run, cifar_subset(out / "sets", part)) for part in ("train", "test"))
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(max_iter=300, C=0.1).fit(scaler.transform(x), y)
    return float(probe.score(scaler.transform(x_test), y_test))


@torch.no_grad()
def features(run: Run, path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The encoder's features (N, F) before any projection, and the labels."""
    data = np.load(path)
    pixels = torch.cat([run.model.preprocess.geometry(part) for part in torch.from_numpy(data["X"]).split(512)])
    with evaluating(run.model):
        parts = [run.model.encoder(run.model.preprocess.normalise(part)) for part in pixels.split(512)]
    return torch.cat(parts).numpy(), data["y"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[CONTROL, *ROWS], default=[CONTROL, *ROWS], metavar="ROW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for all rows")
    arguments = parser.parse_args()
    table = [
        measure(row, seed, arguments.out, arguments.overrides) for row in arguments.rows for seed in arguments.seeds
    ]
    header = ["row", "seed", "NMI first", "middle", "last", "NMI closing", "ACC closing", "linear probe", "minutes"]
    show_table(
        "CIFAR-10, 10 x 1,000 images; NMI of pseudo-labels, then of k-means with K 10 on the features", header, table
    )


if __name__ == "__main__":
    main()
