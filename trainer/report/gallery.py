"""Thumbnails for the report: which images of a cluster to show, and their pixels as data URLs."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from numpy.typing import NDArray

from trainer.images import BadImageError, Item
from trainer.report.assignment_table import Assignment

THUMB_PX = 96
PER_CLUSTER = 18


def spread(rows: Sequence[Assignment]) -> list[Assignment]:
    """From the nearest to the centroid to the farthest, evenly over the ranks."""
    ordered = sorted(rows, key=lambda row: row.distance)
    if len(ordered) <= PER_CLUSTER:
        return ordered
    return [ordered[round(n * (len(ordered) - 1) / (PER_CLUSTER - 1))] for n in range(PER_CLUSTER)]


def strip(rows: Sequence[Assignment], items: dict[str, Item]) -> str:
    """The rows' thumbnails side by side; the title of each gives file, distance and novelty."""
    return '<div class="strip">' + "".join(_figure(row, items.get(row.file)) for row in rows) + "</div>"


def captioned(rows: Sequence[tuple[str, str]], items: dict[str, Item]) -> str:
    """Thumbnails of (file, caption) side by side."""
    figures = []
    for file, caption in rows:
        item = items.get(file)
        url = _data_url(item) if item is not None else None
        picture = f'<img src="{url}" alt="" loading="lazy">' if url else '<span class="gone">not there</span>'
        figures.append(
            f'<figure title="{escape(file, quote=True)}">{picture}<figcaption>{escape(caption)}</figcaption></figure>'
        )
    return f'<div class="strip">{"".join(figures)}</div>'


def _figure(row: Assignment, item: Item | None) -> str:
    title = escape(
        f"{row.file}\ndistance {row.distance:.3g}, novelty {row.novelty_score:.3f}{', ' + row.label if row.label else ''}",
        quote=True,
    )
    mark = ' class="novel"' if row.novelty_score > 1 else ""
    url = _data_url(item) if item is not None else None
    picture = f'<img src="{url}" alt="" loading="lazy">' if url else '<span class="gone">not there</span>'
    return f'<figure title="{title}"{mark}>{picture}<figcaption>{row.novelty_score:.2f}</figcaption></figure>'


def _data_url(item: Item) -> str | None:
    try:
        image = item.read()[0]
    except BadImageError:
        return None
    return jpeg_url(to_side(image, THUMB_PX))


def to_side(image: NDArray[np.uint8], side_px: int) -> NDArray[np.uint8]:
    """An image (H, W, 3 or 1), its longer side brought to `side_px`; a small one keeps its pixels visible."""
    height, width = image.shape[:2]
    scale = side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    return np.asarray(small, np.uint8)


def jpeg_url(image: NDArray[np.uint8]) -> str | None:
    """The image in a data URL; None where OpenCV cannot encode it."""
    ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(np.asarray(data).tobytes()).decode() if ok else None
