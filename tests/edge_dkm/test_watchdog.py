from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from edge_dkm.errors import EdgeError
from edge_dkm.message import StageHealth
from edge_dkm.service.restarts import RestartCounts
from edge_dkm.service.watchdog import MAX_RESTARTS, SETTLE_S, WITHIN_S, StuckError, Watchdog


def stage(state: Literal["ok", "idle", "degraded", "stuck"], age_s: float = 12.0) -> StageHealth:
    return StageHealth(state=state, count=7, age_s=age_s)


class Camera:
    """A stage that can be restarted; `cures` says whether that helps."""

    def __init__(self, cures: bool) -> None:
        self.cures, self.is_stuck, self.restarts = cures, True, 0

    def restart(self) -> None:
        self.restarts += 1
        self.is_stuck = not self.cures

    def health(self) -> dict[str, StageHealth]:
        return {"cam:top": stage("stuck" if self.is_stuck else "ok")}


def judge_each_second(watchdog: Watchdog, stages: Callable[[], dict[str, StageHealth]], seconds: int) -> float | None:
    """When the process had to end, in seconds from the start; None where it goes on."""
    for now_s in range(seconds):
        if watchdog.judge(stages(), float(now_s)).error is not None:
            return float(now_s)
    return None


def test_what_is_not_stuck_is_left_alone_and_systemd_is_told_so(tmp_path: Path) -> None:
    camera = Camera(cures=True)
    watchdog = Watchdog(RestartCounts(tmp_path), {"cam:top": camera.restart})
    judgement = watchdog.judge({"cam:top": stage("degraded", 9999), "infer": stage("idle"), "mqtt": stage("ok")}, 0)
    assert (judgement.may_ping, judgement.error, judgement.restarted, camera.restarts) == (True, None, (), 0)
    assert not (tmp_path / "restarts.json").exists()


def test_a_stuck_camera_is_restarted_and_the_line_goes_on(tmp_path: Path) -> None:
    camera = Camera(cures=True)
    counts = RestartCounts(tmp_path)
    watchdog = Watchdog(counts, {"cam:top": camera.restart})
    first = watchdog.judge(camera.health(), 100.0)
    assert (first.stuck, first.restarted, first.may_ping, first.error) == (("cam:top",), ("cam:top",), False, None)
    second = watchdog.judge(camera.health(), 101.0)
    assert (second.may_ping, camera.restarts, counts.counts()) == (True, 1, {"cam:top": 1})


def test_a_restart_is_given_time_to_take(tmp_path: Path) -> None:
    camera = Camera(cures=False)
    watchdog = Watchdog(RestartCounts(tmp_path), {"cam:top": camera.restart})
    for now_s in (0.0, 1.0, SETTLE_S - 0.1):
        assert not watchdog.judge(camera.health(), now_s).may_ping
    assert camera.restarts == 1
    watchdog.judge(camera.health(), SETTLE_S)
    assert camera.restarts == 2


def test_a_stage_without_a_hook_ends_the_process_and_says_which_how_long_and_what_waits(tmp_path: Path) -> None:
    counts = RestartCounts(tmp_path)
    stages = {"infer": stage("stuck", 12.34), "commit": stage("idle")}
    error = Watchdog(counts, {}).judge(stages, 0.0, {"infer": "5 frames wait"}).error
    assert isinstance(error, StuckError) and isinstance(error, EdgeError) and error.exit_code == 1
    assert str(error).startswith("W-STUCK stage infer has done nothing for 12.3 s while 5 frames wait; it cannot be")
    assert (error.stage, error.age_s, counts.counts()) == ("infer", 12.34, {"process": 1})


def test_three_restarts_that_do_not_help_end_the_process_before_systemd_has_to(tmp_path: Path) -> None:
    camera = Camera(cures=False)
    counts = RestartCounts(tmp_path)
    ended_s = judge_each_second(Watchdog(counts, {"cam:top": camera.restart}), camera.health, 60)
    assert ended_s == MAX_RESTARTS * SETTLE_S < 30 - 10  # WatchdogSec, less the longest time between two words
    assert counts.counts() == {"cam:top": 3, "process": 1}


