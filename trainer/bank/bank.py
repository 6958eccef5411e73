"""The bank: how strange each cell of an image is, a map of that, one score per image. Exported as it stands here.

    maps --Cells--> cells (B,d,h,w) --Centres or Gaussians--> distances (B,h,w) --/ patch_radius--> novelty_map (B,h,w)
    novelty_map --maximum, top share or mean--> patch_score (B)

`patch_radius` is the median of the reduced distances over held-out good parts, divided by `weight`, so that an ordinary part has that score.
Measured (docs/novelty.md): a plain maximum with the embedding's score, both 1 for an ordinary part, ranks worse than the bank alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.bank.cells import Cells, local_mean
from trainer.bank.centres import Centres
from trainer.bank.gaussians import Gaussians
from trainer.bank.settings import BankSettings, Reduction


class Bank(nn.Module):
    """Maps of the encoder's `settings.layers`, whose channels are `widths`, -> patch_score and novelty_map."""

    patch_radius: Tensor

    def __init__(self, settings: BankSettings, widths: Sequence[int]) -> None:
        super().__init__()
        self.settings = settings
        self.cells = Cells(settings, widths)
        ordinary = Gaussians if settings.learn == "gaussian" else Centres
        self.ordinary: Centres | Gaussians = ordinary(settings, self.cells.out_dim)
        self.register_buffer("patch_radius", torch.ones(()))

    @classmethod
    def of(cls, settings: BankSettings, tensors: Mapping[str, Tensor]) -> Bank:
        """A saved bank: `tensors` are those of its `state_dict`."""
        widths = [tensors[f"cells.weights.{n}"].shape[1] for n in range(len(settings.layers))]
        bank = cls(settings, [w // 2 if settings.cells == "image" else w for w in widths])
        for name, _ in list(bank.ordinary.named_buffers()):  # whose sizes only the file knows
            setattr(bank.ordinary, name, tensors[f"ordinary.{name}"])
        bank.load_state_dict(dict(tensors))
        return bank.eval()

    def forward(self, maps: Mapping[str, Tensor], cluster_id: Tensor) -> tuple[Tensor, Tensor]:
        """patch_score (B,) and novelty_map (B, h, w), both in units of `patch_radius`."""
        distances = self.ordinary(self.cells(maps), cluster_id) / self.patch_radius
        return self.reduce(distances), self._blurred(distances)

    def _blurred(self, distances: Tensor) -> Tensor:
        found = distances[:, None]
        for _ in range(self.settings.blur):
            found = local_mean(found)
        return found[:, 0]

    def reduce(self, distances: Tensor, how: Reduction | None = None) -> Tensor:
        """(B,) from a map (B, h, w), as `settings.reduce` says unless told `how`."""
        flat, how = distances.flatten(1), how or self.settings.reduce
        if how == "max":
            return flat.amax(1)
        if how == "mean":
            return flat.mean(1)
        count = max(1, round(self.settings.top_share * flat.shape[1]))
        return flat.topk(count, dim=1).values.mean(1)
