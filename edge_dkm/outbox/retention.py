"""What the outbox may hold, what goes when that is reached, and the gap records that declare it, in the same transaction."""

from __future__ import annotations

import itertools
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.message import Gap
from edge_dkm.outbox.file import WAL_BYTES
from edge_dkm.outbox.row import Row, as_bytes, row_crc
from edge_dkm.outbox.table import ROW_BYTES, Table

if TYPE_CHECKING:
    from edge_dkm.settings import DeliverySettings

log = logging.getLogger(__name__)
GapReason = Literal["drop_oldest", "drop_newest", "age", "row_corrupt", "disk_full"]
Policy = Literal["drop_oldest", "block", "drop_newest"]
AT_ONCE = 64
FIXED_BYTES = 4 * WAL_BYTES  # the WAL, the ballast of twice its size, and as much to spare


@dataclass(frozen=True)
class Limits:
    """What the outbox may hold. Acknowledged rows are kept `keep_h` and go first; what happens then is `policy`'s.

    `max_bytes` is for the files: bodies and about what a row takes besides, WAL and ballast. `max_age_h` drops and declares, except with policy `block`.
    """

    max_rows: int = 1_000_000
    max_bytes: int = 512_000_000
    max_age_h: float = 168
    keep_h: float = 72
    policy: Policy = "drop_oldest"

    @classmethod
    def of(cls, delivery: DeliverySettings) -> Limits:
        """Those of a line file."""
        max_bytes = int(delivery.max_mb * 1e6)
        return cls(delivery.max_rows, max_bytes, delivery.max_age_h, delivery.keep_h, delivery.limit)

    @property
    def row_bytes(self) -> int:
        """What is left for rows once WAL and ballast have theirs; a limit that is hardly more than those is for the rows alone."""
        return self.max_bytes - FIXED_BYTES if self.max_bytes > 4 * FIXED_BYTES else self.max_bytes


