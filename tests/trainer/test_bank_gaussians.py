from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.bank.gaussians import Gaussians, Moments
from trainer.bank.settings import BankSettings
from trainer.errors import DataError


def settings(**changes: Any) -> BankSettings:
    return BankSettings(**{"learn": "gaussian", "regularise": 0.5, "smooth": 0, **changes})


def learned(cells: Tensor, **changes: Any) -> Gaussians:
    return learned_in_batches([cells], **changes)


def learned_in_batches(batches: Iterable[Tensor], **changes: Any) -> Gaussians:
    moments = Moments()
    for batch in batches:
        moments.add(batch)
    found = Gaussians(settings(**changes), moments.first.shape[1])
    found.fit(moments)
    return found


def cells(count: int = 40, height: int = 2, width: int = 3, seed: int = 0) -> Tensor:
    """Parts whose places differ: each has a mean and a spread of its own."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.Generator().manual_seed(99)
    mean = 5 * torch.randn(1, 2, height, width, generator=places)
    spread = 0.2 + torch.rand(1, 2, height, width, generator=places)
    return mean + spread * torch.randn(count, 2, height, width, generator=generator)


def mahalanobis(x: Tensor, learned_from: Tensor, regularise: float) -> float:
    """Of rows of one place, in numpy; PaDiM's distance in units of the root of the number of directions."""
    rows = learned_from.double().numpy()
    covariance = np.cov(rows.T, bias=True) + regularise * np.eye(rows.shape[1])
    apart = x.double().numpy() - rows.mean(0)
    return float(np.sqrt(apart @ np.linalg.inv(covariance) @ apart / rows.shape[1]))


def test_by_hand_in_one_place() -> None:
    # Mean (0, 0), variances 1 and 4, nothing between them; + .5.
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])[:, :, None, None]
    found = learned(x)
    at = torch.tensor([3.0, 1.0]).view(1, 2, 1, 1)
    assert float(found(at, torch.zeros(1))) == pytest.approx(((9 / 1.5 + 1 / 4.5) / 2) ** 0.5, rel=1e-5)


def test_it_is_the_mahalanobis_distance_of_just_that_place() -> None:
    x, new = cells(), cells(3, seed=1)
    distances = learned(x)(new, torch.zeros(3))
    assert distances.shape == (3, 2, 3)
    for n in range(3):
        for row in range(2):
            for column in range(3):
                wanted = mahalanobis(new[n, :, row, column], x[:, :, row, column], 0.5)
                assert float(distances[n, row, column]) == pytest.approx(wanted, rel=1e-4)


def test_what_is_ordinary_in_one_place_is_strange_in_another() -> None:
    x = cells()
    found = learned(x)
    swapped = x.flip(3)
    ordinary, strange = (found(y, torch.zeros(len(y)))[:, :, [0, 2]].mean() for y in (x, swapped))
    assert float(strange) > 4 * float(ordinary)


def test_places_share_their_moments_with_those_around() -> None:
    x = cells()
    alone, shared = learned(x), learned(x, smooth=1)
    # Of 2 x 3 places, the middle ones see all; a corner sees the four nearest.
    corner = x[:, :, :, :2].mean((0, 2, 3))
    middle = x.mean((0, 2, 3))
    assert torch.allclose(shared.mean[0, 0], corner, atol=1e-5) and torch.allclose(shared.mean[1, 0], middle, atol=1e-5)
    assert not torch.allclose(alone.mean, shared.mean, atol=0.1)
    # The scatter is that around the shared mean: with means as far apart as these, much wider.
    assert float(shared(x, torch.zeros(len(x))).mean()) < 1.5


def test_an_ordinary_cell_is_at_about_one() -> None:
    found = learned(cells(2000), regularise=1e-4)
    assert float(found(cells(2000, seed=1), torch.zeros(2000)).square().mean()) == pytest.approx(1.0, abs=0.05)


def test_batches_of_any_size_learn_the_same() -> None:
    x = cells()
    whole, parts = learned(x), learned_in_batches(x.split(7))
    assert torch.allclose(whole.mean, parts.mean, atol=1e-5)
    assert torch.allclose(whole.factor, parts.factor, rtol=1e-4, atol=1e-5)


def test_fewer_parts_than_directions_stay_finite_and_one_is_refused() -> None:
    few = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(learned(few)(few, torch.zeros(3))).all()
    with pytest.raises(DataError, match=r"learn is gaussian, but 1 good part\(s\) were given, expected at least 2"):
        learned(few[:1])
