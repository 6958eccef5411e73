"""One camera fails 500 times in ten ways beside one that does not: the healthy one's rate, memory, open files, processes, time to return.

python -m benchmarks.line.camera_faults [CYCLES]
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.table import show_table
from devices.capture import Capture
from devices.settings import CameraSettings
from tests.faults.mjpeg_camera import MjpegCamera, Mode
from tests.waiting import wait_until

CYCLES, SEED, FPS = 500, 1, 25.0
MODES: tuple[Mode | str, ...] = (
    "refuse",
    "hang_on_open",
    "hang_mid_frame",
    "trickle",
    "reset",
    "eof",
    "garbage",
    "unauthorized",
    "resized",
    "damaged",
    "kill",  # -9 to the camera's process
)
SETTINGS = {"stall_s": 1.0, "open_timeout_s": 1.5, "checks": {"frozen_frames": 20}}
PATIENCE_S = 30.0
MAX_HOLD_S = 0.6


def open_files() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def rss_mb(pid: int) -> float:
    """Resident memory of one process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def camera_processes() -> list[int]:
    """Children of this process."""
    return [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


@dataclass
class Samples:
    """One row per cycle, taken while both cameras are well."""

    parent_mb: list[float] = field(default_factory=list)
    children_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)
    noticed_s: dict[str, list[float]] = field(default_factory=dict)
    returned_s: dict[str, list[float]] = field(default_factory=dict)

    def take(self) -> None:
        children = camera_processes()
        self.parent_mb.append(rss_mb(os.getpid()))
        self.children_mb.append(sum(map(rss_mb, children)))
        self.files.append(open_files())
        self.processes.append(len(children))

    def slope(self, values: list[float]) -> float:
        """MB per 100 cycles, of the later half."""
        later = values[len(values) // 2 :]
        return 100 * float(np.polyfit(np.arange(len(later)), later, 1)[0]) if len(later) > 1 else 0.0


def cycle(rig: tuple[MjpegCamera, Capture], mode: str, hold_s: float, samples: Samples) -> None:
    """One failure, from well to well; it lasts `hold_s` longer than it takes to be noticed."""
    camera, capture = rig
    started_s = time.monotonic()
    if mode == "kill":
        restarts, pid = capture.status().restarts, capture.pid
        os.kill(pid or 0, 9)
        wait_until(lambda: capture.status().state != "online", PATIENCE_S)
        samples.noticed_s.setdefault(mode, []).append(time.monotonic() - started_s)
        started_s = time.monotonic()
        wait_until(lambda: capture.status().restarts > restarts, PATIENCE_S)
    else:
        camera.mode = mode  # type: ignore[assignment]
        wait_until(lambda: capture.status().state != "online", PATIENCE_S)
        samples.noticed_s.setdefault(mode, []).append(time.monotonic() - started_s)
        time.sleep(hold_s)
        camera.mode = "ok"
        started_s = time.monotonic()
    wait_until(lambda: capture.status().state == "online", PATIENCE_S)
    samples.returned_s.setdefault(mode, []).append(time.monotonic() - started_s)


def main() -> None:
    cycles = int(sys.argv[1]) if len(sys.argv) > 1 else CYCLES
    chance, samples = random.Random(SEED), Samples()
    settings = {"trigger": {"kind": "free"}, **SETTINGS}
    with MjpegCamera(FPS) as failing, MjpegCamera(FPS) as healthy:
        captures = [
            Capture(
                name,
                CameraSettings.model_validate({"source": camera.url, **settings}),
                lambda _, shot: None,
                lambda _: None,
            )
            for name, camera in (("failing", failing), ("healthy", healthy))
        ]
        for capture in captures:
            capture.start()
        wait_until(lambda: all(capture.status().state == "online" for capture in captures), PATIENCE_S)
        failed, beside = captures
        frames, started_s = beside.status().frames, time.monotonic()
        for n in range(cycles):
            cycle((failing, failed), MODES[n % len(MODES)], chance.uniform(0, MAX_HOLD_S), samples)
            samples.take()
        seconds = time.monotonic() - started_s
        rate = (beside.status().frames - frames) / seconds
        status = failed.status()
        for capture in captures:
            capture.stop()
        for capture in captures:
            capture.join(10)
    title = f"{cycles} faults of one camera in {seconds:.0f} s, seed {SEED}, {status.restarts} processes replaced"
    rows: list[list[object]] = [
        ["rate of the other camera, share of 25 frames/s", rate / FPS, ">= 0.95"],
        ["its reconnects", beside.status().reconnects, "0"],
        ["parent RSS, MB per 100 cycles (later half)", samples.slope(samples.parent_mb), "< 1"],
        ["camera processes RSS, MB per 100 cycles", samples.slope(samples.children_mb), "< 1"],
        [
            "open files, first / last / most",
            f"{samples.files[0]} / {samples.files[-1]} / {max(samples.files)}",
            "equal",
        ],
        ["processes, least / most", f"{min(samples.processes)} / {max(samples.processes)}", "2 / 2"],
        ["processes left behind", len(camera_processes()), "0"],
        ["longest return, s", max(max(values) for values in samples.returned_s.values()), "<= 5"],
    ]
    show_table(title, ["what", "measured", "asked"], rows)
    show_table(
        "seconds until the failure is told, and from the camera's return to its first frame",
        ["fault", "told: median", "told: longest", "back: median", "back: longest"],
        [
            [
                mode,
                *(f(samples.noticed_s[mode]) for f in (lambda v: float(np.median(v)), max)),
                *(f(samples.returned_s[mode]) for f in (lambda v: float(np.median(v)), max)),
            ]
            for mode in samples.noticed_s
        ],
    )


if __name__ == "__main__":
    main()
