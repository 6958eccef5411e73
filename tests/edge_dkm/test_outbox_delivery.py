from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from edge_dkm.errors import StorageError
from edge_dkm.outbox import Intent, Kept, Limits, Mode, Outbox
from tests.outboxes import cseqs, draft, gaps, topic_of
from tests.waiting import wait_until

Open = Callable[..., Outbox]


@pytest.fixture
def open_outbox(tmp_path: Path) -> Iterator[Open]:
    """Opens the same file again and again; all are closed at the end."""
    opened: list[Outbox] = []

    def make(mode: Mode = "journal", **limits: Any) -> Outbox:
        for old in opened:
            old.close()
        opened.append(Outbox(tmp_path / "outbox.db", "st1", topic_of, Limits(**limits), mode))
        return opened[-1]

    yield make
    for old in opened:
        old.close()


def send(box: Outbox, limit: int = 10_000) -> list[int]:
    """Hands out and lets the broker acknowledge."""
    seqs = [row.seq for row in box.unsent(0, limit)]
    box.mark_sent(seqs)
    return seqs


@pytest.mark.parametrize(("mode", "kept"), [("puback", (0, 0)), ("journal", (0, 3)), ("e2e", (3, 0))])
def test_what_the_brokers_acknowledgement_does_is_the_modes(
    open_outbox: Open, mode: Mode, kept: tuple[int, int]
) -> None:
    box = open_outbox(mode)
    box.commit([draft() for _ in range(3)])
    send(box)
    assert (box.status().rows, box.status().sent_rows) == kept
    assert open_outbox(mode).status().rows == kept[0]


def test_the_consumers_acknowledgement_is_cumulative_and_lasts(open_outbox: Open) -> None:
    box = open_outbox("e2e")
    box.commit([draft() for _ in range(5)])
    send(box)
    assert box.acknowledge(box.epoch, 3) == 3 and box.acknowledge(box.epoch, 2) == 0
    assert cseqs(box) == [4, 5]
    box = open_outbox("e2e")
    assert cseqs(box) == [4, 5] and box.acknowledge(box.epoch, 5) == 2
    assert box.status().rows == 0 and box.purge() == 5 and box.status().sent_rows == 0


def test_an_acknowledgement_of_what_was_not_handed_out_or_of_another_epoch_changes_nothing(
    open_outbox: Open, caplog: pytest.LogCaptureFixture
) -> None:
    box = open_outbox("e2e")
    box.commit([draft() for _ in range(5)])
    box.unsent(0, 2)
    for _ in range(3):
        assert box.acknowledge(box.epoch, 3) == 0 and box.acknowledge("f" * 16, 1) == 0
    assert box.status().rows == 5
    assert len([record for record in caplog.records if "is ignored" in record.message]) == 2


def test_an_acknowledgement_may_come_after_a_restart(open_outbox: Open) -> None:
    box = open_outbox("e2e")
    box.commit([draft() for _ in range(5)])
    box.unsent(0, 4)
    box = open_outbox("e2e")
    assert box.acknowledge(box.epoch, 5) == 0 and box.acknowledge(box.epoch, 4) == 4


def test_with_drop_newest_the_new_result_has_numbers_and_a_record_and_no_row(open_outbox: Open) -> None:
    box = open_outbox(max_rows=10, policy="drop_newest")
    for n in range(25):
        box.intend(Intent(f"r{n}", "top", "plc", n, "ts"))
    given = [numbers for n in range(25) for numbers in box.commit([draft(result_id=f"r{n}")])]
    assert [n.cseq for n in given] == list(range(1, 26)) and len({n.seq for n in given}) == 25
    assert box.open_intents() == [] and box.status().dropped == {"top": {"drop_newest": 15}}
    assert cseqs(box) == list(range(1, 11)) and gaps(box) == [("top", 11, 25, "drop_newest")]
    assert not {row.seq for row in box.unsent(0, 100) if row.cseq is None} & {n.seq for n in given}


def test_with_drop_newest_room_takes_results_again_and_what_was_sent_makes_room(open_outbox: Open) -> None:
    box = open_outbox(max_rows=10, policy="drop_newest")
    box.commit([draft() for _ in range(12)])
    send(box)
    box.commit([draft() for _ in range(3)])
    assert cseqs(box) == [13, 14, 15] and gaps(box) == []


def test_with_block_a_commit_waits_until_rows_have_gone(open_outbox: Open) -> None:
    box = open_outbox("puback", max_rows=10, policy="block")
    box.commit([draft() for _ in range(10)])
    waiting = threading.Thread(target=box.commit, args=([draft()],))
    waiting.start()
    wait_until(lambda: box.is_blocked)
    assert box.status().is_blocked and box.last_cseq() == {"top": 10}
    box.mark_sent([row.seq for row in box.unsent(0, 2)])
    waiting.join(10)
    assert not waiting.is_alive() and not box.is_blocked
    assert cseqs(box) == list(range(3, 12)) and gaps(box) == []


