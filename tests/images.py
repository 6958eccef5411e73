"""Small drawn image sets that tests train on: three kinds of shapes, noisy, with optional defects. No file of ours is needed."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

KINDS = ("disc", "square", "bars")
SIDE_PX = 32


def draw(kind: str, rng: np.random.Generator, side_px: int = SIDE_PX) -> NDArray[np.uint8]:
    """One image (side, side, 3) of a kind, slightly moved and noisy."""
    image = np.full((side_px, side_px, 3), 40, np.float32)
    c, r = side_px // 2 + int(rng.integers(-2, 3)), side_px // 4
    if kind == "disc":
        cv2.circle(image, (c, c), r, (60, 160, 220), -1)
    elif kind == "square":
        cv2.rectangle(image, (c - r, c - r), (c + r, c + r), (200, 110, 60), -1)
    else:
        for x in range(2, side_px, 6):
            cv2.line(image, (x, 0), (x, side_px), (210, 210, 210), 2)
    return np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)


def write_folder(folder: Path, per_kind: int = 20, seed: int = 0, side_px: int = SIDE_PX) -> Path:
    """A folder with a class folder per kind."""
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for n in range(per_kind):
            cv2.imwrite(str(folder / kind / f"{n:03d}.png"), draw(kind, rng, side_px))
    return folder


def write_png(path: Path, image: NDArray[np.uint8]) -> Path:
    """One image file; the name may be in any language."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return path
