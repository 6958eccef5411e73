"""Every broker of the catalogue, each with the code it is called by: nothing is lost, no stall is silent, none is hammered."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs import load_text
from edge_dkm.mqtt import delivery as delivery_module
from edge_dkm.mqtt import link as mqtt_module
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.mqtt.embedded_broker import _accepts, _amqtt, find_mosquitto
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, Subscriber, free_port
from tests.edge_dkm.test_tls import Listener
from tests.faults.fake_broker import (
    MAXIMUM_PACKET_SIZE,
    RECEIVE_MAXIMUM,
    SERVER_KEEP_ALIVE,
    FakeBroker,
    Publish,
)
from tests.faults.proxy import HALF_OPEN, Fault, Proxy
from tests.stations import Station
from tests.waiting import wait_until

Start = Callable[..., Station]
BASE = "dkm/v1/st1"


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts stations that lose no time; closed at the end."""
    for module, name, seconds in (
        (publisher_module, "BACKOFF_FIRST_S", 0.02),
        (publisher_module, "BACKOFF_MAX_S", 0.1),
        (delivery_module, "HOLD_S", 0.1),
        (mqtt_module, "CONNECT_TIMEOUT_S", 1.0),
    ):
        monkeypatch.setattr(module, name, seconds)
    stations: list[Station] = []

    def make(port: int, mode: str = "journal", **mqtt: object) -> Station:
        keys = "".join(f", {name}: {value}" for name, value in {"host": "127.0.0.1", **mqtt}.items())
        text = f"station: st1\nmodel: none.onnx\ncameras: {{top: {{source: none}}}}\nmqtt: {{port: {port}{keys}}}\ndelivery: {{mode: {mode}}}"
        settings = load_text(LineSettings, text, "line.yaml")
        stations.append(Station(settings, tmp_path / f"outbox-{len(stations)}.db"))
        return stations[-1]

    yield make
    for station in stations:
        station.close()


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as running:
        yield running


@pytest.fixture
def real_broker(tmp_path: Path) -> Iterator[Callable[[str], Mosquitto]]:
    """Starts Mosquitto with further lines; killed at the end."""
    if find_mosquitto() is None:
        pytest.skip("Mosquitto is not installed")
    running: list[Mosquitto] = []

    def make(extra: str = "") -> Mosquitto:
        running.append(Mosquitto(tmp_path, f"allow_anonymous true\n{extra}\n"))
        return running[-1]

    yield make
    for mosquitto in running:
        mosquitto.thaw()
        mosquitto.kill()


def code(station: Station) -> str:
    problem = station.publisher.status().problem
    return problem.code if problem else ""


def first_copies(broker: FakeBroker, camera: str = "top") -> list[int]:
    return list(dict.fromkeys(json.loads(publish.payload)["cseq"] for publish in broker.of(f"{BASE}/{camera}/result")))


def is_result(publish: Publish) -> bool:
    return publish.topic == f"{BASE}/top/result"


@pytest.mark.parametrize(
    ("reason", "name", "words"),
    [
        (0x84, "M-V5", "mqtt.version: 3.1.1"),
        (0x86, "M-AUTH", "mqtt.username"),
        (0x87, "M-AUTH", "not authorized"),
        (0x97, "M-QUOTA", "quota"),
        (0x9C, "M-MOVED", "mqtt.host"),
        (0x9D, "M-MOVED", "mqtt.host"),
    ],
)
def test_a_refusal_has_its_code_and_says_what_to_do(
    broker: FakeBroker, start: Start, reason: int, name: str, words: str
) -> None:
    broker.behaviour.connect_code = reason
    station = start(broker.port)
    wait_until(lambda: code(station) == name)
    assert words in station.problem and f"(0x{reason:02x})" in station.problem
    assert not station.publisher.status().connected


def test_a_broker_that_has_moved_is_quoted_and_not_followed(broker: FakeBroker, start: Start) -> None:
    name = f"127.0.0.1:{broker.port}".encode()
    properties = b"\x1c" + len(name).to_bytes(2, "big") + name  # Server Reference
    body = b"\x00\x9c" + bytes([len(properties)]) + properties
    listener = Listener(b"\x20" + bytes([len(body)]) + body)
    try:
        station = start(listener.port)
        wait_until(lambda: len(listener.at_s) >= 4 and code(station) == "M-MOVED")
        assert f"it names '127.0.0.1:{broker.port}'" in station.problem and broker.connects == []
    finally:
        listener.close()


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (0x8B, "M-OFFLINE"),
        (0x8D, "M-OFFLINE"),
        (0x95, "M-PACKET"),
        (0x97, "M-QUOTA"),
        (0x9C, "M-MOVED"),
        (0x9D, "M-MOVED"),
    ],
)
def test_a_broker_that_ends_the_connection_has_its_reason_reported_and_loses_nothing(
    broker: FakeBroker, start: Start, reason: int, name: str
) -> None:
    broker.behaviour.disconnect = (3, reason)
    station = start(broker.port)
    station.commit(1, 10)
    seen: set[str] = set()
    station.publisher.on_change = lambda: seen.add(code(station))
    wait_until(lambda: name in seen)
    broker.behaviour.disconnect = None
    assert station.publisher.wait_drained(20)
    assert first_copies(broker) == list(range(1, 11))


