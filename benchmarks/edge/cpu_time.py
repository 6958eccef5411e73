"""Which process the processor's time goes to, from /proc (Linux): for measurements in which a camera's own decoding runs on the cores of the line."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
EVERY_S = 0.25
OTHERS = "all else on this machine"


def process_s(pid: int) -> float:
    """Processor seconds of a process and its threads until now; 0 where it has ended."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S if fields else 0.0


def children(pid: int) -> list[int]:
    """Its own ones, not theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))) and int(fields[1]) == pid:
            found.append(int(entry.name))
    return found


def busy_s() -> float:
    """Processor seconds of the whole machine since it started, those that a hypervisor gave to others included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS_PER_S


def _stat(pid: int) -> list[str]:
    """Fields behind the name, which may hold blanks: state, parent..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


class CpuTime(threading.Thread):
    """Looks again and again until `close`, since a process takes its count along when it ends.

    `groups` gives the processes of each name at the moment; nothing counts before all of them have one.
    """

    def __init__(self, groups: Callable[[], Mapping[str, list[int]]]) -> None:
        super().__init__(daemon=True)
        self._groups, self._over = groups, threading.Event()
        self._first: dict[str, dict[int, float]] = defaultdict(dict)
        self._last: dict[str, dict[int, float]] = defaultdict(dict)
        self._begin = self._end = (0.0, 0.0)  # (seconds, busy seconds)
        self.start()

    def run(self) -> None:
        while not self._over.wait(EVERY_S):
            groups = self._groups()
            if not all(groups.values()):
                continue
            now = time.monotonic(), busy_s()
            self._begin, self._end = self._begin if self._first else now, now
            for name, pids in groups.items():
                for pid in pids:
                    if (taken_s := process_s(pid)) > 0:
                        self._first[name].setdefault(pid, taken_s)
                        self._last[name][pid] = taken_s

    def close(self) -> dict[str, float]:
        """Cores that each group kept busy on average, and what else ran."""
        self._over.set()
        self.join()
        seconds, busy = (end - start for start, end in zip(self._begin, self._end, strict=True))
        if seconds <= 0:
            return {}
        taken = {name: sum(self._last[name][p] - first[p] for p in first) for name, first in self._first.items()}
        taken[OTHERS] = busy - sum(taken.values())
        return {name: value / seconds for name, value in taken.items()}
