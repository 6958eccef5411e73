from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.bank import cells as module
from trainer.bank.cells import Cells, local_mean
from trainer.bank.settings import BankSettings

Maps = dict[str, Tensor]


def settings(**changes: Any) -> BankSettings:
    return BankSettings(**{"layers": ("fine", "coarse"), "dim": 6, **changes})


def maps(count: int = 4, seed: int = 0) -> Maps:
    """Two layers that differ in width, grid and loudness."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.rand(count, 5, 8, 6, generator=generator)
    return {"fine": fine, "coarse": 40 * torch.rand(count, 7, 4, 3, generator=generator)}


def rows_of(cells: Cells, found: Maps) -> Tensor:
    return cells.gather(found).flatten(2).transpose(1, 2).flatten(0, 1)


def fitted(found: Maps, **changes: Any) -> Cells:
    cells = Cells(settings(**changes), [found[layer].shape[1] for layer in ("fine", "coarse")])
    cells.fit(rows_of(cells, found), settings(**changes).whiten)
    return cells


def as_rows(cells: Tensor) -> Tensor:
    return cells.flatten(2).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("changes", [{}, {"stride": 2}, {"whiten": 0.0}, {"cells": "image"}])
def test_projecting_each_layer_on_its_own_grid_gives_what_projecting_all_of_them_joined_gives(
    changes: dict[str, Any],
) -> None:
    cells = fitted(maps(16), **changes)
    new = maps(3, seed=1)
    assert torch.allclose(as_rows(cells(new)), cells.project(rows_of(cells, new)), atol=1e-5)


def test_control_an_operation_between_the_two_that_is_not_linear_would_break_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = fitted(maps(16))
    new = maps(3, seed=1)
    joined = cells.project(rows_of(cells, new))
    monkeypatch.setattr(module, "local_mean", lambda x: torch.nn.functional.max_pool2d(x, 3, 1, 1))
    assert not torch.allclose(as_rows(cells(new)), joined, atol=0.1)


def test_half_an_exponent_makes_every_direction_of_the_learned_cells_count_alike() -> None:
    found = maps(64)
    z = as_rows(fitted(found, whiten=0.5)(found))
    assert torch.allclose(z.mean(0), torch.zeros(6), atol=1e-4)
    assert torch.allclose(z.T @ z / len(z), torch.eye(6), atol=1e-3)


def test_control_without_an_exponent_directions_keep_their_variances_in_falling_order() -> None:
    found = maps(64)
    z = as_rows(fitted(found, whiten=0.0)(found))
    covariance = z.T @ z / len(z)
    variance = covariance.diagonal()
    assert (variance.diff() <= 1e-5).all() and float(variance[0]) > 1.2 * float(variance[-1])
    assert torch.allclose(covariance, torch.diag(variance), atol=1e-3)


def test_a_map_counts_by_its_width_and_not_by_how_loud_it_is() -> None:
    found = maps(32)
    loud = {**found, "fine": 1000 * found["fine"]}
    assert torch.allclose(fitted(found)(found), fitted(loud)(loud), atol=1e-3)
    # Control: of another map than it was fitted to, loudness counts.
    assert not torch.allclose(fitted(found)(found), fitted(found)(loud), atol=1)


def test_the_local_mean_is_of_the_cells_that_are_there() -> None:
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    assert local_mean(x)[0, 0].tolist() == [[3.0, 3.5, 4.0], [4.5, 5.0, 5.5], [6.0, 6.5, 7.0]]
    # Control: with zeros around it, the corner would be (1 + 2 + 4 + 5) / 9.
    assert float(local_mean(torch.ones(1, 1, 2, 2)).min()) == 1.0


@pytest.mark.parametrize(
    ("stride", "rows", "columns"),
    [
        (1, list(range(8)), list(range(6))),
        (2, [1, 3, 5, 7], [1, 3, 5]),
        (3, [1, 4, 7], [1, 4]),
        (4, [2, 6], [2]),
    ],
)
def test_a_stride_takes_every_so_many_cells_from_the_middle_of_the_first(
    stride: int, rows: list[int], columns: list[int]
) -> None:
    found = maps(2)
    whole = fitted(found)
    thinned = Cells(settings(stride=stride), [5, 7])
    thinned.load_state_dict(whole.state_dict())
    assert torch.equal(thinned(found), whole(found)[:, :, rows][:, :, :, columns])
    assert torch.equal(thinned.gather(found), whole.gather(found)[:, :, rows][:, :, :, columns])


def test_cells_of_an_image_are_means_and_deviations() -> None:
    cells = Cells(settings(layers=("only",), cells="image", unit=False), [2])
    x = torch.tensor([[[1.0, 3.0], [1.0, 3.0]], [[2.0, 2.0], [2.0, 2.0]]])[None]
    found = cells.gather({"only": x})
    assert found.shape == (1, 4, 1, 1)
    assert found.flatten().tolist() == pytest.approx([2.0, 2.0, 1.0, 1e-3])  # the last has no deviation but the floor's


def test_with_unit_every_block_is_of_length_one_and_its_entries_are_roots() -> None:
    cells = Cells(settings(cells="image"), [5, 7])
    found = cells.gather(maps()).flatten(1)
    blocks = found.split([5, 5, 7, 7], 1)
    assert all(torch.allclose(block.norm(dim=1), torch.ones(4), atol=1e-5) for block in blocks)
    means = maps()["fine"].mean((2, 3))
    assert torch.allclose(blocks[0].square(), means / means.sum(1, keepdim=True), atol=1e-5)


def test_with_unit_strength_says_nothing_and_without_it_does() -> None:
    found, strong = maps(), {"fine": 3 * maps()["fine"], "coarse": 0.2 * maps()["coarse"]}
    for unit in (True, False):
        cells = Cells(settings(cells="image", unit=unit), [5, 7])
        assert torch.allclose(cells.gather(found), cells.gather(strong), atol=1e-4) == unit


def test_maps_of_zeros_and_constant_ones_stay_finite() -> None:
    cells = Cells(settings(cells="image"), [5, 7])
    for value in (0.0, 3.0):
        flat = {"fine": torch.full((1, 5, 8, 6), value), "coarse": torch.full((1, 7, 4, 3), value)}
        assert torch.isfinite(cells.gather(flat)).all()


def test_there_are_no_more_directions_than_channels() -> None:
    assert Cells(settings(dim=128), [5, 7]).out_dim == 12
    assert Cells(settings(dim=128, cells="image"), [5, 7]).out_dim == 24
    assert Cells(settings(dim=3), [5, 7]).out_dim == 3
