"""The receiver that integrators copy loses nothing and books nothing twice, whatever is killed; one that acknowledges early does."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_dkm.errors import BrokerError
from edge_dkm.mqtt.embedded_broker import find_mosquitto
from edge_dkm.mqtt.link import Link, await_connack, open_link, publish, pump
from edge_dkm.settings import MqttSettings
from tests.broker import Mosquitto
from tests.waiting import wait_until

pytestmark = pytest.mark.broker
RECEIVER = Path(__file__).parent.parent / "docs/mes_receiver.py"
BASE = "plant/dkm/v1/st1"
EPOCH = "e1"

# Runs the receiver of the docs with other limits, and kills it at a chosen commit; `early` acknowledges before it commits.
HARNESS = f"""
import importlib.util, json, os, signal, sys
spec = importlib.util.spec_from_file_location("mes_receiver", {str(RECEIVER)!r})
receiver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(receiver)
faults = json.loads(sys.argv[1])
receiver.PATIENCE_S, receiver.ASK_EVERY_S = faults.get("patience_s", 0.3), 1.0
receiver.BATCH = 5
commits, store, turn = [0], receiver.store, receiver.Receiver.turn

def die_at_commit(db, rows):
    commits[0] += 1
    if commits[0] == faults.get("before_commit"):
        os.kill(os.getpid(), signal.SIGKILL)
    new = store(db, rows)
    if commits[0] == faults.get("after_commit"):
        os.kill(os.getpid(), signal.SIGKILL)
    return new

def acknowledge_early(self, client):
    rows = [body for body in map(receiver.read, self.inbox) if body and "seq" in body]
    for message in self.inbox:
        client.ack(message.mid, message.qos)
    if rows:
        upto = max(row["seq"] for row in rows)
        body = {{"schema": "dkm.ack/1", "epoch": rows[0]["epoch"], "upto": upto}}
        said = client.publish(self.options.base + "/ack", json.dumps(body), 1)
        while not said.is_published():  # else the end of the process may take it back
            client.loop(0.1)
    turn(self, client)

receiver.store = die_at_commit
if faults.get("early"):
    receiver.Receiver.turn = acknowledge_early
