"""Batch normalisation over the whole batch, of which several processes may hold a share each.

Source: Ioffe and Szegedy, "Batch Normalization", 2015, arXiv 1502.03167, algorithm 1; the sums of algorithm 1 are added up over the processes.
torch.nn.SyncBatchNorm does the same on GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from trainer import ranks


class BatchNorm2d(nn.BatchNorm2d):
    """torch's own, unless several processes train."""

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and ranks.current().are_many):
            return super().forward(input)
        x = input.float()
        n = x.new_tensor([float(x.numel() // self.num_features)])
        sums: Tensor = _Total.apply(torch.cat([n, x.sum((0, 2, 3))]))
        count, mean = sums[0].detach(), sums[1:] / sums[0].detach()
        centred = x - mean[:, None, None]
        squares: Tensor = _Total.apply(centred.square().sum((0, 2, 3)))
        variance = squares / count
        self._remember(mean.detach(), squares.detach() / (count - 1).clamp_min(1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class _Total(torch.autograd.Function):
    """Sum over all processes, each of which goes on with it for its own samples: their gradients are added up likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        distributed.all_reduce(total)
        return total
