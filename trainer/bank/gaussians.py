"""A Gaussian for each place of the image: how far a cell is from what is ordinary just there, for parts that lie alike.

    distance = |(x - mean_p) W_p| / sqrt(d),    W_p W_p^T = (covariance_p + regularise I)^-1

Source: Defard et al. 2020 (PaDiM, arXiv 2011.08785), equation 2. Differs from it: cells are a whitened projection instead of a random choice
of channels, so the identity is their common covariance; a place shares its moments with those around it, as a part may lie a little aside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.bank.settings import BankSettings
from trainer.errors import DataError


class Moments:
    """Sums over good parts, place by place: of cells (P, d) and of their products (P, d, d), in double precision."""

    def __init__(self) -> None:
        self.count, self.grid = 0, (1, 1)
        self.first = self.second = torch.zeros(())

    def add(self, cells: Tensor) -> None:
        """Of a batch (B, d, h, w)."""
        self.grid = (cells.shape[2], cells.shape[3])
        rows = cells.flatten(2).permute(2, 0, 1).double()  # (P, B, d)
        self.count += rows.shape[1]
        self.first = self.first + rows.sum(1)
        self.second = self.second + rows.transpose(1, 2) @ rows


class Gaussians(nn.Module):
    """`mean` (P, 1, d) and `factor` (P, d, d) of the P places of a grid."""

    mean: Tensor
    factor: Tensor

    def __init__(self, settings: BankSettings, dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("mean", torch.zeros(1, 1, dim))
        self.register_buffer("factor", torch.eye(dim)[None])

    def forward(self, cells: Tensor, cluster_id: Tensor) -> Tensor:
        """(B, h, w): distances of cells (B, d, h, w), 1 for an ordinary one."""
        height, width = cells.shape[2:]
        rows = cells.flatten(2).permute(2, 0, 1)  # (P, B, d)
        apart = torch.matmul(rows - self.mean, self.factor)
        return apart.square().mean(2).sqrt().T.unflatten(1, (height, width))

    @torch.no_grad()
    def fit(self, moments: Moments) -> None:
        """Mean and factor from what was added up of good parts.

        Raises:
            DataError: fewer than two parts.
        """
        if moments.count < 2:
            raise DataError(
                f"novelty.bank.learn is gaussian, but {moments.count} good part(s) were given, expected at least 2"
            )
        mean = self._shared(moments.first / moments.count, moments.grid)
        dim = mean.shape[1]
        second = self._shared((moments.second / moments.count).flatten(1), moments.grid).unflatten(1, (dim, dim))
        covariance = second - mean[:, :, None] * mean[:, None, :]
        identity = torch.eye(dim, dtype=torch.float64, device=mean.device)
        inverse = torch.linalg.inv(covariance + self.settings.regularise * identity)
        self.mean = mean[:, None].float()
        self.factor = torch.linalg.cholesky((inverse + inverse.transpose(1, 2)) / 2).float()

    def _shared(self, moments: Tensor, grid: tuple[int, int]) -> Tensor:
        """Moments (P, m), averaged over the cells around each place."""
        reach = self.settings.smooth
        field = moments.T.unflatten(1, grid)[None]  # (1, m, h, w)
        return nn.functional.avg_pool2d(field, 2 * reach + 1, 1, reach, count_include_pad=False)[0].flatten(1).T
