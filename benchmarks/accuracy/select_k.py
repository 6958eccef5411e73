"""The number of clusters that `dkm-train select-k` recommends: drawn blobs and single clouds, MNIST, x_sdd. Nothing here looks at a label.

Blobs are round, of variance 1, the nearest two centres 8 apart, 600 points: K 2, 3, 5, 8 in 2, 8 and 32 dimensions, even and 10 : 1.

    python -m benchmarks.accuracy.select_k --sets drawn x_sdd mnist --set pretrain.cache=runs/autoencoders
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.table import WEIGHTS, real_set, show_table
from trainer.k_criteria import Embedding, measure
from trainer.select_k import KChoice, SelectOptions, mean_row, recommend, select_k

N, APART = 600, 8.0
KS, REAL_KS = list(range(2, 13)), list(range(2, 15))
REAL = {
    "mnist": ("mnist_ae_kmeans", "mnist.npz", 1, (), "9 or 10"),
    "x_sdd": ("x_sdd_ae_kmeans", "x_sdd", 3, (WEIGHTS,), "5 to 9"),
}
Points = NDArray[np.float64]
CLOUDS: dict[str, Callable[[np.random.Generator], Points]] = {
    "round, 2 dimensions": lambda rng: rng.normal(size=(N, 2)),
    "round, 8": lambda rng: rng.normal(size=(N, 8)),
    "round, 32": lambda rng: rng.normal(size=(N, 32)),
    "6 : 1, 2": lambda rng: rng.normal(size=(N, 2)) * [6, 1],
    "6 : 1, 8": lambda rng: rng.normal(size=(N, 8)) * [6, 1, 1, 1, 1, 1, 1, 1],
    "falling widths, 8": lambda rng: rng.normal(size=(N, 8)) * 0.7 ** np.arange(8),
    "cube, 2": lambda rng: rng.uniform(size=(N, 2)),
    "cube, 8": lambda rng: rng.uniform(size=(N, 8)),
    "heavy tails (t, 5 degrees), 8": lambda rng: rng.standard_t(5, (N, 8)),
}


def blobs() -> Iterator[tuple[str, int, Points, int]]:
    """Name, K, points and seed of each drawn set."""
    for k in (2, 3, 5, 8):
        for dim in (2, 8, 32):
            for seed, ratio in enumerate((1, 10)):
                rng = np.random.default_rng((seed, k, dim))
                centres = rng.normal(size=(k, dim))
                gaps = np.linalg.norm(centres[:, None] - centres[None], axis=2) + 1e9 * np.eye(k)
                share = np.geomspace(1, ratio, k)
                kinds = rng.choice(k, N, p=share / share.sum())
                points = (centres * APART / gaps.min())[kinds] + rng.normal(size=(N, dim))
                yield f"{k} blobs, {dim} dimensions, {ratio} : 1", k, points, seed


def chosen(points: Points, seed: int) -> KChoice:
    """What is recommended for points (N, D)."""
    embedding = Embedding(torch.from_numpy(points.astype(np.float32)), np.arange(len(points)), False, seed)
    return recommend([mean_row([figures]) for figures in measure(embedding, KS)])


def drawn() -> list[list[object]]:
    """Rows of the table: how many drawn sets got their number, and which did not."""
    wrong = [f"{name}: {choice.k}" for name, k, z, seed in blobs() if (choice := chosen(z, seed)).k != k]
    split = [
        f"{name}, seed {seed}: {choice.k}"
        for name, draw in CLOUDS.items()
        for seed in (0, 1)
        if ((choice := chosen(draw(np.random.default_rng(seed)), seed)).k or 1) > 1
    ]
    return [
        ["drawn blobs, 24 sets", "theirs", f"{24 - len(wrong)} right", "; ".join(wrong) or "-"],
        ["single clouds, 18 sets", "none", f"{18 - len(split)} right", "; ".join(split) or "-"],
    ]


def real(name: str, overrides: list[str]) -> list[object]:
    """Row of a real set."""
    config, data, seeds, extra, asked = REAL[name]
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        options = SelectOptions(REAL_KS, seeds, Path(folder), [f"data.path={real_set(data)}", *extra, *overrides])
        choice = select_k(config, options).choice
    minutes = (time.monotonic() - started_s) / 60
    return [name, asked, f"{choice.k}, {choice.kind}", f"{choice.why} ({minutes:.1f} minutes)"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=["drawn", *REAL], default=["drawn", "x_sdd"])
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", help="of the real sets, e.g. pretrain.cache=FOLDER"
    )
    arguments = parser.parse_args()
    table = drawn() if "drawn" in arguments.sets else []
    table += [real(name, arguments.overrides) for name in arguments.sets if name in REAL]
    show_table("Number of clusters, chosen without labels", ["set", "asked", "chosen", ""], table)


if __name__ == "__main__":
    main()
