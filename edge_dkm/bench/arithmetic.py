"""What the processor could do at best: its measured rate of float32 matrix products, against the multiply-adds of the graph."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

from edge_dkm.bench.profile import Cost

SIDE = 1536  # of the matrices: large enough to reach the full rate, small enough for a small device
MEASURE_S = 0.7
TIMEOUT_S = 60.0
# In a process of its own, since numpy's number of threads is fixed when it is loaded.
PROGRAM = f"""
import time
import numpy as np
a = np.ones(({SIDE}, {SIDE}), np.float32)
b = a.copy()
best_s, end_s = float("inf"), time.perf_counter() + {MEASURE_S}
a @ b
while True:
    started_s = time.perf_counter()
    a @ b
    best_s = min(best_s, time.perf_counter() - started_s)
    if time.perf_counter() > end_s:
        break
print(2 * {SIDE}**3 / best_s / 1e9)
"""


@dataclass(frozen=True)
class Limit:
    """`limit_ms`: the multiply-adds of one frame at the measured rate; a lower precision may beat it. None where they cannot be counted."""

    gflops: float
    threads: int
    macs: int | None
    encoder_macs: int | None
    limit_ms: float | None


def arithmetic_limit(threads: int, cost: Cost | None) -> Limit | None:
    """For that many threads (0: one per core); None where the rate cannot be measured."""
    count = threads or len(os.sched_getaffinity(0))
    variables = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(variables, str(count))}
    words = [sys.executable, "-c", PROGRAM]
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        gflops = float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    if cost is None:
        return Limit(round(gflops, 1), count, None, None, None)
    limit_ms = 2 * cost.macs / (gflops * 1e9) * 1000
    return Limit(round(gflops, 1), count, cost.macs, cost.encoder_macs, round(limit_ms, 3))
