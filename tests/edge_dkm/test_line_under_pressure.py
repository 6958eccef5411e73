"""A line whose outbox is full, whose consumer does not read, or whose camera flaps: it waits, drops and declares, and nothing else suffers."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devices.capture import Capture
from devices.settings import CameraSettings
from devices.sources import mask
from edge_dkm import health as health_module
from edge_dkm import supervisor as supervisor_module
from edge_dkm.mqtt import delivery as delivery_module
from edge_dkm.mqtt import pacing
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.mqtt.link import await_connack, open_link, publish, pump
from edge_dkm.outbox import Intent, Limits, Outbox
from edge_dkm.outbox import outbox as outbox_module
from edge_dkm.outbox.row import Row, row_crc
from edge_dkm.outbox.writer import NoRoomError
from edge_dkm.service.admin_handlers import admin_handlers
from edge_dkm.settings import LineSettings, MqttSettings
from tests.broker import Mosquitto, Subscriber, free_port
from tests.images import draw, np, write_png
from tests.stations import RunningLine, Station, draft
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Make = Callable[..., LineSettings]
Run = Callable[[LineSettings], RunningLine]
StartStation = Callable[..., Station]
Subscribe = Callable[..., Subscriber]
STUCK_S = 2.0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Starts lines in this process; what hangs is found soon, and the end is short."""
    monkeypatch.setattr(health_module, "STUCK_S", STUCK_S)
    monkeypatch.setattr(supervisor_module, "STOP_DRAIN_S", 0.2)
    monkeypatch.setattr(publisher_module, "BACKOFF_MAX_S", 0.3)
    running: list[RunningLine] = []

    def start(settings: LineSettings) -> RunningLine:
        running.append(RunningLine(settings, monkeypatch))
        running[-1].line.pipeline.stages["infer"].stuck_s = STUCK_S
        return running[-1]

    yield start
    for line in running:
        assert line.end()


@pytest.fixture
def make_box(tmp_path: Path) -> Iterator[Callable[..., Outbox]]:
    """Opens outboxes; closed at the end."""
    opened: list[Outbox] = []

    def make(limits: Limits | None = None, name: str = "box.db", mode: Any = "journal") -> Outbox:
        opened.append(Outbox(tmp_path / name, "st1", lambda camera: f"dkm/v1/st1/{camera}/result", limits, mode))
        return opened[-1]

    yield make
    for box in opened:
        box.close()


def backlog(path: Path, rows: int, cameras: tuple[str, ...] = ("top",)) -> None:
    """What an earlier run left in the outbox."""
    box = Outbox(path, "st1", lambda camera: f"dkm/v1/st1/{camera}/result")
    for first in range(0, rows, 1000):
        box.commit([draft(n, camera) for n in range(first, min(rows, first + 1000)) for camera in cameras])
    box.close()


def numbers(messages: list[dict[str, Any]]) -> list[int]:
    return [m["cseq"] for m in messages]


def test_a_full_outbox_without_a_broker_is_no_hang_and_the_line_goes_on_when_the_broker_comes(
    start_broker: Callable[..., Mosquitto], subscribe: Subscribe, make_line: Make, run: Run, part_folder: Path
) -> None:
    broker = start_broker()
    broker.kill()
    running = run(
        make_line(
            broker.port,
            cameras=f"{{top: {{source: '{part_folder}', pace: source, fps: 100, loop: true, policy: every, stall_s: 0.1}}}}",
            delivery="{mode: puback, limit: block, max_rows: 50}",
        )
    )
    wait_until(lambda: running.line.outbox.is_blocked and len(running.line.pipeline._buffer) == 16)
    ended = running.has_ended(3 * STUCK_S)
    assert not ended, running.error
    assert running.line.vitals.healthz() == (
        True,
        {"stuck": [], "uptime_s": running.line.vitals.healthz()[1]["uptime_s"]},
    )
    stages = running.line.vitals.stages
    assert (stages["infer"].state, stages["commit"].state) == ("degraded", "degraded")
    assert running.line.vitals.readyz()[1]["why"] == ["the outbox is full"]
    broker.start()
    subscriber = subscribe(broker.port)
    wait_until(lambda: len(subscriber.results()) >= 150)
    assert numbers(subscriber.results())[:150] == list(range(1, 151)) and running.is_running


