"""Exact nearest neighbours by Euclidean distance, chunk by chunk, on the device of the points; graphs of communities are built on it.

    d2(i, j) = |z_i - c|^2 - 2 (z_i - c)(z_j - c) + |z_j - c|^2,  c: the mean of the points, where the three terms cancel least

Every pair is compared: (M x N x D) multiplications, and memory for one chunk of (m, N) distances. Ties go to the lowest id, as far as
the expanded form shows them as ties. (smoothing.py searches by cosine, on points of unit length, with one line of its own.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distance import squared_distances_matmul

CHUNK_ELEMENTS = 1 << 22  # distances held at a time, 17 MB in float32: on one core half the time that 1 << 25 takes


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
        count: 0 .. N.
    """
    smallest, columns = values.topk(min(count + 1, values.shape[1]), dim=1, largest=False)
    columns = columns[:, :count]
    if 0 < count < values.shape[1]:
        # topk picks freely among equal values: where the first one left out equals the last one taken, the row is sorted in full.
        crowded = torch.nonzero(smallest[:, count] == smallest[:, count - 1])[:, 0]
        columns[crowded] = values[crowded].argsort(dim=1, stable=True)[:, :count]
    columns = columns.sort(dim=1).values
    return columns.gather(1, values.gather(1, columns).argsort(dim=1, stable=True))


def _search(queries: Tensor, points: Tensor, count: int, own: Tensor | None) -> Neighbours:
    """`own` (M,): the point that each query is itself, or None."""
    queries, points = _at_least_float32(queries), _at_least_float32(points)
    centre = points.mean(0)
    ids, d2 = [], []
    for start in range(0, len(queries), chunk := max(1, CHUNK_ELEMENTS // len(points))):
        distances = squared_distances_matmul(queries[start : start + chunk], points, centre)
        if own is not None:
            distances.scatter_(1, own[start : start + chunk, None], torch.inf)
        ids.append(lowest(distances, count))
        d2.append(distances.gather(1, ids[-1]))
    if not ids:
        return Neighbours(torch.zeros(0, count, dtype=torch.int64, device=points.device), points.new_zeros(0, count))
    return Neighbours(torch.cat(ids), torch.cat(d2))


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
