from __future__ import annotations

import pytest
import torch

from trainer.convergence import Convergence
from trainer.errors import CollapseError

Z = torch.eye(3).repeat(10, 1) + 0.01 * torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
MU = torch.eye(3)
LABELS = torch.arange(3).repeat(10)


def watched(interval_steps: int = 10) -> Convergence:
    convergence = Convergence(30, 3, tol=0.05, interval_steps=interval_steps)
    convergence.begin(Z)
    return convergence


def test_two_quiet_epochs_in_a_row_are_needed() -> None:
    convergence = watched()
    for step, reached in ((0, False), (10, False), (20, True)):
        convergence.look(LABELS, Z, MU, step)
        assert convergence.is_reached == reached


def test_refreshes_within_an_epoch_do_not_count() -> None:
    convergence = watched()
    for step in range(0, 10, 2):
        convergence.look(LABELS, Z, MU, step)
    assert not convergence.is_reached and convergence.figures["churn"] == 1.0


def test_a_restless_epoch_starts_the_count_again() -> None:
    convergence = watched()
    moved = LABELS.clone()
    moved[:6] = (moved[:6] + 1) % 3  # 6 of 30
    for step, labels in ((0, LABELS), (10, LABELS), (20, moved), (30, moved)):
        convergence.look(labels, Z, MU, step)
    assert not convergence.is_reached
    assert convergence.figures["churn"] == pytest.approx(0.0)


def test_hard_labels_are_guarded_as_soft_ones() -> None:
    convergence = watched()
    with pytest.raises(CollapseError, match="guard n_eff"):
        convergence.look(torch.zeros(30, dtype=torch.int64), Z, MU, 0)


def test_a_restored_state_goes_on_where_it_stopped() -> None:
    first = watched()
    first.look(LABELS, Z, MU, 0)
    first.look(LABELS, Z, MU, 10)
    second = Convergence(30, 3, 0.05, 10)
    second.load_state(first.state())
    second.look(LABELS, Z, MU, 20)
    assert second.is_reached
