from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_dkm import clock
from edge_dkm.outbox import Draft, Intent, Limits, Numbers, Outbox
from edge_dkm.outbox import table as outbox_table
from tests.outboxes import cseqs, draft, gaps, topic_of


@pytest.fixture
def open_outbox(tmp_path: Path) -> Iterator[Callable[..., Outbox]]:
    """Opens the same file again and again; all are closed at the end."""
    opened: list[Outbox] = []

    def make(**limits: Any) -> Outbox:
        for old in opened:
            old.close()
        opened.append(Outbox(tmp_path / "outbox.db", "st1", topic_of, Limits(**limits)))
        return opened[-1]

    yield make
    for old in opened:
        old.close()


def test_numbers_rise_by_one_per_camera_and_over_all(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    given = box.commit([draft("top"), draft("side")]) + box.commit([draft("top")])
    assert [(n.seq, n.cseq) for n in given] == [(1, 1), (2, 1), (3, 2)]
    assert len({n.epoch for n in given}) == 1 and box.last_cseq() == {"top": 2, "side": 1}


def test_results_survive_closing_and_are_sent_in_order(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    box.commit([draft() for _ in range(5)])
    epoch = box.epoch
    box = open_outbox()
    assert cseqs(box) == [1, 2, 3, 4, 5] and box.epoch == epoch
    assert box.commit([draft()])[0] == Numbers(epoch, 6, 6)


def test_acknowledged_rows_are_kept_but_not_sent_again_and_numbers_are_never_reused(
    open_outbox: Callable[..., Outbox],
) -> None:
    box = open_outbox(keep_h=0)
    box.commit([draft() for _ in range(3)])
    box.mark_sent([row.seq for row in box.unsent(0, 10)])
    assert cseqs(box) == [] and box.status().sent_rows == 3 and box.status().rows == 0
    box.trim()
    assert box.status().sent_rows == 0
    box = open_outbox()
    assert box.commit([draft()])[0].seq == 4


def test_rows_behind_a_number_are_given_up_to_a_limit(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    box.commit([draft() for _ in range(10)])
    assert [row.seq for row in box.unsent(3, 4)] == [4, 5, 6, 7]


def test_marking_twice_or_nothing_changes_nothing(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    box.commit([draft(), draft()])
    for _ in range(2):
        box.mark_sent([1])
        box.mark_sent([])
    assert (box.status().rows, box.status().sent_rows) == (1, 1)


def test_a_commit_wakes_the_publisher_after_the_row_is_there(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    seen: list[int] = []
    box.on_commit = lambda: seen.append(box.status().rows)
    box.commit([draft(), draft()])
    assert seen == [2]


def test_an_intent_is_closed_by_its_result_and_stays_open_without(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    for n in (1, 2):
        box.intend(Intent(f"r{n}", "top", "part_present", n, "ts"))
    box.commit([draft(result_id="r1")])
    assert [intent.result_id for intent in open_outbox().open_intents()] == ["r2"]


def test_when_full_the_oldest_is_dropped_and_declared_in_one_widening_record(
    open_outbox: Callable[..., Outbox],
) -> None:
    box = open_outbox(max_rows=10)
    for _ in range(25):
        box.commit([draft()])
    assert gaps(box) == [("top", 1, 16, "drop_oldest")]
    assert cseqs(box) == list(range(17, 26))


def test_received_and_declared_add_up_to_what_was_produced_for_every_camera(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox(max_rows=12)
    for n in range(40):
        box.commit([draft("top" if n % 3 else "side")])
    for camera, produced in box.last_cseq().items():
        declared = [c for cam, first, last, _ in gaps(box) if cam == camera for c in range(first, last + 1)]
        assert sorted(declared + cseqs(box, camera)) == list(range(1, produced + 1))


def test_what_was_acknowledged_goes_before_anything_is_dropped(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox(max_rows=10)
    box.commit([draft() for _ in range(8)])
    box.mark_sent([row.seq for row in box.unsent(0, 5)])
    box.commit([draft() for _ in range(6)])
    assert gaps(box) == [] and cseqs(box) == list(range(6, 15)) and box.status().sent_rows == 1


def test_rows_under_way_are_not_dropped_since_the_consumer_may_have_them(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox(max_rows=10)
    box.commit([draft() for _ in range(10)])
    under_way = [row.seq for row in box.unsent(0, 3)]
    box.commit([draft() for _ in range(4)])
    assert under_way == [1, 2, 3]
    assert cseqs(box)[:3] == [1, 2, 3] and gaps(box)[0][1] == 4


def test_what_an_earlier_process_handed_out_is_not_dropped_either(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox(max_rows=10)
    box.commit([draft() for _ in range(10)])
    box.unsent(0, 3)
    box = open_outbox(max_rows=10)
    box.commit([draft() for _ in range(4)])
    assert cseqs(box)[:3] == [1, 2, 3] and gaps(box) == [("top", 4, 8, "drop_oldest")]


def test_a_limit_in_bytes_holds_too(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox(max_bytes=5_000)
    for _ in range(30):
        box.commit([draft(size=400)])
    assert box.status().bytes <= 5_000 and gaps(box)[0][3] == "drop_oldest"


def test_too_old_results_are_declared_and_a_jump_of_the_wall_clock_ages_nothing(
    open_outbox: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    box = open_outbox(max_age_h=1)
    box.commit([draft() for _ in range(3)])
    monkeypatch.setattr(clock, "wall_s", lambda: 4e9)
    box.trim()
    assert box.status().rows == 3 and box.status().dropped == {}
    now_s = outbox_table.time.monotonic()
    monkeypatch.setattr(outbox_table.time, "monotonic", lambda: now_s + 7200)
    box.trim()
    assert cseqs(box) == [] and gaps(box) == [("top", 1, 3, "age")]
    assert box.status().dropped == {"top": {"age": 3}}


def test_after_a_reboot_the_wall_clock_decides_the_age(
    open_outbox: Callable[..., Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_outbox().commit([draft()])
    monkeypatch.setattr(clock, "boot_id", lambda: "another boot")
    wall = clock.wall_s()
    box = open_outbox(max_age_h=1)
    box.trim()
    assert box.status().rows == 1 and box.status().dropped == {}
    monkeypatch.setattr(clock, "wall_s", lambda: wall + 7200)
    box.trim()
    assert gaps(box) == [("top", 1, 1, "age")]


def test_a_damaged_row_is_declared_and_never_sent(open_outbox: Callable[..., Outbox], tmp_path: Path) -> None:
    box = open_outbox()
    box.commit([draft() for _ in range(3)])
    box.close()
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db:
        db.execute("UPDATE outbox SET body = replace(body, 'xx', 'xy') WHERE seq = 2")
        db.commit()
        assert db.execute("PRAGMA quick_check").fetchone() == ("ok",)  # SQLite itself sees nothing
    box = Outbox(tmp_path / "outbox.db", "st1", topic_of)
    assert cseqs(box) == [1, 3] and gaps(box) == [("top", 2, 2, "row_corrupt")]
    box.close()


def test_a_failed_commit_leaves_neither_rows_nor_numbers(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    box.commit([draft()])

    def explode(numbers: Numbers) -> bytes:
        raise RuntimeError("rendering failed")

    with pytest.raises(RuntimeError):
        box.commit([draft(), Draft("top", "t", "x", explode)])
    assert cseqs(box) == [1] and box.commit([draft()])[0] == Numbers(box.epoch, 2, 2)


def test_sessions_count_up_across_restarts(open_outbox: Callable[..., Outbox]) -> None:
    assert [open_outbox().next_session() for _ in range(3)] == [1, 2, 3]


def test_two_threads_commit_and_read_at_once(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox()
    sent: list[int] = []

    def send() -> None:
        while len(sent) < 300:
            rows = box.unsent(0, 20)
            sent.extend(json.loads(row.body)["cseq"] for row in rows)
            box.mark_sent([row.seq for row in rows])

    reader = threading.Thread(target=send)
    reader.start()
    for _ in range(100):
        box.commit([draft() for _ in range(3)])
    reader.join(30)
    assert sent == list(range(1, 301))


CHILD = """
import sys
from edge_dkm.outbox import Outbox, Draft
box = Outbox(sys.argv[1], "st1", lambda camera: "t")
while True:
    numbers = box.commit([Draft("top", "t", "r", lambda n: str(n.cseq).encode())])
    print(numbers[0].cseq, flush=True)
"""


def test_what_was_committed_is_there_after_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    last = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(40):
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        last = max([last, *(int(line) for line in process.stdout.read().splitlines())])
        process.wait()
        process.stdout.close()
        box = Outbox(path, "st1", lambda camera: "t")
        stored = [int(row.body) for row in box.unsent(0, 100_000)]
        assert stored == list(range(1, len(stored) + 1)) and len(stored) in {
            last,
            last + 1,
        }  # one more may be committed and not yet said
        last = len(stored)
        box.close()


def test_a_gap_record_that_is_damaged_itself_leaves_no_undeclared_hole(
    open_outbox: Callable[..., Outbox], tmp_path: Path
) -> None:
    box = open_outbox(max_rows=10)
    box.commit([draft(result_id=str(n)) for n in range(15)])
    declared = gaps(box)[0]
    box.close()
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db:
        db.execute("UPDATE outbox SET body = 'nonsense' WHERE cseq IS NULL")
        db.commit()
    box = open_outbox(max_rows=10)
    box.unsent(0, 100)
    (camera, first, last, reason) = gaps(box)[0]
    assert (camera, first, reason) == ("top", 1, "row_corrupt") and last >= declared[2]
    assert last == cseqs(box)[0] - 1


def test_sent_gap_records_are_trimmed_like_any_sent_row(open_outbox: Callable[..., Outbox]) -> None:
    box = open_outbox(max_rows=10, keep_h=0)
    box.commit([draft(result_id=str(n)) for n in range(15)])
    box.mark_sent([row.seq for row in box.unsent(0, 100)])
    box.trim()
    assert box.status().sent_rows == 0


def test_a_row_that_lost_its_own_number_is_declared_by_the_hole_it_leaves(
    open_outbox: Callable[..., Outbox], tmp_path: Path
) -> None:
    box = open_outbox()
    box.commit([draft("top"), draft("side"), draft("top"), draft("side"), draft("top")])
    box.close()
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db:
        db.execute("UPDATE outbox SET cseq = 3 WHERE seq = 3")  # was 2
        db.execute("UPDATE outbox SET camera = 'sidf' WHERE seq = 2")  # was side
        db.commit()
    box = open_outbox()
    assert (cseqs(box), cseqs(box, "side")) == ([1, 3], [2])
    assert sorted(gaps(box)) == [("side", 1, 1, "row_corrupt"), ("top", 2, 2, "row_corrupt")]


@pytest.mark.parametrize("column", ["topic", "camera"])
def test_text_that_is_no_utf_8_any_more_is_a_damaged_row(
    open_outbox: Callable[..., Outbox], tmp_path: Path, column: str
) -> None:
    box = open_outbox()
    box.commit([draft() for _ in range(3)])
    box.close()
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db:
        db.execute(f"UPDATE outbox SET {column} = CAST(X'74FF70' AS TEXT) WHERE seq = 2")
        db.commit()
    box = open_outbox()
    assert cseqs(box) == [1, 3] and gaps(box) == [("top", 2, 2, "row_corrupt")]


def test_every_bit_flip_in_what_is_sent_is_found(open_outbox: Callable[..., Outbox], tmp_path: Path) -> None:
    box = open_outbox()
    box.commit([draft(size=5)])
    (row,) = box.unsent(0, 1)
    box.close()
    found = sqlite_only = 0
    for bit in range(8 * len(row.body)):
        body = bytearray(row.body)
        body[bit // 8] ^= 1 << bit % 8
        with (
            closing(sqlite3.connect(tmp_path / "copy.db")) as copy,
            closing(sqlite3.connect(tmp_path / "outbox.db")) as db,
        ):
            db.backup(copy)
            copy.execute("UPDATE outbox SET body = ?", (bytes(body),))
            copy.commit()
            sqlite_only += copy.execute("PRAGMA integrity_check").fetchone() != ("ok",)
        damaged = Outbox(tmp_path / "copy.db", "st1", topic_of)
        assert damaged.unsent(0, 1) == []
        found += gaps(damaged) == [("top", 1, 1, "row_corrupt")]
        damaged.close()
        if bit > 40:
            break
    assert (found, sqlite_only) == (42, 0)  # control: SQLite itself sees none
