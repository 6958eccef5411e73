from __future__ import annotations

import pytest

from edge_dkm import health
from edge_dkm.health import STUCK_S, Stage


class Clock:
    """A monotonic clock that is moved by hand."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    moved = Clock()
    monkeypatch.setattr(health, "time", moved)
    return moved


def test_a_stage_without_work_is_idle_however_long(clock: Clock) -> None:
    stage = Stage(waiting=lambda: False)
    clock.now_s += 1e6
    assert stage.health().state == "idle"


def test_work_that_waits_without_progress_is_stuck_and_progress_frees_it(clock: Clock) -> None:
    stage = Stage(waiting=lambda: True)
    clock.now_s += STUCK_S - 1
    assert stage.health().state == "ok"
    clock.now_s += 2
    assert (stage.health().state, stage.health().age_s) == ("stuck", STUCK_S + 1)
    stage.progress(3)
    assert (stage.health().state, stage.health().count) == ("ok", 3)


def test_a_known_outside_cause_is_degraded_and_not_stuck(clock: Clock) -> None:
    stage = Stage(waiting=lambda: True, excuse=lambda: "broker away")
    clock.now_s += 1000
    assert stage.health().state == "degraded"


def test_work_that_came_after_an_idle_hour_is_not_stuck(clock: Clock) -> None:
    waiting = False
    stage = Stage(waiting=lambda: waiting)
    clock.now_s += 3600
    assert stage.health().state == "idle"
    waiting = True
    clock.now_s += 5
    assert stage.health().state == "ok"
    clock.now_s += STUCK_S
    assert stage.health().state == "stuck"
