"""Every way in which a network camera fails has its code, heals by itself, and leaves the camera beside it alone."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.capture import CameraStatus, Capture
from devices.settings import CameraSettings
from devices.sources import open_source
from devices.triggers import Shot
from tests.faults.mjpeg_camera import MjpegCamera, Mode
from tests.waiting import wait_until

QUICK = {"stall_s": 0.6, "open_timeout_s": 1.0, "checks": {"frozen_frames": 8}}


class Watched:
    """A capture, its shots, and every status it announced."""

    def __init__(self, source: str, **settings: object) -> None:
        self.shots: queue.SimpleQueue[Shot] = queue.SimpleQueue()
        self.seen: list[CameraStatus] = []
        self.capture = Capture(
            "cam",
            CameraSettings.model_validate({"source": source, **QUICK, **settings}),
            lambda _, shot: self.shots.put(shot),
            lambda _: self.seen.append(self.capture.status()),
        )
        self.capture.start()

    @property
    def codes(self) -> list[str | None]:
        return [status.code for status in self.seen]

    def wait_online(self) -> None:
        wait_until(lambda: self.capture.status().state == "online")

    def next_good(self) -> Shot:
        while (shot := self.shots.get(timeout=20)).frame.fault is not None:
            pass
        return shot

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.capture.stop()
        self.capture.join(20)
        assert not self.capture.is_alive()


@pytest.fixture(autouse=True)
def _retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devices.capture.RECONNECT_FIRST_S", 0.05)
    monkeypatch.setattr("devices.capture.RECONNECT_KNOWN_MAX_S", 0.2)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[MjpegCamera, Watched, MjpegCamera, Watched]]:
    """A camera that will fail and one that will not, each watched."""
    with (
        MjpegCamera() as failing,
        MjpegCamera() as healthy,
        Watched(failing.url) as watched,
        Watched(healthy.url) as beside,
    ):
        watched.wait_online()
        beside.wait_online()
        yield failing, watched, healthy, beside


@pytest.mark.parametrize(
    ("mode", "state", "code"),
    [
        ("refuse", "offline", "C-REFUSED"),
        ("hang_on_open", "offline", "C-OPEN-TIMEOUT"),
        ("hang_mid_frame", "offline", "C-STALL"),
        ("trickle", "offline", "C-STALL"),
        ("reset", "offline", "C-LOST"),
        ("eof", "offline", "C-LOST"),
        ("garbage", "offline", "C-LOST"),
        ("unauthorized", "offline", "C-AUTH"),
        ("resized", "offline", "C-CHANGED"),
        ("truncated", "bad", "F-DAMAGED"),
        ("damaged", "bad", "F-DAMAGED"),
        ("frozen", "bad", "F-FROZEN"),
        ("black", "bad", "F-DARK"),
    ],
)
def test_a_failing_camera_is_named_and_heals_while_the_other_misses_nothing(
    pair: tuple[MjpegCamera, Watched, MjpegCamera, Watched], mode: Mode, state: str, code: str
) -> None:
    failing, watched, healthy, beside = pair
    sent, received, said = healthy.frames, beside.capture.status().frames, len(beside.seen)
    watched.seen.clear()
    failing.mode = mode
    wait_until(lambda: code in watched.codes)
    assert next(status.state for status in watched.seen if status.code == code) == state
    failing.mode = "ok"
    watched.wait_online()
    while not watched.shots.empty():
        watched.shots.get_nowait()
    watched.next_good()
    sent = healthy.frames - sent
    wait_until(lambda: beside.capture.status().frames - received >= 0.95 * sent)
    assert healthy.connections == 1 and len(beside.seen) == said  # it never went away, and never said a word


def test_a_faulty_frame_is_a_shot_without_a_picture() -> None:
    with MjpegCamera() as camera, Watched(camera.url) as watched:
        first = watched.next_good()
        camera.mode = "damaged"
        while (shot := watched.shots.get(timeout=20)).frame.fault is None:
            pass
        assert shot.frame.fault.code == "F-DAMAGED" and "rows were filled in" in shot.frame.fault.detail
        assert shot.frame.image.size == 0 and shot.trigger_id > first.trigger_id


def test_control_without_the_damage_test_half_a_picture_passes() -> None:
    with MjpegCamera() as camera, Watched(camera.url, checks={"damaged": False}) as watched:
        watched.next_good()
        camera.mode = "damaged"
        frames = camera.frames
        wait_until(lambda: camera.frames > frames + 20)
        assert watched.capture.status().state == "online"


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGSTOP])
def test_a_camera_process_that_dies_or_hangs_is_replaced_and_numbers_go_on(how: signal.Signals) -> None:
    with MjpegCamera() as camera, Watched(camera.url) as watched:
        watched.next_good()
        before = watched.capture.pid
        assert before is not None
        os.kill(before, how)  # SIGSTOP: what a driver that never returns looks like from outside
        wait_until(lambda: watched.capture.status().restarts == 1)
        watched.wait_online()
        assert watched.capture.pid != before and not Path(f"/proc/{before}").exists()
        assert ("C-STALL" if how == signal.SIGSTOP else "C-CRASH") in watched.codes
        ids = [watched.shots.get(timeout=20).trigger_id for _ in range(watched.shots.qsize() + 5)]
        assert ids == sorted(set(ids))


def test_a_command_that_a_dying_process_did_not_answer_is_answered_by_the_next() -> None:
    with MjpegCamera() as camera, Watched(camera.url, trigger={"kind": "mqtt"}) as watched:
        watched.wait_online()
        watched.capture.fire("first")
        assert watched.shots.get(timeout=20).token == "first"
        assert watched.capture.pid is not None
        os.kill(watched.capture.pid, signal.SIGSTOP)
        for token in ("second", "third", "gone"):
            watched.capture.fire(token)
        watched.capture.withdraw("gone")
        shots = [watched.shots.get(timeout=20) for _ in range(2)]
        assert [(shot.token, shot.trigger_id, shot.kind) for shot in shots] == [
            ("second", 2, "mqtt"),
            ("third", 3, "mqtt"),
        ]
        assert shots[0].frame.mono_s < shots[1].frame.mono_s  # each has a frame of its own
        assert watched.capture.status().restarts == 1 and watched.shots.empty()


def test_frames_for_which_nobody_has_time_are_counted_and_none_is_lost_uncounted() -> None:
    entered, go_on = threading.Event(), threading.Event()
    skipped: list[int] = []
    shots: list[Shot] = []

    def emit(_: str, shot: Shot) -> None:
        shots.append(shot)
        entered.set()
        go_on.wait(20)

    with MjpegCamera(fps=100) as camera:
        settings = CameraSettings.model_validate({"source": camera.url, **QUICK})
        capture = Capture("cam", settings, emit, lambda _: None, lambda _, n: skipped.append(n))
        capture.start()
        assert entered.wait(20)
        wait_until(lambda: camera.frames > 60)  # far more than the ring holds
        go_on.set()
        wait_until(lambda: sum(skipped) > 0)
        camera.mode = "hang_mid_frame"
        wait_until(lambda: capture.status().code == "C-STALL")
        frames = capture.status().frames
        capture.stop()
        capture.join(20)
    assert len(shots) + sum(skipped) == frames and shots[-1].trigger_id <= frames
    assert [shot.trigger_id for shot in shots] == sorted({shot.trigger_id for shot in shots})


def test_stopping_does_not_wait_for_a_camera_that_hangs() -> None:
    with MjpegCamera() as camera, Watched(camera.url, stall_s=3600, open_timeout_s=3600) as watched:
        watched.wait_online()
        pid = watched.capture.pid
        camera.mode = "hang_mid_frame"
        wait_until(lambda: camera.hanging == 1)
        watched.capture.stop()
        watched.capture.join(20)
        assert watched.capture.ended.is_set() and not Path(f"/proc/{pid}").exists()


def test_control_in_one_process_such_a_camera_blocks_whoever_reads_it() -> None:
    """The hang is a hang: nothing but the camera, or the end of the process, lets the read return."""
    settings = CameraSettings.model_validate({"source": "http://x", "stall_s": 3600, "open_timeout_s": 3600})
    with MjpegCamera() as camera:
        source = open_source(settings.model_copy(update={"source": camera.url}))
        frames: queue.SimpleQueue[int] = queue.SimpleQueue()
        reader = threading.Thread(target=lambda: [frames.put(frame.index) for frame in source])
        reader.start()
        frames.get(timeout=20)
        camera.mode = "hang_mid_frame"
        wait_until(lambda: camera.hanging == 1)
        with pytest.raises(queue.Empty):  # once what was on its way has been read
            while True:
                frames.get(timeout=0.3)
        source.close()  # the watchdog's `please end`
        reader.join(QUICK["stall_s"])  # type: ignore[arg-type]
        assert reader.is_alive()
        camera.mode = "ok"
        reader.join(20)
        assert not reader.is_alive()


def test_nothing_is_left_of_the_camera_processes_when_the_line_is_killed(tmp_path: Path) -> None:
    program = """
import sys, time
from devices.capture import Capture
from devices.settings import CameraSettings
settings = CameraSettings.model_validate({"source": sys.argv[1]})
capture = Capture("cam", settings, lambda _, shot: None, lambda _: print(capture.pid, flush=True))
capture.start()
time.sleep(60)
"""
    with MjpegCamera() as camera:
        with subprocess.Popen([sys.executable, "-c", program, camera.url], stdout=subprocess.PIPE, text=True) as line:
            assert line.stdout is not None
            pid = int(line.stdout.readline())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes()
            line.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid))
    assert camera.url.encode() not in arguments and b"devices.camera_process" in arguments


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True
