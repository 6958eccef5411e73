"""How much memory this process may still take: what the machine has left, or what its control group allows, whichever is less."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
MEMINFO = "proc/meminfo"
CGROUP = "proc/self/cgroup"
# Where groups lie, what they may hold, what they hold, and what of that is cache that the kernel gives back; of both versions.
VERSIONS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = ROOT) -> int | None:
    """Bytes that can be taken before something has to go; None where this system does not say.

    Args:
        root: where `proc` and `sys` lie.
    """
    found = [*_of_machine(root), *_of_groups(root)]
    return min(found) if found else None


def _of_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / MEMINFO):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024
            return
    if root == ROOT and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    """What is left in this process's group and in each of those above it. In a container the path is often the host's: its root counts too."""
    for line in _lines(root / CGROUP):
        _, controllers, path = line.split(":", 2)
        for controller, (home, limit, usage, cache) in VERSIONS.items():
            if controller in controllers.split(","):
                top = root / home
                inner = top / path.strip().lstrip("/")
                for folder in (inner, *(parent for parent in inner.parents if parent.is_relative_to(top))):
                    allowed, held = _number(folder / limit), _number(folder / usage)
                    if allowed is not None and held is not None:
                        yield max(0, allowed - held + _stat(folder / "memory.stat", cache))


def _stat(path: Path, name: str) -> int:
    return next((int(line.split()[1]) for line in _lines(path) if line.split()[0] == name), 0)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or `max`."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except OSError:
        return []
