"""Greedy k-centre coreset: the points that leave no other point far from all of them.

Source: Gonzalez 1985 (a 2-approximation of the k-centre problem); Sener and Savarese 2018, arXiv 1708.00489; used for patches by Roth et
al. 2022 (PatchCore, arXiv 2106.08265), whose random projection before the search is left out: cells are short already.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-6  # of the longest row's square: what is nearer than that to a chosen one is a copy of it


def greedy_coreset(rows: Tensor, size: int, seed: int) -> Tensor:
    """Indices (at most `size`) into rows (n, d): a first one at random, then always the row farthest from those chosen."""
    if size >= len(rows):
        return torch.arange(len(rows))
    first = int(torch.randint(len(rows), (1,), generator=torch.Generator().manual_seed(seed)))
    chosen = [first]
    squares = rows.square().sum(1)
    d2, least = _from(rows, squares, first), ROUNDING * float(squares.max())
    for _ in range(size - 1):
        farthest = int(d2.argmax())
        if float(d2[farthest]) <= least:
            break  # nothing but copies of what is chosen
        chosen.append(farthest)
        d2 = torch.minimum(d2, _from(rows, squares, farthest))
    return torch.tensor(chosen)


def _from(rows: Tensor, squares: Tensor, index: int) -> Tensor:
    return (squares - 2 * (rows @ rows[index]) + squares[index]).clamp_min(0)
