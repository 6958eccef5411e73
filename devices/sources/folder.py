"""A folder of images as a camera; `source: folder:images`, or the bare path. Images in the order of their names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from devices.errors import CameraError
from devices.frame import Frame, Pacer
from devices.settings import CameraSettings
from devices.sources.picture import decode_picture

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
DEFAULT_FPS = 10.0


class FolderSource:
    """One frame per image file below the folder; a file that cannot be decoded is a faulty frame."""

    kind = "folder"
    live = False

    def __init__(self, path: str, settings: CameraSettings) -> None:
        folder = Path(path)
        if not folder.is_dir():
            raise CameraError("C-NODEV", f"folder {path} does not exist (looked in {Path.cwd()})")
        self._files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not self._files:
            raise CameraError("C-NODEV", f"folder {path} holds no images ({', '.join(sorted(SUFFIXES))})")
        self._loop, self._check_damage = settings.loop, settings.checks.damaged
        self._pacer = Pacer((settings.fps or DEFAULT_FPS) if settings.pace == "source" else None)
        self._closed = False

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while not self._closed:
            for file in self._files:
                self._pacer.wait()
                if self._closed:
                    return
                yield read_image(file, index, check_damage=self._check_damage)
                index += 1
            if not self._loop:
                return

    def close(self) -> None:
        self._closed = True
        self._pacer.stop()


def read_image(file: Path, index: int = 0, *, check_damage: bool = True) -> Frame:
    """One image file as a frame; where it cannot be decoded to 8 bits per channel, a faulty one."""
    try:
        data = file.read_bytes()
    except OSError as error:
        return Frame.faulty("F-DECODE", f"{file}: {error.strerror or error}", index)
    return decode_picture(data, str(file), index, check_damage=check_damage)
