"""Local contrast normalisation: each pixel relative to mean and deviation around it, so that shading and exposure say nothing.

    contrast(window) = clamp(.45 + .15 (g - mean) / (deviation + 5), 0, 1),    g grey, mean and deviation over the window
    y = 255 (share contrast(about 40 pixels) + (1 - share) contrast(the whole image))

Jarrett et al. 2009 ("What is the best multi-stage architecture for object recognition?") with a box instead of a Gaussian, computed on cells of
8x8 pixels and interpolated: a graph of small operations (measured on magnetic tiles: not behind the Gaussian one). The whole image's part
keeps what is larger than the window. The result has the range of a picture, so that a pretrained encoder sees what it knows.
"""

from __future__ import annotations

from torch import Tensor, nn

GREY_OF_BGR = (0.114, 0.587, 0.299)  # ITU-R BT.601
CELL_PX, WINDOW_CELLS = 8, 5
MIDDLE, GAIN = 0.45 * 255, 0.15 * 255
FLOOR = 5.0  # grey levels: noise of an even surface is not blown up


def local_contrast(x: Tensor, share: float = 1.0) -> Tensor:
    """(N, C, h, w) in grey levels 0..255, BGR or grey -> the same shape and range, all channels alike; `share` is the neighbourhood's."""
    channels = x.shape[1]
    grey = (x * x.new_tensor(GREY_OF_BGR)[:, None, None]).sum(1, keepdim=True) if channels == 3 else x
    found = grey.new_zeros(())
    if share > 0:
        apart = grey - _to(_around(grey), grey)
        # Of what is left of the mean: a difference of squares of grey levels would cancel, and its root be wrong by a tenth of a level.
        found = found + share * _contrast(apart, _to(_around(apart.square()).sqrt(), grey))
    if share < 1:
        apart = grey - grey.mean((2, 3), keepdim=True)
        found = found + (1 - share) * _contrast(apart, apart.square().mean((2, 3), keepdim=True).sqrt())
    return found.expand(-1, channels, -1, -1)


def _contrast(apart: Tensor, deviation: Tensor) -> Tensor:
    return (MIDDLE + GAIN * apart / (deviation + FLOOR)).clamp(0, 255)


def _around(grey: Tensor) -> Tensor:
    """Mean in the window around each cell: (N, 1, h / 8, w / 8)."""
    pool = nn.functional.avg_pool2d
    cells = pool(grey, CELL_PX, CELL_PX, ceil_mode=True, count_include_pad=False)
    return pool(cells, WINDOW_CELLS, 1, WINDOW_CELLS // 2, count_include_pad=False)


def _to(cells: Tensor, grey: Tensor) -> Tensor:
    return nn.functional.interpolate(cells, size=(grey.shape[2], grey.shape[3]), mode="bilinear", align_corners=False)
