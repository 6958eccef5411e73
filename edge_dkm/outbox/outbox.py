"""The outbox: every result is on disk before it is published, numbered without holes, and kept until it was acknowledged.

The pipeline commits, the publisher reads and marks; both call from their own threads. Each row carries a CRC. A limit that forces a
drop writes a gap record in the same transaction. What a full disk, a damaged file or row, a power cut and `kill -9` do is in
file (opening), witness (a WAL that was cut), retention (drops) and ballast (room to drain).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from edge_dkm.outbox import file as outbox_file
from edge_dkm.outbox.ballast import Ballast
from edge_dkm.outbox.file import WAL_BYTES, Database, DiskFullError, OutboxFile
from edge_dkm.outbox.intents import COLUMNS as INTENT_COLUMNS
from edge_dkm.outbox.intents import Intents
from edge_dkm.outbox.replies import Replies
from edge_dkm.outbox.retention import GapReason, Limits, Retention
from edge_dkm.outbox.row import Draft, Intent, Kept, Numbers, OutboxStatus, Row, as_bytes, row_crc, stretch
from edge_dkm.outbox.table import Table
from edge_dkm.outbox.witness import Witness
from edge_dkm.outbox.writer import NoRoomError, Writer, set_meta

AT_ONCE = 1000  # rows per transaction where many go
MOMENT_S = 0.25
TRIM_S = 0.5  # per call: the supervisor waits for it, and comes again in seconds

log = logging.getLogger(__name__)
Mode = Literal["puback", "journal", "e2e"]


class Outbox:
    """Opens or creates the database at `path`; a damaged one is moved away first (`quarantined` says where, the epoch is new).

    `mode` says what an acknowledgement of the broker does: `puback` deletes the row, `journal` keeps it as sent, `e2e` waits for the
    consumer's own (`acknowledge`).

    Raises:
        StorageError: the folder cannot be written, another process holds the file, or it belongs to a newer version.
    """

    ballast_bytes = max(1_000_000, 2 * WAL_BYTES)
    _connect: Callable[[Path], Database] = staticmethod(outbox_file.connect)

    def __init__(
        self,
        path: Path,
        station: str,
        topic_of: Callable[[str], str],
        limits: Limits | None = None,
        mode: Mode = "journal",
    ) -> None:
        self.path, self.station, self.limits, self.mode = Path(path), station, limits or Limits(), mode
        self.on_commit: Callable[[], None] = lambda: None
        self._complained: set[str] = set()
        self._table = Table()
        self._retention = Retention(self._table, self.limits, station, topic_of)
        self._file = OutboxFile(self.path, type(self)._connect, self._load)
        self._retention.epoch = self.epoch = self._file.epoch
        self.quarantined = self._file.quarantined
        self._intents, self._replies = Intents(self._file), Replies(self._file)
        ballast = Ballast(self.path.with_name(f"{self.path.name}.ballast"), self.ballast_bytes)
        self._witness = Witness(self.path.with_name(f"{self.path.name}.newest"))
        self._writer = Writer(self._file, self._table, self._retention, ballast, self._witness)
        self._lock = self._writer.room
        self._declare_what_the_wal_lost()
        self._last_status, self._last_cseq = self._status(), dict(self._table.counts.newest)

    def _load(self, db: Database) -> None:
        self._table.load(db)
        session = db.execute("SELECT value FROM meta WHERE key = 'session'").fetchone()
        self._session = int(session[0]) if session else 0
        for query in (
            f"SELECT {INTENT_COLUMNS} FROM intent LIMIT 1",
            "SELECT seq, camera, cseq, topic, body, crc, t_wall, t_mono, boot, sent FROM outbox LIMIT 1",
            "SELECT n, command_id, reply FROM reply LIMIT 1",
            "SELECT key, value FROM note LIMIT 1",
        ):
            db.execute(query).fetchall()

    @property
    def last_seq(self) -> int:
        """The newest seq of this epoch, 0 before the first."""
        with self._lock:  # a number that is taken in a transaction may be given back
            return self._table.counts.next_seq - 1

    @property
    def is_blocked(self) -> bool:
        """Whether `commit` is waiting for room."""
        return self._writer.is_blocked

    def next_session(self) -> int:
        """Counts connections to the broker; a late last will of an earlier one can be told apart."""
        with self._lock:
            self._session += 1
            try:
                self._writer.change(lambda db: set_meta(db, "session", self._session))
            except DiskFullError:  # without a connection nothing would ever drain
                log.warning("S-FULL outbox %s cannot note session %d", self.path, self._session)
            return self._session

    def intend(self, intent: Intent) -> None:
        """Writes the intent row of a trigger. On a full disk it waits and raises as `commit`."""
        self._writer.insist(lambda db: self._intents.add(db, intent))

    def open_intents(self) -> list[Intent]:
        """Triggers that have no result yet, in order."""
        with self._lock:
            return self._intents.open()

    def commit(self, drafts: Sequence[Draft]) -> list[Numbers]:
        """Numbers and writes results in one transaction; they are safe when this returns. Wakes the publisher.

        Waits while there is no room and the policy is `block`, or while a full disk does not even take a gap record.

        Raises:
            StorageError: it cannot be written, or `unblock` was called while it waited.
        """
        # On a full disk that not even dropped rows give room the results are declared instead of kept, if they may be dropped.
        declare = None if self.limits.policy == "block" else partial(self._declare_all, drafts)
        given = self._writer.insist(partial(self._store_all, drafts), declare)
        self.on_commit()
        return given

    def unblock(self) -> None:
        """A commit that waits, and every later one that would, raises StorageError instead: the line wants to stop."""
        self._writer.unblock()

    def _store_all(self, drafts: Sequence[Draft], db: Database) -> list[Numbers]:
        policy = self.limits.policy
        was_empty = self._table.counts.rows[0] == 0
        given = []
        for draft in drafts:
            numbers = self._number(db, draft)
            body = draft.render(numbers)
            if policy == "drop_newest" and not self._retention.clear_sent(1, len(body)):
                self._table.counts.next_seq += 1  # the record's own is another
                self._retention.declare(draft.camera, numbers.cseq, numbers.cseq, "drop_newest")
            else:
                self._table.insert(draft.camera, numbers.cseq, draft.topic, body)
            given.append(numbers)
        if policy == "drop_oldest":
            self._retention.drop_oldest()
        elif policy == "block" and not self._retention.clear_sent() and not was_empty:
            raise NoRoomError
        return given

    def _declare_all(self, drafts: Sequence[Draft], db: Database) -> list[Numbers]:
        given = []
        for draft in drafts:
            given.append(self._number(db, draft))
            self._table.counts.next_seq += 1
            self._retention.declare(draft.camera, given[-1].cseq, given[-1].cseq, "disk_full")
        return given

    def _number(self, db: Database, draft: Draft) -> Numbers:
        """Closes the intent, too: from here on the result is in the transaction, kept or declared."""
        self._intents.close(db, draft.result_id)
        return Numbers(self.epoch, self._table.counts.next_seq, self._table.next_cseq(draft.camera))

    def _declare_what_the_wal_lost(self) -> None:
        """Numbers that were given and that the database does not know any more: declared, and not given again."""
        seen, counts = self._witness.seen, self._table.counts
        if seen is None or seen.epoch != self.epoch or seen.seq < counts.next_seq:
            return
        lost = {name: (counts.newest.get(name, 0) + 1, n) for name, n in seen.newest.items()}
        lost = {name: (first, last) for name, (first, last) in lost.items() if first <= last}
        log.error("S-CORRUPT outbox %s: its WAL was damaged; lost and declared are %s", self.path, lost)

        def declare(db: Database) -> None:
            self._table.counts.next_seq = seen.seq + 1
            for camera, (first, last) in lost.items():
                self._table.raise_cseq(camera, last)
                self._retention.declare(camera, first, last, "row_corrupt")

        self._writer.insist(declare)

    def unsent(self, after_seq: int, limit: int, without: Collection[str] = ()) -> list[Row]:
        """The oldest unacknowledged rows behind `after_seq`, but for the cameras `without`; they count as handed out from then on.

        A row whose CRC is wrong becomes a gap record; nothing damaged is sent.
        """
        query = (
            "SELECT seq, camera, cseq, topic, body, crc FROM outbox WHERE sent = 0 AND seq > ? "
            f"{'AND camera NOT IN (' + ','.join('?' * len(without)) + ')' if without else ''} ORDER BY seq LIMIT ?"
        )
        with self._lock:
            found = [
                (Row(seq, topic, as_bytes(body), camera, cseq), crc)
                for seq, camera, cseq, topic, body, crc in self._file.read(query, (after_seq, *without, limit))
            ]
            rows = [row for row, crc in found if row_crc(row) == crc]
            damaged = [row for row, crc in found if row_crc(row) != crc]
            if damaged:
                self._writer.change(lambda _: self._retention.declare_damaged(damaged))
            if rows:
                self._hand_out(rows)
        if damaged:
            self.on_commit()  # the records of what is damaged
        return rows

    def _hand_out(self, rows: Sequence[Row]) -> None:
        self._table.expose(rows, is_prefix=self.mode == "e2e")
        if self._table.handed > self._table.counts.handed_on_disk:
            try:
                self._writer.change(self._writer.note_handed)
            except DiskFullError:  # draining matters more; after a crash now, a drop may declare what did arrive
                log.warning("S-FULL outbox %s cannot note what it hands out", self.path)

    def mark_sent(self, seqs: Sequence[int]) -> None:
        """The broker has acknowledged these rows."""
        if not seqs or self.mode == "e2e":
            return

        def mark(_: Database) -> None:
            self._table.mark(seqs)
            if self.mode == "puback":
                self._table.delete(seqs)

        with self._lock:
            self._writer.change(mark)
            self._table.exposed.difference_update(seqs)
            self._writer.freed()

    def acknowledge(self, epoch: str, upto: int) -> int:
        """The consumer has all up to this seq (mode `e2e`). Another epoch, or more than was handed out, changes nothing."""
        with self._lock:
            if epoch != self.epoch or upto > self._table.handed or self.mode != "e2e":
                kind = "mode" if self.mode != "e2e" else "epoch" if epoch != self.epoch else "upto"
                if kind not in self._complained:
                    self._complained.add(kind)
                    log.warning(
                        "acknowledgement of epoch %s up to %d is ignored: mode %s, epoch %s, handed out up to %d (said once)",
                        epoch,
                        upto,
                        self.mode,
                        self.epoch,
                        self._table.handed,
                    )
                return 0
            if not self._file.read("SELECT 1 FROM outbox WHERE sent = 0 AND seq <= ? LIMIT 1", (upto,)):
                return 0
            changed = self._writer.change(lambda _: self._table.mark_upto(upto))
            self._writer.freed()
            return changed

    def kept(self, camera: str, epoch: str, first: int, last: int, limit: int) -> list[Kept]:
        """At most `limit` entries for the results `first` to `last` (cseq, inclusive), in order: what is held, and runs of what is not.

        Numbers that were not given yet are left out. Of another epoch nothing is held.
        """
        topic = self._retention.topic_of(camera)
        with self._lock:
            if epoch != self.epoch:
                return [Kept(first, last, topic, None)] if first <= last else []
            first, last = max(1, first), min(last, self._table.counts.newest.get(camera, 0))
            query = (
                "SELECT seq, topic, body, camera, cseq, crc FROM outbox "
                "WHERE camera = ? AND cseq BETWEEN ? AND ? ORDER BY cseq LIMIT ?"
            )
            found = self._file.read(query, (camera, first, last, limit))
        upto = found[-1][4] if len(found) == limit else last
        rows = [(Row(seq, name, as_bytes(body), *which), crc) for seq, name, body, *which, crc in found]
        return stretch([row for row, crc in rows if row_crc(row) == crc], first, upto, topic)[:limit]

    def count_kept(self, camera: str, first: int, last: int) -> int:
        """How many of the results `first` to `last` (cseq) of this epoch are held."""
        query = "SELECT COUNT(*) FROM outbox WHERE camera = ? AND cseq BETWEEN ? AND ?"
        with self._lock:
            return int(self._file.read(query, (camera, first, last))[0][0])

    def declare_missing(self, camera: str, epoch: str, first: int, last: int, reason: GapReason) -> None:
        """Appends a gap record for results that a replay asked for and that are no longer held."""
        self._writer.change(lambda _: self._retention.tell(camera, epoch, first, last, reason))
        self.on_commit()

    def find_reply(self, command_id: str) -> bytes | None:
        """What this command was answered, if it was carried out before."""
        with self._lock:
            return self._replies.find(command_id)

    def record_reply(self, command_id: str, reply: bytes, remember: Mapping[str, str] | None = None) -> None:
        """Writes the answer, and settings that the command changed, in one transaction; the newest 1000 answers are kept."""
        self._writer.change(lambda db: self._replies.record(db, command_id, reply, remember or {}))

    def recall(self, key: str) -> str | None:
        """What `record_reply` was told to remember."""
        with self._lock:
            return self._replies.recall(key)

    def trim(self) -> None:
        """Applies the ages: acknowledged rows older than `keep_h` go, unsent ones older than `max_age_h` are dropped and declared."""
        until_s = time.monotonic() + TRIM_S
        while self._writer.change(lambda _: self._retention.expire(AT_ONCE)) >= AT_ONCE and time.monotonic() < until_s:
            pass  # the lock is free in between
        self._writer.freed()

    def purge(self) -> int:
        """Deletes acknowledged rows; how many."""
        gone = 0
        while n := self._writer.change(lambda _: self._table.delete(self._table.sent(AT_ONCE))):
            gone += n
        self._writer.freed()
        return gone

    def status(self) -> OutboxStatus:
        """Counts for health messages; those of the last time where the disk takes longer than a moment just now."""
        if not self._lock.acquire(timeout=MOMENT_S):
            return self._last_status
        try:
            self._last_status = self._status()
            return self._last_status
        finally:
            self._lock.release()

    def _status(self) -> OutboxStatus:
        query = "SELECT t_wall, t_mono, boot FROM outbox WHERE sent = 0 ORDER BY seq LIMIT 1"
        counts = self._table.counts
        oldest = self._file.read(query)
        return OutboxStatus(
            counts.rows[0],
            counts.bytes[0],
            self._table.age_s(*oldest[0]) if oldest else 0.0,
            counts.rows[1],
            {camera: dict(reasons) for camera, reasons in counts.dropped.items()},
            self._writer.is_blocked,
        )

    def is_drained(self) -> bool:
        """Whether nothing waits for delivery; as long as that takes to know."""
        with self._lock:
            return self._table.counts.rows[0] == 0

    def last_cseq(self) -> dict[str, int]:
        """The newest cseq of every camera; as `status` where the disk takes long."""
        if self._lock.acquire(timeout=MOMENT_S):
            try:
                self._last_cseq = dict(self._table.counts.newest)
            finally:
                self._lock.release()
        return self._last_cseq

    def close(self) -> None:
        """Closes the database; nothing is pending, every commit was one."""
        with self._lock:
            self._writer.end_in_order()
            self._file.close()
            self._witness.close()
