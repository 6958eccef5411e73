"""Pictures of the strangest parts with the bank's novelty_map laid over, beside the plain ones. For runs with a bank.

The map is drawn on what the encoder saw: the image after crop, resize and pad. Linear, from 0 to TOP times the edge; a white line runs
where it crosses the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from trainer.images import BadImageError, Item
from trainer.model import ClusterModel
from trainer.report.gallery import jpeg_url, to_side

SIDE_PX = 160
TOP = 2.0  # edges at the end of the scale
FAINTEST, STRONGEST = 0.15, 0.75  # how much of the heat is mixed in at 0 and at TOP
SCALE_STEPS = 16

Picture = NDArray[np.uint8]


def overlay(picture: Picture, edges: NDArray[np.float32]) -> Picture:
    """The map `edges` (h, w), 1 = the edge, laid over a picture (H, W, 3), (H, W, 1) or (H, W) of the same view: (H, W, 3) BGR."""
    # OpenCV drops the axis of a single channel when it resizes.
    grey = (
        cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY) if picture.shape[2:] == (3,) else picture.reshape(picture.shape[:2])
    )
    size = (picture.shape[1], picture.shape[0])
    fine = np.asarray(cv2.resize(edges, size, interpolation=cv2.INTER_LINEAR), np.float32)
    mixed = heat(np.asarray(grey, np.float32), fine)
    outlines, _ = cv2.findContours((fine > 1).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(mixed, outlines, -1, (255, 255, 255), 1), np.uint8)


def heat(grey: NDArray[np.float32], edges: NDArray[np.float32]) -> Picture:
    """Grey levels (H, W) with the colour of `edges` (H, W) mixed in, the more the higher: (H, W, 3) BGR."""
    part = np.clip(edges / TOP, 0, 1)
    colour = np.asarray(cv2.applyColorMap((255 * part).round().astype(np.uint8), cv2.COLORMAP_INFERNO), np.float32)
    share = (FAINTEST + (STRONGEST - FAINTEST) * part)[..., None]
    return np.asarray((1 - share) * grey[..., None] + share * colour, np.uint8)


def seen_by(model: ClusterModel, image: Picture) -> tuple[Picture, NDArray[np.float32]]:
    """What the encoder saw of an image (H, W, 3 or 1), and its novelty_map (h, w), both in float32 edges."""
    pixels = model.preprocess.geometry(torch.from_numpy(np.ascontiguousarray(image))[None])
    distances = model.novelty_map(pixels)[0] / model.novelty_scale
    shown = pixels[0].round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels[0]
    return np.asarray(shown.cpu().numpy(), np.uint8), distances.float().cpu().numpy()


def map_strip(model: ClusterModel, rows: Sequence[tuple[str, str]], items: dict[str, Item]) -> str:
    """Of each (file, caption): the plain picture and that with its map, side by side."""
    return '<div class="strip">' + "".join(_pair(model, row, items.get(row[0])) for row in rows) + "</div>"


def scale_bar() -> str:
    """The colours from 0 to TOP, over a middle grey."""
    edges = np.linspace(0, TOP, SCALE_STEPS, dtype=np.float32)[None]
    colours = heat(np.full_like(edges, 128), edges)[0]
    stops = ",".join(f"rgb({r},{g},{b})" for b, g, r in colours.tolist())
    return (
        f'<p>0 <span style="display:inline-block;vertical-align:middle;width:240px;height:12px;'
        f'background:linear-gradient(to right,{stops})"></span> {TOP:g} times the edge or more, linear; '
        f"the white line runs at the edge</p>"
    )


def _pair(model: ClusterModel, row: tuple[str, str], item: Item | None) -> str:
    file, caption = row
    pictures = '<span class="gone">not there</span>'
    try:
        if item is not None:
            seen, edges = seen_by(model, item.read()[0])
            plain = to_side(seen, SIDE_PX)
            urls = (jpeg_url(plain), jpeg_url(overlay(plain, edges)))
            pictures = "".join(f'<img class="map" src="{url}" alt="" loading="lazy">' for url in urls if url)
    except BadImageError:
        pass
    return f'<figure title="{escape(file, quote=True)}">{pictures}<figcaption>{escape(caption)}</figcaption></figure>'
