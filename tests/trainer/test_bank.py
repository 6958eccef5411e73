from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from trainer.bank.bank import Bank
from trainer.bank.gaussians import Gaussians, Moments
from trainer.bank.settings import BankSettings

NO_CLUSTER = torch.zeros(2, dtype=torch.int64)
# One of two images strange in one of its 12 cells.
FIELD = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 100.0]], [[2.0] * 4] * 3])


def bank(**changes: Any) -> Bank:
    return Bank(BankSettings(**{"layers": ("one",), "dim": 2, **changes}), [3])


@pytest.mark.parametrize(
    ("changes", "score"),
    [
        ({"reduce": "max"}, 100.0),
        ({"reduce": "mean"}, 166 / 12),
        ({"reduce": "top", "top_share": 0.25}, (100 + 11 + 10) / 3),
        ({"reduce": "top", "top_share": 0.01}, 100.0),  # at least one cell
        ({"reduce": "top", "top_share": 1.0}, 166 / 12),
    ],
)
def test_a_map_becomes_one_score_by_hand(changes: dict[str, Any], score: float) -> None:
    assert bank(**changes).reduce(FIELD).tolist() == pytest.approx([score, 2.0])


def test_blur_spreads_the_map_by_means_of_3x3() -> None:
    spot = torch.zeros(1, 3, 3)
    spot[0, 0, 0] = 12.0
    assert bank(blur=0)._blurred(spot)[0].tolist() == spot[0].tolist()
    assert bank(blur=1)._blurred(spot)[0].tolist() == [
        [3.0, 2.0, 0.0],
        [2.0, pytest.approx(4 / 3), 0.0],
        [0.0, 0.0, 0.0],
    ]
    even = torch.full((2, 4, 5), 7.0)
    assert torch.allclose(bank(blur=3)._blurred(even), even)


def learned(**changes: Any) -> tuple[Bank, dict[str, Tensor]]:
    """A bank on random maps of two layers, and new ones."""
    made = Bank(BankSettings(**{"layers": ("a", "b"), "dim": 4, "size": 16, **changes}), [3, 5])
    generator = torch.Generator().manual_seed(0)
    maps = {"a": torch.rand(30, 3, 6, 6, generator=generator), "b": torch.rand(30, 5, 3, 3, generator=generator)}
    rows = made.cells.gather(maps).flatten(2).transpose(1, 2).flatten(0, 1)
    made.cells.fit(rows, made.settings.whiten)
    if isinstance(made.ordinary, Gaussians):
        moments = Moments()
        moments.add(made.cells(maps))
        made.ordinary.fit(moments)
    else:
        groups = torch.arange(30).repeat_interleave(len(rows) // 30)
        made.ordinary.fit(made.cells.project(rows), groups, groups % 2, 0)
    made.patch_radius.fill_(0.5)
    return made.eval(), {name: value[:2] + 0.1 for name, value in maps.items()}


KINDS: list[dict[str, Any]] = [
    {},
    {"learn": "coreset", "local": True, "neighbours": 3},
    {"per_cluster": True},
    {"cells": "image", "learn": "sample"},
    {"learn": "gaussian"},
    {"stride": 2, "reduce": "top"},
    {"blur": 2},
]


@pytest.mark.parametrize("changes", KINDS)
def test_the_score_is_of_the_map_before_it_is_blurred(changes: dict[str, Any]) -> None:
    made, maps = learned(**changes)
    score, field = made(maps, NO_CLUSTER)
    side = {"image": 1}.get(made.settings.cells, 3 if made.settings.stride == 2 else 6)
    assert score.shape == (2,) and field.shape == (2, side, side)
    distances = made.ordinary(made.cells(maps), NO_CLUSTER) / made.patch_radius
    assert torch.equal(score, made.reduce(distances)) and (field >= 0).all()
    assert torch.equal(field, distances) == (made.settings.blur == 0)


@pytest.mark.parametrize("changes", KINDS)
def test_a_bank_of_saved_tensors_gives_the_same_scores(changes: dict[str, Any]) -> None:
    made, maps = learned(**changes)
    again = Bank.of(made.settings, {name: value.clone() for name, value in made.state_dict().items()})
    for wanted, found in zip(made(maps, NO_CLUSTER), again(maps, NO_CLUSTER), strict=True):
        assert torch.equal(wanted, found)


def test_the_patch_radius_is_what_scores_count_in() -> None:
    made, maps = learned()
    score, field = made(maps, NO_CLUSTER)
    made.patch_radius.fill_(1.0)
    assert torch.allclose(made(maps, NO_CLUSTER)[0], score / 2) and torch.allclose(made(maps, NO_CLUSTER)[1], field / 2)


def test_one_strange_place_moves_the_maximum_and_hardly_the_mean() -> None:
    for reduce, least, most in (("max", 3.0, 1e9), ("mean", 1.0, 1.6)):
        made, maps = learned(reduce=reduce)
        good = made(maps, NO_CLUSTER)[0]
        maps["a"] = maps["a"].clone()
        maps["a"][0, :, 2, 3] += 20
        found = made(maps, NO_CLUSTER)[0] / good
        assert found[1] == 1.0 and (least < float(found[0]) < most or reduce == "mean")


@pytest.mark.parametrize(
    "changes",
    [
        {"learn": "gaussian", "cells": "image"},
        {"learn": "gaussian", "per_cluster": True},
        {"learn": "gaussian", "local": True},
        {"layers": ()},
        {"learn": "kmedoids"},
        {"size": 0},
        {"dim": 500},
        {"stride": 5},
        {"whiten": 0.6},
        {"top_share": 0.0},
        {"regularise": 0.0},
        {"neighbours": 0},
        {"bank": "big"},
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BankSettings(**changes)


def test_the_message_says_what_a_gaussian_needs() -> None:
    with pytest.raises(ValidationError, match="expected cells: patches, per_cluster: false and local: false"):
        BankSettings(learn="gaussian", cells="image")
