"""The rows of the outbox and the numbers they get; counts are kept in memory and follow a transaction that is rolled back.

Called by Outbox and Retention inside their transactions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_dkm import clock
from edge_dkm.outbox.file import Database
from edge_dkm.outbox.row import Row, row_crc

ROW_BYTES = 200  # what a row takes on the disk besides its body, about
AT_ONCE = 500


@dataclass
class Counts:
    """What a rollback must restore. rows, bytes: [unacknowledged, acknowledged].

    `handed_on_disk`: no row behind it was given to the publisher. `is_clean`: the file says that its last user ended in order.
    """

    rows: list[int] = field(default_factory=lambda: [0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    newest: dict[str, int] = field(default_factory=dict)  # camera -> cseq
    next_seq: int = 1
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    handed_on_disk: int = 0
    is_clean: bool = False

    def copy(self) -> Counts:
        """Independent of this one."""
        return replace(
            self,
            rows=list(self.rows),
            bytes=list(self.bytes),
            newest=dict(self.newest),
            dropped={camera: Counter(reasons) for camera, reasons in self.dropped.items()},
        )

    @property
    def disk_bytes(self) -> int:
        """What all rows take on the disk, about."""
        return sum(self.bytes) + ROW_BYTES * sum(self.rows)


class Table:
    """`exposed`: rows that were given to the publisher and not acknowledged, and so may have reached the consumer."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.exposed: set[int] = set()
        self.deleted: list[int] = []  # in the transaction that is open
        self.exposed_upto = 0  # all up to here count as exposed too
        self.handed = 0  # the highest seq that was given to the publisher
        self.boot = clock.boot_id()

    def load(self, db: Database) -> None:
        """Counts what is there."""
        self.db = db
        counts = self.counts = Counts()
        for camera, n in db.execute("SELECT camera, n FROM counter").fetchall():
            counts.newest[str(camera)] = int(n)
        last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
        counts.next_seq = 1 + (int(last[0]) if last else 0)
        query = "SELECT sent, COUNT(*), TOTAL(LENGTH(body)) FROM outbox GROUP BY sent"
        for sent, rows, size in db.execute(query).fetchall():
            counts.rows[bool(sent)] += int(rows)
            counts.bytes[bool(sent)] += int(size)
        meta = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('handed', 'clean')").fetchall())
        counts.is_clean = meta.get("clean") == 1
        counts.handed_on_disk = int(meta.get("handed", 0))
        # What a process before this one handed out may have arrived.
        self.handed = self.exposed_upto = min(counts.handed_on_disk, counts.next_seq - 1)

    def next_cseq(self, camera: str) -> int:
        """Takes the camera's next number."""
        cseq = self.counts.newest.get(camera, 0) + 1
        self.raise_cseq(camera, cseq)
        return cseq

    def raise_cseq(self, camera: str, cseq: int) -> None:
        """The camera's newest number is this one."""
        self.counts.newest[camera] = cseq
        self.db.execute(
            "INSERT INTO counter(camera, n) VALUES (?, ?) ON CONFLICT(camera) DO UPDATE SET n = excluded.n",
            (camera, cseq),
        )

    def insert(self, camera: str, cseq: int | None, topic: str, body: bytes) -> int:
        """Appends a row; its seq is `counts.next_seq`, which the body may hold already."""
        seq = self.counts.next_seq
        self.counts.next_seq += 1
        crc = row_crc(Row(seq, topic, body, camera, cseq))
        self.db.execute(
            "INSERT INTO outbox(seq, camera, cseq, topic, body, crc, t_wall, t_mono, boot) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (seq, camera, cseq, topic, body, crc, clock.wall_s(), time.monotonic(), self.boot),
        )
        self.counts.rows[0] += 1
        self.counts.bytes[0] += len(body)
        return seq

    def delete(self, seqs: Iterable[int]) -> int:
        """Removes rows; how many there were. Of acknowledged ones the highest cseq per camera is remembered."""
        removed = 0
        settled: dict[str, int] = {}
        for part in _parts(list(seqs)):
            rows = self.db.execute(
                f"DELETE FROM outbox WHERE seq IN ({_marks(part)}) RETURNING sent, LENGTH(body), camera, cseq", part
            ).fetchall()
            for sent, size, camera, cseq in rows:
                self.counts.rows[bool(sent)] -= 1
                self.counts.bytes[bool(sent)] -= size
                if sent and cseq is not None:
                    settled[camera] = max(cseq, settled.get(camera, 0))
            self.deleted += part
            removed += len(rows)
        for camera, cseq in settled.items():
            self.db.execute("UPDATE counter SET settled = MAX(settled, ?) WHERE camera = ?", (cseq, camera))
        return removed

    def mark(self, seqs: Sequence[int]) -> int:
        """Acknowledged; how many were not before."""
        changed = 0
        for part in _parts(seqs):
            query = f"UPDATE outbox SET sent = 1 WHERE sent = 0 AND seq IN ({_marks(part)}) RETURNING LENGTH(body)"
            changed += self._count_marked(self.db.execute(query, part).fetchall())
        return changed

    def mark_upto(self, seq: int) -> int:
        """Acknowledged, all up to this one; how many were not before."""
        query = "UPDATE outbox SET sent = 1 WHERE sent = 0 AND seq <= ? RETURNING LENGTH(body)"
        return self._count_marked(self.db.execute(query, (seq,)).fetchall())

    def sent(self, limit: int) -> list[int]:
        """The oldest acknowledged rows."""
        if not self.counts.rows[1]:
            return []
        query = "SELECT seq FROM outbox WHERE sent = 1 ORDER BY seq LIMIT ?"
        return [int(row[0]) for row in self.db.execute(query, (limit,)).fetchall()]

    def droppable(self, limit: int) -> list[int]:
        """The oldest results that the consumer cannot have yet."""
        query = "SELECT seq FROM outbox WHERE sent = 0 AND seq > ? AND cseq IS NOT NULL ORDER BY seq LIMIT ?"
        found = self.db.execute(query, (self.exposed_upto, limit + len(self.exposed))).fetchall()
        return [int(seq) for (seq,) in found if seq not in self.exposed][:limit]

    def expose(self, rows: Sequence[Row], is_prefix: bool) -> None:
        """These rows are given to the publisher; `is_prefix`: all before them were, and only a mark for all comes back."""
        if is_prefix:
            self.exposed_upto = max(self.exposed_upto, rows[-1].seq)
        else:
            self.exposed.update(row.seq for row in rows)
        self.handed = max(self.handed, rows[-1].seq)

    def is_exposed(self, seq: int) -> bool:
        """Whether the consumer may have the row."""
        return seq <= self.exposed_upto or seq in self.exposed

    def age_s(self, t_wall: float, t_mono: float, boot: str) -> float:
        """Within one boot the monotonic clock counts: a jump of the wall clock ages nothing."""
        if boot == self.boot:
            return max(0.0, time.monotonic() - t_mono)
        return max(0.0, clock.wall_s() - t_wall) if t_wall >= 1_700_000_000 else 0.0

    def _count_marked(self, sizes: list[Any]) -> int:
        n, size = len(sizes), sum(int(row[0]) for row in sizes)
        counts = self.counts
        counts.rows = [counts.rows[0] - n, counts.rows[1] + n]
        counts.bytes = [counts.bytes[0] - size, counts.bytes[1] + size]
        return n


def _parts(seqs: Sequence[int]) -> list[list[int]]:
    return [list(seqs[start : start + AT_ONCE]) for start in range(0, len(seqs), AT_ONCE)]


def _marks(values: Sequence[int]) -> str:
    return ",".join("?" * len(values))
