"""Drawn defects on good parts: what a bank is chosen by where no defect is known. Nothing is trained on them.

Each kind changes a region of the picture by as much as the picture itself varies: a spot, a scratch or crack, a patch of another part
(Li et al. 2021, CutPaste, arXiv 2104.04015), a region of another look (blurred, noisy, lighter, of more contrast; after Zavrtanik et al. 2021,
DRAEM, arXiv 2108.07610), frayed strokes, a part bent out of shape. Real defects are others: the choice is a ranking, no figure of the line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.floating[Any]]  # (h, w, C), 0 to 1
Mask = NDArray[np.floating[Any]]  # (h, w), 0 to 1
Kind = Callable[[np.random.Generator, Picture, Picture], tuple[Picture, Mask]]
SEEN = 0.012  # mean change of a pixel from which on somebody could see it
LEAST_PX = 8
TRIES = 8


def with_defect(image: NDArray[np.uint8], other: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A copy of `image` (h, w, C) with one visible defect of a random kind; `other` is another good part of the same shape."""
    x, y = image.astype(np.float32) / 255, other.astype(np.float32) / 255
    changed = x
    for _ in range(TRIES):
        kind = KINDS[int(rng.integers(len(KINDS)))]
        look, mask = kind(rng, x, y)
        changed = np.clip(x + mask[..., None] * (look - x), 0, 1)
        if (np.abs(changed - x).mean(2) > SEEN).sum() >= LEAST_PX:
            break
    return np.rint(changed * 255).astype(np.uint8)


def _spot(rng: np.random.Generator, x: Picture, other: Picture) -> tuple[Picture, Mask]:
    mask = _softened(_blob(rng, x.shape[:2], 0.01, 0.06), float(rng.choice([0, 0.7, 1.5, 3])))
    return x + _step(rng, x, mask), mask


def _scratch(rng: np.random.Generator, x: Picture, other: Picture) -> tuple[Picture, Mask]:
    """Straight, or jagged as a crack."""
    height, width = x.shape[:2]
    is_crack = rng.random() < 0.6
    angle, left = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(0.07), 0)) * width
    points = [rng.uniform(0, 1, 2) * (width, height)]
    while left > 0:
        angle += rng.normal(0, 0.45 if is_crack else 0.08)
        step = rng.uniform(0.012, 0.03) * width
        points.append(points[-1] + step * np.array([np.cos(angle), np.sin(angle)]))
        left -= step
    mask = np.zeros((height, width), np.uint8)
    corners = np.round(np.array(points) * 16).astype(np.int32)
    cv2.polylines(mask, [corners], False, 255, int(rng.integers(1, 4)), cv2.LINE_AA, 4)
    soft = _softened(mask.astype(np.float32) / 255, float(rng.choice([0, 0.5, 0.8])))
    return x + _step(rng, x, soft), soft


def _pasted(rng: np.random.Generator, x: Picture, other: Picture) -> tuple[Picture, Mask]:
    height, width = x.shape[:2]
    source = x if rng.random() < 0.4 else other
    area, aspect = np.exp(rng.uniform(np.log(0.002), np.log(0.12))), np.exp(rng.uniform(-1.3, 1.3))
    h = int(np.clip((area / aspect) ** 0.5 * height, 3, height - 1))
    w = int(np.clip((area * aspect) ** 0.5 * width, 3, width - 1))
    (top, y), (left, z) = rng.integers(0, height - h, 2), rng.integers(0, width - w, 2)
    look, mask = x.copy(), np.zeros((height, width), np.float32)
    look[y : y + h, z : z + w] = source[top : top + h, left : left + w] * np.exp(rng.normal(0, 0.15))
    mask[y : y + h, z : z + w] = 1
    return look, _softened(mask, float(rng.choice([0, 1, 2, 4])))


