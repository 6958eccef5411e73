from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("apsw", reason="apsw is not installed: no disk whose power can be cut")

from tests.faults.power_cut import cut_repeatedly

SEED = 20_261_121


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A cut leaves what it wants to; the outbox says so each time."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def test_no_committed_result_is_lost_at_a_power_cut_and_the_file_opens_again() -> None:
    tally = cut_repeatedly(200, SEED)
    assert tally.cuts == 200 and tally.committed > 1000
    assert (tally.lost, tally.undone, tally.unusable) == (0, 0, 0)


def test_control_synchronous_normal_loses_committed_results() -> None:
    tally = cut_repeatedly(100, SEED, {"PRAGMA synchronous=FULL": "PRAGMA synchronous=NORMAL"})
    assert tally.lost > 0 and tally.unusable == 0


def test_control_without_syncs_files_become_unusable() -> None:
    assert cut_repeatedly(200, SEED, {"PRAGMA synchronous=FULL": "PRAGMA synchronous=OFF"}).unusable > 0