def test_two_stations_of_one_name_come_back_once_in_a_pause_and_not_sooner(
    broker: FakeBroker, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publisher_module.TAKEOVER_PAUSE_S == 30.0
    monkeypatch.setattr(publisher_module, "TAKEOVER_PAUSE_S", 0.4)
    at_s: list[float] = []
    broker.behaviour.puback = lambda publish: at_s.append(time.monotonic()) or 0
    broker.behaviour.disconnect = (1, 0x8E)
    station = start(broker.port)
    wait_until(lambda: len(broker.connects) >= 5)
    assert code(station) in {"M-TAKEOVER", ""}
    assert min(later - earlier for earlier, later in itertools.pairwise(at_s)) >= 0.4


def test_a_broker_of_mqtt_3_alone_is_told_by_its_answer(start: Start) -> None:
    listener = Listener(bytes.fromhex("20020001"))  # CONNACK of MQTT 3.1.1: unacceptable protocol version
    try:
        station = start(listener.port)
        wait_until(lambda: code(station) == "M-V5")
        assert "3.1.1" in station.problem
    finally:
        listener.close()


def test_amqtt_which_speaks_3_1_1_alone_is_offline_for_mqtt_5_with_a_hint_and_works_with_3_1_1(
    tmp_path: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("amqtt")
    port = free_port()
    with (tmp_path / "amqtt.log").open("wb") as log:
        process = subprocess.Popen(_amqtt(port, tmp_path), stdout=log, stderr=log)
    try:
        monkeypatch.setattr(mqtt_module, "CONNECT_TIMEOUT_S", 5.0)
        wait_until(lambda: _accepts(port))
        station = start(port)
        wait_until(lambda: code(station) in {"M-V5", "M-OFFLINE"} and "MQTT 5" in station.problem)
        old = start(port, version='"3.1.1"')
        old.commit(1, 5)
        assert old.publisher.wait_drained(20)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("limit", [100, 600])
def test_a_small_packet_limit_is_reported_and_never_overstepped_on_one_connection(
    broker: FakeBroker, start: Start, limit: int
) -> None:
    broker.behaviour.properties = {MAXIMUM_PACKET_SIZE: limit}
    station = start(broker.port)
    station.commit(1, 5)
    wait_until(lambda: code(station) == "M-PACKET")
    loops = station.publisher.loops
    wait_until(lambda: station.publisher.loops > loops + 10)  # several times HOLD_S
    assert code(station) == "M-PACKET" and station.publisher.status().connected
    assert len(broker.connects) == 1 and station.outbox.status().rows == 5
    assert broker.of(f"{BASE}/top/result") == [] and len(broker.of(f"{BASE}/status")) == (limit == 600)
    broker.behaviour.properties = {MAXIMUM_PACKET_SIZE: 2000}
    broker.cut()
    assert station.publisher.wait_drained(20)


@pytest.mark.broker
def test_mosquitto_with_a_small_packet_limit_gets_no_packet_above_it(
    real_broker: Callable[[str], Mosquitto], start: Start
) -> None:
    running = real_broker("max_packet_size 600")
    station = start(running.port)
    station.commit(1, 5)
    wait_until(lambda: code(station) == "M-PACKET")
    loops, session = station.publisher.loops, station.outbox.next_session()
    wait_until(lambda: station.publisher.loops > loops + 10)
    assert code(station) == "M-PACKET" and station.publisher.status().connected
    assert station.outbox.next_session() == session + 1  # the publisher has begun none in between


@pytest.mark.broker
@pytest.mark.parametrize(
    ("extra", "words"), [("max_packet_size 100", "M-OFFLINE .*take packets of 1 KB"), ("max_qos 0", "M-QOS .*QoS 1")]
)
def test_mosquitto_that_does_not_even_take_our_connect_is_said(
    real_broker: Callable[[str], Mosquitto], start: Start, extra: str, words: str
) -> None:
    station = start(real_broker(extra).port)
    station.commit(1, 3)
    wait_until(lambda: re.match(words, station.problem) is not None)
    assert station.outbox.status().rows == 3


@pytest.mark.broker
def test_mosquitto_that_keeps_no_retained_messages_gets_every_result(
    real_broker: Callable[[str], Mosquitto], start: Start
) -> None:
    running = real_broker("retain_available false")
    subscriber = Subscriber(running.port)
    station = start(running.port)
    station.commit(1, 10)
    assert station.publisher.wait_drained(20)
    wait_until(lambda: len(subscriber.results()) == 10)
    session = station.outbox.next_session()
    subscriber.close()
    assert session <= 3  # one connection to learn it, one that lasted


def test_a_host_that_is_not_there_has_its_code(start: Start) -> None:
    gone = start(1883, host="no-such-host.invalid")
    refused = start(free_port())
    wait_until(lambda: code(gone) == "M-DNS" and "name" in gone.problem)
    wait_until(lambda: code(refused) == "M-OFFLINE" and "refused" in refused.problem)
    assert not gone.publisher.status().connected


def test_a_host_that_accepts_and_says_nothing_is_left_again(broker: FakeBroker, start: Start) -> None:
    with Proxy(broker.port) as proxy:
        proxy.set(Fault(silent=True))
        station = start(proxy.port)
        station.commit(1, 3)
        wait_until(lambda: code(station) == "M-OFFLINE" and "does not answer" in station.problem)
        wait_until(lambda: proxy.accepted >= 2)
        proxy.heal()
        assert station.publisher.wait_drained(20)


@pytest.mark.parametrize(
    ("asked_s", "answered_s"),
    [
        pytest.param(2, None, id="ours", marks=pytest.mark.slow),
        pytest.param(2, 600, id="longer"),
        pytest.param(2, 0, id="none", marks=pytest.mark.slow),
        pytest.param(600, 2, id="shorter"),
    ],
)
def test_a_half_open_connection_is_seen_within_seconds_whatever_keepalive_the_broker_sets(
    broker: FakeBroker, start: Start, asked_s: int, answered_s: int | None
) -> None:
    if answered_s is not None:
        broker.behaviour.properties = {SERVER_KEEP_ALIVE: answered_s}
    with Proxy(broker.port) as proxy:
        station = start(proxy.port, keepalive_s=asked_s)
        wait_until(lambda: broker.of(f"{BASE}/status") != [] and station.publisher.status().connected)
        proxy.set(HALF_OPEN)
        wait_until(lambda: code(station) == "M-OFFLINE", timeout_s=10)  # nothing to send: only the keepalive can tell
        proxy.heal()
        station.commit(1, 3)
        assert station.publisher.wait_drained(20)


@pytest.mark.parametrize("what", ["results", "announcements"])
def test_a_broker_that_acknowledges_nothing_is_reported_until_it_does(
    broker: FakeBroker, start: Start, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    assert delivery_module.ACK_TIMEOUT_S == 5.0
    monkeypatch.setattr(delivery_module, "ACK_TIMEOUT_S", 0.3)
    monkeypatch.setattr(delivery_module, "IDLE_S", 0.1)
    broker.behaviour.properties = {RECEIVE_MAXIMUM: 1}  # what is not acknowledged keeps everything else back
    broker.behaviour.puback = lambda publish: None if is_result(publish) == (what == "results") else 0
    station = start(broker.port)
    station.commit(1, 3)
    wait_until(lambda: code(station) == "M-NO-PUBACK")
    seen: list[str] = []
    station.publisher.on_change = lambda: seen.append(code(station))
    before = len(broker.connects)
    wait_until(lambda: len(broker.connects) >= before + 3)
    assert set(seen) == {"M-NO-PUBACK"}  # not taken back whenever a connection begins
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)
    wait_until(lambda: code(station) == "")


@pytest.mark.parametrize("reason", [0x10, 0x80, 0x87, 0x97, 0x99])
def test_a_refused_topic_keeps_its_rows_and_the_others_flow(broker: FakeBroker, start: Start, reason: int) -> None:
    broker.behaviour.puback = lambda publish: reason if is_result(publish) else 0
    station = start(broker.port)
    for n in range(1, 31):
        station.commit(n, 1, "top")
        station.commit(n, 1, "side")
    wait_until(lambda: first_copies(broker, "side") == list(range(1, 31)) and station.outbox.status().rows == 30)
    wait_until(lambda: f"0x{reason:02x}" in station.problem)
    assert len(broker.connects) == 1 and station.publisher.codes[reason] >= 1
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)
    assert first_copies(broker) == list(range(1, 31))


def test_bytes_that_are_no_mqtt_are_reported_and_results_delivered_when_they_end(
    broker: FakeBroker, start: Start
) -> None:
    broker.behaviour.malformed_after = 4
    station = start(broker.port)
    seen: set[str] = set()
    station.publisher.on_change = lambda: seen.add(code(station))
    station.commit(1, 10)
    wait_until(lambda: "M-PROTOCOL" in seen)
    broker.behaviour.malformed_after = None
    assert station.publisher.wait_drained(20)
    assert first_copies(broker) == list(range(1, 11)) and "M-FAILED" not in seen


@pytest.mark.broker
def test_a_broker_that_is_frozen_and_thawed_costs_time_and_no_result(
    real_broker: Callable[[str], Mosquitto], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "ACK_TIMEOUT_S", 0.3)
    running = real_broker("")
    subscriber = Subscriber(running.port, f"{BASE}/top/result")
    station = start(running.port)
    station.commit(1, 10)
    assert station.publisher.wait_drained(20)
    running.freeze()
    station.commit(11, 10)
    wait_until(lambda: code(station) == "M-NO-PUBACK")
    wait_until(lambda: "does not answer" in station.problem)
    assert station.outbox.status().rows == 10
    running.thaw()
    assert station.publisher.wait_drained(20)
    late = [m["cseq"] for m in subscriber.of("dkm.result/1")]
    subscriber.close()
    assert list(dict.fromkeys(late)) == list(range(1, len(set(late)) + 1))
