from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from configs import load_text
from edge_dkm.mqtt import delivery
from edge_dkm.mqtt import publisher as publisher_module
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Draft, Numbers, Outbox
from edge_dkm.settings import LineSettings
from tests.faults.fake_broker import (
    MAXIMUM_PACKET_SIZE,
    MAXIMUM_QOS,
    RECEIVE_MAXIMUM,
    RETAIN_AVAILABLE,
    SERVER_KEEP_ALIVE,
    Behaviour,
    FakeBroker,
    Publish,
)
from tests.waiting import wait_until

TOPIC = "dkm/v1/st1/top/result"


def draft(n: int) -> Draft:
    def render(numbers: Numbers) -> bytes:
        body = {"schema": "dkm.result/1", "result_id": str(n), "camera": "top", "epoch": numbers.epoch}
        return json.dumps(body | {"seq": numbers.seq, "cseq": numbers.cseq, "ts": "t", "historical": False}).encode()

    return Draft("top", TOPIC, str(n), render)


class Station:
    """An outbox and a publisher, as a line has them."""

    def __init__(self, port: int, folder: Path) -> None:
        text = f"station: st1\nmodel: none.onnx\ncameras: {{top: {{source: none}}}}\nmqtt: {{host: 127.0.0.1, port: {port}}}"
        self.outbox = Outbox(folder / "outbox.db", "st1", lambda camera: TOPIC)
        self.publisher = Publisher(load_text(LineSettings, text, "line.yaml"), self.outbox, "test")
        self.publisher.start()

    def close(self) -> None:
        self.publisher.stop()
        self.publisher.join(20)
        self.outbox.close()


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as running:
        yield running


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[FakeBroker], Station]]:
    monkeypatch.setattr(publisher_module, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(publisher_module, "BACKOFF_MAX_S", 0.02)
    stations: list[Station] = []

    def make(broker: FakeBroker) -> Station:
        stations.append(Station(broker.port, tmp_path))
        return stations[-1]

    yield make
    for station in stations:
        station.close()


def first_copies(broker: FakeBroker) -> list[int]:
    """Numbers of the results in the order in which each came for the first time."""
    return list(dict.fromkeys(int(json.loads(publish.payload)["result_id"]) for publish in broker.of(TOPIC)))


def inversions(numbers: list[int]) -> int:
    return sum(later < earlier for earlier, later in itertools.pairwise(numbers))


def test_a_good_broker_gets_every_result_once(broker: FakeBroker, start: Callable[..., Station]) -> None:
    station = start(broker)
    for n in range(1, 51):
        station.outbox.commit([draft(n)])
    assert station.publisher.wait_drained(20)
    assert [json.loads(publish.payload)["cseq"] for publish in broker.of(TOPIC)] == list(range(1, 51))
    assert {publish.qos for publish in broker.of(TOPIC)} == {1}
    assert dict(broker.of(TOPIC)[0].user)["type"] == "dkm.result.v1"
    assert broker.connects == ["edge-dkm-st1"]


@pytest.mark.parametrize("connections", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_first_copies_keep_their_order_over_many_connections_that_are_cut(
    broker: FakeBroker, start: Callable[..., Station], connections: int
) -> None:
    broker.behaviour = Behaviour(connack_delay_s=0.03, drop_after=7)
    station = start(broker)
    numbers, stop = itertools.count(1), threading.Event()

    def produce() -> None:
        while not stop.wait(0.002):  # also between CONNECT and CONNACK
            station.outbox.commit([draft(next(numbers))])

    producer = threading.Thread(target=produce)
    producer.start()
    wait_until(lambda: len(broker.connects) >= connections, timeout_s=300)
    stop.set()
    producer.join()
    broker.behaviour = Behaviour()
    assert station.publisher.wait_drained(20)
    seen = first_copies(broker)
    assert seen == list(range(1, next(numbers)))


def test_control_the_library_on_its_own_turns_first_copies_round(broker: FakeBroker) -> None:
    broker.behaviour = Behaviour(connack_delay_s=0.03, drop_after=12)
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="naive", protocol=MQTTProtocolVersion.MQTTv5)
    client.reconnect_delay_set(0.01, 0.02)  # type: ignore[arg-type]
    client.connect("127.0.0.1", broker.port, clean_start=False)
    client.loop_start()
    stop = threading.Event()
    try:
        for n in itertools.count(1):
            if len(broker.connects) >= 25 or stop.wait(0.005):
                break
            client.publish(TOPIC, json.dumps({"result_id": str(n)}), qos=1)
    finally:
        broker.behaviour = Behaviour()
        client.disconnect()
        client.loop_stop()
    assert inversions(first_copies(broker)) > 0


@pytest.mark.parametrize("code", [0x80, 0x87, 0x97, 0x99])
def test_a_refused_result_stays_and_is_delivered_when_the_refusal_ends(
    broker: FakeBroker, start: Callable[..., Station], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    shorten_hold(monkeypatch)

    def refuse(publish: Publish) -> int:
        return code if publish.topic == TOPIC else 0

    broker.behaviour.puback = refuse
    station = start(broker)
    for n in range(1, 6):
        station.outbox.commit([draft(n)])
    wait_until(lambda: station.publisher.status().problem is not None)
    assert f"0x{code:02x}" in str(station.publisher.status().problem) and station.outbox.status().rows == 5
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)
    assert first_copies(broker) == [1, 2, 3, 4, 5]


def test_nobody_who_listens_is_no_delivery(
    broker: FakeBroker, start: Callable[..., Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten_hold(monkeypatch)
    broker.behaviour.puback = lambda publish: 0x10 if publish.topic == TOPIC else 0
    station = start(broker)
    station.outbox.commit([draft(1)])
    wait_until(lambda: "0x10" in str(station.publisher.status().problem))
    assert station.outbox.status().rows == 1
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)


@pytest.mark.parametrize("refused", [1, 5])
def test_a_consumer_that_subscribes_in_the_middle_of_the_window_gets_the_order_too(
    broker: FakeBroker, start: Callable[..., Station], monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """After a restart of the broker: the first results meet nobody (0x10), those behind them in the same window are delivered."""
    shorten_hold(monkeypatch)
    delivered: list[int] = []
    left = iter(range(refused))

    def answer(publish: Publish) -> int:
        if publish.topic != TOPIC:
            return 0
        if next(left, None) is not None:
            return 0x10
        delivered.append(int(json.loads(publish.payload)["result_id"]))
        return 0

    broker.behaviour.connect_code = 0x87  # so that a window is full when it begins
    station = start(broker)
    station.outbox.commit([draft(n) for n in range(1, 31)])
    broker.behaviour.puback = answer
    broker.behaviour.connect_code = 0
    assert station.publisher.wait_drained(20)
    assert list(dict.fromkeys(delivered)) == list(range(1, 31))


def shorten_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused row is tried again at once."""
    monkeypatch.setattr(delivery, "HOLD_S", 0.1)


def test_a_broker_that_never_acknowledges_is_left_for_a_new_connection(
    broker: FakeBroker, start: Callable[..., Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "ACK_TIMEOUT_S", 0.3)
    broker.behaviour.puback = lambda _: None
    station = start(broker)
    station.outbox.commit([draft(1)])
    wait_until(lambda: len(broker.connects) >= 3)
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)


def test_an_announcement_that_is_never_acknowledged_does_not_stop_the_results_unseen(
    broker: FakeBroker, start: Callable[..., Station], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fills a window of one, so no result goes out that could be missed."""
    monkeypatch.setattr(delivery, "ACK_TIMEOUT_S", 0.3)
    broker.behaviour = Behaviour(properties={RECEIVE_MAXIMUM: 1})
    broker.behaviour.puback = lambda publish: 0 if publish.topic == TOPIC else None
    station = start(broker)
    station.outbox.commit([draft(1)])
    wait_until(lambda: station.publisher.status().problem is not None, timeout_s=8)
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)


@pytest.mark.parametrize("maximum", [1, 5])
def test_the_window_is_what_the_broker_takes(
    broker: FakeBroker, start: Callable[..., Station], monkeypatch: pytest.MonkeyPatch, maximum: int
) -> None:
    monkeypatch.setattr(delivery, "ACK_TIMEOUT_S", 0.3)
    broker.behaviour = Behaviour(properties={RECEIVE_MAXIMUM: maximum, SERVER_KEEP_ALIVE: 5})
    taken: list[int] = []  # the first result, which goes alone, is taken, and then none

    def puback(publish: Publish) -> int | None:
        if publish.topic == TOPIC:
            taken.append(publish.mid)
        return 0 if publish.topic != TOPIC or len(taken) == 1 else None

    broker.behaviour.puback = puback
    station = start(broker)
    station.outbox.commit([draft(n) for n in range(1, 31)])
    wait_until(lambda: len(broker.connects) >= 2)
    assert broker.most_open == maximum
    broker.behaviour.puback = lambda _: 0
    assert station.publisher.wait_drained(20)
    assert first_copies(broker) == list(range(1, 31))


def test_a_broker_without_retained_messages_is_told_none(broker: FakeBroker, start: Callable[..., Station]) -> None:
    broker.behaviour = Behaviour(properties={RETAIN_AVAILABLE: 0, MAXIMUM_PACKET_SIZE: 100_000})
    station = start(broker)
    station.outbox.commit([draft(1)])
    assert station.publisher.wait_drained(20)
    assert not any(publish.retain for publish in broker.received)


def test_a_broker_that_offers_no_qos_1_is_said_to_be_useless(broker: FakeBroker, start: Callable[..., Station]) -> None:
    broker.behaviour = Behaviour(properties={MAXIMUM_QOS: 0})
    station = start(broker)
    station.outbox.commit([draft(1)])
    wait_until(lambda: "M-QOS" in str(station.publisher.status().problem))
    assert station.outbox.status().rows == 1


@pytest.mark.parametrize(("code", "name"), [(0x84, "M-V5"), (0x86, "M-AUTH"), (0x87, "M-AUTH"), (0x9C, "M-MOVED")])
def test_a_refused_connection_is_named(broker: FakeBroker, start: Callable[..., Station], code: int, name: str) -> None:
    broker.behaviour.connect_code = code
    station = start(broker)
    wait_until(lambda: name in str(station.publisher.status().problem))
    broker.behaviour.connect_code = 0
    station.outbox.commit([draft(1)])
    assert station.publisher.wait_drained(20)


def test_a_second_station_of_the_name_is_noticed(broker: FakeBroker, start: Callable[..., Station]) -> None:
    broker.behaviour.disconnect = (1, 0x8E)
    station = start(broker)
    wait_until(lambda: "M-TAKEOVER" in str(station.publisher.status().problem))
    assert len(broker.connects) == 1  # no ping-pong


def test_bytes_that_are_no_mqtt_cost_a_connection_and_no_result(
    broker: FakeBroker, start: Callable[..., Station]
) -> None:
    broker.behaviour.malformed_after = 4
    station = start(broker)
    station.outbox.commit([draft(n) for n in range(1, 11)])
    wait_until(lambda: len(broker.connects) >= 5)
    broker.behaviour.malformed_after = None
    assert station.publisher.wait_drained(20)
    assert first_copies(broker) == list(range(1, 11))
