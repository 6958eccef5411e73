"""Kinds of cameras, one per file; `open_source` finds the one that a `source:` setting names. Adding one: a file, and a line in SOURCES."""

from __future__ import annotations

from pathlib import Path

from devices.errors import CameraError
from devices.settings import CameraSettings
from devices.sources.base import Source
from devices.sources.file import FileSource
from devices.sources.folder import FolderSource
from devices.sources.masking import mask
from devices.sources.rtsp import RtspSource
from devices.sources.synthetic import SyntheticSource
from devices.sources.usb import UsbSource

SOURCES: dict[str, type[Source]] = {
    "usb": UsbSource,
    "rtsp": RtspSource,
    "file": FileSource,
    "folder": FolderSource,
    "synthetic": SyntheticSource,
}
_URL_SCHEMES = ("rtsp://", "rtsps://", "http://", "https://")


def source_kind(source: str) -> tuple[str, str]:
    """(kind, the rest) of a `source:` setting; a bare path is a folder if there is one, else a film.

    Raises:
        CameraError: C-SPEC for a kind that there is not.
    """
    if source.lower().startswith(_URL_SCHEMES):
        return "rtsp", source
    kind, colon, rest = source.partition(":")
    if kind in SOURCES and colon and kind != "rtsp":
        return kind, rest
    if colon and len(kind) > 1 and kind.isalpha() and not Path(source).exists():
        raise CameraError(
            "C-SPEC",
            f"source is {mask(source)}, expected one of usb:0, rtsp://..., file:PATH, folder:PATH, synthetic:OPTIONS",
        )
    return ("folder" if Path(source).is_dir() else "file"), source


def is_live(source: str) -> bool:
    """Whether a source of this kind is worth waiting for; a film or folder that is not there will not come."""
    try:
        return SOURCES[source_kind(source)[0]].live
    except CameraError:
        return False


def open_source(settings: CameraSettings) -> Source:
    """Opens the camera of the settings.

    Raises:
        CameraError: C-NODEV, C-OPEN or C-SPEC, with what was tried.
    """
    kind, rest = source_kind(settings.source)
    return SOURCES[kind](rest, settings)


__all__ = ["SOURCES", "Source", "is_live", "mask", "open_source", "source_kind"]
