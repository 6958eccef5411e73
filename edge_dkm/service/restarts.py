"""How often each stage was restarted, and the process for a stage's sake: kept over restarts, for health, metrics and `edge-dkm status`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from pathlib import Path

from edge_dkm.set_aside import set_aside

FILE = "restarts.json"
VERSION = 1
MAX_BYTES = 65_536  # a healthy file has some hundred
PROCESS = "process"

log = logging.getLogger(__name__)


class RestartCounts:
    """Counts by stage name in `<state>/restarts.json`. A damaged file is moved aside; one that cannot be written is said and counted on in memory."""

    def __init__(self, state: Path) -> None:
        self.path = state / FILE
        self.quarantined: Path | None = None
        self._lock = threading.Lock()
        self._complained = False
        self._counts = self._load()

    def add(self, name: str) -> None:
        """One more; on disk when this returns."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1
            try:
                self._save()
            except OSError as error:
                if not self._complained:
                    log.warning("%s cannot be written: %s; restarts are counted in memory", self.path, error.strerror)
                self._complained = True
            else:
                self._complained = False

    def counts(self) -> dict[str, int]:
        """By name of the stage, and `process`."""
        with self._lock:
            return dict(self._counts)

    def _load(self) -> dict[str, int]:
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
            return _parse(data)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            reason = error
        try:
            self.quarantined = set_aside(self.path)
            log.warning(
                "S-CORRUPT %s is damaged (%s), moved to %s; restarts count from 0", self.path, reason, self.quarantined
            )
        except OSError as error:
            log.warning("S-CORRUPT %s is damaged (%s) and cannot be moved aside: %s", self.path, reason, error.strerror)
        return {}

    def _save(self) -> None:
        """Whole or not at all, also at a power cut: written beside it, flushed, renamed, the folder flushed."""
        text = json.dumps({"version": VERSION, "restarts": self._counts}, sort_keys=True) + "\n"
        beside = self.path.with_name(f"{FILE}.new")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _parse(data: bytes) -> dict[str, int]:
    if len(data) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES} bytes")
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict) or value.get("version") != VERSION or not isinstance(value.get("restarts"), dict):
        raise ValueError(f"expected version {VERSION} and restarts")
    counts = value["restarts"]
    if not all(type(n) is int and n >= 0 for n in counts.values()):
        raise ValueError("expected whole numbers of at least 0")
    return dict(counts)