class Retention:
    """Drops and declares within the transaction that is open. A result that the consumer may have is never dropped."""

    def __init__(self, table: Table, limits: Limits, station: str, topic_of: Callable[[str], str]) -> None:
        self.table, self.limits = table, limits
        self.epoch = ""
        self._station, self.topic_of = station, topic_of

    def is_over(self, rows: int = 0, body_bytes: int = 0) -> bool:
        """Whether the limits are passed, with that much more."""
        counts, limits = self.table.counts, self.limits
        return (
            sum(counts.rows) + rows > limits.max_rows
            or counts.disk_bytes + body_bytes + ROW_BYTES * rows > limits.row_bytes
        )

    def clear_sent(self, rows: int = 0, body_bytes: int = 0) -> bool:
        """Deletes acknowledged rows, oldest first, until that much more has room; whether it has."""
        while self.is_over(rows, body_bytes):
            excess = max(1, sum(self.table.counts.rows) + rows - self.limits.max_rows)
            kept = self.table.sent(min(excess, AT_ONCE))
            if not kept:
                return False
            self.table.delete(kept)
        return True

    def drop_oldest(self) -> None:
        """Back below the limits: first what was acknowledged, then, declared, the oldest of the rest."""
        while not self.clear_sent():
            excess = max(1, sum(self.table.counts.rows) - self.limits.max_rows)
            oldest = self.table.droppable(min(excess, AT_ONCE))
            if not oldest:
                return
            self.drop(oldest, "drop_oldest")

    def sacrifice(self, rows: int) -> int:
        """Gives up to `rows` rows for room on the disk, acknowledged ones first, then as the policy allows; how many."""
        given = self.table.delete(self.table.sent(rows))
        if given < rows and self.limits.policy == "drop_oldest":
            oldest = self.table.droppable(rows - given)
            self.drop(oldest, "disk_full")
            given += len(oldest)
        return given

    def drop(self, seqs: Sequence[int], reason: GapReason) -> None:
        """Deletes results and declares them, one record per stretch; a damaged one may not be what its columns say."""
        numbers: dict[str, list[int]] = defaultdict(list)
        damaged: list[Row] = []
        for start in range(0, len(seqs), AT_ONCE):
            part = seqs[start : start + AT_ONCE]
            query = f"SELECT seq, topic, body, camera, cseq, crc FROM outbox WHERE seq IN ({','.join('?' * len(part))})"
            for seq, topic, body, camera, cseq, crc in self.table.db.execute(query, part).fetchall():
                row = Row(seq, topic, as_bytes(body), camera, cseq)
                if row_crc(row) == crc:
                    numbers[camera].append(cseq)
                else:
                    damaged.append(row)
        self.table.delete(sorted(set(seqs) - {row.seq for row in damaged}))
        for camera, cseqs in numbers.items():
            for first, last in _stretches(sorted(cseqs)):
                self.declare(camera, first, last, reason)
        if damaged:
            self.declare_damaged(damaged)

    def declare(self, camera: str, first: int, last: int, reason: GapReason) -> None:
        """A gap record on the camera's stream, counted; a neighbouring one that nobody has seen yet is widened instead.

        One that was seen is widened too while the limits are passed: a consumer that takes records and acknowledges nothing would
        fill the disk with them. Its numbers are in the wider record again.
        """
        dropped = self.table.counts.dropped.setdefault(camera, Counter())
        dropped[reason] += last - first + 1
        pending = self.table.db.execute(
            "SELECT seq, topic, body, crc FROM outbox WHERE camera = ? AND cseq IS NULL AND +sent = 0 ORDER BY seq DESC LIMIT 1",
            (camera,),
        ).fetchone()
        if pending and (not self.table.is_exposed(pending[0]) or self.is_over()):
            seq, topic, body, crc = pending
            if row_crc(Row(seq, topic, as_bytes(body), camera, None)) == crc:
                gap = Gap.model_validate_json(body)
                if (gap.reason, gap.epoch, gap.to) == (reason, self.epoch, first - 1):
                    first = gap.from_
                    self.table.delete([seq])
        self.tell(camera, self.epoch, first, last, reason)

    def tell(self, camera: str, epoch: str, first: int, last: int, reason: GapReason) -> None:
        """Appends a gap record as it is."""
        record = {
            "ts": rfc3339(utc_now()),
            "station": self._station,
            "camera": camera,
            "epoch": epoch,
            "seq": self.table.counts.next_seq,
            "from": first,
            "to": last,
            "n": last - first + 1,
            "reason": reason,
        }
        self.table.insert(camera, None, self.topic_of(camera), Gap.model_validate(record).payload())

    def declare_damaged(self, rows: Sequence[Row]) -> None:
        """Deletes rows whose CRC is wrong, and declares what is missing then: their columns may not be what was written."""
        for row in rows:
            log.error(
                "outbox row %d (camera %s, cseq %s) is damaged and declared as a gap", row.seq, row.camera, row.cseq
            )
        self.table.delete([row.seq for row in rows])
        for camera in list(self.table.counts.newest):
            for first, last in self._missing(camera):
                self.declare(camera, first, last, "row_corrupt")

    def _missing(self, camera: str) -> list[tuple[int, int]]:
        """Stretches that neither a row nor a gap record accounts for, above what was acknowledged and deleted."""
        db = self.table.db
        settled = db.execute("SELECT settled FROM counter WHERE camera = ?", (camera,)).fetchone()
        at = settled[0] if settled else 0
        spans = [
            (int(row[0]), int(row[0]))
            for row in db.execute("SELECT cseq FROM outbox WHERE camera = ? AND cseq > ? ORDER BY cseq", (camera, at))
        ]
        query = "SELECT seq, topic, body, crc FROM outbox WHERE camera = ? AND cseq IS NULL"
        for seq, topic, body, crc in db.execute(query, (camera,)).fetchall():
            if row_crc(Row(seq, topic, as_bytes(body), camera, None)) == crc:
                gap = Gap.model_validate_json(body)
                if gap.epoch == self.epoch:
                    spans.append((gap.from_, gap.to))
        end = self.table.counts.newest[camera] + 1
        found = []
        for first, last in [*sorted(spans), (end, end)]:
            if first > at + 1:
                found.append((at + 1, first - 1))
            at = max(at, last)
        return found

    def expire(self, limit: int) -> int:
        """Applies the ages to at most `limit` rows of each kind; how many went."""
        gone = self.table.delete(self._older_than(1, self.limits.keep_h, limit))
        if self.limits.policy != "block":
            late = [seq for seq in self._older_than(0, self.limits.max_age_h, limit) if not self.table.is_exposed(seq)]
            self.drop(late, "age")
            gone += len(late)
        return gone

    def _older_than(self, sent: int, hours: float, limit: int) -> list[int]:
        """Rows of that age, up to the first younger one. Unsent gap records never age."""
        rows = self.table.db.execute(
            "SELECT seq, t_wall, t_mono, boot FROM outbox "
            f"WHERE sent = {int(sent)} {'' if sent else 'AND cseq IS NOT NULL'} AND seq > ? ORDER BY seq LIMIT ?",
            (0 if sent else self.table.exposed_upto, limit),
        ).fetchall()
        old = itertools.takewhile(lambda row: self.table.age_s(*row[1:]) > hours * 3600, rows)
        return [int(row[0]) for row in old]


def _stretches(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each run without a hole."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
