"""Records training frames by the same camera, ROI, trigger and controls as the line: PNG files and an index.csv that the trainer reads."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import cv2

from devices.capture import Observation, build_trigger, observe
from devices.frame import Frame
from devices.sources import open_source
from edge_dkm.errors import StorageError, UsageError
from edge_dkm.results import timestamp
from edge_dkm.settings import LineSettings

COLUMNS = ("file", "camera", "ts", "group", "result_id", "cluster", "novelty_score", "verdict", "roi", "frame")
Frames = Literal["one", "all"]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordOptions:
    """`frames: one` keeps the trigger's frame of each part, `all` every frame with a part in the region (group = part)."""

    out: Path
    camera: str | None = None
    parts: int | None = None
    frames: Frames = "one"


@dataclass(frozen=True)
class Recorded:
    """What was written."""

    folder: Path
    parts: int
    frames: int
    faulty: int


def record(settings: LineSettings, options: RecordOptions) -> Recorded:
    """Writes frames until the source ends or `parts` are complete; Ctrl-C ends it too, with everything so far in the index.

    Raises:
        CameraError: the camera is not there, or is lost.
        UsageError: more than one camera and none named, or the folder already holds a recording.
    """
    name = _camera_name(settings, options.camera)
    camera = settings.cameras[name]
    trigger = build_trigger(camera)
    source = open_source(camera)
    writer = _Writer(options.out, name)
    parts = faulty = 0
    try:
        with writer:
            for observation in observe(source, camera, trigger):
                faulty += observation.frame.fault is not None
                for frame, group in _kept(observation, options.frames, trigger.stands_for_part):
                    writer.write(frame, group, observation.full_size, camera.roi)
                parts += observation.shot is not None and observation.frame.fault is None
                if options.parts is not None and parts >= options.parts:
                    break
    except KeyboardInterrupt:
        log.warning("interrupted; what was recorded so far is complete")
    finally:
        source.close()
    return Recorded(options.out, parts, writer.count, faulty)


def _kept(observation: Observation, frames: Frames, has_presence: bool) -> Iterator[tuple[Frame, int]]:
    """The frames to write and their group."""
    shot = observation.shot
    if observation.frame.fault is not None:
        return
    if frames == "all" and has_presence:
        if observation.present_id is not None:
            yield observation.frame, observation.present_id
    elif shot is not None:
        yield shot.frame, shot.trigger_id


def _camera_name(settings: LineSettings, wanted: str | None) -> str:
    names = list(settings.cameras)
    if wanted is not None and wanted not in names:
        raise UsageError(f"--camera is {wanted}, expected one of {', '.join(names)}")
    if wanted is None and len(names) > 1:
        raise UsageError(f"the line has the cameras {', '.join(names)}; name one with --camera")
    return wanted or names[0]


class _Writer:
    """PNG files, numbered, and one line each in index.csv, flushed as it goes."""

    def __init__(self, folder: Path, camera: str) -> None:
        self.folder, self.camera, self.count = folder, camera, 0
        if (folder / "index.csv").exists():
            raise UsageError(f"{folder} already holds a recording; choose another --out")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (folder / "index.csv").open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from None
        self._index = csv.writer(self._file)
        self._index.writerow(COLUMNS)

    def write(
        self, frame: Frame, group: int, full_size: tuple[int, int], roi: tuple[int, int, int, int] | None
    ) -> None:
        """One image. A ROI is written as it was cut; without one it is the whole frame."""
        name = f"{self.camera}-{group:06d}-{frame.index:08d}.png"
        width, height = full_size
        box = roi or (0, 0, width, height)
        try:
            (self.folder / name).write_bytes(
                cv2.imencode(".png", frame.image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
            )
            self._index.writerow(
                [
                    name,
                    self.camera,
                    timestamp(frame.mono_s),
                    group,
                    "",
                    "",
                    "",
                    "",
                    " ".join(map(str, box)),
                    f"{width}x{height}",
                ]
            )
            self._file.flush()
        except OSError as error:
            raise StorageError(f"{self.folder / name} cannot be written: {error.strerror or error}") from None
        self.count += 1

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
