"""What `edge-dkm bench` found, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_dkm.bench.arithmetic import Limit


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50_ms: float
    p99_ms: float

    @classmethod
    def of(cls, values_ms: NDArray[np.float64]) -> Percentiles:
        """Of measured times."""
        return cls(round(float(np.percentile(values_ms, 50)), 3), round(float(np.percentile(values_ms, 99)), 3))

    def text(self) -> str:
        """For people."""
        return f"p50 {self.p50_ms:8.3f} ms   p99 {self.p99_ms:8.3f} ms"


@dataclass(frozen=True)
class BenchReport:
    """Times of `frames` frames, one at a time; `size` (width, height) is what the model sees of a `frame`.

    `stages`: capture (into the ring and out of it, the camera's own time not among it), pre-process, encoder, head (kernels in the
    graph), decision (checks and verdict around it), commit, publish (to a subscriber); None with the reason in `notes`. `p50_ms`
    and `p99_ms` are those of `Inspector.inspect`, `graph` the run inside it. `overlapping`: frames/s with frames always waiting.
    """

    model: str
    providers: list[str]
    precision: str
    threads: int
    size: tuple[int, int]
    frame: tuple[int, int]
    frames: int
    stages: Mapping[str, Percentiles | None]
    graph: Percentiles
    frame_to_commit: Percentiles
    p50_ms: float
    p99_ms: float
    frames_per_s: float
    rss_mb: int | None
    limit: Limit | None
    notes: Mapping[str, str]

    @property
    def commit_over_encoder(self) -> float | None:
        """Frame to commit / encoder, both p50."""
        encoder = self.stages.get("encoder")
        return round(self.frame_to_commit.p50_ms / encoder.p50_ms, 3) if encoder and encoder.p50_ms else None

    @property
    def graph_over_limit(self) -> float | None:
        """The graph's time / the arithmetic limit."""
        return round(self.graph.p50_ms / self.limit.limit_ms, 2) if self.limit and self.limit.limit_ms else None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        ratios = {"commit_over_encoder": self.commit_over_encoder, "graph_over_limit": self.graph_over_limit}
        return asdict(self) | ratios

    def text(self) -> str:
        """For people."""
        seen = f"{self.size[0]}x{self.size[1]}"
        of = "" if self.frame == self.size else f" out of {self.frame[0]}x{self.frame[1]}"
        lines = [
            f"model         {self.model} ({self.precision}) on {', '.join(self.providers)}, {self.threads} threads, {seen}{of}"
        ]
        for name, value in self.stages.items():
            reason = self.notes.get(name, "")
            lines.append(f"{name:<13} {value.text() if value else f'not measured: {reason}'}")
        lines += [
            f"{'inspect':<13} {Percentiles(self.p50_ms, self.p99_ms).text()}   (graph and decision)",
            f"{'to commit':<13} {self.frame_to_commit.text()}   from the frame, over {self.frames} frames",
            f"{'rate':<13} {self.frames_per_s:.1f} frames/s with frames always waiting",
            f"{'memory':<13} {self.rss_mb} MB",
        ]
        if self.commit_over_encoder is not None:
            lines.append(f"{'encoder':<13} frame to commit takes {self.commit_over_encoder:.2f} x the encoder alone")
        return "\n".join([*lines, f"{'arithmetic':<13} {self._limit_text()}"])

    def _limit_text(self) -> str:
        limit = self.limit
        if limit is None:
            return "not measured: numpy's matrix product did not run"
        rate = f"{limit.gflops:.0f} GFLOP/s (float32 matrix product, {limit.threads} threads)"
        if limit.macs is None or limit.limit_ms is None:
            return f"{rate}; the graph's multiply-adds could not be counted"
        ratio = f"; the graph takes {self.graph_over_limit} x that" if self.graph_over_limit else ""
        return f"{limit.macs / 1e9:.3f} G multiply-adds at {rate}: {limit.limit_ms:.2f} ms{ratio}"
