"""How long `--help` of each command takes: it must not load onnxruntime, OpenCV or torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.table import show_table

ROUNDS = 15


def main() -> None:
    rows = []
    for name in ("edge-dkm", "dkm-train", "dkm-export"):
        taken = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            subprocess.run([Path(sys.executable).with_name(name), "--help"], stdout=subprocess.DEVNULL, check=True)
            taken.append(time.perf_counter() - started)
        rows.append([name, float(np.median(taken)), max(taken), "< 0.3"])
    show_table(f"--help, {ROUNDS} times, s", ["command", "median", "max", "asked"], rows)


if __name__ == "__main__":
    main()
