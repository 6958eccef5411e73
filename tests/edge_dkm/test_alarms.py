from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_dkm import alarms as alarms_module
from edge_dkm.alarms import Alarms, code_of
from edge_dkm.errors import UsageError
from edge_dkm.message import Alarm

BASE = "dkm/v1/st1"


class Said:
    """What was announced: (topic level, active, detail)."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, topic: str, build: Callable[[int], Alarm]) -> None:
        self.messages.append((topic, json.loads(build(3).payload())))

    def short(self) -> list[tuple[str, bool, str]]:
        return [(topic.removeprefix(f"{BASE}/alarm/"), m["active"], m["detail"]) for topic, m in self.messages]


@pytest.fixture
def said() -> Said:
    return Said()


def test_an_alarm_is_said_when_it_is_raised_and_when_it_is_over(said: Said) -> None:
    alarms = Alarms(BASE, said)
    for _ in range(3):
        alarms.raise_("M-NO-CONSUMER", "nobody subscribes")
    alarms.clear("M-NO-CONSUMER")
    alarms.clear("M-NO-CONSUMER")
    assert said.short() == [("M-NO-CONSUMER", True, "nobody subscribes"), ("M-NO-CONSUMER", False, "")]
    raised, cleared = (message for _, message in said.messages)
    assert raised["schema"] == "dkm.alarm/1" and raised["station"] == "st1" and raised["session"] == 3
    assert raised["since"] <= cleared["since"] and "camera" not in raised


def test_alarms_of_cameras_stand_side_by_side(said: Said) -> None:
    alarms = Alarms(BASE, said)
    alarms.raise_("C-OFFLINE", "refused", "top")
    alarms.raise_("C-OFFLINE", "hangs", "side")
    alarms.clear("C-OFFLINE", "top")
    assert [(a.code, a.camera, a.detail) for a in alarms.active()] == [("C-OFFLINE-side", "side", "hangs")]
    assert said.short()[-1] == ("C-OFFLINE-top", False, "") and said.messages[0][1]["camera"] == "top"


def test_a_changed_detail_is_said_once_in_ten_seconds_and_never_forgotten(
    said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarms = Alarms(BASE, said)
    for n in range(50):
        alarms.raise_("S-FULL", f"dropped {n}")
        alarms.flush()
    assert said.short() == [("S-FULL", True, "dropped 0")] and alarms.active()[0].detail == "dropped 49"
    monkeypatch.setattr(alarms_module, "DETAIL_EVERY_S", 0.0)
    for _ in range(3):
        alarms.flush()
    assert said.short() == [("S-FULL", True, "dropped 0"), ("S-FULL", True, "dropped 49")]
    assert said.messages[0][1]["since"] == said.messages[1][1]["since"]


def test_set_raises_with_a_detail_and_clears_without(said: Said) -> None:
    alarms = Alarms(BASE, said)
    for detail in (None, "2 MB free", "2 MB free", None):
        alarms.set("S-FULL", detail)
    assert said.short() == [("S-FULL", True, "2 MB free"), ("S-FULL", False, "")]


def test_what_was_raised_when_the_process_died_is_cleared_at_the_next_start(said: Said, tmp_path: Path) -> None:
    memory = tmp_path / "alarms.json"
    first = Alarms(BASE, Said(), memory)
    first.raise_("C-OFFLINE", "refused", "top")
    first.raise_("S-FULL", "x")
    first.clear("S-FULL")
    again = Alarms(BASE, said, memory)
    assert said.short() == [("C-OFFLINE-top", False, alarms_module.RESTARTED)] and again.active() == []
    assert said.messages[0][1]["camera"] == "top"
    third = Said()
    Alarms(BASE, third, memory)
    assert third.messages == []


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"a/b#": null, "X-1": 7}', b"[" * 100_000])
def test_a_damaged_memory_stops_nothing(said: Said, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "alarms.json").write_bytes(content)
    Alarms(BASE, said, tmp_path / "alarms.json").raise_("S-FULL", "x")
    assert [m for m in said.short() if m[1]] == [("S-FULL", True, "x")]


def test_a_memory_that_cannot_be_written_stops_nothing(said: Said, tmp_path: Path) -> None:
    Alarms(BASE, said, tmp_path / "missing" / "alarms.json").raise_("S-FULL", "x")
    assert said.short() == [("S-FULL", True, "x")]


@pytest.mark.parametrize("code", ["", "a/b", "S+", "#", "é", "x" * 65, "C.STALL"])
def test_a_code_is_one_level_of_a_topic(code: str) -> None:
    with pytest.raises(UsageError, match="alarm code"):
        code_of(code, None)


def test_threads_that_raise_the_same_alarm_say_it_once(said: Said) -> None:
    alarms, start = Alarms(BASE, said), threading.Barrier(8)

    def raise_() -> None:
        start.wait()
        for _ in range(200):
            alarms.raise_("S-FULL", "x")

    threads = [threading.Thread(target=raise_) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said.short() == [("S-FULL", True, "x")]
