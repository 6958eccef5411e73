"""The codebooks of a running station: the current one of each camera at the start, and switching between two frames.

A file that is damaged, half written or of another model is refused (S-CODEBOOK): the newest of its ancestors that is whole runs instead,
the graph's own in the end. `info` says so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_dkm.codebook import Codebook
from edge_dkm.codebook_record import BASE, CodebookRecord, Current, How
from edge_dkm.errors import ContractError, ModelError, UsageError
from edge_dkm.inspector import Inspector

CODE = "S-CODEBOOK"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InForce:
    """What judges, and what was to. `problem`: why they differ."""

    codebook: Codebook | None
    current: Current
    problem: str | None = None

    @property
    def name(self) -> str:
        """Of what judges."""
        return self.codebook.sha12 if self.codebook is not None else BASE

    def plain(self) -> dict[str, Any]:
        """For info and the admin socket."""
        metadata = self.codebook.metadata if self.codebook is not None else {}
        problem = {"code": CODE, "detail": self.problem} if self.problem else None
        return {
            "codebook": self.name,
            "parent": metadata.get("parent"),
            "created": metadata.get("created"),
            "promised_frr": float(metadata["promised_frr"]) if "promised_frr" in metadata else None,
            "since": self.current.since,
            "problem": problem,
        }


def in_force(record: CodebookRecord, camera: str, inspector: Inspector) -> InForce:
    """The current codebook of a camera and model, or the newest whole one of its chain."""
    current = record.current(camera, inspector.file.sha256)
    problem: str | None = None
    for name in (current.codebook, *current.chain):
        try:
            return InForce(read_named(record, name, camera, inspector), current, problem)
        except ModelError as error:
            problem = problem or str(error)
            log.warning("%s camera %s: %s", CODE, camera, error)
    return InForce(None, current, problem)


def read_named(record: CodebookRecord, name: str, camera: str, inspector: Inspector) -> Codebook | None:
    """The codebook of that name, for a camera; None for base.

    Raises:
        ModelError: not there, damaged, or of another model, shape or camera.
    """
    if name == BASE:
        return None
    path = record.file_of(name)
    codebook = inspector.read_codebook(path)
    if codebook.sha12 != name:
        raise ContractError(f"codebook {path} has the digest {codebook.sha12}: it was changed after it was written")
    if codebook.metadata.get("camera", camera) != camera:
        raise ContractError(
            f"codebook {name} was made from parts of camera {codebook.metadata['camera']}, not of {camera}; --list says which there are"
        )
    return codebook


class StationCodebooks:
    """Sets the inspectors' codebooks; for any thread."""

    def __init__(self, state: Path, inspectors: Mapping[str, Inspector]) -> None:
        self._record, self._inspectors = CodebookRecord(state), inspectors
        self._lock = threading.Lock()
        self._in_force: dict[str, InForce] = {}

    def load(self) -> None:
        """At the start: what was in force when the station last ran."""
        with self._lock:
            for camera, inspector in self._inspectors.items():
                found = in_force(self._record, camera, inspector)
                inspector.set_codebook(found.codebook)
                self._in_force[camera] = found
                if found.name != BASE:
                    log.info("camera %s judges by codebook %s", camera, found.name)

    def switch(self, camera: str, name: str, how: How) -> InForce:
        """From the next frame on; first it is on disk, then it judges.

        Raises:
            UsageError: no such camera.
            ModelError: the file is no codebook of this camera and its model; what judged goes on.
            StorageError: the choice cannot be written; what judged goes on.
        """
        if camera not in self._inspectors:
            raise UsageError(f"there is no camera {camera}, expected one of {', '.join(self._inspectors)}")
        inspector = self._inspectors[camera]
        with self._lock:
            codebook = read_named(self._record, name, camera, inspector)
            current = self._record.switch(camera, inspector.file.sha256, name, how)
            before = self._in_force[camera].name if camera in self._in_force else BASE
            inspector.set_codebook(codebook)
            self._in_force[camera] = InForce(codebook, current)
        log.info("camera %s judges by codebook %s from now on, before by %s (%s)", camera, name, before, how)
        return self._in_force[camera]

    def plain(self) -> dict[str, dict[str, Any]]:
        """By camera, for info and the admin socket."""
        with self._lock:
            return {camera: found.plain() for camera, found in self._in_force.items()}
