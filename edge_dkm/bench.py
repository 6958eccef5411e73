"""`edge-dkm bench`: how long this device takes with this model, and how much memory."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_dkm.health import rss_mb
from edge_dkm.inspector import Inspector

WARM_UP = 10


@dataclass(frozen=True)
class BenchReport:
    """Milliseconds per frame of `Inspector.inspect`, one frame at a time; `size` is (width, height)."""

    model: str
    providers: list[str]
    size: tuple[int, int]
    frames: int
    p50_ms: float
    p99_ms: float
    frames_per_s: float
    rss_mb: int | None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        return (
            f"model     {self.model} on {', '.join(self.providers)}, frames of {self.size[0]}x{self.size[1]}\n"
            f"inspect   p50 {self.p50_ms:.2f} ms, p99 {self.p99_ms:.2f} ms, {self.frames_per_s:.1f} frames/s over {self.frames} frames\n"
            f"memory    {self.rss_mb} MB"
        )


def bench(inspector: Inspector, size: tuple[int, int] | None, frames: int) -> BenchReport:
    """Times `frames` inspections of random frames of `size` (width, height); default: the size that the model was trained on."""
    spec = inspector.metadata.input
    trained = (spec.w, spec.h) if spec.w and spec.h else (spec.roi[2], spec.roi[3]) if spec.roi else spec.frame
    width, height = size or trained or (224, 224)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(8)]
    for n in range(WARM_UP):
        inspector.inspect(images[n % len(images)])
    taken_ms = np.empty(frames)
    for n in range(frames):
        started = time.perf_counter()
        inspector.inspect(images[n % len(images)])
        taken_ms[n] = (time.perf_counter() - started) * 1000
    return BenchReport(
        inspector.metadata.model_id,
        inspector.providers,
        (width, height),
        frames,
        round(float(np.percentile(taken_ms, 50)), 3),
        round(float(np.percentile(taken_ms, 99)), 3),
        round(1000 / float(taken_ms.mean()), 1),
        rss_mb(),
    )
