"""The outbox against a model of plain sets: whatever happens in whatever order, nothing is lost undeclared."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from edge_dkm import clock
from edge_dkm.errors import StorageError
from edge_dkm.outbox import Intent, Limits, Outbox, Row
from tests.outboxes import draft, topic_of

IS_LONG = os.environ.get("EDGE_DKM_LONG") == "1"
CAMERAS = ("top", "side", "end")
Key = tuple[str, int]
SETTINGS = settings(
    max_examples=400 if IS_LONG else 25,
    stateful_step_count=60 if IS_LONG else 30,
    deadline=None,
    derandomize=not IS_LONG,
    phases=(Phase.generate, Phase.shrink) if IS_LONG else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


class OutboxMachine(RuleBasedStateMachine):
    """The consumer receives a row the moment it is handed out; what is acknowledged of it comes later, or never."""

    box_class: ClassVar[type[Outbox]] = Outbox

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="outbox-model-"))
        self.lives = 0
        self.wall_s, self.jump_s = clock.wall_s, 0.0
        clock.wall_s = lambda: self.wall_s() + self.jump_s
        self.produced: dict[str, int] = defaultdict(int)
        self.received: dict[Key, bytes] = {}
        self.declared: set[Key] = set()
        self.damaged: set[Key] = set()
        self.handed: dict[int, bytes] = {}
        self.newest: dict[str, int] = defaultdict(int)
        self.seqs: set[int] = set()
        self.intents: set[str] = set()
        self.ids = itertools.count()
        self.is_unsure = False  # a gap record is damaged and was not yet looked at

    @initialize(
        mode=st.sampled_from(["puback", "journal", "e2e"]),
        policy=st.sampled_from(["drop_oldest", "drop_newest", "block"]),
        max_rows=st.integers(3, 25),
    )
    def begin(self, mode: Any, policy: Any, max_rows: int) -> None:
        self.mode, self.limits = mode, Limits(max_rows=max_rows, policy=policy)
        self.open(self.root / "0")

    def open(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.box = self.box_class(folder / "outbox.db", "st1", topic_of, self.limits, self.mode)
        self.box.unblock()  # where it would wait, it raises
        self.box._writer._ballast.release()

    def sql(self, query: str, *values: object) -> list[Any]:
        return list(self.box._file.db.execute(query, values).fetchall())

    @rule(cameras=st.lists(st.sampled_from(CAMERAS), min_size=1, max_size=6), has_intent=st.booleans())
    def put(self, cameras: list[str], has_intent: bool) -> None:
        ids = [f"r{next(self.ids)}" for _ in cameras]
        if has_intent:
            for one, camera in zip(ids, cameras, strict=True):
                self.box.intend(Intent(one, camera, "plc", 1, "ts"))
        self.intents |= set(ids) if has_intent else set()
        try:
            given = self.box.commit([draft(camera, one, 20) for camera, one in zip(cameras, ids, strict=True)])
        except StorageError:
            assert self.limits.policy == "block"
            return
        self.intents -= set(ids)
        for camera, numbers in zip(cameras, given, strict=True):
            self.produced[camera] += 1
            assert numbers.cseq == self.produced[camera] and numbers.epoch == self.box.epoch
            assert numbers.seq not in self.seqs
            self.seqs.add(numbers.seq)

    @rule(camera=st.sampled_from(CAMERAS))
    def fill(self, camera: str) -> None:
        for _ in range(4):
            self.put([camera] * 8, False)

    @rule(limit=st.sampled_from([1, 3, 10, 1000]))
    def hand_out(self, limit: int) -> None:
        for row in self.box.unsent(0, limit):
            self.receive(row)
        if limit == 1000:
            self.is_unsure = False

    def receive(self, row: Row) -> None:
        assert self.handed.setdefault(row.seq, row.body) == row.body  # every copy is the same
        body = json.loads(row.body)
        if body["schema"] == "dkm.gap/1":
            assert row.cseq is None and body["seq"] == row.seq
            self.declared.update((body["camera"], n) for n in range(body["from"], body["to"] + 1))
            return
        key = (row.camera, body["cseq"])
        if key not in self.received:
            assert body["cseq"] > self.newest[row.camera]  # first copies come in order
            self.newest[row.camera] = body["cseq"]
        self.received[key] = row.body

    @precondition(lambda self: self.handed)
    @rule(data=st.data())
    def puback(self, data: st.DataObject) -> None:
        self.box.mark_sent(data.draw(st.lists(st.sampled_from(sorted(self.handed)), max_size=10, unique=True)))

    @precondition(lambda self: self.handed)
    @rule(data=st.data())
    def consumer_acknowledges(self, data: st.DataObject) -> None:
        before = self.box.status().rows
        changed = self.box.acknowledge(self.box.epoch, data.draw(st.sampled_from(sorted(self.handed))))
        assert self.box.status().rows == before - changed and (self.mode == "e2e" or changed == 0)

    @rule(beyond=st.integers(1, 10))
    def consumer_is_wrong(self, beyond: int) -> None:
        assert self.box.acknowledge(self.box.epoch, self.box.last_seq + beyond) == 0
        assert self.box.acknowledge("0" * 16, 1) == 0

    @rule()
    def crash(self) -> None:
        self.lives += 1
        folder = self.root / str(self.lives)
        shutil.copytree(self.folder, folder)
        self.box._file.close()
        self.open(folder)

    @rule()
    def restart(self) -> None:
        self.box.close()
        self.open(self.folder)

    @rule(data=st.data(), column=st.sampled_from(["body", "topic", "camera", "cseq"]))
    def corrupt(self, data: st.DataObject, column: str) -> None:
        rows = self.sql("SELECT seq, camera, cseq FROM outbox WHERE sent = 0")
        if not rows:
            return
        seq, camera, cseq = data.draw(st.sampled_from(rows))
        if cseq is None:
            column, self.is_unsure = "body", True
        elif (camera, cseq) in self.damaged:
            return
        else:
            self.damaged.add((camera, cseq))
            self.is_unsure = self.is_unsure or column in {"camera", "cseq"}
        value: object = {"body": b"{}", "topic": "t", "camera": "tpp", "cseq": (cseq or 0) + 1}[column]
        self.sql(f"UPDATE outbox SET {column} = ? WHERE seq = ?", value, seq)
        self.box._table.load(self.box._file.db)

    @rule(hours=st.sampled_from([-90_000, -1, 1, 90_000]))
    def clock_jumps(self, hours: float) -> None:
        self.box.trim()
        self.jump_s += hours * 3600
        before = self.box.status()
        self.box.trim()
        assert self.box.status().rows == before.rows and self.box.status().sent_rows == before.sent_rows

    @rule()
    def a_week_passes(self) -> None:
        self.sql("UPDATE outbox SET t_mono = t_mono - 1000000")
        self.box.trim()
        assert self.box.status().sent_rows == 0

    @rule()
    def purge(self) -> None:
        self.box.purge()
        assert self.box.status().sent_rows == 0

    @rule(
        camera=st.sampled_from(CAMERAS), first=st.integers(1, 40), length=st.integers(0, 40), limit=st.integers(1, 20)
    )
    def replay(self, camera: str, first: int, length: int, limit: int) -> None:
        kept = self.box.kept(camera, self.box.epoch, first, first + length, limit)
        at = first
        for one in kept:
            assert one.first == at and one.first <= one.last <= self.produced[camera]
            if one.body is not None:
                assert one.first == one.last == json.loads(one.body)["cseq"]
                assert self.received.get((camera, one.first), one.body) == one.body
            at = one.last + 1
        assert len(kept) == limit or at == max(first, min(first + length, self.produced[camera]) + 1)

    @invariant()
    def all_is_accounted_for(self) -> None:
        if not hasattr(self, "box") or self.is_unsure:
            return
        waiting = {
            (row[0], row[1]) for row in self.sql("SELECT camera, cseq FROM outbox WHERE sent = 0 AND cseq IS NOT NULL")
        }
        declared = set(self.declared)
        for (body,) in self.sql("SELECT body FROM outbox WHERE cseq IS NULL AND sent = 0"):
            gap = json.loads(body)
            declared.update((gap["camera"], n) for n in range(gap["from"], gap["to"] + 1))
        produced = {(camera, n) for camera, last in self.produced.items() for n in range(1, last + 1)}
        assert set(self.received) | declared | waiting == produced
        if not self.damaged:
            assert not declared & set(self.received) and not declared & waiting

    @invariant()
    def counts_are_those_of_the_table(self) -> None:
        if not hasattr(self, "box"):
            return
        status = self.box.status()
        query = "SELECT COUNT(*), TOTAL(LENGTH(body)) FROM outbox WHERE sent = ?"
        assert (status.rows, status.bytes) == tuple(self.sql(query, 0)[0])
        assert status.sent_rows == self.sql(query, 1)[0][0]
        assert {intent.result_id for intent in self.box.open_intents()} == self.intents
        assert self.box.last_cseq() == {camera: n for camera, n in self.produced.items() if n}

    def teardown(self) -> None:
        clock.wall_s = self.wall_s
        if hasattr(self, "box"):
            self.box._file.close()
        shutil.rmtree(self.root, ignore_errors=True)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_whatever_happens_received_and_declared_and_waiting_are_what_was_produced() -> None:
    assert run_state_machine_as_test(OutboxMachine, settings=SETTINGS) is None  # it raises where an invariant fails


def test_control_an_outbox_that_drops_without_a_word_is_found_out() -> None:
    class Silent(Outbox):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._retention.declare = lambda *_: None  # type: ignore[method-assign]

    class SilentMachine(OutboxMachine):
        box_class = Silent

    with pytest.raises(AssertionError):
        run_state_machine_as_test(SilentMachine, settings=SETTINGS)
