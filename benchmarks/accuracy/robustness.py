"""x_sdd with 15 % pixel noise, and with a tenth of the image covered: what each method loses of its ACC on damaged images.

Models are learned from the images as they are and then see damaged ones, as a line does when dirt or a bad cable comes; labels serve
scoring only. The autoencoder methods share one autoencoder on pretrained features per seed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.table import FEATURE_WEIGHTS, WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, Run, fit
from trainer.answers import read_like
from trainer.data import Dataset
from trainer.metric import score_labels

Image = NDArray[np.uint8]
NOISE_SHARE, COVERED_SHARE = 0.15, 0.10
METHODS = {
    "ae_kmeans": ("x_sdd_ae_kmeans", WEIGHTS, []),
    "smoothed_kmeans": ("x_sdd_smoothed_kmeans", WEIGHTS, []),
    "dec": ("x_sdd_dec", WEIGHTS, []),
    "ae_kmeans, feature_mlp": ("x_sdd_idec", FEATURE_WEIGHTS, ["method={name: ae_kmeans, n_clusters: 7}"]),
    "idec, feature_mlp": ("x_sdd_idec", FEATURE_WEIGHTS, []),
    "dcn, feature_mlp": ("x_sdd_idec", FEATURE_WEIGHTS, ["method={name: dcn, n_clusters: 7}"]),
    "dkm, feature_mlp": ("x_sdd_idec", FEATURE_WEIGHTS, ["method={name: dkm, n_clusters: 7}"]),
    "centering, feature_mlp": ("x_sdd_idec", FEATURE_WEIGHTS, ["method={name: centering, n_clusters: 7}"]),
    "dekm, feature_mlp": ("x_sdd_idec", FEATURE_WEIGHTS, ["method={name: dekm, n_clusters: 7}"]),
}


def noisy(image: Image, rng: np.random.Generator) -> Image:
    """15 % of the pixels take a random grey level."""
    hit = rng.random(image.shape[:2]) < NOISE_SHARE
    values = rng.integers(0, 256, image.shape[:2], dtype=np.uint8)
    return np.where(hit[..., None], values[..., None], image)


def covered(image: Image, rng: np.random.Generator) -> Image:
    """A black square of a tenth of the area, anywhere."""
    side = round((COVERED_SHARE * image.shape[0] * image.shape[1]) ** 0.5)
    top, left = (int(rng.integers(0, size - side + 1)) for size in image.shape[:2])
    out = image.copy()
    out[top : top + side, left : left + side] = 0
    return out


def acc(run: Run, dataset: Dataset, damage: Callable[[Image, np.random.Generator], Image] | None) -> float:
    """ACC of `predict` on the damaged images."""
    rng = np.random.default_rng(0)
    assert dataset.labels is not None
    images = (item.read()[0] for item in dataset.items)
    ids = run.model.predict(image if damage is None else damage(image, rng) for image in images)
    return score_labels(dataset.labels, ids).acc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    arguments = parser.parse_args()
    path, table = real_set("x_sdd"), []
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.methods:
            config, weights, changes = METHODS[name]
            found: list[list[float]] = []
            for seed in range(arguments.seeds):
                cache = f"pretrain.cache={scratch}/autoencoders"
                overrides = [f"train.seed={seed}", f"data.path={path}", weights, cache, *changes]
                run = fit(config, FitOptions(Path(scratch) / f"{name}-{seed}", overrides))
                dataset = read_like(run, str(path))
                found.append([acc(run, dataset, damage) for damage in (None, noisy, covered)])
            clean, noise, cover = (spread(column) for column in zip(*found, strict=True))
            losses = [np.mean([row[0] - row[n] for row in found]) for n in (1, 2)]
            table.append([name, clean, noise, f"{losses[0]:+.3f}", cover, f"{losses[1]:+.3f}"])
    show_table(
        f"x_sdd, models of clean images on damaged ones, {arguments.seeds} seeds: ACC, mean (least to most)",
        ["method", "clean", "15 % pixel noise", "loss", "10 % covered", "loss"],
        table,
    )


if __name__ == "__main__":
    main()