def test_control_a_stage_that_hangs_with_room_in_the_outbox_ends_the_line(
    make_line: Make, run: Run, part_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    commit = Outbox.commit

    def hang(box: Outbox, drafts: Any) -> Any:
        hangs.wait(20)
        return commit(box, drafts)

    monkeypatch.setattr(Outbox, "commit", hang)
    running = run(make_line(free_port(), cameras=f"{{top: {{source: '{part_folder}', loop: true, policy: every}}}}"))
    wait_until(lambda: not running.line.vitals.healthz()[0])
    hangs.set()
    assert running.has_ended() and "W-STUCK" in str(running.error)


def test_the_outbox_is_blocked_until_the_last_one_who_waits_is_served(make_box: Callable[..., Outbox]) -> None:
    box = make_box(Limits(max_rows=10, policy="block"), mode="puback")
    for n in range(10):
        box.commit([draft(n)])
    waiting = [threading.Thread(target=lambda n=n: box.commit([draft(n)])) for n in (10, 11)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: box._writer._n_waiting == 2)
    for n in range(20):  # an announced part needs no room, and must not hide those who wait for it
        box.intend(Intent(f"r{n}", "top", "mqtt", n, "ts"))
        assert box.is_blocked
    box.mark_sent([1])
    wait_until(lambda: box.last_seq == 11)
    assert sum(thread.is_alive() for thread in waiting) >= 1 and box.is_blocked and box.status().is_blocked
    box.mark_sent([2])
    for thread in waiting:
        thread.join(20)
    assert not box.is_blocked and box.last_seq == 12 and box.status().rows == 10


def test_while_nobody_subscribes_the_oldest_results_are_dropped_and_declared_and_nothing_grows(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: StartStation
) -> None:
    station = start_station(mosquitto.port, delivery="{max_rows: 100, limit: drop_oldest}")
    station.commit(1, 1)
    wait_until(lambda: station.problem.startswith("M-NO-CONSUMER"))
    exposed = []
    for first in range(2, 302, 30):
        station.commit(first, 30)
        answers = sum(station.publisher.codes.values())
        wait_until(lambda answers=answers: sum(station.publisher.codes.values()) > answers)  # type: ignore[misc]
        exposed.append(len(station.outbox._table.exposed))
    assert max(exposed) <= 3  # a row under way, and no more
    assert station.outbox.status().rows <= 101
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: 301 in numbers(subscriber.results()))
    kept = set(numbers(subscriber.results()))
    assert kept >= set(range(220, 302))
    gaps = [(gap["from"], gap["to"]) for gap in subscriber.of("dkm.gap/1")]
    missing = {n for first, last in gaps for n in range(first, last + 1)}
    assert kept | missing == set(range(1, 302)) and not kept & missing


def write_old_rows(path: Path, count: int, hours: float) -> None:
    """Acknowledged rows of an earlier boot."""
    body = b'{"schema":"dkm.result/1"}'
    database = sqlite3.connect(path)
    old_s = time.time() - hours * 3600
    database.executemany(
        "INSERT INTO outbox(seq, camera, cseq, topic, body, crc, t_wall, t_mono, boot, sent) VALUES (?,?,?,?,?,?,?,?,?,1)",
        [
            (n, "top", n, "t", body, row_crc(Row(n, "t", body, "top", n)), old_s, 0.0, "another boot")
            for n in range(1, count + 1)
        ],
    )
    database.execute("INSERT INTO counter(camera, n) VALUES ('top', ?)", (count,))
    database.commit()
    database.close()


