"""Films a drawn conveyor: an MP4 for the camera, and the list of what was planted in a file that trainer and line never read."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import cv2

from devices.sources.synthetic import HEIGHT_PX, WIDTH_PX, Conveyor, ConveyorOptions, PlannedPart


def film(path: Path, options: ConveyorOptions) -> list[PlannedPart]:
    """Writes `path` and `<path>.planted.json`; returns the plan."""
    conveyor = Conveyor(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), options.fps, (WIDTH_PX, HEIGHT_PX))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path}: it has no MP4 encoder")
    for index in range(conveyor.n_frames):
        writer.write(conveyor.render(index))
    writer.release()
    path.with_suffix(".planted.json").write_text(json.dumps([asdict(part) for part in conveyor.plan]))
    return conveyor.plan


def counts(plan: list[PlannedPart]) -> dict[str, int]:
    """How many parts of each kind of defect, and good ones."""
    return dict(Counter(part.defect or "good" for part in plan))
