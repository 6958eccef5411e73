"""A disk whose power can be cut: an apsw VFS in memory that knows what was synced, and an adapter that lets Outbox run on it.

A cut at a random write or sync reverts each 512-byte sector that was not synced with probability one half, the last write included,
so a write may be torn. File names and lengths survive as the sectors do: what grew and was not synced may be cut off again.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw

from edge_dkm.errors import StorageError
from edge_dkm.outbox import Draft, Outbox

SECTOR_BYTES = 512
_names = itertools.count()


class PowerCutError(Exception):
    """The power is gone: nothing reaches the disk any more."""


class Content:
    """One file: what the program sees, what is safe, and which sectors differ."""

    def __init__(self) -> None:
        self.seen = bytearray()
        self.safe = bytearray()
        self.unsynced: set[int] = set()


class Disk(apsw.VFS):
    """`cut_after` writes and syncs from now on the power goes; `restart` is the next boot."""

    def __init__(self, rng: random.Random) -> None:
        self.name = f"power_cut_{next(_names)}"
        self.rng = rng
        self.files: dict[str, Content] = {}
        self.left: int | None = None
        self.is_dead = False
        super().__init__(self.name, "", exclude={"xDlOpen", "xDlSym", "xDlClose", "xDlError", "xSetSystemCall"})

    def cut_after(self, operations: int) -> None:
        self.left = operations

    def step(self) -> None:
        """One write or sync."""
        if self.is_dead:
            raise PowerCutError
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                self.is_dead = True

    def restart(self) -> None:
        for content in self.files.values():
            length = len(content.seen)
            if len(content.safe) != length and self.rng.random() < 0.5:
                length = len(content.safe)
            after = bytearray(content.seen[:length].ljust(length, b"\0"))
            for sector in content.unsynced:
                if self.rng.random() < 0.5:
                    start = sector * SECTOR_BYTES
                    old = bytes(content.safe[start : start + SECTOR_BYTES])
                    end = min(start + SECTOR_BYTES, length)
                    if start < end:
                        after[start:end] = old.ljust(SECTOR_BYTES, b"\0")[: end - start]
            content.seen, content.safe, content.unsynced = after, bytearray(after), set()
        self.left, self.is_dead = None, False

    def xOpen(self, name: Any, flags: list[int]) -> Any:  # noqa: N802
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        flags[1] = flags[0]
        return DiskFile(self, self.files.setdefault(path or f"temporary{next(_names)}", Content()))

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        self.step()
        if self.is_dead:
            raise PowerCutError
        self.files.pop(filename, None)

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        return pathname in self.files

    def xFullPathname(self, filename: str) -> str:  # noqa: N802
        return filename

    def xRandomness(self, numbytes: int) -> bytes:  # noqa: N802
        return self.rng.randbytes(numbytes)

    def xSleep(self, microseconds: int) -> int:  # noqa: N802
        return 0

    def xCurrentTime(self) -> float:  # noqa: N802
        return 2_460_000.5

    def xCurrentTimeInt64(self) -> int:  # noqa: N802
        return 212_544_043_200_000

    def xGetLastError(self) -> tuple[int, str]:  # noqa: N802
        return 0, ""


class DiskFile:
    """One open file of a Disk."""

    def __init__(self, disk: Disk, content: Content) -> None:
        self.disk, self.content = disk, content

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        return bytes(self.content.seen[offset : offset + amount])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.step()
        seen = self.content.seen
        if len(seen) < offset:
            seen.extend(bytes(offset - len(seen)))
        seen[offset : offset + len(data)] = data
        self.content.unsynced.update(range(offset // SECTOR_BYTES, (offset + len(data) - 1) // SECTOR_BYTES + 1))
        if self.disk.is_dead:
            raise PowerCutError

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.disk.step()
        if self.disk.is_dead:
            raise PowerCutError
        self.content.safe = bytearray(self.content.seen)
        self.content.unsynced.clear()

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        self.disk.step()
        del self.content.seen[newsize:]
        if self.disk.is_dead:
            raise PowerCutError

    def xFileSize(self) -> int:  # noqa: N802
        return len(self.content.seen)

    def xClose(self) -> None:  # noqa: N802
        pass

    def xLock(self, level: int) -> None:  # noqa: N802
        pass

    def xUnlock(self, level: int) -> None:  # noqa: N802
        pass

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def xFileControl(self, op: int, ptr: int) -> bool:  # noqa: N802
        return False

    def xSectorSize(self) -> int:  # noqa: N802
        return SECTOR_BYTES

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return 0


class _Rows:
    """What `sqlite3.Cursor` gives, of an apsw cursor read to its end."""

    def __init__(self, rows: list[Any], rowcount: int) -> None:
        self._rows, self.rowcount = rows, rowcount

    def fetchone(self) -> Any:
        return self._rows.pop(0) if self._rows else None

    def fetchall(self) -> list[Any]:
        rows, self._rows = self._rows, []
        return rows

    def __iter__(self) -> Any:
        return iter(self.fetchall())


class Adapter:
    """An apsw connection with the face and the errors of `sqlite3`; pragmas in `instead` are replaced, for controls."""

    def __init__(self, disk: Disk, path: Path, instead: dict[str, str]) -> None:
        self._db = apsw.Connection(str(path), vfs=disk.name)
        self._instead = instead

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> _Rows:
        try:
            rows = list(self._db.execute(self._instead.get(sql, sql), tuple(parameters)))
            return _Rows(rows, self._db.changes())
        except PowerCutError:
            raise
        except apsw.Error as error:
            translated = sqlite3.DatabaseError(str(error))
            translated.sqlite_errorcode = getattr(error, "extendedresult", 0)
            raise translated from error

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def close(self) -> None:
        with contextlib.suppress(apsw.Error, PowerCutError):
            self._db.close(True)


def outbox_on(disk: Disk, instead: dict[str, str] | None = None) -> type[Outbox]:
    """Outbox with its database on this disk, without ballast."""

    def connect(path: Path) -> Adapter:
        return Adapter(disk, path, instead or {})

    class OnDisk(Outbox):
        ballast_bytes = 0
        _connect: Callable[[Path], Any] = staticmethod(connect)

    return OnDisk


@dataclass
class Tally:
    """What the power cuts did. `lost`: committed results that are neither there nor acknowledged; `undone`: acknowledgements."""

    cuts: int = 0
    committed: int = 0
    lost: int = 0
    undone: int = 0
    unusable: int = 0
    cuts_with_loss: int = 0


class Ledger:
    """What the outbox has promised, kept outside of it."""

    def __init__(self) -> None:
        self.waiting: set[tuple[str, int]] = set()
        self.sent: set[tuple[str, int]] = set()


def cut_repeatedly(cuts: int, seed: int, instead: dict[str, str] | None = None) -> Tally:
    """Runs an outbox into `cuts` power cuts at random moments, opening, committing, acknowledging and purging."""
    rng = random.Random(seed)
    tally = Tally()
    disk, ledger = Disk(rng), Ledger()
    box_class = outbox_on(disk, instead)
    path = Path("/not/on/any/real/disk/outbox.db")
    for _ in range(cuts):
        tally.cuts += 1
        disk.cut_after(rng.choice([rng.randint(1, 12), rng.randint(1, 120), rng.randint(1, 600)]))
        box: Outbox | None = None
        try:
            box = box_class(path, "st1", str)
            _work(box, rng, ledger, tally)
        except PowerCutError:
            pass
        finally:
            _drop(box, disk)
        disk.restart()
        try:
            box = box_class(path, "st1", str)
            _check(box, ledger, tally)
            _drop(box, disk)
        except (StorageError, sqlite3.Error):
            tally.unusable += 1
            _drop(box, disk)
            disk.files.clear()
            ledger = Ledger()
    return tally


def _work(box: Outbox, rng: random.Random, ledger: Ledger, tally: Tally) -> None:
    """Until the power goes."""
    while True:
        batch = [Draft(rng.choice("ab"), "t", "r", lambda n: b"%d " % n.cseq * rng.choice([1, 30, 400]))]
        batch *= rng.choice([1, 1, 3])
        given = box.commit(batch)
        tally.committed += len(given)
        ledger.waiting.update((draft.camera, n.cseq) for draft, n in zip(batch, given, strict=True))
        if rng.random() < 0.4:
            rows = box.unsent(0, rng.choice([1, 5, 50]))
            box.mark_sent([row.seq for row in rows])
            done = {(row.camera, row.cseq or 0) for row in rows}
            ledger.waiting -= done
            ledger.sent |= done
        if rng.random() < 0.05:
            box.purge()


def _check(box: Outbox, ledger: Ledger, tally: Tally) -> None:
    """Compares and begins a new page of the ledger with what is there; one commit more than it knows may be."""
    found = {(row.camera, row.cseq or 0) for row in box.unsent(0, 1_000_000)}
    # What was under way at the cut: a commit, or an acknowledgement of the oldest rows that were waiting.
    missing = ledger.waiting - found
    acknowledged = _held_as_sent(box, missing)
    tally.lost += len(missing - acknowledged)
    tally.cuts_with_loss += bool(missing - acknowledged)
    tally.undone += len(ledger.sent & found)
    ledger.waiting, ledger.sent = set(found), set()


def _held_as_sent(box: Outbox, wanted: set[tuple[str, int]]) -> set[tuple[str, int]]:
    return {
        (camera, cseq)
        for camera, cseq in wanted
        if any(kept.body is not None for kept in box.kept(camera, box.epoch, cseq, cseq, 1))
    }


def _drop(box: Outbox | None, disk: Disk) -> None:
    """Lets go of the connection without writing anything."""
    if box is not None:
        was_dead, disk.is_dead = disk.is_dead, True
        box._file.close()
        disk.is_dead = was_dead
