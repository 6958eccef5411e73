"""Keeps a sample of the line's recent parts for `edge-dkm recentre`: a follower of the pipeline, some microseconds a part."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from edge_dkm.clock import wall_s
from edge_dkm.inspector import Inspector
from edge_dkm.pipeline import Outcome
from edge_dkm.recentring.reservoir import Reservoir, Row, Spec, others_than, reservoir_path, room_for, row_type
from edge_dkm.results import Case
from edge_dkm.settings import ReservoirSettings

RETRY_PARTS = 1000  # after the disk refused

log = logging.getLogger(__name__)


class ReservoirFollower:
    """One reservoir per camera, for its model. A disk that refuses costs rows, said once, and never the line."""

    def __init__(self, state: Path, settings: ReservoirSettings, inspectors: Mapping[str, Inspector]) -> None:
        self._keepers = {
            name: _Keeper(name, state, inspector, _capacity(settings, len(inspectors), inspector))
            for name, inspector in inspectors.items()
        }
        self._limit_bytes = int(settings.max_mb * 1e6)
        self._token = os.urandom(8).hex()  # trigger numbers begin anew with every start

    def wants_image(self, outcome: Outcome) -> bool:
        """Never: the embedding is enough."""
        return False

    def follow(self, outcome: Outcome) -> None:
        """Writes the row of a part that has an answer."""
        inspection = outcome.inspection
        if inspection is None:
            return
        row = Row(
            embedding=inspection.embedding,
            patch_score=inspection.patch_score,
            cluster=inspection.cluster.id,
            novelty_score=inspection.novelty_score,
            group=_group(outcome.case, self._token),
            is_novel=inspection.is_novel,
            is_rejected=inspection.verdict == "reject" and inspection.reason != "novel",
            codebook=inspection.codebook,
            minute=int(wall_s() // 60),
        )
        keeper = self._keepers[outcome.case.camera]
        keeper.keep(row)
        if keeper.is_new:
            keeper.is_new = False
            self._make_room()

    def close(self) -> None:
        """Releases the files."""
        for keeper in self._keepers.values():
            keeper.close()

    def _make_room(self) -> None:
        """Rows of other models stay beside these for as long as all together keep to the limit; the oldest files go first."""
        keepers = self._keepers.values()
        left = self._limit_bytes - sum(keeper.full_bytes for keeper in keepers)
        with contextlib.suppress(OSError):  # the next start tries again
            for path in others_than({keeper.path for keeper in keepers}, next(iter(keepers)).path.parent):
                left -= path.stat().st_size
                if left < 0:
                    log.info(
                        "%s is removed: the rows of another model or camera, and reservoir.max_mb is used up", path
                    )
                    path.unlink(missing_ok=True)


class _Keeper:
    def __init__(self, camera: str, state: Path, inspector: Inspector, capacity: int) -> None:
        self._spec = Spec(camera, inspector.file.sha256, inspector.metadata.embed_dim, capacity)
        self.path = reservoir_path(state, camera, inspector.file.sha256)
        self.full_bytes = capacity * row_type(self._spec.embed_dim).itemsize
        self.is_new = False
        self._reservoir: Reservoir | None = None
        self._resting = 0
        self._is_refused = self._has_complained = False

    def keep(self, row: Row) -> None:
        if self._spec.capacity == 0:
            return
        if self._resting > 0:
            self._resting -= 1
            return
        try:
            if self._reservoir is None:
                self._reservoir = Reservoir(self.path, self._spec)
                self.is_new = True
            if not self._reservoir.add(row) and not self._has_complained:
                self._has_complained = True
                log.warning("%s: an embedding does not fit into float16 and is left out, as others may be", self.path)
            if self._is_refused:
                log.warning("%s is written again", self.path)
            self._is_refused = False
        except OSError as error:
            self._resting = RETRY_PARTS
            if not self._is_refused:
                log.warning(
                    "S-IO %s cannot be written: %s; parts are not kept for recentre until it can, results are not touched by that",
                    self.path,
                    error.strerror or error,
                )
            self._is_refused = True

    def close(self) -> None:
        if self._reservoir is not None:
            self._reservoir.close()


def _capacity(settings: ReservoirSettings, n_cameras: int, inspector: Inspector) -> int:
    return room_for(settings.rows, int(settings.max_mb * 1e6 / n_cameras), inspector.metadata.embed_dim)


def _group(case: Case, token: str) -> int:
    """The part where it is known, else the trigger: shots of one part, on whatever day, are one group."""
    text = f"part {case.part.id}" if case.part is not None else f"{token} {case.trigger.kind} {case.trigger.id}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
