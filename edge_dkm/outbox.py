"""The outbox: every result is on disk before it is published, numbered without holes, kept until it was acknowledged and 72 h beyond.

SQLite, one file, one connection (two would meet the WAL-reset bug of SQLite before 3.51.3), WAL with synchronous=FULL: a commit
survives a power cut. Each row carries a CRC, since SQLite does not check its pages. A limit that forces a drop writes a gap
record in the same transaction. The pipeline commits, the publisher reads and marks; both call from their own threads.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_dkm.clock import boot_id, rfc3339, utc_now, wall_s
from edge_dkm.errors import StorageError
from edge_dkm.message import Gap

log = logging.getLogger(__name__)

USER_VERSION = 1
SCHEMA = """
CREATE TABLE outbox(seq INTEGER PRIMARY KEY AUTOINCREMENT, camera TEXT NOT NULL, cseq INT, topic TEXT NOT NULL, body BLOB NOT NULL,
                    crc INT NOT NULL, t_wall REAL NOT NULL, t_mono REAL NOT NULL, boot TEXT NOT NULL, sent INT NOT NULL DEFAULT 0);
CREATE INDEX outbox_unsent ON outbox(seq) WHERE sent = 0;
CREATE INDEX outbox_gaps ON outbox(camera, seq) WHERE cseq IS NULL;
CREATE TABLE counter(camera TEXT PRIMARY KEY, n INT NOT NULL);
CREATE TABLE intent(result_id TEXT PRIMARY KEY, camera TEXT NOT NULL, kind TEXT NOT NULL, trigger_id INT NOT NULL, ts TEXT NOT NULL);
CREATE TABLE meta(key TEXT PRIMARY KEY, value NOT NULL);
"""
GapReason = Literal["drop_oldest", "age", "row_corrupt"]


@dataclass(frozen=True)
class Limits:
    """What the outbox may hold. Sent rows are kept `keep_h` and go first; unsent ones are dropped oldest first, and declared."""

    max_rows: int = 1_000_000
    max_bytes: int = 512_000_000
    max_age_h: float = 168
    keep_h: float = 72


@dataclass(frozen=True)
class Numbers:
    """What a result is numbered with when it is committed: `seq` per epoch, `cseq` per camera and epoch, both without holes."""

    epoch: str
    seq: int
    cseq: int


@dataclass(frozen=True)
class Draft:
    """A result before it has its numbers; `render` makes the payload of them. Its intent, if there is one, is closed with it."""

    camera: str
    topic: str
    result_id: str
    render: Callable[[Numbers], bytes]


@dataclass(frozen=True)
class Intent:
    """A trigger that stands for a part, on disk before the inspection: after a restart it ends in a declared result."""

    result_id: str
    camera: str
    kind: str
    trigger_id: int
    ts: str


@dataclass(frozen=True)
class Row:
    """A row to publish."""

    seq: int
    topic: str
    body: bytes


@dataclass(frozen=True)
class OutboxStatus:
    """Rows not yet acknowledged, their bytes, the age of the oldest; rows kept after acknowledgement."""

    rows: int
    bytes: int
    oldest_s: float
    sent_rows: int


class Outbox:
    """Opens or creates the database at `path`.

    Raises:
        StorageError: it cannot be opened, is damaged, or belongs to another version.
    """

    def __init__(self, path: Path, station: str, topic_of: Callable[[str], str], limits: Limits | None = None) -> None:
        self.path, self.station, self.limits = path, station, limits or Limits()
        self.on_commit: Callable[[], None] = lambda: None
        self._topic_of = topic_of
        self._lock = threading.RLock()
        self._boot = boot_id()
        # Rows that were given to the publisher and not acknowledged: the consumer may have them, so they are neither dropped nor changed.
        self._exposed: set[int] = set()
        try:
            self._db = self._open(path)
            self.epoch = str(self._db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0])
            self._counters = dict(self._db.execute("SELECT camera, n FROM counter"))
            self._next_seq = 1 + int(
                (self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone() or (0,))[0]
            )
            self._count()
        except (sqlite3.Error, TypeError) as error:
            raise StorageError(
                f"outbox {path} cannot be used: {error}; move it away to start with an empty one (its results are then lost)"
            ) from None

    def _open(self, path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2)
        for pragma in (
            "locking_mode=EXCLUSIVE",
            "journal_mode=WAL",
            "synchronous=FULL",
            "wal_autocheckpoint=200",
            "mmap_size=0",
        ):
            db.execute(f"PRAGMA {pragma}")
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version == 0:
            with _transaction(db):
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),))
                db.execute(f"PRAGMA user_version = {USER_VERSION}")
        elif version != USER_VERSION:
            raise StorageError(
                f"outbox {path} has version {version}, this program writes {USER_VERSION}; use the program that wrote it, or move it away"
            )
        return db

    def _count(self) -> None:
        """Rows and bytes, unsent and sent; kept up to date in memory from here on."""
        self._rows, self._bytes = [0, 0], [0, 0]
        for sent, rows, size in self._db.execute("SELECT sent, COUNT(*), SUM(LENGTH(body)) FROM outbox GROUP BY sent"):
            self._rows[sent], self._bytes[sent] = rows, size

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction; after a failure the counters are those of the disk again."""
        with self._lock:
            kept = (dict(self._counters), self._next_seq, list(self._rows), list(self._bytes))
            try:
                with _transaction(self._db):
                    yield self._db
            except BaseException as error:
                self._counters, self._next_seq, self._rows, self._bytes = kept
                if isinstance(error, sqlite3.Error):
                    raise StorageError(f"outbox {self.path} cannot be written: {error}") from error
                raise

    def next_session(self) -> int:
        """Counts connections to the broker; a late last will of an earlier one can be told apart."""
        with self._change() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'session'").fetchone()
            session = int(row[0]) + 1 if row else 1
            db.execute("INSERT OR REPLACE INTO meta VALUES ('session', ?)", (session,))
        return session

    def intend(self, intent: Intent) -> None:
        """Writes the intent row of a trigger."""
        with self._change() as db:
            db.execute(
                "INSERT INTO intent VALUES (?, ?, ?, ?, ?)",
                (intent.result_id, intent.camera, intent.kind, intent.trigger_id, intent.ts),
            )

    def open_intents(self) -> list[Intent]:
        """Triggers that have no result yet, in order."""
        with self._lock:
            return [
                Intent(*row)
                for row in self._db.execute("SELECT result_id, camera, kind, trigger_id, ts FROM intent ORDER BY rowid")
            ]

    def commit(self, drafts: Sequence[Draft]) -> list[Numbers]:
        """Numbers and writes results in one transaction; they are safe when this returns. Wakes the publisher."""
        given = []
        with self._change() as db:
            for draft in drafts:
                numbers = Numbers(self.epoch, self._next_seq, self._counters.get(draft.camera, 0) + 1)
                self._counters[draft.camera] = numbers.cseq
                db.execute(
                    "INSERT INTO counter VALUES (?, ?) ON CONFLICT(camera) DO UPDATE SET n = excluded.n",
                    (draft.camera, numbers.cseq),
                )
                self._insert(draft.camera, numbers.cseq, draft.topic, draft.render(numbers))
                db.execute("DELETE FROM intent WHERE result_id = ?", (draft.result_id,))
                given.append(numbers)
            self._enforce_size()
        self.on_commit()
        return given

    def unsent(self, after_seq: int, limit: int) -> list[Row]:
        """The oldest unacknowledged rows behind `after_seq`. A row whose CRC is wrong becomes a gap record; nothing damaged is sent."""
        with self._lock:
            found = self._db.execute(
                "SELECT seq, camera, cseq, topic, body, crc FROM outbox WHERE sent = 0 AND seq > ? ORDER BY seq LIMIT ?",
                (after_seq, limit),
            ).fetchall()
            rows = []
            for seq, camera, cseq, topic, blob, crc in found:
                body = blob if isinstance(blob, bytes) else str(blob).encode()
                if _crc(seq, camera, cseq, topic, body) != crc:
                    log.error("outbox row %d (camera %s, cseq %s) is damaged and declared as a gap", seq, camera, cseq)
                    with self._change():
                        self._delete([seq])
                        first, last = (cseq, cseq) if cseq is not None else self._hole(camera)
                        self._declare(camera, first, last, "row_corrupt")
                    continue
                rows.append(Row(seq, topic, body))
            self._exposed.update(row.seq for row in rows)
            return rows

    def mark_sent(self, seqs: Sequence[int]) -> None:
        """The broker has acknowledged these rows."""
        if not seqs:
            return
        with self._change() as db:
            marks = ",".join("?" * len(seqs))
            size = int(
                db.execute(
                    f"SELECT TOTAL(LENGTH(body)) FROM outbox WHERE sent = 0 AND seq IN ({marks})", list(seqs)
                ).fetchone()[0]
            )
            changed = db.execute(f"UPDATE outbox SET sent = 1 WHERE sent = 0 AND seq IN ({marks})", list(seqs)).rowcount
            self._rows = [self._rows[0] - changed, self._rows[1] + changed]
            self._bytes = [self._bytes[0] - size, self._bytes[1] + size]
        self._exposed.difference_update(seqs)

    def trim(self) -> None:
        """Applies the ages: sent rows older than `keep_h` go, unsent ones older than `max_age_h` are dropped and declared."""
        with self._change():
            self._delete([seq for seq, *_ in self._older_than(1, self.limits.keep_h)])
            self._drop(
                [row for row in self._older_than(0, self.limits.max_age_h) if row[0] not in self._exposed], "age"
            )

    def status(self) -> OutboxStatus:
        """Counts for health messages."""
        with self._lock:
            row = self._db.execute(
                "SELECT t_wall, t_mono, boot FROM outbox WHERE sent = 0 ORDER BY seq LIMIT 1"
            ).fetchone()
            return OutboxStatus(self._rows[0], self._bytes[0], self._age_s(*row) if row else 0.0, self._rows[1])

    def last_cseq(self) -> dict[str, int]:
        """The newest cseq of every camera."""
        with self._lock:
            return dict(self._counters)

    def close(self) -> None:
        """Closes the database; nothing is pending, every commit was one."""
        with self._lock:
            self._db.close()

    def _insert(self, camera: str, cseq: int | None, topic: str, body: bytes) -> None:
        seq = self._next_seq
        self._next_seq += 1
        self._db.execute(
            "INSERT INTO outbox(seq, camera, cseq, topic, body, crc, t_wall, t_mono, boot) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                seq,
                camera,
                cseq,
                topic,
                body,
                _crc(seq, camera, cseq, topic, body),
                wall_s(),
                time.monotonic(),
                self._boot,
            ),
        )
        self._rows[0] += 1
        self._bytes[0] += len(body)

    def _delete(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            row = self._db.execute("DELETE FROM outbox WHERE seq = ? RETURNING sent, LENGTH(body)", (seq,)).fetchone()
            if row:
                self._rows[row[0]] -= 1
                self._bytes[row[0]] -= row[1]

    def _enforce_size(self) -> None:
        """Back below the limits: first what was acknowledged, then, declared, the oldest of the rest."""
        while sum(self._rows) > self.limits.max_rows or sum(self._bytes) > self.limits.max_bytes:
            kept = (
                [row[0] for row in self._db.execute("SELECT seq FROM outbox WHERE sent = 1 ORDER BY seq LIMIT 100")]
                if self._rows[1]  # without any, the query would read the whole table, at every commit of a long outage
                else []
            )
            if kept:
                excess = max(1, sum(self._rows) - self.limits.max_rows)
                self._delete(kept[:excess])
                continue
            oldest = [
                row
                for row in self._db.execute(
                    "SELECT seq, camera, cseq FROM outbox WHERE sent = 0 AND cseq IS NOT NULL ORDER BY seq LIMIT 64"
                )
                if row[0] not in self._exposed
            ][:1]
            if not oldest:
                return
            self._drop(oldest, "drop_oldest")

    def _drop(self, rows: Sequence[tuple[int, str, int]], reason: GapReason) -> None:
        for seq, camera, cseq in rows:
            self._delete([seq])
            self._declare(camera, cseq, cseq, reason)

    def _declare(self, camera: str, first: int, last: int, reason: GapReason) -> None:
        """A gap record on the camera's stream; a neighbouring one that nobody has seen yet is widened instead."""
        pending = self._db.execute(
            "SELECT seq, body FROM outbox WHERE sent = 0 AND cseq IS NULL AND camera = ? ORDER BY seq DESC LIMIT 1",
            (camera,),
        ).fetchone()
        if pending and pending[0] not in self._exposed:
            gap = Gap.model_validate_json(pending[1])
            if gap.reason == reason and gap.to == first - 1:
                first = gap.from_
                self._delete([pending[0]])
        self._insert(
            camera,
            None,
            self._topic_of(camera),
            Gap.model_validate(
                {
                    "ts": rfc3339(utc_now()),
                    "station": self.station,
                    "camera": camera,
                    "epoch": self.epoch,
                    "seq": self._next_seq,
                    "from": first,
                    "to": last,
                    "n": last - first + 1,
                    "reason": reason,
                }
            ).payload(),
        )

    def _hole(self, camera: str) -> tuple[int, int]:
        """What a gap record that is damaged itself may have declared: all between the last sent and the first unsent result."""
        edges = "SELECT MAX(CASE WHEN sent = 1 THEN cseq END), MIN(CASE WHEN sent = 0 THEN cseq END) FROM outbox WHERE camera = ?"
        before, after = self._db.execute(edges, (camera,)).fetchone()
        first = (before or 0) + 1
        return first, max(first, (after or self._counters.get(camera, 0) + 1) - 1)

    def _older_than(self, sent: int, hours: float) -> list[tuple[int, str, int]]:
        """Rows (seq, camera, cseq) of that age, up to the first younger one. Unsent gap records never age.

        Within one boot the monotonic clock counts: a jump of the wall clock ages nothing.
        """
        rows = self._db.execute(
            "SELECT seq, camera, cseq, t_wall, t_mono, boot FROM outbox "
            f"WHERE sent = {int(sent)} {'' if sent else 'AND cseq IS NOT NULL'} ORDER BY seq"
        )
        return [row[:3] for row in itertools.takewhile(lambda row: self._age_s(*row[3:]) > hours * 3600, rows)]

    def _age_s(self, t_wall: float, t_mono: float, boot: str) -> float:
        return max(0.0, time.monotonic() - t_mono if boot == self._boot else wall_s() - t_wall)


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _crc(seq: int, camera: str, cseq: int | None, topic: str, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(f"{seq}\0{camera}\0{cseq}\0{topic}\0".encode()))