def test_a_commit_that_waits_ends_with_an_error_when_the_line_stops(open_outbox: Open) -> None:
    box = open_outbox(max_rows=10, policy="block")
    box.commit([draft() for _ in range(10)])
    errors: list[BaseException] = []

    def commit() -> None:
        try:
            box.commit([draft()])
        except StorageError as error:
            errors.append(error)

    waiting = threading.Thread(target=commit)
    waiting.start()
    wait_until(lambda: box.is_blocked)
    box.unblock()
    waiting.join(10)
    assert "no room for more (10 rows wait" in str(errors[0]) and not box.is_blocked
    assert cseqs(box) == list(range(1, 11)) and box.last_cseq() == {"top": 10}


def test_with_block_nothing_ages_out_and_a_batch_larger_than_the_limit_passes_when_it_is_alone(
    open_outbox: Open,
) -> None:
    box = open_outbox(max_rows=10, max_age_h=0, policy="block")
    box.commit([draft() for _ in range(12)])
    box.trim()
    assert cseqs(box) == list(range(1, 13))


def test_a_consumer_that_takes_records_and_acknowledges_nothing_does_not_fill_the_disk(open_outbox: Open) -> None:
    box = open_outbox("e2e", max_rows=10)
    for _ in range(100):
        box.commit([draft()])
        box.unsent(0, 1000)
    assert box.status().rows <= 11
    assert cseqs(box)[:8] == list(range(1, 9)) and gaps(box)[-1][2] == 100


def test_what_is_kept_is_given_in_order_with_the_runs_that_are_not(open_outbox: Open) -> None:
    box = open_outbox(max_rows=6, keep_h=72)
    for _ in range(10):
        box.commit([draft("top"), draft("side")])
        send(box)
    held = box.kept("top", box.epoch, 1, 99, 100)
    assert [(k.first, k.last, k.body is None) for k in held] == [
        (1, 7, True),
        (8, 8, False),
        (9, 9, False),
        (10, 10, False),
    ]
    assert json.loads(held[1].body or b"")["cseq"] == 8
    assert [k.last for k in box.kept("top", box.epoch, 1, 99, 2)] == [7, 8]
    assert box.kept("top", box.epoch, 11, 20, 5) == [] and box.kept("none", box.epoch, 1, 5, 5) == []
    assert box.kept("top", "e" * 16, 3, 5, 5) == [Kept(3, 5, "t/top/result", None)]


def test_a_replay_never_holds_a_damaged_row(open_outbox: Open, tmp_path: Path) -> None:
    box = open_outbox()
    box.commit([draft() for _ in range(3)])
    send(box)
    box.close()
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db:
        db.execute("UPDATE outbox SET body = X'00' WHERE cseq = 2")
        db.commit()
    box = open_outbox()
    assert [(k.first, k.body is None) for k in box.kept("top", box.epoch, 1, 3, 9)] == [
        (1, False),
        (2, True),
        (3, False),
    ]


def test_what_a_replay_finds_missing_is_declared_under_its_own_epoch(open_outbox: Open) -> None:
    box = open_outbox()
    woken: list[int] = []
    box.on_commit = lambda: woken.append(1)
    box.declare_missing("top", "0123456789abcdef", 5, 9, "drop_oldest")
    body = json.loads(box.unsent(0, 1)[0].body)
    assert (body["epoch"], body["from"], body["to"], body["n"]) == ("0123456789abcdef", 5, 9, 5) and woken == [1]
    assert box.status().dropped == {}


def test_replies_and_what_commands_changed_outlast_a_restart_and_only_the_newest_1000_stay(open_outbox: Open) -> None:
    box = open_outbox()
    for n in range(1003):
        box.record_reply(f"c{n}", f"reply {n}".encode(), {"threshold": str(n)})
    box = open_outbox()
    assert (box.find_reply("c2"), box.find_reply("c3"), box.find_reply("c1002")) == (None, b"reply 3", b"reply 1002")
    assert box.recall("threshold") == "1002" and box.recall("epoch") is None


def test_an_intent_keeps_its_part(open_outbox: Open) -> None:
    intents = [Intent("r1", "top", "mqtt", 1, "ts", "SN1", "A17"), Intent("r2", "top", "plc", 2, "ts")]
    box = open_outbox()
    for intent in intents:
        box.intend(intent)
    assert open_outbox().open_intents() == intents


def test_the_publisher_is_woken_for_the_record_of_a_damaged_row(open_outbox: Open, tmp_path: Path) -> None:
    open_outbox().commit([draft()])
    open_outbox().close()
    with closing(sqlite3.connect(tmp_path / "outbox.db")) as db:
        db.execute("UPDATE outbox SET body = X'00'")
        db.commit()
    box = open_outbox()
    found: list[tuple[str, int, int, str]] = []
    box.on_commit = lambda: found.extend(gaps(box))
    assert box.unsent(0, 10) == [] and found == [("top", 1, 1, "row_corrupt")]


def test_handing_out_costs_one_commit_in_many(open_outbox: Open) -> None:
    box = open_outbox("e2e")
    box.commit([draft(size=1) for _ in range(2000)])
    before = box._file.db.total_changes  # type: ignore[attr-defined]
    after = 0
    for _ in range(100):
        after = box.unsent(after, 20)[-1].seq
    assert after == 2000 and box._file.db.total_changes - before <= 10  # type: ignore[attr-defined]
