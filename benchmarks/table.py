"""What every measurement prints: the machine, then one table; and the real image sets it needs, or a word on what is missing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

SHARED = Path(os.environ.get("EDGE_DKM_SHARED", "../shared"))
REAL_SETS = SHARED / "data"
WEIGHTS = f"encoder.weights={SHARED / 'weights' / 'squeezenet1_0-imagenet.safetensors'}"
FEATURE_WEIGHTS = WEIGHTS.replace("encoder.", "encoder.backbone.", 1)  # of encoder feature_mlp


def real_set(name: str) -> Path:
    """Path of a real image set; ends the script with one line where it is absent."""
    path = REAL_SETS / name
    if not path.exists():
        sys.exit(f"{path} is not there; this measurement needs it (EDGE_DKM_SHARED names the folder that holds data/)")
    return path


def machine() -> str:
    """One line: processor, cores, load."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}"


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a Markdown table under its title and the machine."""
    print(f"\n{title}\n{machine()}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def spread(values: Sequence[float]) -> str:
    """Mean and range over seeds."""
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"