def test_trimming_stops_within_its_budget_and_goes_on_the_next_time(
    make_box: Callable[..., Outbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_box().close()
    write_old_rows(tmp_path / "box.db", 3500, hours=80)
    box = make_box()
    monkeypatch.setattr(outbox_module, "TRIM_S", 0.0, raising=False)
    left = []
    for _ in range(5):
        box.trim()
        left.append(box.status().sent_rows)
    assert left == [2500, 1500, 500, 0, 0]


def test_a_replay_asked_for_at_the_station_counts_what_is_held_without_reading_it(
    make_box: Callable[..., Outbox],
) -> None:
    box = make_box()
    box.commit([draft(n) for n in range(1, 31)])
    box.mark_sent([3, 4, 9])
    box.purge()  # 3, 4 and 9 are gone
    given: list[Any] = []
    asked: list[Any] = []
    file: Any = box._file
    read = file.read

    def watched(*query: Any) -> Any:
        rows = read(*query)
        given.extend(value for row in rows for value in row)
        return rows

    file.read = watched

    def take(request: Any) -> bool:
        asked.append(request)
        return True

    line: Any = SimpleNamespace(outbox=box, captures={"top": None}, publisher=SimpleNamespace(replay=take))
    answers = [admin_handlers(line)["replay"](args) for args in ({}, {"from": 2, "to": 9}, {"from": 10})]
    file.read = read
    assert [(a["sent"], a["missing"]) for a in answers] == [(27, 3), (5, 3), (21, 0)] and len(asked) == 3
    assert len(given) <= 3 and not any(isinstance(value, bytes) for value in given)
    for answer in answers:
        pieces = box.kept("top", box.epoch, answer["from"], answer["to"], 100)
        assert answer["sent"] == sum(piece.body is not None for piece in pieces)


def test_live_results_flow_where_nobody_reads_the_history_and_the_publisher_is_at_rest(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: StartStation, tmp_path: Path
) -> None:
    backlog(tmp_path / "outbox-0.db", 30)
    live = subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    station = start_station(mosquitto.port, delivery="{order: live_first}")
    wait_until(lambda: station.problem.startswith("M-NO-CONSUMER"))
    for n in range(30, 60):
        station.commit(n, 1)
        wait_until(lambda n=n: n + 1 in numbers(live.of("dkm.result/1")))  # type: ignore[misc]
    assert station.outbox.status().rows >= 30 and station.problem.startswith("M-NO-CONSUMER")
    loops = station.publisher.loops
    threading.Event().wait(1.0)
    assert station.publisher.loops - loops < 60  # five tries a second, and not each turn one
    history = subscribe(mosquitto.port, "dkm/v1/st1/+/history")
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: numbers(history.of("dkm.result/1")) == list(range(1, 31)))
    assert numbers(live.of("dkm.result/1")) == list(range(31, 61)) and station.problem == ""


def test_with_live_first_one_camera_that_the_broker_denies_does_not_hold_up_another(
    start_broker: Callable[..., Mosquitto], subscribe: Subscribe, start_station: StartStation, tmp_path: Path
) -> None:
    (tmp_path / "acl").write_text("topic read #\ntopic write dkm/v1/st1/status\ntopic write dkm/v1/st1/side/#\n")
    broker = start_broker(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}\n")
    backlog(tmp_path / "outbox-0.db", 5, ("top", "side"))
    subscriber = subscribe(broker.port)
    station = start_station(broker.port, delivery="{order: live_first}")
    wait_until(lambda: "not authorized" in station.problem)
    for n in range(5, 25):
        station.commit(n, 1, "top")
        station.commit(n, 1, "side")
    wait_until(lambda: 25 in numbers(subscriber.of("dkm.result/1")))
    assert [m["result_id"] for m in subscriber.results() if not m["historical"]] == [f"side-{n}" for n in range(5, 25)]
    wait_until(lambda: station.outbox.status().sent_rows >= 20)
    assert "top" in station.problem and station.outbox.status().rows >= 25


def test_a_word_of_the_consumer_beyond_what_was_sent_does_not_end_the_resending(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: StartStation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "SILENCE_FIRST_S", 0.4)
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery="{mode: e2e}")
    station.commit(1, 20)
    wait_until(lambda: len(subscriber.results()) == 20)
    mqtt = MqttSettings(host="127.0.0.1", port=mosquitto.port)
    link = open_link(mqtt, "mes", clean=True)
    await_connack(link, mqtt)
    word = {"schema": "dkm.ack/1", "epoch": station.outbox.epoch, "upto": 10**9}
    mid = publish(link, "dkm/v1/st1/ack", json.dumps(word).encode(), qos=1)
    wait_until(lambda: pump(link, 0.02) or mid not in link.unacknowledged)  # type: ignore[func-returns-value]
    wait_until(lambda: station.outbox._complained == {"upto"})
    heard = len(subscriber.of("dkm.result/1"))
    wait_until(lambda: len(subscriber.of("dkm.result/1")) >= heard + 20)
    assert station.outbox.status().rows == 20
    wait_until(lambda: station.problem.startswith("M-NO-ACK"))
    publish(link, "dkm/v1/st1/ack", json.dumps({**word, "upto": station.outbox.last_seq}).encode(), qos=1)
    wait_until(lambda: pump(link, 0.02) or station.outbox.status().rows == 0)  # type: ignore[func-returns-value]
    link.client.disconnect()


