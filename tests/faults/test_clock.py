"""The wall clock jumps by hours and decades, and back: only timestamps change."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shlex
import sqlite3
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from edge_dkm import clock
from edge_dkm.outbox import Limits, Outbox
from edge_dkm.outbox.table import Table
from tests.broker import Mosquitto, Subscriber, needs_mosquitto
from tests.faults.station import RealStation, line_settings
from tests.outboxes import draft
from tests.waiting import wait_until

JUMPS = 50
TIMES = (
    "+0",
    "+3600",
    "-3600",
    "+315360000",
    "-315360000",
    "1970-01-01 00:00:05",
    "2038-01-19 03:14:05",
    "2099-12-31 23:59:58",
)
YEAR_S = 365.25 * 86_400


def library() -> Path | None:
    """Debian's libfaketime for programs with threads."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class FakeClock:
    """The wall clock of a station that is started while it is entered, and not of its children: they read no wall clock.

    The loader takes the library: a variable LD_PRELOAD would reach the camera processes, which are given no other variable of it,
    and then the monotonic clock would be false there too.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._file, self._patch = folder / "now", patch
        self._python = folder / "python"
        loader = next(Path("/lib64").glob("ld-linux-*.so.2"))
        words = [loader, "--preload", library(), "--argv0", sys.executable, os.path.realpath(sys.executable)]
        self._python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        self._python.chmod(0o755)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        self.jump("+0")
        with self._patch.context() as patch:
            patch.setattr(sys, "executable", str(self._python))
            patch.setenv("FAKETIME_TIMESTAMP_FILE", str(self._file))
            patch.setenv("FAKETIME_NO_CACHE", "1")
            patch.setenv("DONT_FAKE_MONOTONIC", "1")
            patch.setenv("TZ", "UTC")
            yield

    def jump(self, to: str) -> None:
        draft = self._file.with_suffix(".new")
        draft.write_text(f"{to}\n")
        draft.replace(self._file)  # never half a time


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    started = Mosquitto(tmp_path)
    yield started
    started.kill()


@pytest.mark.broker
@needs_mosquitto
@pytest.mark.skipif(library() is None, reason="faketime is not installed (apt install faketime)")
def test_a_line_whose_clock_jumps_loses_nothing_and_takes_nothing_for_stuck_or_old(
    broker: Mosquitto, tiny_model_path: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, rng = FakeClock(tmp_path, monkeypatch), random.Random(11)
    camera = f"{{top: {{source: '{image_folder / 'disc'}', pace: source, fps: 20, loop: true, policy: every}}}}"
    settings = line_settings(tiny_model_path, tmp_path / "state", broker.port, cameras=camera)
    subscriber = Subscriber(broker.port)
    with fake.entered():
        station = RealStation(settings, tmp_path / "station")
    with station, contextlib.closing(subscriber):
        wait_until(lambda: len(subscriber.of("dkm.result/1")) >= 3, timeout_s=60)
        for n in range(JUMPS):
            before = len(subscriber.of("dkm.result/1"))
            to = TIMES[n] if n < len(TIMES) else rng.choice(TIMES)
            fake.jump(to)
            wait_until(lambda before=before: len(subscriber.of("dkm.result/1")) >= before + 2)
            if to[0].isdigit():  # parts that were on their way still have the time before it
                wait_until(lambda to=to: any(result["ts"][:4] == to[:4] for result in subscriber.of("dkm.result/1")))
        assert station.stop() == 0, station.log()
        wait_until(lambda: "stopped" in [m["state"] for m in subscriber.of("dkm.status/1")])
        results = subscriber.of("dkm.result/1")
        stamps = [datetime.fromisoformat(result["ts"]) for result in results]
        assert {1970, 2038, 2099} <= {stamp.year for stamp in stamps}, "the clock did not jump"
        assert [result["cseq"] for result in results] == list(range(1, len(results) + 1)) and len(results) > 2 * JUMPS
        assert len({result["result_id"] for result in results}) == len(results)
        assert subscriber.of("dkm.gap/1") == [] and {result["state"] for result in results} == {"completed"}
        assert [m["state"] for m in subscriber.of("dkm.status/1")] == [
            "online",
            "stopped",
        ]  # no time-out, no second connection
        assert {m["code"] for m in subscriber.of("dkm.alarm/1")} <= {"M-NO-CONSUMER", "S-CLOCK"}
        health = subscriber.of("dkm.health/1")
        assert health and "stuck" not in {stage["state"] for m in health for stage in m["stages"].values()}
        assert "restart" not in station.log() and "stuck" not in station.log()
    with contextlib.closing(sqlite3.connect(tmp_path / "state" / "outbox.db")) as db:  # journal: kept for replays
        assert db.execute("SELECT COUNT(*) FROM outbox WHERE cseq IS NOT NULL").fetchone()[0] == len(results)


def _commit_and_jump(path: Path, patch: pytest.MonkeyPatch) -> tuple[int, dict[str, dict[str, int]]]:
    """Rows that are left, and what was dropped, after jumps of all sizes with results in between."""
    box = Outbox(path, "st1", lambda camera: f"t/{camera}/result", Limits(max_age_h=1, keep_h=1), "journal")
    with contextlib.closing(box):
        offsets = [0, 3600, -3600, 10 * YEAR_S, -10 * YEAR_S, -time.time() + 5, 2**31 - time.time(), 0]
        for n, offset in enumerate(itertools.islice(itertools.cycle(offsets), JUMPS)):
            patch.setattr(clock, "wall_s", lambda offset=offset: time.time() + offset)
            box.commit([draft("top")])
            if n % 2:
                box.mark_sent([row.seq for row in box.unsent(0, 1)])
            box.trim()
        status = box.status()
        return status.rows + status.sent_rows, status.dropped


def test_ages_do_not_follow_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _commit_and_jump(tmp_path / "outbox.db", monkeypatch) == (JUMPS, {})


def test_control_ages_by_the_wall_clock_alone_drop_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Table, "age_s", lambda self, t_wall, t_mono, boot: clock.wall_s() - t_wall)
    rows, dropped = _commit_and_jump(tmp_path / "outbox.db", monkeypatch)
    assert rows < JUMPS and dropped["top"]["age"] > 0


def test_what_was_written_before_the_clock_was_set_is_not_old_after_a_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(clock, "wall_s", lambda: 300.0)  # a device without a battery for its clock
        patch.setattr(clock, "boot_id", lambda: "first")
        box = Outbox(tmp_path / "outbox.db", "st1", lambda camera: f"t/{camera}/result")
        box.commit([draft("top")])
        box.close()
    box = Outbox(tmp_path / "outbox.db", "st1", lambda camera: f"t/{camera}/result")
    with contextlib.closing(box):
        box.trim()
        assert (box.status().rows, box.status().dropped) == (1, {})
