"""Numbers too small for a processor to be quick at: zero while training, in every thread that helps, and as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.trainer.test_fitting import dec
from trainer import FitOptions, denormals, fit
from trainer.denormals import denormals_as_zero
from trainer.stage import OptimizerSettings

MANY = 1 << 20  # values: PyTorch shares an operation on so many among its threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def tenth_of_the_smallest() -> float:
    return float((torch.tensor(1e-38) * 0.1).double())


def share_of_zeros() -> float:
    """Of the tenths of many numbers, each too small, half of which another thread computes; counted as integers, which no flag rounds."""
    tenths = torch.full((MANY,), 2e-38) * 0.1
    return float((tenths.view(torch.int32) == 0).double().mean())


def test_denormals_are_zero_inside_and_as_they_were_outside() -> None:
    assert tenth_of_the_smallest() > 0
    with denormals_as_zero():
        assert tenth_of_the_smallest() == 0
        with denormals_as_zero():
            pass
        assert tenth_of_the_smallest() == 0
    assert tenth_of_the_smallest() > 0


@pytest.mark.skipif(denormals._openmp() is None, reason="this PyTorch has another OpenMP")
def test_threads_that_were_there_before_flush_as_well_and_no_longer_afterwards(two_threads: None) -> None:
    assert share_of_zeros() == 0  # this starts the second thread
    with denormals_as_zero():
        assert share_of_zeros() == 1
    assert share_of_zeros() == 0


def test_control_without_the_end_of_the_threads_half_of_the_values_stay(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denormals, "_openmp", lambda: None)
    assert share_of_zeros() == 0
    with denormals_as_zero():
        assert share_of_zeros() == 0.5


def test_training_lets_no_average_of_a_dead_weight_sink_below_what_processors_are_quick_at(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    build = OptimizerSettings.build

    def noted(*arguments: object) -> torch.optim.Optimizer:
        seen.append(tenth_of_the_smallest())
        return build(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(OptimizerSettings, "build", noted)
    fit(dec(image_folder), FitOptions(tmp_path / "run"))
    assert seen and not any(seen)
    assert tenth_of_the_smallest() > 0
