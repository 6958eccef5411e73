from __future__ import annotations

import os

import pytest
import torch

from tests.ranks import run_on_ranks
from trainer import ranks


def who(add: int) -> tuple[int, int, float, int]:
    here = ranks.current()
    return here.index, here.count, float(here.total(torch.tensor(float(here.index + add)))), os.getpid()


def fail_on_one() -> None:
    if ranks.current().index == 1:
        raise ValueError("the second one")
    ranks.current().wait()


def die() -> None:
    if ranks.current().index == 1:
        os._exit(9)


@pytest.mark.slow  # starts processes
def test_functions_run_on_real_ranks_which_stay_until_one_fails() -> None:
    first, again = run_on_ranks(2, who, 1), run_on_ranks(2, who, 1)
    assert [row[:3] for row in first] == [(0, 2, 3.0), (1, 2, 3.0)] and first == again
    with pytest.raises(ValueError, match="the second one"):
        run_on_ranks(2, fail_on_one)
    assert {row[3] for row in run_on_ranks(2, who, 1)}.isdisjoint(row[3] for row in first)


@pytest.mark.slow  # starts processes
def test_a_rank_that_ends_is_an_error() -> None:
    with pytest.raises(ChildProcessError, match="rank 1 ended, 9"):
        run_on_ranks(2, die)
