"""Exact nearest neighbours by Euclidean distance, chunk by chunk, on the device of the points; graphs of communities are built on it.

    d2(i, j) = |z_i - c|^2 - 2 (z_i - c)(z_j - c) + |z_j - c|^2,  c: the mean of the points, where the three terms cancel least

Every pair is compared: the last two terms are one matrix product of (M x N x (D + 1)) multiplications, the first one moves no neighbour
before another and is added to those found. Memory for one chunk of (m, N). Ties go to the lowest id, as far as the expanded form shows them:
distances below a thousandth of the points' spread are rounding, so within a burst of nearly equal frames the order is chance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21  # distances held at a time, 8 MB in float32: what a core's cache holds
BLOCK = 32  # columns whose smallest value is looked at before they are


@dataclass(frozen=True)
class Neighbours:
    """`ids` (M, k) of the nearest points, nearest first, and the squared distances `d2` (M, k) to them. No id is ever negative."""

    ids: Tensor
    d2: Tensor


def nearest_neighbours(queries: Tensor, points: Tensor, count: int) -> Neighbours:
    """The `count` points (N, D) nearest to each query (M, D); all N of them where there are fewer.

    Raises:
        ValueError: there is no point, the widths differ, or `count` is below 1.
    """
    _check(queries, points, count)
    return _search(queries, points, min(count, len(points)), None)


def neighbours_within(points: Tensor, count: int) -> Neighbours:
    """The `count` other points nearest to each of `points` (N, D); all N - 1 where there are fewer, so (N, 0) for a lone point.

    A duplicate of a point is a neighbour of it; only the point itself is left out.

    Raises:
        ValueError: there is no point, or `count` is below 1.
    """
    _check(points, points, count)
    return _search(points, points, min(count, len(points) - 1), torch.arange(len(points), device=points.device))


def lowest(values: Tensor, count: int) -> Tensor:
    """Columns (M, count) of the smallest `values` (M, N) of each row, in ascending order; of equal ones the lowest column first.

    Args:
        values: rows without NaN, or of nothing else.
        count: 0 .. N.
    """
    smallest, columns = _smallest(values, min(count + 1, values.shape[1]))
    columns = columns[:, :count]
    if 0 < count < values.shape[1]:
        # Among equal values it is chance: where the first one left out equals the last one taken, the row is sorted in full.
        crowded = torch.nonzero(smallest[:, count] == smallest[:, count - 1])[:, 0]
        columns[crowded] = values[crowded].argsort(dim=1, stable=True)[:, :count]
    columns = columns.sort(dim=1).values
    return columns.gather(1, values.gather(1, columns).argsort(dim=1, stable=True))


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and columns (M, count) of the smallest of each row of `values` (M, N), ascending: `topk` in a third of its time (N 20,000)."""
    n_blocks = values.shape[1] // BLOCK
    if n_blocks < 4 * count:
        return values.topk(count, dim=1, largest=False)
    # `count` blocks hold a value not above the count-th lowest of the blocks' minima: blocks of higher minima hold none that is needed.
    whole = n_blocks * BLOCK
    held = values[:, :whole].unflatten(1, (n_blocks, BLOCK)).amin(2).topk(count, dim=1, largest=False).indices
    columns = torch.arange(values.shape[1], device=values.device)
    inside = (held[:, :, None] * BLOCK + columns[:BLOCK]).flatten(1)
    columns = torch.cat((inside, columns[whole:].expand(len(values), -1)), dim=1)
    smallest, places = values.gather(1, columns).topk(count, dim=1, largest=False)
    return smallest, columns.gather(1, places)


def _search(queries: Tensor, points: Tensor, count: int, own: Tensor | None) -> Neighbours:
    """`own` (M,): the point that each query is itself, or None."""
    queries, points = _at_least_float32(queries), _at_least_float32(points)
    centre = points.mean(0)
    queries, points = queries - centre, points - centre
    left = torch.cat((-2 * queries, queries.new_ones(len(queries), 1)), dim=1)
    right = torch.cat((points, points.square().sum(1, keepdim=True)), dim=1).T
    ids, d2 = [], []
    for start in range(0, len(queries), chunk := max(1, CHUNK_ELEMENTS // len(points))):
        beyond_own = left[start : start + chunk] @ right  # d2 without |z_i - c|^2
        if own is not None:
            beyond_own.scatter_(1, own[start : start + chunk, None], torch.inf)
        ids.append(lowest(beyond_own, count))
        d2.append(beyond_own.gather(1, ids[-1]))
    if not ids:
        return Neighbours(torch.zeros(0, count, dtype=torch.int64, device=points.device), points.new_zeros(0, count))
    return Neighbours(torch.cat(ids), (torch.cat(d2) + queries.square().sum(1, keepdim=True)).clamp_min(0.0))


def _at_least_float32(z: Tensor) -> Tensor:
    z = z.detach()
    return z if z.dtype == torch.float64 else z.float()


def _check(queries: Tensor, points: Tensor, count: int) -> None:
    if len(points) == 0 or queries.dim() != 2 or queries.shape[1:] != points.shape[1:]:
        raise ValueError(
            f"neighbours of {tuple(queries.shape)} among {tuple(points.shape)}: expected (M, D) and (N, D) with N >= 1; "
            f"flatten or pool the features first"
        )
    if count < 1:
        raise ValueError(f"the number of neighbours is {count}, expected an integer >= 1")
