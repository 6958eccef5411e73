"""The outbox's file: opened, checked, brought to this version, or moved away where it is damaged. The only module that speaks SQLite.

One connection (two would meet the WAL-reset bug of SQLite before 3.51.3), WAL with synchronous=FULL: a commit survives a power cut.
After an error that leaves in doubt what is on the disk the file is used no more, and the next start checks all of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from edge_dkm.errors import StorageError
from edge_dkm.set_aside import set_aside

log = logging.getLogger(__name__)

USER_VERSION = 2
CHECKPOINT_PAGES = 200
PAGE_BYTES = 4096
NO_LIMIT_PAGES = 2**30
WAL_BYTES = CHECKPOINT_PAGES * PAGE_BYTES
PRAGMAS = ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "mmap_size=0")
VERSION_1 = """
CREATE TABLE outbox(seq INTEGER PRIMARY KEY AUTOINCREMENT, camera TEXT NOT NULL, cseq INT, topic TEXT NOT NULL, body BLOB NOT NULL,
                    crc INT NOT NULL, t_wall REAL NOT NULL, t_mono REAL NOT NULL, boot TEXT NOT NULL, sent INT NOT NULL DEFAULT 0);
CREATE INDEX outbox_unsent ON outbox(seq) WHERE sent = 0;
CREATE INDEX outbox_gaps ON outbox(camera, seq) WHERE cseq IS NULL;
CREATE TABLE counter(camera TEXT PRIMARY KEY, n INT NOT NULL);
CREATE TABLE intent(result_id TEXT PRIMARY KEY, camera TEXT NOT NULL, kind TEXT NOT NULL, trigger_id INT NOT NULL, ts TEXT NOT NULL);
CREATE TABLE meta(key TEXT PRIMARY KEY, value NOT NULL);
"""
# settled: the highest cseq of a row that was acknowledged and deleted. meta holds epoch, session, version, clean, handed.
VERSION_2 = """
DROP INDEX outbox_unsent;
DROP INDEX outbox_gaps;
CREATE INDEX outbox_sent ON outbox(sent, seq);
CREATE INDEX outbox_cseq ON outbox(camera, cseq);
ALTER TABLE counter ADD COLUMN settled INT NOT NULL DEFAULT 0;
ALTER TABLE intent ADD COLUMN part_id TEXT;
ALTER TABLE intent ADD COLUMN product TEXT;
CREATE TABLE reply(n INTEGER PRIMARY KEY AUTOINCREMENT, command_id TEXT NOT NULL UNIQUE, reply BLOB NOT NULL);
CREATE TABLE note(key TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO meta VALUES ('version', 2);
"""
SIDE_FILES = ("", "-wal", "-shm", "-journal")
CHECK, REPLACE = "check", "replace"  # words of the sentinel: look at every page; or it was being moved away
NO_DAMAGE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM}
DOUBTFUL = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR}


class DiskFullError(StorageError):
    """There is no room on the disk; nothing was changed."""


class _DamagedError(Exception):
    """The file opens, but is not an outbox in order."""


class Database(Protocol):
    """What is used of a `sqlite3.Connection`; tests put one on a disk whose power they cut."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Any:
        """A cursor with `fetchone`, `fetchall`, `rowcount`."""

    def close(self) -> None:
        """Releases the file."""


def connect(path: Path) -> Database:
    """A connection in autocommit mode, for use from any thread under one lock."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=2)
    db.text_factory = lambda raw: raw.decode("utf-8", "replace")  # a damaged text is for the row's CRC to find
    return db


class OutboxFile:
    """Opens or makes the file; `load` reads what its user needs of it, and a failure there counts as damage too.

    Raises:
        StorageError: the folder cannot be written, the file belongs to a newer version, or another process holds it.
    """

    def __init__(self, path: Path, connect: Callable[[Path], Database], load: Callable[[Database], None]) -> None:
        self.path = path
        self.quarantined: Path | None = None
        self._connect, self._load = connect, load
        self._sentinel = path.with_name(f"{path.name}.distrust")
        self._failed: str | None = None
        try:
            if self._sentinel.is_dir():
                log.warning("S-CORRUPT %s is a folder, moved to %s", self._sentinel, set_aside(self._sentinel))
            self.db = self._open_or_replace()
        except (sqlite3.Error, OSError, _DamagedError) as error:
            raise StorageError(
                f"S-IO outbox {path} cannot be used: {error}; its folder must be writable, have room, and no other program may hold the file"
            ) from None

    def _open_or_replace(self) -> Database:
        try:
            if self._distrust() == REPLACE and self._is_there():
                raise _DamagedError("it was being moved away when the program ended")
            db = self._open()
        except (sqlite3.Error, _DamagedError, TypeError, ValueError, OverflowError) as error:
            if _code(error) in NO_DAMAGE or not self._is_there():
                raise
            self._quarantine(error)
            db = self._open()
        self._sentinel.unlink(missing_ok=True)
        return db

    def _is_there(self) -> bool:
        return any(_side(self.path, suffix).exists() for suffix in SIDE_FILES)

    def _open(self) -> Database:
        if self.path.is_dir():
            raise _DamagedError("it is a folder")
        self._check_rights()
        wal = _side(self.path, "-wal")
        if _size(self.path) == 0 and _size(wal) > 0:  # SQLite would take it for a new one and delete its WAL
            raise _DamagedError(
                f"it is {'empty' if self.path.exists() else 'gone'}, beside a WAL of {_size(wal)} bytes"
            )
        db = self._connect(self.path)
        try:
            for pragma in (*PRAGMAS, f"wal_autocheckpoint={CHECKPOINT_PAGES}"):
                db.execute(f"PRAGMA {pragma}").fetchall()
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            self._check_version(db, version)
            if version:
                self._check_pages(db)
            for statements in (VERSION_1, VERSION_2)[version:]:
                self._upgrade(db, statements)
            epoch = db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
            if epoch is None or not re.fullmatch("[0-9a-f]{16}", str(epoch[0])):
                raise _DamagedError(f"its epoch is {epoch and epoch[0]!r}, expected 16 hexadecimal digits")
            self.epoch = str(epoch[0])
            self._load(db)
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                db.close()
            raise
        return db

    def _check_rights(self) -> None:
        """A file of another user (a backup that root put back) is not damaged: it must not be moved away with what waits in it."""
        for side in (_side(self.path, suffix) for suffix in SIDE_FILES):
            if side.is_file() and not os.access(side, os.R_OK | os.W_OK, effective_ids=True):
                owner, mode = side.stat().st_uid, side.stat().st_mode & 0o777
                raise StorageError(
                    f"S-IO outbox {side} may not be read and written by user {os.geteuid()} (its owner is {owner}, its mode {mode:o}); "
                    "give it back to the user that runs the station (chown)"
                )

    def _check_version(self, db: Database, version: int) -> None:
        if version == 0 and db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
            raise _DamagedError("it is some other database")
        if 0 <= version <= USER_VERSION:
            return
        said = None
        with contextlib.suppress(sqlite3.Error):
            said = db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
        if said is not None and said[0] != version:
            raise _DamagedError(f"its header says version {version}, its content {said[0]}")
        raise StorageError(
            f"outbox {self.path} has version {version}, this program writes {USER_VERSION}; "
            "use the program that wrote it, or move it away"
        )

    def _check_pages(self, db: Database) -> None:
        """All of it where it is distrusted; the structure where the program did not end in order; else nothing."""
        clean = db.execute("SELECT value FROM meta WHERE key = 'clean'").fetchone()
        check = "integrity_check" if self._distrust() else "quick_check"
        if check == "quick_check" and clean is not None and clean[0] == 1:
            return
        found = db.execute(f"PRAGMA {check}(1)").fetchall()
        if [tuple(row) for row in found] != [("ok",)]:
            raise _DamagedError(f"{check}: {found[0][0] if found else 'no answer'}")

    def _upgrade(self, db: Database, statements: str) -> None:
        with _transaction(db):
            for statement in filter(str.strip, statements.split(";")):
                db.execute(statement)
            if statements is VERSION_1:
                db.execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),))
            db.execute(f"PRAGMA user_version = {1 if statements is VERSION_1 else 2}")

    def _distrust(self) -> str | None:
        """What the sentinel asks for."""
        try:
            return REPLACE if self._sentinel.read_text() == REPLACE else CHECK
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return CHECK

    def _quarantine(self, error: Exception) -> None:
        """Moves the file with its side files; the sentinel keeps a new file from meeting the old one's WAL after a crash in between."""
        place = next(
            place
            for n in range(1, 1_000_000)
            if not any(_side(place := _side(self.path, f".corrupt-{n}"), suffix).exists() for suffix in SIDE_FILES)
        )
        self._write_sentinel(REPLACE)
        for suffix in SIDE_FILES:
            if _side(self.path, suffix).exists():
                _side(self.path, suffix).rename(_side(place, suffix))
        _sync_folder(self.path.parent)
        self.quarantined = place
        self._sentinel.unlink()
        _sync_folder(self.path.parent)  # were it to come back after a power cut, the new file would be moved away
        log.error("S-CORRUPT outbox %s: %s; moved to %s, a new one with a new epoch begins", self.path, error, place)

    def _write_sentinel(self, word: str) -> None:
        file = os.open(self._sentinel, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(file, word.encode())
            os.fsync(file)
        finally:
            os.close(file)
        _sync_folder(self.path.parent)

    @contextmanager
    def transaction(self) -> Iterator[Database]:
        """BEGIN to COMMIT.

        Raises:
            DiskFullError: no room; nothing was changed.
            StorageError: it cannot be written; where that leaves its content in doubt, it is used no more.
        """
        self._refuse_if_failed()
        try:
            with _transaction(self.db):
                yield self.db
        except sqlite3.Error as error:
            raise self._judged(error, "written") from error

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query; errors as in `transaction`."""
        self._refuse_if_failed()
        try:
            return list(self.db.execute(sql, parameters).fetchall())
        except sqlite3.Error as error:
            raise self._judged(error, "read") from error

    def checkpoint(self) -> None:
        """Empties the WAL into the file where that is possible, so that the WAL's own room is used again."""
        with contextlib.suppress(sqlite3.Error):
            self.db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def page_count(self) -> int:
        """Pages that the database has."""
        return int(self.read("PRAGMA page_count")[0][0])

    def limit_pages(self, pages: int) -> None:
        """What would make the database grow beyond that fails as on a full disk, from now on."""
        self.read(f"PRAGMA max_page_count = {pages}")

    def close(self) -> None:
        """Releases the file; that it ended in order is for its user to say (meta `clean`)."""
        with contextlib.suppress(sqlite3.Error):
            self.db.close()

    def _refuse_if_failed(self) -> None:
        if self._failed is not None:
            raise StorageError(self._failed)

    def _judged(self, error: sqlite3.Error, what: str) -> StorageError:
        message = f"S-IO outbox {self.path} cannot be {what}: {error}"
        if _code(error) == sqlite3.SQLITE_FULL:
            return DiskFullError(message)
        if _code(error) in DOUBTFUL:
            # After a failed fsync nothing is known of what is on the disk: no further write may build on it.
            self._failed = f"{message}; what is on the disk is in doubt: start again, which checks the file"
            with contextlib.suppress(OSError):
                self._write_sentinel(CHECK)
            return StorageError(self._failed)
        return StorageError(message)


@contextmanager
def _transaction(db: Database) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                db.execute("ROLLBACK")
        raise


def _code(error: Exception) -> int:
    """SQLite's primary result code, 0 for errors of another kind."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _side(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