def _region(rng: np.random.Generator, x: Picture, other: Picture) -> tuple[Picture, Mask]:
    mask = _softened(_blob(rng, x.shape[:2], 0.04, 0.3), float(rng.choice([0.7, 2, 4, 8])))
    mean = cv2.blur(x, (15, 15)).reshape(x.shape)
    look: Picture
    match int(rng.integers(5)):
        case 0:
            look = np.roll(np.asarray(other, np.float32), tuple(rng.integers(0, x.shape[0], 2).tolist()), (0, 1))
        case 1:
            look = np.asarray(cv2.GaussianBlur(x, (0, 0), rng.uniform(1, 4)), np.float32).reshape(x.shape)
        case 2:
            look = x + rng.normal(0, rng.uniform(0.03, 0.3) * mean.mean(), x.shape[:2])[..., None]
        case 3:
            look = np.asarray(x + 0.7 * _step(rng, x, mask))
        case _:
            look = mean + (x - mean) * float(np.exp(rng.choice([-1, 1]) * rng.uniform(0.5, 1.3)))
    return look.astype(np.float32), mask


def _frayed(rng: np.random.Generator, x: Picture, other: Picture) -> tuple[Picture, Mask]:
    """Many short strokes side by side."""
    height, width = x.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    angle, centre = rng.uniform(0, np.pi), rng.uniform(0, 1, 2) * (width, height)
    for _ in range(int(rng.integers(5, 40))):
        start = centre + rng.normal(0, rng.uniform(0.02, 0.15) * width, 2)
        turn = angle + rng.normal(0, 0.15)
        end = start + rng.uniform(0.02, 0.13) * width * np.array([np.cos(turn), np.sin(turn)])
        ends = [(int(a), int(b)) for a, b in (start, end)]
        cv2.line(mask, ends[0], ends[1], int(rng.integers(120, 256)), int(rng.integers(1, 3)), cv2.LINE_AA)
    soft = _softened(mask.astype(np.float32) / 255, float(rng.choice([0, 0.7, 1.2])))
    return x + _step(rng, x, soft), soft


def _bent(rng: np.random.Generator, x: Picture, other: Picture) -> tuple[Picture, Mask]:
    height, width = x.shape[:2]
    mask = _softened(_blob(rng, x.shape[:2], 0.05, 0.22), 4)
    across, down = (rng.normal(0, max(1.0, 0.02 * width), (4, 4)).astype(np.float32) for _ in range(2))
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    columns += cv2.resize(across, (width, height), interpolation=cv2.INTER_CUBIC) * mask
    rows += cv2.resize(down, (width, height), interpolation=cv2.INTER_CUBIC) * mask
    look = cv2.remap(x, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT).reshape(x.shape)
    return np.asarray(look, np.float32), np.ones((height, width), np.float32)


KINDS: tuple[Kind, ...] = (_spot, _scratch, _pasted, _region, _frayed, _bent)


def _blob(rng: np.random.Generator, size: tuple[int, ...], least: float, most: float) -> Mask:
    """An ellipse with an uneven edge, its radius `least` to `most` of the side."""
    height, width = size[0], size[1]
    radius = float(np.exp(rng.uniform(np.log(least), np.log(most)))) * min(height, width)
    radius = max(radius, 1.0)
    aspect, angle = float(np.exp(rng.uniform(-0.9, 0.9))), rng.uniform(0, np.pi)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    rows -= rng.uniform(0, height)
    columns -= rng.uniform(0, width)
    u = (columns * np.cos(angle) + rows * np.sin(angle)) / (radius * aspect**0.5)
    v = (-columns * np.sin(angle) + rows * np.cos(angle)) / (radius / aspect**0.5)
    uneven = cv2.resize(rng.normal(0, 1, (7, 7)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return ((u * u + v * v) * np.exp(0.45 * uneven) < 1).astype(np.float32)


def _step(rng: np.random.Generator, x: Picture, mask: Mask) -> float:
    """Darker or lighter by a share of what is there."""
    there = mask > 0.3
    level = float(x[there].mean()) if there.any() else float(x.mean())
    share = float(np.exp(rng.uniform(np.log(0.08), np.log(0.9))))
    return -share * level if rng.random() < 0.6 else share * max(0.15, 1 - level)


def _softened(mask: Mask, sigma_px: float) -> Mask:
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), sigma_px), np.float32) if sigma_px > 0 else mask
