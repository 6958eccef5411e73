from __future__ import annotations

from pathlib import Path

import pytest

from edge_dkm.outbox import Outbox
from tests.faults import small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Where a scenario mounts its small disk; its ledger lies beside it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not small_disk.is_permitted(folder):
        pytest.skip("this machine does not let a user mount a tmpfs")
    return folder


def test_a_full_disk_drains_by_the_ballast_which_comes_back(disk: Path) -> None:
    found = small_disk.run("drain", disk, Outbox.ballast_bytes)
    assert found == {"had_ballast": True, "left": 0, "problem": None, "left_with_room": 0, "restored": True}


def test_control_without_ballast_it_is_stuck_until_there_is_room(disk: Path) -> None:
    found = small_disk.run("drain", disk, 0)
    assert found["left"] > 900 and "full" in found["problem"] and found["left_with_room"] == 0


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_on_a_full_disk_received_and_declared_are_what_was_produced(disk: Path, policy: str) -> None:
    found = small_disk.run("starve", disk, policy)
    assert found["produced"] == 10_001 and found["exact"] and found["overlap"] == 0
    assert found["declared"] > 1000 and set(found["dropped"]["top"]) == {"disk_full"}


def test_on_a_full_disk_block_waits_and_drops_nothing(disk: Path) -> None:
    found = small_disk.run("starve", disk, "block")
    assert found["blocked"] and found["exact"] and found["declared"] == 0


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest", "block"])
def test_kill_9_on_a_disk_that_others_fill_loses_nothing_undeclared(disk: Path, policy: str) -> None:
    found = small_disk.run("chaos", disk, disk.parent / "ledger", policy, 7, 8)
    assert found["promised"] > 0 and found["fills"] > 0
    assert (found["lost"], found["unaccounted"], found["unheard_of"], found["overlap"]) == (0, 0, 0, 0)
    assert (found["ended_itself"], found["quarantined"]) == (0, "")
