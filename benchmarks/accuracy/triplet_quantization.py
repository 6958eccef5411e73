"""stochastic_quantization on MNIST with 10, 50 and 100 % of the training labels: weighted F1 on the 10,000 test images, as the paper counts.

A test image's class is the name of its nearest cluster; an "unsure" cluster is always wrong. Beside it, k-means on the same encoder's
embeddings, its clusters named in the same way: what the quantization adds, or does not, to the triplet encoder.

    python -m benchmarks.accuracy.triplet_quantization --shares 0.1 0.5 1.0 --seeds 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from benchmarks.table import real_set, show_table
from trainer.artifact import Run, load_run
from trainer.cluster_names import class_of
from trainer.clustering.kmeans import kmeans
from trainer.data import Dataset
from trainer.distance import nearest
from trainer.images import DataSettings
from trainer.progress import Silent, Terminal
from trainer.trials import fit_or_reuse, load_base, read_images

PAPER = {0.1: 0.947, 0.5: 0.977, 1.0: 0.984}  # the first version's SQ-SGD at 10 %, the final one's at 50 and 100 %
ASKED = {0.1: 0.97, 0.5: 0.985, 1.0: 0.99}


def measure(share: float, seed: int, out: Path, extra: list[str]) -> list[object]:
    """One line of the table."""
    overrides = [
        f"data.path={real_set('mnist.npz')}",
        f"train.seed={seed}",
        f"method.triplet.labelled_share={share}",
        *extra,
    ]
    settings, _ = load_base("mnist_stochastic_quantization", overrides)
    folder = out / "quantization" / f"{share:g}-{seed}"
    fit_or_reuse(settings, folder, Terminal())
    run = load_run(folder)  # on the CPU, wherever it was learned
    train, test = (_part(run, part) for part in ("train", "test"))
    z, z_test = (run.model.embed_dataset(part.pixels) for part in (train, test))
    centroids = run.model.centroids.detach()
    owners = np.array([class_of(row["name"], train.classes) for row in run.info["clusters"]])
    by_kmeans = kmeans(z, len(centroids), seed).centroids
    kmeans_owners = _majority(nearest(z, by_kmeans)[0].numpy(), train.known, len(centroids))
    scores = [_f1(z_test, mu, who, test.known) for mu, who in ((centroids, owners), (by_kmeans, kmeans_owners))]
    return [f"{share:.0%}", seed, PAPER.get(share, ""), ASKED.get(share, ""), *scores, run.info["train"]["minutes"]]


def _part(run: Run, part: str) -> Dataset:
    data: DataSettings = run.settings.data.model_copy(update={"split": part})
    return read_images(run.settings.model_copy(update={"data": data}), Silent())


def _majority(ids: NDArray[np.int64], labels: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return np.array([np.bincount(labels[ids == n], minlength=1).argmax() if (ids == n).any() else -1 for n in range(k)])


def _f1(z: torch.Tensor, mu: torch.Tensor, owners: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    return float(f1_score(truth, owners[nearest(z, mu)[0].numpy()], average="weighted"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="for all rows")
    arguments = parser.parse_args()
    table = [
        measure(share, seed, arguments.out, arguments.overrides)
        for share in arguments.shares
        for seed in arguments.seeds
    ]
    header = ["labels", "seed", "paper", "asked", "F1", "F1 of k-means", "minutes"]
    show_table("MNIST test part, weighted F1", header, table)


if __name__ == "__main__":
    main()