def test_rows_of_a_held_camera_are_not_passed_over_again_at_every_commit(
    mosquitto: Mosquitto, start_station: StartStation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "IDLE_S", 600.0)
    count, per_tick = 20_000, 1000
    backlog(tmp_path / "outbox-0.db", count)
    station = start_station(mosquitto.port)
    monkeypatch.setattr(delivery_module, "HOLD_S", 600.0)
    wait_until(lambda: station.problem.startswith("M-NO-CONSUMER"))
    station.commit(0, 1)  # all before it are passed over now, at the latest
    ticks: list[int] = []
    database: Any = station.outbox._file.db
    with station.outbox._lock:
        database.set_progress_handler(lambda: ticks.append(1), per_tick)
    for n in range(1, 21):
        loops = station.publisher.loops
        station.commit(n, 1)
        wait_until(lambda loops=loops: station.publisher.loops > loops)  # type: ignore[misc]
    with station.outbox._lock:
        database.set_progress_handler(None, per_tick)
    assert station.outbox.status().rows == count + 21
    assert (
        len(ticks) * per_tick < 5 * count
    )  # of SQLite's steps; one look at each row takes several, and twenty rounds were made


def test_a_number_that_was_taken_and_given_back_does_not_make_the_publisher_pass_over_its_row(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: StartStation
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port)
    station.commit(0, 1)
    wait_until(lambda: station.outbox.status().rows == 0)
    outbox = station.outbox

    def finds_no_room(_: Any) -> None:
        outbox._table.insert("top", outbox._table.next_cseq("top"), "t", b"x")
        station.publisher.wake()
        threading.Event().wait(0.3)  # it reads meanwhile, or waits to read
        raise NoRoomError

    with pytest.raises(NoRoomError):
        outbox._writer.change(finds_no_room)
    loops = station.publisher.loops
    wait_until(lambda: station.publisher.loops > loops + 1)  # its look at the rows is over
    station.commit(1, 2)
    wait_until(lambda: len(subscriber.results()) == 3)
    assert numbers(subscriber.of("dkm.result/1")) == [1, 2, 3]


SECRET = "hunter2"
ADDRESS = f"http://127.0.0.1:{{port}}/mjpg?user=admin&password={SECRET}&token={SECRET}"


@pytest.mark.parametrize("key", ["password", "passwd", "PWD", "token", "key", "secret", "auth"])
def test_an_address_is_shown_without_what_its_query_keeps_secret(key: str) -> None:
    shown = mask(f"http://admin:{SECRET}@10.0.0.7/mjpg?user=admin&{key}={SECRET}&w=640")
    assert shown == f"http://admin:***@10.0.0.7/mjpg?user=admin&{key}=***&w=640"
    assert mask(f"http://10.0.0.7/mjpg?access_token={SECRET}/x&w=640") == "http://10.0.0.7/mjpg?access_token=***&w=640"
    assert mask("http://10.0.0.7/mjpg?w=640&h=480") == "http://10.0.0.7/mjpg?w=640&h=480"


def test_a_camera_that_fails_tells_nobody_its_password(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    subscriber = subscribe(mosquitto.port)
    running = run(make_line(mosquitto.port, cameras=f"{{top: {{source: '{ADDRESS.format(port=free_port())}'}}}}"))
    wait_until(lambda: any("refuses" in str(alarm.get("detail")) for alarm in subscriber.of("dkm.alarm/1")))
    wait_until(lambda: bool(subscriber.of("dkm.camera/1")))
    assert running.end()
    said = json.dumps([payload for _, payload, _ in subscriber.messages]) + caplog.text
    assert "/mjpg?user=admin&password=***" in said and SECRET not in said


def test_a_camera_of_which_every_sixth_frame_is_good_stays_bad(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    rng = np.random.default_rng(0)
    for n in range(90):
        path = write_png(folder / f"{n:03d}.png", draw("disc", rng))
        if n % 6 and n < 78:  # the last twelve are good again
            path.write_bytes(b"not an image")
    states: list[str] = []
    settings = CameraSettings.model_validate({"source": str(folder), "pace": "max", "policy": "every"})
    capture = Capture("top", settings, lambda *_: None, lambda _: states.append(capture.status().state))
    capture.start()
    capture.join(30)
    assert [state for n, state in enumerate(states) if n == 0 or state != states[n - 1]] == ["online", "bad", "online"]
