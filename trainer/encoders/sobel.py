"""Fixed edge filters in front of an encoder, so that it cannot cluster by colour; `encoder.sobel: true`.

Source: Caron et al. 2018 (arXiv 1807.05520) section 4, after Bojanowski and Joulin 2017: the mean of the (normalised) colour channels,
then the two Sobel kernels, padding 1. Differs from the authors' code: the border is repeated, not black, which would be an edge.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHANNELS = 2


class Sobel(nn.Module):
    """x (B, C, H, W) -> horizontal and vertical gradient (B, 2, H, W); nothing to learn."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        horizontal = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernels", torch.stack([horizontal, horizontal.T])[:, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        grey = nn.functional.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), "replicate")
        return nn.functional.conv2d(grey, self.kernels.to(x.dtype))
