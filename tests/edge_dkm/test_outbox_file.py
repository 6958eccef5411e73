from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_dkm.errors import StorageError
from edge_dkm.outbox import Outbox
from edge_dkm.outbox import file as outbox_file
from tests.outboxes import cseqs, draft, topic_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outbox.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[], Outbox]]:
    boxes: list[Outbox] = []

    def make() -> Outbox:
        for old in boxes:
            old.close()
        boxes.append(Outbox(path, "st1", topic_of))
        return boxes[-1]

    yield make
    for old in boxes:
        old.close()


def crash(box: Outbox) -> None:
    """Ends without a word to the file, as kill -9 does: the database as it is on the disk is opened by the next."""
    folder = box.path.parent
    copies = [(file, file.read_bytes()) for file in folder.glob("outbox.db*") if "ballast" not in file.name]
    box._file.close()
    for file, content in copies:
        file.write_bytes(content)


def write_garbage(path: Path) -> None:
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 40)


def write_header_only(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4000)


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "something").touch()


def write_other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other(x)")


def write_lookalike(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other(x)")
        db.execute("PRAGMA user_version = 2")


def fill(path: Path) -> None:
    box = Outbox(path, "st1", topic_of)
    box.commit([draft(size=500) for _ in range(200)])
    box.close()


def truncate(path: Path) -> None:
    fill(path)
    path.write_bytes(path.read_bytes()[:20_000])


def damage_pages(path: Path) -> None:
    fill(path)
    content = bytearray(path.read_bytes())
    content[4096 * 2 : 4096 * 6] = b"\xa5" * (4096 * 4)
    path.write_bytes(content)
    (path.parent / "outbox.db.distrust").write_text("check")


def lose_the_epoch(path: Path) -> None:
    fill(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM meta WHERE key = 'epoch'")
        db.commit()


def flip_the_version(path: Path) -> None:
    fill(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 6")


DAMAGES = [
    write_garbage,
    write_header_only,
    make_folder,
    write_other_database,
    write_lookalike,
    truncate,
    damage_pages,
    lose_the_epoch,
    flip_the_version,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_moved_away_and_the_line_starts_with_a_new_epoch(
    path: Path, damage: Callable[[Path], None], opened: Callable[[], Outbox]
) -> None:
    damage(path)
    box = opened()
    assert box.quarantined == path.with_name("outbox.db.corrupt-1") and box.quarantined.exists()
    assert box.commit([draft()])[0].cseq == 1
    epoch = box.epoch
    box = opened()
    assert (box.epoch, box.quarantined, cseqs(box)) == (epoch, None, [1])


def test_an_empty_file_is_a_new_outbox(path: Path, opened: Callable[[], Outbox]) -> None:
    path.touch()
    box = opened()
    assert box.quarantined is None and box.commit([draft()])[0].cseq == 1


def test_quarantines_do_not_overwrite_each_other(path: Path, opened: Callable[[], Outbox]) -> None:
    for n in (1, 2):
        write_garbage(path)
        assert opened().quarantined == path.with_name(f"outbox.db.corrupt-{n}")
        opened().close()
        path.unlink()


def test_a_quarantine_takes_the_side_files_and_a_crash_in_it_leaves_no_old_wal_to_the_new_file(
    path: Path, opened: Callable[[], Outbox]
) -> None:
    box = opened()
    box.commit([draft() for _ in range(5)])
    old = box.epoch
    crash(box)
    path.unlink()  # moved, and then the power went: its WAL is still here
    path.with_name("outbox.db.distrust").write_text("replace")
    box = opened()
    assert box.epoch != old and cseqs(box) == []
    assert path.with_name("outbox.db.corrupt-1-wal").exists() and not path.with_name("outbox.db.distrust").exists()


def test_a_crash_at_the_end_of_a_quarantine_does_not_keep_it_from_starting(
    path: Path, opened: Callable[[], Outbox]
) -> None:
    path.with_name("outbox.db.distrust").write_text("replace")  # all was moved, nothing is here
    assert opened().quarantined is None
    assert not path.with_name("outbox.db.distrust").exists()


def test_where_it_cannot_be_moved_it_is_an_error_and_never_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_garbage(path)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match=r"cannot be used: .*Permission denied"):
        Outbox(path, "st1", topic_of)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open database file"):
        Outbox(tmp_path / "nowhere" / "outbox.db", "st1", topic_of)


def test_a_file_that_another_process_holds_is_not_moved_away(path: Path, opened: Callable[[], Outbox]) -> None:
    opened().commit([draft()])
    with pytest.raises(StorageError, match="locked"):
        Outbox(path, "st1", topic_of)
    assert path.exists() and not path.with_name("outbox.db.corrupt-1").exists()


@pytest.mark.parametrize("version", [3, 9])
def test_a_file_of_a_newer_version_is_refused_and_stays(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE meta(key TEXT PRIMARY KEY, value NOT NULL)")
        db.execute("INSERT INTO meta VALUES ('version', ?)", (version,))
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()
    with pytest.raises(StorageError, match=f"has version {version}, this program writes 2"):
        Outbox(path, "st1", topic_of)
    assert path.exists()


def test_a_file_of_version_1_is_brought_to_this_one_in_place(path: Path, opened: Callable[[], Outbox]) -> None:
    with closing(sqlite3.connect(path)) as db:
        for statement in outbox_file.VERSION_1.split(";"):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('epoch', '0123456789abcdef')")
        db.execute("INSERT INTO meta VALUES ('session', 7)")
        db.execute("INSERT INTO counter VALUES ('top', 2)")
        db.execute("INSERT INTO intent VALUES ('r3', 'top', 'plc', 3, 'ts')")
        row = outbox_file_row(2, "top", 2, "t/top/result", b'{"schema": "dkm.result/1", "cseq": 2}')
        db.execute("INSERT INTO outbox VALUES (?, ?, ?, ?, ?, ?, 1.0, 1.0, 'boot', 0)", row)
        db.execute("PRAGMA user_version = 1")
        db.commit()
    box = opened()
    assert (box.quarantined, box.epoch, box.next_session()) == (None, "0123456789abcdef", 8)
    assert cseqs(box) == [2] and [intent.part_id for intent in box.open_intents()] == [None]
    assert box.commit([draft()])[0].cseq == 3


def outbox_file_row(seq: int, camera: str, cseq: int, topic: str, body: bytes) -> tuple[Any, ...]:
    """As version 1 wrote it, CRC included."""
    import zlib

    crc = zlib.crc32(body, zlib.crc32(f"{seq}\0{camera}\0{cseq}\0{topic}\0".encode()))
    return seq, camera, cseq, topic, body, crc


def test_after_an_end_in_order_pages_are_not_read_again_and_after_a_crash_they_are(
    path: Path, opened: Callable[[], Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[str] = []

    class Watched:
        def __init__(self, db: Any) -> None:
            self._db = db

        def execute(self, sql: str, parameters: Any = ()) -> Any:
            if "_check" in sql:
                checks.append(sql)
            return self._db.execute(sql, parameters)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._db, name)

    monkeypatch.setattr(Outbox, "_connect", staticmethod(lambda path: Watched(outbox_file.connect(path))))
    opened().commit([draft()])
    box = opened()
    assert checks == []
    box.commit([draft()])
    crash(box)
    assert cseqs(opened()) == [1, 2] and checks == ["PRAGMA quick_check(1)"]
    path.with_name("outbox.db.distrust").write_text("check")
    assert cseqs(opened()) == [1, 2] and checks[1:] == ["PRAGMA integrity_check(1)"]
    assert not path.with_name("outbox.db.distrust").exists()


@pytest.mark.parametrize(
    "code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR_WRITE]
)
def test_after_an_error_that_leaves_the_disk_in_doubt_it_is_used_no_more_and_checked_at_the_next_start(
    path: Path, monkeypatch: pytest.MonkeyPatch, opened: Callable[[], Outbox], code: int
) -> None:
    class Failing:
        broken = False

        def __init__(self, db: Any) -> None:
            self._db = db

        def execute(self, sql: str, parameters: Any = ()) -> Any:
            if sql == "COMMIT" and Failing.broken:
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = code
                raise error
            return self._db.execute(sql, parameters)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._db, name)

    monkeypatch.setattr(Outbox, "_connect", staticmethod(lambda path: Failing(outbox_file.connect(path))))
    box = opened()
    box.commit([draft()])
    Failing.broken = True
    with pytest.raises(StorageError, match="in doubt") as caught:
        box.commit([draft()])
    assert caught.value.exit_code == 7
    Failing.broken = False
    for use in (lambda: box.commit([draft()]), lambda: box.unsent(0, 1), box.status, lambda: box.mark_sent([1])):
        with pytest.raises(StorageError, match="in doubt"):
            use()
    assert path.with_name("outbox.db.distrust").read_text() == "check"
    assert cseqs(opened()) == [1]


def test_damage_that_shows_while_it_runs_is_found_at_the_next_start(path: Path, opened: Callable[[], Outbox]) -> None:
    fill(path)
    content = bytearray(path.read_bytes())
    for page in range(8, len(content) // 4096 - 4):
        content[4096 * page : 4096 * page + 100] = b"\xa5" * 100
    box = opened()
    path.write_bytes(content)
    box._file.db.execute("PRAGMA shrink_memory")
    with pytest.raises(StorageError, match="malformed"):
        for _ in range(3):
            box.unsent(0, 10_000)
    assert opened().quarantined is not None


def test_control_without_the_sentinel_the_damage_goes_unseen_until_a_row_is_read(path: Path) -> None:
    fill(path)
    content = bytearray(path.read_bytes())
    content[-2000:-1900] = b"\xa5" * 100
    path.write_bytes(content)
    box = Outbox(path, "st1", topic_of)  # it ended in order, so no page is checked
    assert box.quarantined is None
    box._file.close()