receiver.Receiver(receiver.parse(sys.argv[2:])).run()
"""


def result(camera: str, cseq: int, seq: int) -> dict[str, Any]:
    return {
        "schema": "dkm.result/1",
        "result_id": f"{camera}-{cseq}",
        "epoch": EPOCH,
        "camera": camera,
        "cseq": cseq,
        "seq": seq,
        "historical": False,
    }


def gap(camera: str, first: int, last: int, seq: int) -> dict[str, Any]:
    return {
        "schema": "dkm.gap/1",
        "epoch": EPOCH,
        "camera": camera,
        "from": first,
        "to": last,
        "n": last - first + 1,
        "seq": seq,
        "reason": "drop_oldest",
    }


def two_cameras(count: int) -> list[dict[str, Any]]:
    """`count` results of the cameras a and b in turn."""
    return [result("ab"[n % 2], n // 2 + 1, n + 1) for n in range(count)]


class Station(threading.Thread):
    """Publishes rows in order; with `e2e` until they are acknowledged, from the first unacknowledged one after half a second's silence.

    `swallowed`: seqs that this stand-in for a lossy broker withholds in the live stream (with e2e: the first time). What was
    acknowledged is forgotten in mode e2e, and kept for replays otherwise.
    """

    def __init__(
        self, port: int, rows: list[dict[str, Any]], *, e2e: bool, swallowed: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(daemon=True)
        self.settings = MqttSettings(host="127.0.0.1", port=port)
        self.rows, self.e2e, self.swallowed = rows, e2e, set(swallowed)
        self.position = self.upto = 0
        self.sent = self.rewinds = 0
        self.replays: list[dict[str, Any]] = []
        self.forgotten: set[str] = set()  # result ids that a replay can no longer give
        self._heard_s = time.monotonic()
        self._stopping = threading.Event()

    @property
    def is_done(self) -> bool:
        return self.position == len(self.rows) and (not self.e2e or self.upto >= self.rows[-1]["seq"])

    def close(self) -> None:
        self._stopping.set()
        self.join(10)

    def run(self) -> None:
        while not self._stopping.is_set():
            try:
                link = open_link(self.settings, "station", clean=True)
                try:
                    await_connack(link, self.settings)
                    link.client.subscribe([(f"{BASE}/ack", 1), (f"{BASE}/cmd/replay", 1)])
                    self._rewind()
                    while link.lost is None and not self._stopping.is_set():
                        self._publish(link)
                        pump(link, 0.02)
                        self._hear(link)
                finally:
                    link.client.disconnect()
            except BrokerError:
                self._stopping.wait(0.05)

    def _rewind(self) -> None:
        self._heard_s = time.monotonic()
        if self.e2e:
            self.position = next((n for n, row in enumerate(self.rows) if row["seq"] > self.upto), len(self.rows))

    def _publish(self, link: Link) -> None:
        while self.position < len(self.rows) and link.room > 0:
            row = self.rows[self.position]
            self.position += 1
            if row["seq"] in self.swallowed:
                if self.e2e:
                    self.swallowed.discard(row["seq"])
                continue
            self.say(link, row)
        if self.e2e and not self.is_done and time.monotonic() - self._heard_s > 0.5:
            self.rewinds += 1
            self._rewind()

    def say(self, link: Link, row: dict[str, Any]) -> None:
        self.sent += 1
        publish(link, f"{BASE}/{row['camera']}/result", json.dumps(row).encode(), qos=1)

    def _hear(self, link: Link) -> None:
        messages, link.messages = link.messages, []
        for message in messages:
            body = json.loads(message.payload)
            if message.topic == f"{BASE}/ack":
                assert body["schema"] == "dkm.ack/1" and body["epoch"] == EPOCH
                if body["upto"] > self.upto:
                    self.upto, self._heard_s = body["upto"], time.monotonic()
            else:
                self.replays.append(body)
                self._replay(link, body["args"])

    def _replay(self, link: Link, args: dict[str, Any]) -> None:
        kept = {(row["camera"], row["cseq"]): row for row in self.rows if "cseq" in row}
        for cseq in range(args["from"], args["to"] + 1):
            row = kept.get((args["camera"], cseq))
            if row is None or row["result_id"] in self.forgotten or (self.e2e and row["seq"] <= self.upto):
                self.say(link, gap(args["camera"], cseq, cseq, 10_000 + cseq))
            else:
                self.say(link, {**row, "historical": True})


class Mes:
    """The receiver in a process of its own."""

    def __init__(self, port: int, db: Path) -> None:
        self.port, self.db = port, db
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str, **faults: object) -> subprocess.Popen[bytes]:
        arguments = ["127.0.0.1", str(self.port), BASE, "--db", str(self.db), *options]
        command = [sys.executable, "-c", HARNESS, json.dumps(faults), *arguments]
        self.processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return self.processes[-1]

    def start_subscribed(self, broker: Mosquitto, *options: str, **faults: object) -> subprocess.Popen[bytes]:
        """Returns when the broker has the subscription."""
        seen = broker_log(broker).count("Sending SUBACK to mes-receiver")
        process = self.start(*options, **faults)
        wait_until(lambda: broker_log(broker).count("Sending SUBACK to mes-receiver") > seen)
        return process

    def read(self, query: str) -> list[tuple[Any, ...]]:
        if not self.db.exists():
            return []
        db = sqlite3.connect(self.db, timeout=10)
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError:  # its tables are not there yet
            return []
        finally:
            db.close()

    def ids(self) -> list[str]:
        return [row[0] for row in self.read("SELECT result_id FROM result")]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def broker_log(broker: Mosquitto) -> str:
    return (broker._folder / "mosquitto.log").read_text()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed")
    running = Mosquitto(tmp_path, "allow_anonymous true\nlog_type all\n")
    yield running
    running.kill()


@pytest.fixture
def mes(broker: Mosquitto, tmp_path: Path) -> Iterator[Mes]:
    running = Mes(broker.port, tmp_path / "results.db")
    yield running
    running.close()


@pytest.fixture
def station(broker: Mosquitto) -> Iterator[Callable[..., Station]]:
    """Starts stations; closed at the end."""
    started: list[Station] = []

    def start(rows: list[dict[str, Any]], **options: Any) -> Station:
        started.append(Station(broker.port, rows, **options))
        started[-1].start()
        return started[-1]

    yield start
    for running in started:
        running.close()


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(row["result_id"] for row in rows if "result_id" in row)


def test_it_runs_as_the_docs_say_and_ends_by_count(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    command = [sys.executable, RECEIVER, "127.0.0.1", str(broker.port), BASE, "--db", mes.db, "--count", "10", "--ack"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    mes.processes.append(process)
    rows = two_cameras(10)
    sender = station(rows, e2e=True)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors.count(b"broker: Success") == 1
    assert sorted(mes.ids()) == ids(rows)
    wait_until(lambda: sender.is_done)


def test_duplicates_are_one_result_and_are_acknowledged_again(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    mes.start_subscribed(broker, "--ack")
    rows = two_cameras(6)
    first = station(rows, e2e=True)
    wait_until(lambda: first.is_done)
    first.close()
    again = station(rows, e2e=True)  # whose acknowledgement was lost: it begins anew
    wait_until(lambda: again.is_done)
    assert again.sent >= 6 and sorted(mes.ids()) == ids(rows)


def test_a_hole_that_a_gap_record_covers_is_not_asked_for(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    mes.start_subscribed(broker)
    # The station dropped cseq 3 to 5 and says so behind the results that it kept.
    rows = [result("a", n, n) for n in (1, 2, 6, 7)] + [gap("a", 3, 5, 8), result("a", 8, 9), result("a", 10, 11)]
    sender = station(rows, e2e=False)
    wait_until(lambda: bool(sender.replays))
    assert {(r["args"]["from"], r["args"]["to"]) for r in sender.replays} == {(9, 9)}  # that one nobody declared
    assert mes.read("SELECT first, last, reason FROM gap ORDER BY first")[0] == (3, 5, "drop_oldest")


def test_a_hole_is_filled_by_a_replay_or_declared(broker: Mosquitto, mes: Mes, station: Callable[..., Station]) -> None:
    mes.start_subscribed(broker)
    rows = two_cameras(40)
    sender = Station(broker.port, rows, e2e=False, swallowed=frozenset(range(11, 25)))
    sender.forgotten = {"a-6", "a-7"}
    sender.start()
    wait_until(lambda: mes.read("SELECT cseq FROM stream ORDER BY camera") == [(20,), (20,)])
    sender.close()
    assert sorted(mes.ids()) == sorted(set(ids(rows)) - sender.forgotten)
    assert mes.read("SELECT camera, first, last FROM gap ORDER BY first") == [("a", 6, 6), ("a", 7, 7)]


def test_a_loss_at_the_very_end_shows_by_the_health_message(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    mes.start_subscribed(broker)
    sender = station(two_cameras(8), e2e=False, swallowed=frozenset({8}))  # b-4: nothing comes behind it
    wait_until(lambda: len(mes.ids()) == 7)
    link = open_link(sender.settings, "health", clean=True)
    await_connack(link, sender.settings)
    health = {"schema": "dkm.health/1", "epoch": EPOCH, "last": {"a": 4, "b": 4}, "outbox": {"rows": 0}}
    publish(link, f"{BASE}/health", json.dumps(health).encode(), qos=0)
    wait_until(lambda: len(mes.ids()) == 8)
    link.client.disconnect()
    assert [r["args"] for r in sender.replays] == [{"epoch": EPOCH, "camera": "b", "from": 4, "to": 4}]


def test_what_a_broker_lost_is_not_acknowledged_but_sent_again(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    mes.start_subscribed(broker, "--ack", patience_s=60)
    rows = two_cameras(40)
    sender = station(rows, e2e=True, swallowed=frozenset(range(11, 25)))
    wait_until(lambda: sender.is_done)
    assert sorted(mes.ids()) == ids(rows) and sender.rewinds > 0 and sender.replays == []


def test_a_hole_in_seq_alone_holds_nothing_up(broker: Mosquitto, mes: Mes, station: Callable[..., Station]) -> None:
    mes.start_subscribed(broker, "--ack", patience_s=60)
    sender = station([result("a", 1, 1), result("a", 2, 50), result("a", 3, 90)], e2e=True)
    wait_until(lambda: sender.is_done)
    assert sender.rewinds == 0 and len(mes.ids()) == 3


def test_nothing_is_lost_or_double_across_a_broker_that_is_killed(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    mes.start_subscribed(broker, "--ack", patience_s=60)
    rows = two_cameras(2000)
    sender = station(rows, e2e=True)
    for part in (0.1, 0.4):
        wait_until(lambda part=part: len(mes.ids()) > part * len(rows))  # type: ignore[misc]
        broker.kill()  # it keeps nothing on disk: queues and sessions are gone
        broker.start()
    wait_until(lambda: sender.is_done)
    assert sorted(mes.ids()) == ids(rows) and sender.replays == []


@pytest.mark.parametrize("moment", ["before_commit", "after_commit"])
def test_nothing_is_lost_or_double_when_the_receiver_is_killed(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station], moment: str
) -> None:
    rows = two_cameras(60)
    process = mes.start_subscribed(broker, "--ack", **{moment: 3})
    sender = station(rows, e2e=True)
    assert process.wait(20) == -signal.SIGKILL
    process = mes.start("--ack", **{moment: 5})
    assert process.wait(20) == -signal.SIGKILL
    mes.start("--ack")
    wait_until(lambda: sender.is_done)
    assert sorted(mes.ids()) == ids(rows)


def test_control_a_receiver_that_acknowledges_before_its_commit_loses(
    broker: Mosquitto, mes: Mes, station: Callable[..., Station]
) -> None:
    rows = two_cameras(60)
    process = mes.start_subscribed(broker, "--ack", early=True, before_commit=1)
    sender = station(rows, e2e=True)
    assert process.wait(20) == -signal.SIGKILL
    mes.start("--ack", early=True)
    wait_until(lambda: sender.is_done)
    wait_until(lambda: mes.read("SELECT DISTINCT cseq FROM stream") == [(30,)])  # it knows, at least, what it misses
    assert 0 < len(set(ids(rows)) - set(mes.ids())) <= 20


def test_what_is_not_understood_is_passed_over(broker: Mosquitto, mes: Mes, station: Callable[..., Station]) -> None:
    mes.start_subscribed(broker)
    settings = MqttSettings(host="127.0.0.1", port=broker.port)
    link = open_link(settings, "garbage", clean=True)
    await_connack(link, settings)
    for payload in (b"", b"\xff", b"[]", b"{}", b'{"schema":"dkm.result/1","cseq":"x"}', b"[" * 100_000):
        publish(link, f"{BASE}/a/result", payload, qos=1)
    wait_until(lambda: (pump(link, 0.02), not link.unacknowledged)[1])
    link.client.disconnect()
    sender = station(two_cameras(4), e2e=False)
    wait_until(lambda: len(mes.ids()) == 4)
    assert sender.replays == []