def test_a_camera_that_gets_stuck_again_and_again_ends_the_process_but_not_one_that_does_so_rarely(
    tmp_path: Path,
) -> None:
    def stuck_every(period_s: int) -> float | None:
        now = [0]
        camera = Camera(cures=True)

        def health() -> dict[str, StageHealth]:
            camera.is_stuck = camera.is_stuck or now[0] % period_s == 0
            now[0] += 1
            return camera.health()

        return judge_each_second(Watchdog(RestartCounts(tmp_path), {"cam:top": camera.restart}), health, 4000)

    assert stuck_every(60) == 180.0  # the fourth time within five minutes
    assert stuck_every(int(WITHIN_S) // 2) is None


def test_a_hook_that_fails_counts_as_a_restart_that_did_not_help(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no child")

    watchdog = Watchdog(RestartCounts(tmp_path), {"cam:top": fail})
    assert judge_each_second(watchdog, lambda: {"cam:top": stage("stuck")}, 60) == MAX_RESTARTS * SETTLE_S


def test_one_camera_being_restarted_does_not_hide_another_stage_that_is_stuck(tmp_path: Path) -> None:
    camera = Camera(cures=True)
    watchdog = Watchdog(RestartCounts(tmp_path), {"cam:top": camera.restart})
    judgement = watchdog.judge({**camera.health(), "commit": stage("stuck")}, 0.0)
    assert judgement.restarted == ("cam:top",) and judgement.error is not None
    assert judgement.error.stage == "commit" and "also stuck: cam:top" in str(judgement.error)


def test_counts_go_on_in_the_next_process(tmp_path: Path) -> None:
    RestartCounts(tmp_path).add("cam:top")
    later = RestartCounts(tmp_path)
    later.add("cam:top")
    later.add("process")
    assert RestartCounts(tmp_path).counts() == {"cam:top": 2, "process": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["restarts.json"]


GOOD = b'{"version": 1, "restarts": {"cam:top": 2}}'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-5],
        GOOD.replace(b"2", b"-2"),
        GOOD.replace(b"1", b"9"),
        b"[" * 50_000,
        b"\xff" * 9,
        GOOD + b" " * 70_000,
    ],
    ids=["empty", "truncated", "negative", "other version", "deep", "binary", "huge"],
)
def test_a_damaged_file_is_moved_aside_and_counting_starts_again(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "restarts.json").write_bytes(data)
    (tmp_path / "restarts.json.corrupt-1").write_bytes(b"of an earlier time")
    counts = RestartCounts(tmp_path)
    assert counts.counts() == {} and counts.quarantined == tmp_path / "restarts.json.corrupt-2"
    assert counts.quarantined.read_bytes() == data
    counts.add("cam:top")
    assert RestartCounts(tmp_path).counts() == {"cam:top": 1}


def test_control_an_undamaged_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "restarts.json").write_bytes(GOOD)
    counts = RestartCounts(tmp_path)
    assert counts.counts() == {"cam:top": 2} and counts.quarantined is None


def test_a_folder_in_its_place_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "restarts.json").mkdir()
    counts = RestartCounts(tmp_path)
    counts.add("infer")
    assert RestartCounts(tmp_path).counts() == {"infer": 1}


def test_a_folder_that_cannot_be_written_is_said_once_and_counting_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = RestartCounts(tmp_path)
    (tmp_path / "restarts.json.new").mkdir()  # what it wants to write beside
    counts.add("infer")
    counts.add("infer")
    assert counts.counts() == {"infer": 2}
    assert len(caplog.records) == 1 and "counted in memory" in caplog.records[0].message


def test_a_kill_between_write_and_rename_leaves_the_old_counts(tmp_path: Path) -> None:
    RestartCounts(tmp_path).add("infer")
    (tmp_path / "restarts.json.new").write_bytes(b'{"version": 1, "rest')
    assert RestartCounts(tmp_path).counts() == {"infer": 1}


HANGS = """
import threading, signal
from edge_dkm.service.watchdog import cancel_end, end_at_latest
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
end_at_latest(0.3)
{then}
"""


def ended(then: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", HANGS.format(then=then)], capture_output=True, text=True, timeout=60)


def test_a_process_whose_end_hangs_is_ended_and_shows_where_it_hung() -> None:
    done = ended("def wedged():\n    threading.Event().wait()\nwedged()")
    assert done.returncode == 1 and "in wedged" in done.stderr


def test_it_is_ended_even_where_no_python_can_run() -> None:
    # PyDLL keeps the interpreter's lock while it sleeps, as a broken driver does.
    done = ended("import ctypes; ctypes.PyDLL(None).sleep(50)")
    assert done.returncode == 1 and "Timeout" in done.stderr


def test_control_a_process_that_ends_in_time_is_not_touched() -> None:
    done = ended("cancel_end(); threading.Event().wait(0.6)")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_kill_while_counting_never_leaves_a_damaged_file(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from edge_dkm.service.restarts import RestartCounts
counts = RestartCounts(Path({str(tmp_path)!r}))
while True:
    counts.add("infer")
    print(counts.counts()["infer"], flush=True)
"""
    said = 0
    for lines in (3, 17, 40):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(lines):
                said = int(child.stdout.readline())
            os.kill(child.pid, signal.SIGKILL)
            rest = child.stdout.read().split()
        said = int(rest[-1]) if rest else said
        counts = RestartCounts(tmp_path)
        assert counts.quarantined is None and counts.counts()["infer"] >= said
    assert json.loads((tmp_path / "restarts.json").read_text())["version"] == 1
