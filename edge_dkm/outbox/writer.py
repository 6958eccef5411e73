"""Transactions that outlast a full disk; Outbox changes nothing but by them.

While there is no ballast (it was given up, and has not come back) the disk counts as full: the database may not grow by results, which
therefore take the room of others as the policy allows, are declared, or wait. What the ballast gave is left to the WAL: without it
not even an acknowledgement could be written, and nothing would ever drain.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from edge_dkm.errors import StorageError
from edge_dkm.outbox.ballast import Ballast
from edge_dkm.outbox.file import NO_LIMIT_PAGES, Database, DiskFullError, OutboxFile
from edge_dkm.outbox.retention import Retention
from edge_dkm.outbox.table import Table
from edge_dkm.outbox.witness import Seen, Witness

AHEAD = 256  # seqs by which the mark of what was handed out runs ahead on disk, so that it costs no commit of its own
SACRIFICES = (16, 64, 256, 1024)  # rows given for room on a full disk; more would only write more
SPACE_LOOK_S = 0.25  # space on a disk comes back without an event
BALLAST_LOOK_S = 1.0

log = logging.getLogger(__name__)
T = TypeVar("T")
Work = Callable[[Database], T]


class NoRoomError(Exception):
    """The limits are reached and the policy is to wait; raised by the work of a transaction."""


class Writer:
    """`room` guards all that the outbox has, and tells a waiting thread that rows have gone."""

    def __init__(
        self, file: OutboxFile, table: Table, retention: Retention, ballast: Ballast, witness: Witness
    ) -> None:
        self.room = threading.Condition(threading.RLock())
        self._n_waiting = 0  # threads that wait for room: a part that is announced must not hide a commit that waits
        self._stopping = False
        self._file, self._table, self._retention, self._ballast = file, table, retention, ballast
        self._witness = witness
        self._looked_s = float("-inf")
        self._most_pages: int | None = None  # on a full disk
        if not ballast.restore(factor=1):
            self._starve()

    @property
    def is_blocked(self) -> bool:
        """Whether somebody waits for room."""
        return self._n_waiting > 0

    def change(self, work: Work[T]) -> T:
        """One transaction; on a full disk once more with the room of the ballast.

        Raises:
            DiskFullError: it had no room even so.
            StorageError: it cannot be written.
        """
        with self.room:
            self._look_for_room()
            try:
                return self._once(work)
            except DiskFullError:
                self._starve()
                return self._once(work)

    def insist(self, work: Work[T], last_resort: Work[T] | None = None) -> T:
        """One transaction; on a full disk rows make room, then `last_resort` is tried, and then it waits and begins again.

        Raises:
            StorageError: it cannot be written, or `unblock` was called while it waited.
        """
        with self.room:
            waits = False
            try:
                while True:
                    self._look_for_room()
                    with contextlib.suppress(DiskFullError, NoRoomError):
                        return self._try_all(work, last_resort)
                    self._refuse_if_stopping()
                    self._n_waiting += not waits
                    if self._n_waiting == 1 and not waits:
                        log.warning("S-FULL outbox %s has no room; the line waits for it", self._file.path)
                    waits = True
                    self.room.wait(SPACE_LOOK_S)
            finally:
                self._n_waiting -= waits

    def unblock(self) -> None:
        """What waits, and all that would from now on, raises StorageError instead."""
        with self.room:
            self._stopping = True
            self.room.notify_all()

    def freed(self) -> None:
        """Rows have gone: what waits may go on, and the ballast may come back."""
        with self.room:
            self.room.notify_all()
            self._look_for_room()

    def note_handed(self, db: Database) -> None:
        """Within a transaction: how far rows were handed out, and a little more."""
        self._table.counts.handed_on_disk = self._table.handed + AHEAD
        set_meta(db, "handed", self._table.counts.handed_on_disk)

    def end_in_order(self) -> None:
        """Notes that the next start need not check the file."""
        with self.room, contextlib.suppress(StorageError):
            if not self._table.counts.is_clean:
                with self._file.transaction() as db:
                    set_meta(db, "handed", self._table.handed)
                    set_meta(db, "clean", 1)

    def _once(self, work: Work[T]) -> T:
        before = self._table.counts.copy()
        try:
            with self._file.transaction() as db:
                result = work(db)
                counts = self._table.counts
                if counts.is_clean:
                    counts.is_clean = False
                    set_meta(db, "clean", 0)
                if self._table.handed + AHEAD // 2 > counts.handed_on_disk > 0:
                    self.note_handed(db)
        except BaseException:
            self._table.counts = before
            self._table.deleted.clear()
            raise
        self._table.exposed.difference_update(self._table.deleted)
        self._table.deleted.clear()
        if self._table.counts.next_seq != before.next_seq:
            self.testify()
        return result

    def testify(self) -> None:
        """Notes the newest numbers beside the database."""
        counts = self._table.counts
        self._witness.note(Seen(self._file.epoch, counts.next_seq - 1, counts.newest))

    def _try_all(self, work: Work[T], last_resort: Work[T] | None) -> T:
        with self._without_growth(), contextlib.suppress(DiskFullError):
            return self._once(work)
        self._starve()
        with self._without_growth():
            for rows in SACRIFICES:
                with contextlib.suppress(DiskFullError):
                    return self._once(partial(self._after_sacrifice, rows=rows, work=work))
        if last_resort is None:
            raise DiskFullError(f"outbox {self._file.path} has no room")
        return self._once(last_resort)

    def _after_sacrifice(self, db: Database, rows: int, work: Work[T]) -> T:
        self._retention.sacrifice(rows)
        return work(db)

    def _starve(self) -> None:
        """The disk is full: the ballast is given to the WAL, and the database stays as large as it is."""
        if self._most_pages is None:
            self._most_pages = self._file.page_count()
            self._looked_s = time.monotonic()
        self._ballast.release()
        self._file.checkpoint()

    @contextmanager
    def _without_growth(self) -> Iterator[None]:
        if self._most_pages is None:
            yield
            return
        self._file.limit_pages(self._most_pages)
        try:
            yield
        finally:
            self._file.limit_pages(NO_LIMIT_PAGES)

    def _look_for_room(self) -> None:
        """Ends what `_starve` began once the ballast can be made again."""
        if self._most_pages is not None and time.monotonic() - self._looked_s > BALLAST_LOOK_S:
            self._looked_s = time.monotonic()
            if self._ballast.restore():
                self._most_pages = None
                log.warning("outbox %s has room on its disk again", self._file.path)

    def _refuse_if_stopping(self) -> None:
        if self._stopping:
            raise StorageError(
                f"outbox {self._file.path} has no room for more ({self._table.counts.rows[0]} rows wait, "
                f"{self._retention.limits}); the line stops: bring the consumer back, or give it more disk"
            )


def set_meta(db: Database, key: str, value: object) -> None:
    """Within a transaction: writes one value of the table `meta`."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
