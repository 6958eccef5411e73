"""What a finished line did, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_dkm.pipeline import Timings
from edge_dkm.shot_buffer import Tally


@dataclass(frozen=True)
class LineReport:
    """What a finished line did. `unsent` results wait in the outbox and go out at the next start."""

    parts: int
    bad: int
    dropped: int
    verdicts: dict[str, int]
    unsent: int
    seconds: float
    latency_ms: dict[str, dict[str, float]]

    def text(self) -> str:
        """For people."""
        verdicts = ", ".join(f"{name} {n}" for name, n in sorted(self.verdicts.items())) or "none"
        lines = [
            f"results   {self.parts} ({verdicts}), {self.bad} bad frames, {self.dropped} frames skipped, in {self.seconds:.1f} s"
        ]
        lines += [
            f"latency   {name}: p50 {values['p50']:.1f} ms, p99 {values['p99']:.1f} ms"
            for name, values in self.latency_ms.items()
        ]
        lines.append(
            f"outbox    {'everything delivered' if not self.unsent else f'{self.unsent} results wait for delivery'}"
        )
        return "\n".join(lines)


def report(tallies: Mapping[str, Tally], timings: Sequence[Timings], unsent: int, seconds: float) -> LineReport:
    """Sums up over the cameras."""
    verdicts: dict[str, int] = {}
    for tally in tallies.values():
        for verdict, n in tally.verdicts.items():
            verdicts[verdict] = verdicts.get(verdict, 0) + n
    return LineReport(
        sum(t.results for t in tallies.values()),
        sum(t.bad for t in tallies.values()),
        sum(sum(t.dropped.values()) for t in tallies.values()),
        verdicts,
        unsent,
        seconds,
        _latencies(timings),
    )


def _latencies(timings: Sequence[Timings]) -> dict[str, dict[str, float]]:
    if not timings:
        return {}
    columns = {
        "infer": [t.infer for t in timings],
        "capture to answer": [t.total for t in timings],
        "capture to commit": [t.committed for t in timings],
    }
    return {
        name: {"p50": round(float(np.percentile(v, 50)), 2), "p99": round(float(np.percentile(v, 99)), 2)}
        for name, v in columns.items()
    }
