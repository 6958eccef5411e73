"""Coloured shapes as an .npz, for methods that need images and not only embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from configs import load_text
from tests.images import KINDS, draw
from trainer import FitOptions, Run, fit
from trainer.settings import TrainSettings

SIDE_PX = 16


def write_shapes(path: Path, per_kind: int = 200, seed: int = 0, labelled: bool = True) -> Path:
    """Three kinds of shapes, moved, dark on bright or bright on dark, in noise: neither place nor brightness says which."""
    rng = np.random.default_rng(seed)
    kinds = np.repeat(np.arange(len(KINDS)), per_kind)
    images = np.stack([draw(KINDS[kind], rng, SIDE_PX) for kind in kinds]).astype(np.int16)
    moved = [np.roll(image, rng.integers(-4, 5, 2), (0, 1)) for image in images]
    images = np.stack([255 - image if rng.random() < 0.5 else image for image in moved])
    images = np.clip(images + rng.normal(0, 30, images.shape), 0, 255).astype(np.uint8)
    np.savez(path, X=images, **({"y": kinds} if labelled else {}))
    return path


def fit_shapes(data: Path, out: Path, method: str, extra: str = "") -> Run:
    """A small convolutional encoder from scratch."""
    text = f"""
data: {{path: {data}}}
preprocess: {{resize: none}}
encoder: {{name: conv, channels: [8, 16, 16], dim: 16, batch_norm: true}}
pretrain: {{kind: none}}
method: {method}
novelty: none
train: {{batch_size: 64, device: cpu}}
{extra}
"""
    return fit(load_text(TrainSettings, text, "shapes.yaml"), FitOptions(out=out))
