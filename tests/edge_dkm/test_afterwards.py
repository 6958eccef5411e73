"""What follows a part never holds the line up, never sees the camera's memory, and falls alone."""

from __future__ import annotations

import logging
import threading

import numpy as np
import pytest

from edge_dkm import afterwards as afterwards_module
from edge_dkm.afterwards import MAX_WAITING, Afterwards
from edge_dkm.message import TriggerInfo
from edge_dkm.pipeline import Outcome
from edge_dkm.results import Case
from tests.waiting import wait_until


def outcome(n: int = 1, image: np.ndarray | None = None) -> Outcome:
    case = Case(f"r{n}", "st1", "top", TriggerInfo(kind="free", id=n), "ts", 0.0, 0.0)
    return Outcome(case, None, None, None, image)


class Notes:
    """A follower that keeps what it sees; may be held up, or fail."""

    def __init__(self, wants: bool = False, fails_in: str = "") -> None:
        self.seen: list[Outcome] = []
        self.wants, self.fails_in, self.closed, self.asked = wants, fails_in, 0, 0
        self.threads: set[str] = set()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def _fail(self, where: str) -> None:
        if where == self.fails_in:
            raise ValueError(f"planned failure in {where}")

    def wants_image(self, outcome: Outcome) -> bool:
        self._fail("wants_image")
        self.asked += 1
        return self.wants

    def follow(self, outcome: Outcome) -> None:
        self.threads.add(threading.current_thread().name)
        assert self.may_go_on.wait(20)
        self._fail("follow")
        self.seen.append(outcome)

    def close(self) -> None:
        self._fail("close")
        self.closed += 1

    @property
    def ids(self) -> list[str]:
        return [outcome.case.result_id for outcome in self.seen]


def test_every_follower_sees_every_part_in_order_on_a_thread_of_its_own() -> None:
    first, second = Notes(), Notes()
    afterwards = Afterwards([first])
    afterwards.add(second)
    afterwards.start()
    for n in range(5):
        afterwards.committed(outcome(n))
    assert afterwards.close()
    assert first.ids == second.ids == [f"r{n}" for n in range(5)]
    assert first.threads == second.threads == {"afterwards"}
    assert (first.closed, second.closed, afterwards.left_out) == (1, 1, 0)


def test_a_follower_gets_a_copy_that_outlives_the_camera_s_memory() -> None:
    notes = Notes(wants=True)
    afterwards = Afterwards([notes])
    ring = np.full((4, 6, 3), 7, np.uint8)
    afterwards.committed(outcome(1, ring))
    ring[:] = 9  # the camera's process writes its next picture there
    afterwards.start()
    assert afterwards.close()
    (image,) = [seen.image for seen in notes.seen]
    assert image is not None and image.shape == (4, 6, 3) and np.all(image == 7)
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 1


def test_no_picture_is_copied_where_nobody_wants_it() -> None:
    notes = Notes(wants=False)
    afterwards = Afterwards([notes])
    afterwards.start()
    afterwards.committed(outcome(1, np.zeros((4, 6, 3), np.uint8)))
    assert afterwards.close()
    assert [seen.image for seen in notes.seen] == [None]


def test_each_is_asked_for_every_part_and_only_those_who_want_the_picture_get_it() -> None:
    eager, modest, late = Notes(wants=True), Notes(wants=False), Notes(wants=True)
    afterwards = Afterwards([eager, modest, late])
    afterwards.start()
    for n in range(3):
        afterwards.committed(outcome(n, np.zeros((4, 6, 3), np.uint8)))
    assert afterwards.close()
    assert [eager.asked, modest.asked, late.asked] == [3, 3, 3]
    assert [seen.image is None for seen in modest.seen] == [True, True, True]
    assert all(one.image is other.image is not None for one, other in zip(eager.seen, late.seen, strict=True))


def test_a_slow_follower_costs_parts_and_no_time_of_the_line(caplog: pytest.LogCaptureFixture) -> None:
    notes = Notes()
    notes.may_go_on.clear()
    afterwards = Afterwards([notes])
    afterwards.start()
    afterwards.committed(outcome(0))
    wait_until(lambda: bool(notes.threads))  # it hangs on part 0
    for n in range(1, MAX_WAITING + 11):
        afterwards.committed(outcome(n))  # would never return if it waited
    assert afterwards.left_out == 10
    notes.may_go_on.set()
    with caplog.at_level(logging.WARNING):
        assert afterwards.close()
    assert notes.ids == [f"r{n}" for n in range(MAX_WAITING + 1)]  # the oldest, in order
    assert "10 parts" in caplog.text and "results are complete" in caplog.text


def test_pictures_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(afterwards_module, "MAX_WAITING_BYTES", 250)
    afterwards = Afterwards([Notes(wants=True)])
    for n in range(3):
        afterwards.committed(outcome(n, np.zeros((10, 10, 1), np.uint8)))
    assert afterwards.left_out == 1
    alone = Afterwards([Notes(wants=True)])
    alone.committed(outcome(1, np.zeros((10, 100, 1), np.uint8)))
    assert alone.left_out == 0  # one larger than the bound still passes, or nothing ever would


@pytest.mark.parametrize("where", ["wants_image", "follow", "close"])
def test_a_follower_that_fails_is_switched_off_alone_and_said_once(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken, sound = Notes(wants=True, fails_in=where), Notes(wants=True)
    afterwards = Afterwards([broken, sound])
    afterwards.start()
    for n in range(4):
        afterwards.committed(outcome(n, np.zeros((2, 2, 3), np.uint8)))
    assert afterwards.close()
    assert sound.ids == ["r0", "r1", "r2", "r3"] and sound.closed == 1
    assert all(seen.image is not None for seen in sound.seen)
    assert [record.exc_info is not None for record in caplog.records] == [True]


def test_closing_says_when_a_follower_hangs() -> None:
    notes = Notes()
    notes.may_go_on.clear()
    afterwards = Afterwards([notes])
    afterwards.start()
    afterwards.committed(outcome())
    assert not afterwards.close(0.05)
    notes.may_go_on.set()
    assert afterwards.close()


def test_parts_after_the_closing_are_left_out_and_without_followers_nothing_is_done() -> None:
    afterwards = Afterwards([Notes()])
    assert afterwards.close()  # never started: nothing to wait for
    afterwards.committed(outcome())
    assert afterwards.left_out == 1
    idle = Afterwards()
    idle.start()
    idle.committed(outcome())
    assert idle.close() and idle.left_out == 0
