"""deeppcb_patches, six kinds of defects, with the golden template beside each patch: how far a reference carries. Benchmark only, not exported.

Features are signed and weighted to the centre: Gaussian means over SqueezeNet's maps of the patch minus those of its template, half-whitened
PCA of 64, L2, k-means; fitted on half of the boards, scored on the other. The place is given by the annotation, which a line has not got.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy.factory_sets import halves
from benchmarks.table import SHARED, real_set, show_table, spread
from trainer.clustering.kmeans import kmeans
from trainer.distance import nearest
from trainer.encoders.pretrained import PretrainedEncoder, PretrainedSettings
from trainer.metric import score_labels
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.projection import Projection, ProjectionSettings

LAYERS = ("fire4", "fire8", "fire9")
KINDS, CENTRE_SIGMA = 6, 0.15  # of the side


@torch.no_grad()
def centre_features(encoder: PretrainedEncoder, inputs: Tensor) -> Tensor:
    """(B, F): means of each layer's map, weighted by a Gaussian around the image's centre."""
    found = []
    for layer in encoder.trunk.maps(inputs, encoder.trunk.layers).values():
        height, width = layer.shape[2:]
        y, x = (torch.linspace(-0.5, 0.5, size) for size in (height, width))
        weight = torch.exp(-(y[:, None].square() + x.square()) / (2 * CENTRE_SIGMA**2))
        found.append((layer * (weight / weight.sum())).sum((2, 3)))
    return torch.cat(found, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    started_s = time.monotonic()
    with np.load(real_set("deeppcb_patches.npz")) as archive:
        images, y, board = archive["X"], archive["y"].astype(np.int64), archive["board"]
    patch, template = np.arange(0, len(y), 2), np.arange(1, len(y), 2)  # a defect, then the same place of its template
    assert (y[template] == 0).all() and (y[patch] > 0).all()
    weights = str(SHARED / "weights" / "squeezenet1_0-imagenet.safetensors")
    encoder = PretrainedEncoder(PretrainedSettings(weights=weights, layers=LAYERS), (3, 64, 64)).eval()
    encoder.load_pretrained()
    preprocess = Preprocess(PreprocessSettings(normalise="imagenet"), 64, 64)
    preprocess.fit_normalise(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    features = torch.cat(
        [
            centre_features(encoder, preprocess.normalise(torch.from_numpy(part)[..., None]))
            for part in np.array_split(images, len(images) // 256)
        ]
    )
    rows = []
    for name, x in {"patch alone": features[patch], "patch - template": features[patch] - features[template]}.items():
        scores = []
        for seed in range(arguments.seeds):
            seen, unseen = (torch.from_numpy(half) for half in halves(board[patch], seed))
            settings = ProjectionSettings(kind="pca", dim=64, whiten=0.25, sqrt=True, l2=True)
            projection = Projection(settings, x.shape[1], len(seen))
            projection.fit(x[seen], KINDS, seed)
            z = projection.to_cluster_space(projection(x)).detach()
            ids = nearest(z[unseen], kmeans(z[seen], KINDS, seed).centroids)[0]
            scores.append(score_labels(y[patch][unseen.numpy()] - 1, ids.numpy()))
        rows.append([name, *(spread([getattr(score, key) for score in scores]) for key in ("acc", "nmi", "ari"))])
    show_table(
        f"deeppcb_patches, K {KINDS}, other boards, {arguments.seeds} seeds, {(time.monotonic() - started_s) / 60:.1f} minutes",
        ["centre-weighted features of", "ACC", "NMI", "ARI"],
        rows,
    )


if __name__ == "__main__":
    main()
