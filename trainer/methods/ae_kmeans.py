"""Autoencoder (or frozen encoder), then k-means: the control that every method must beat; `method.name: ae_kmeans`.

Source: the "AE + k-means" rows of Xie, Girshick, Farhadi 2016 (arXiv 1511.06335) Table 3. Differs from the paper: nothing.
"""

from __future__ import annotations

from typing import Literal

from trainer.methods.base import Method, MethodSettings


class AEKMeansSettings(MethodSettings):
    """k-means on the embeddings, nothing else."""

    name: Literal["ae_kmeans"] = "ae_kmeans"


class AEKMeans(Method):
    """All it does is what every method starts with."""

    Settings = AEKMeansSettings
    title = "autoencoder (or frozen encoder) + k-means: the control"
