"""Memory of a running one-camera line with a SqueezeNet model: PSS of all its processes (the embedded broker too), sampled while it runs."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.line.conveyor import learn, set_all
from benchmarks.table import show_table
from tests.broker import free_port

WARM_UP_S, SAMPLES, EVERY_S = 6.0, 20, 1.0


def tree(pid: int) -> list[int]:
    """The process and its descendants."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [pid, *(number for child in children for number in tree(child))]


def pss_mb(pid: int) -> float:
    """Proportional set size of one process."""
    match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        places = [
            *learn(Path(name)),
            f"mqtt.port={free_port()}",
            "cameras.belt.pace=source",
            "cameras.belt.fps=30",
            "cameras.belt.loop=true",
            "cameras.belt.policy=latest",
            "cameras.belt.trigger={kind: free}",
        ]
        with subprocess.Popen(
            [Path(sys.executable).with_name("edge-dkm"), "run", "conveyor", *set_all(places)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as line:
            time.sleep(WARM_UP_S)  # its caches fill; there is no event for that
            samples = []
            for _ in range(SAMPLES):
                time.sleep(EVERY_S)
                samples.append([pss_mb(pid) for pid in tree(line.pid)])
            line.terminate()
    total = np.array([sum(sample) for sample in samples])
    rows = [[len(samples[-1]), float(np.median(total)), float(total.max()), "< 250"]]
    show_table(
        f"one camera at 30 frames/s, every frame inspected, {SAMPLES} samples, PSS in MB",
        ["processes", "median", "max", "asked"],
        rows,
    )


if __name__ == "__main__":
    main()
