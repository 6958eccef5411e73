"""What ten times as many images cost: an epoch of pre-training, a full pass, k-means; 1.00 would be exactly ten times.

python -m benchmarks.scale.growth [--images 7000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.scale.epoch_times import MLP, EpochTimes, images, pretrain
from benchmarks.table import real_set, show_table
from trainer.artifact import build_model
from trainer.clustering.kmeans import KMeansOptions, kmeans
from trainer.settings import TrainSettings

TIMES = 10
DIM, CLUSTERS, ITERATIONS = 64, 100, 10
Work = Callable[[int], float]  # seconds for so many images


def epoch_s(n: int) -> float:
    """Of pre-training, the quickest of some epochs: about equally many steps are looked at for both sizes."""
    times = EpochTimes()
    pretrain(images(real_set("mnist.npz"), n), 3 if n > 20_000 else 15, times, device="cpu")
    return times.best("reconstruct")


def pass_s(n: int) -> float:
    """Of embedding n images, as `predict` does it."""
    pixels = torch.from_numpy(images(real_set("mnist.npz"), n))
    settings = TrainSettings.model_validate(
        {
            "data": {"path": "mnist.npz"},
            "preprocess": {"resize": "none", "color": "gray", "normalise": "unit"},
            "encoder": MLP,
            "method": {"name": "ae_kmeans", "n_clusters": 10},
        }
    )
    model = build_model(settings, (pixels.shape[1], pixels.shape[2]), n)
    started_s = time.perf_counter()
    model.embed_dataset(pixels)
    return time.perf_counter() - started_s


def kmeans_s(n: int) -> float:
    """Of one run of so many iterations on n made-up embeddings."""
    z = points(n)
    started_s = time.perf_counter()
    kmeans(z, CLUSTERS, 0, KMeansOptions(n_init=1, max_iterations=ITERATIONS, tol=0.0, init="random"))
    return time.perf_counter() - started_s


def points(n: int) -> torch.Tensor:
    """(n, DIM): blobs wide enough for Lloyd's iterations to go on."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLUSTERS, DIM))
    return torch.from_numpy((centres[rng.integers(CLUSTERS, size=n)] + rng.normal(size=(n, DIM))).astype(np.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=7000, help="N; at most 7,000, a tenth of MNIST")
    parser.add_argument("--rounds", type=int, default=3, help="the quickest of each size counts")
    arguments = parser.parse_args()
    n = arguments.images
    works: list[tuple[str, int, Work]] = [
        ("epoch of pre-training, 500-500-2000-10", n, epoch_s),
        ("full pass, 500-500-2000-10", n, pass_s),
        (f"k-means, {DIM} dimensions, K {CLUSTERS}, {ITERATIONS} iterations", 10 * n, kmeans_s),
    ]
    table: list[list[object]] = []
    for title, size, work in works:
        found = [(work(size), work(TIMES * size)) for _ in range(arguments.rounds)]
        few, many = min(a for a, _ in found), min(b for _, b in found)
        table.append([title, size, f"{few:.3f}", f"{many:.2f}", f"{many / few / TIMES:.2f}"])
    show_table(
        f"From N to {TIMES} N images, {torch.get_num_threads()} threads, quickest of {arguments.rounds}",
        ["", "N", "s", f"s at {TIMES} N", "over ten times"],
        table,
    )


if __name__ == "__main__":
    main()
