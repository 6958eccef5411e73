"""The further frames: drawn parts in all lights, noise, photo-like gradients, hard edges, all black and all white; the same ones every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from tests.images import KINDS, draw

Image = NDArray[np.uint8]
Size = tuple[int, int]
# Height and width of frames for graphs that take any size: smaller and larger than the network, odd, far from square.
SIZES: tuple[Size, ...] = ((32, 32), (40, 30), (61, 47), (25, 80), (96, 64), (24, 24), (17, 19), (120, 160))


def make_frame(n: int, size: Size) -> Image:
    """Frame number n, (height, width, 3) uint8."""
    rng = np.random.default_rng([20261121, n])
    return _MAKERS[n % len(_MAKERS)](rng, size)


def further_frames(count: int, sizes: tuple[Size, ...]) -> Iterator[tuple[Size, Iterator[Image]]]:
    """`count` frames, shared out over the sizes; every size gets every kind."""
    start = 0
    for k, size in enumerate(sizes):
        stop = count * (k + 1) // len(sizes)
        yield size, (make_frame(n, size) for n in range(start, stop))
        start = stop


def _drawn(rng: np.random.Generator, size: Size) -> Image:
    side = max(size)
    image = draw(KINDS[int(rng.integers(len(KINDS)))], rng, side)
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]


def _drawn_in_other_light(rng: np.random.Generator, size: Size) -> Image:
    gain, offset = rng.uniform(0.3, 1.6, 3), rng.uniform(-40, 60)
    return np.clip(_drawn(rng, size) * gain + offset, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, size: Size) -> Image:
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def _dim_noise(rng: np.random.Generator, size: Size) -> Image:
    return np.clip(rng.normal(rng.uniform(0, 255), rng.uniform(1, 40), (*size, 3)), 0, 255).astype(np.uint8)


def _photo_like(rng: np.random.Generator, size: Size) -> Image:
    coarse = rng.uniform(0, 255, (int(rng.integers(2, 7)), int(rng.integers(2, 7)), 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def _hard_edges(rng: np.random.Generator, size: Size) -> Image:
    period = int(rng.integers(1, 9))
    rows, columns = np.indices(size) // period
    colours = rng.integers(0, 256, (2, 3), dtype=np.uint8) if rng.random() < 0.5 else np.array([[0] * 3, [255] * 3])
    return np.ascontiguousarray(colours[(rows + columns) % 2], np.uint8)


def _half_a_part(rng: np.random.Generator, size: Size) -> Image:
    image = _photo_like(rng, size)
    image[: size[0] // 2] = _drawn(rng, size)[: size[0] // 2]
    return image


def _flat(rng: np.random.Generator, size: Size) -> Image:
    value = (0, 255, int(rng.integers(256)))[int(rng.integers(3))]
    return np.full((*size, 3), value, np.uint8)


_MAKERS: tuple[Callable[[np.random.Generator, Size], Image], ...] = (
    _drawn,
    _drawn_in_other_light,
    _photo_like,
    _drawn,
    _half_a_part,
    _noise,
    _drawn_in_other_light,
    _hard_edges,
    _dim_noise,
    _flat,
)
