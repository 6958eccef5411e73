from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.errors import DataError
from trainer.feature_store import FeatureStore


@pytest.mark.parametrize("on_disk", [False, True])
def test_row_i_is_sample_i_whatever_the_order_of_writing(on_disk: bool, tmp_path: Path) -> None:
    rows = torch.randn(10, 3)
    store = FeatureStore(10, 3, tmp_path / "deep" / "rows.f32" if on_disk else None)
    for index in torch.randperm(10).split(4):
        store.write(index, rows[index])
    assert torch.equal(store.whole(), rows)


def test_a_pass_that_missed_a_sample_is_refused() -> None:
    store = FeatureStore(5, 2)
    store.write(torch.tensor([0, 1, 3, 4]), torch.zeros(4, 2))
    with pytest.raises(DataError, match=r"1 of 5 samples have no features \(the first: 2\)"):
        store.whole()


@pytest.mark.parametrize("index", [[0, 1, 1], [0, 2]])
def test_a_sample_that_comes_twice_is_refused(index: list[int]) -> None:
    store = FeatureStore(5, 2)
    store.write(torch.tensor([2]), torch.zeros(1, 2))
    with pytest.raises(DataError, match=f"sample {1 if 1 in index else 2} came twice"):
        store.write(torch.tensor(index), torch.zeros(len(index), 2))


def test_a_place_that_cannot_hold_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot hold 0 MB of features"):
        FeatureStore(2, 2, tmp_path / "file" / "rows.f32")
