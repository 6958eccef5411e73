"""The CIFAR-10 subset that the pseudo-label and community methods are measured on: the first 1,000 images of each class and part."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from benchmarks.table import real_set

PER_CLASS = 1000


def cifar_subset(folder: Path, part: Literal["train", "test"]) -> Path:
    """An .npz of 10,000 images (N, 32, 32, 3) BGR with `y`, written at the first call."""
    path = folder / f"cifar10_{part}_{PER_CLASS}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = np.load(real_set("cifar10_jpeg.npz"))
        of_part = data["split"] == (part == "test")
        chosen = np.concatenate([np.flatnonzero(of_part & (data["y"] == c))[:PER_CLASS] for c in range(10)])
        jpeg, offset = data["jpeg"], data["offset"]
        images = [cv2.imdecode(jpeg[offset[n] : offset[n + 1]], cv2.IMREAD_COLOR) for n in chosen]
        temporary = path.with_name(f".{os.getpid()}-{path.name}")
        np.savez(temporary, X=np.stack(images), y=data["y"][chosen])
        temporary.replace(path)
    return path
