from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from configs import load_text
from edge_dkm.mqtt import broker_probe
from edge_dkm.mqtt.broker_probe import Probed, probe
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, Subscriber, free_port
from tests.faults.fake_broker import (
    MAXIMUM_PACKET_SIZE,
    MAXIMUM_QOS,
    RECEIVE_MAXIMUM,
    RETAIN_AVAILABLE,
    SERVER_KEEP_ALIVE,
    Behaviour,
    FakeBroker,
)
from tests.waiting import wait_until

BASE = "dkm/v1/st1"


def ask(port: int, mqtt: str = "", mode: str = "e2e") -> dict[str, Probed]:
    text = f"station: st1\nmodel: none.onnx\ncameras: {{top: {{source: none}}}}\nmqtt: {{host: 127.0.0.1, port: {port}{mqtt}}}\ndelivery: {{mode: {mode}}}"
    return {one.what: one for one in probe(load_text(LineSettings, text, "line.yaml"))}


def failed(found: dict[str, Probed]) -> set[str]:
    assert {one.exit_code for one in found.values()} <= {0, 5}
    return {what for what, one in found.items() if one.exit_code}


@pytest.fixture
def broker() -> Iterator[FakeBroker]:
    with FakeBroker() as running:
        yield running


def test_a_good_broker_has_a_line_for_each_thing_and_no_fault(broker: FakeBroker) -> None:
    found = ask(broker.port)
    assert failed(found) == set()
    assert list(found) == [
        "broker",
        "window",
        "packets",
        "qos",
        "retained",
        "keepalive",
        "write",
        "read status",
        "read commands",
        "read acks",
        "consumer",
    ]
    assert "MQTT 5" in found["broker"].detail and found["window"].detail.startswith("20 ")
    assert "(0x00)" in found["write"].detail and "not asked" in found["consumer"].detail
    assert "read acks" not in ask(broker.port, mode="journal")


def test_what_is_asked_disturbs_nobody(broker: FakeBroker) -> None:
    ask(broker.port)
    assert [(publish.topic, publish.qos, publish.retain) for publish in broker.received] == [
        (f"{BASE}/check", 1, False)
    ]
    assert json.loads(broker.received[0].payload)["schema"] == "dkm.check/1"
    assert broker.connects == ["edge-dkm-check-st1"]  # a station that runs has another id
    assert broker.subscriptions == {f"{BASE}/status", f"{BASE}/cmd/+", f"{BASE}/+/cmd/+", f"{BASE}/ack"}


@pytest.mark.broker
def test_nothing_stays_on_a_real_broker_and_a_reader_of_everything_can_parse_it(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber]
) -> None:
    reader = subscribe(mosquitto.port)
    found = ask(mosquitto.port)
    assert failed(found) == set() and "acknowledged (0x00)" in found["write"].detail
    wait_until(lambda: bool(reader.messages))
    assert [topic for topic, _, _ in reader.messages] == [f"{BASE}/check"]
    reader.close()
    assert "nobody reads it (0x10)" in ask(mosquitto.port)["write"].detail
    late = subscribe(mosquitto.port)
    late.close()
    assert late.messages == []


@pytest.mark.broker
def test_rights_that_are_missing_are_named(tmp_path: Path, start_broker: Callable[..., Mosquitto]) -> None:
    (tmp_path / "acl").write_text(f"topic read #\ntopic write {BASE}/status\n")
    running = start_broker(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}\n")
    found = ask(running.port)
    assert failed(found) == {"write"}
    assert "not authorized" in found["write"].detail and f"the right to write {BASE}/check" in found["write"].detail


@pytest.mark.broker
def test_the_right_to_write_below_the_station_is_enough(tmp_path: Path, start_broker: Callable[..., Mosquitto]) -> None:
    (tmp_path / "acl").write_text(f"topic write {BASE}/#\ntopic read {BASE}/#\n")
    assert failed(ask(start_broker(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}\n").port)) == set()


@pytest.mark.broker
def test_a_refused_password_and_a_port_that_nobody_listens_on_are_one_line(
    start_broker: Callable[..., Mosquitto],
) -> None:
    found = ask(start_broker("allow_anonymous false\n").port, ", username: st1, password: wrong")
    assert set(found) == {"broker"} == failed(found)
    assert found["broker"].detail.startswith("M-AUTH") and "as client edge-dkm-check-st1" in found["broker"].detail
    found = ask(free_port())
    assert set(found) == failed(found) == {"broker"} and found["broker"].detail.startswith("M-OFFLINE")


def test_what_a_broker_offers_is_told(broker: FakeBroker) -> None:
    broker.behaviour.properties = {
        RECEIVE_MAXIMUM: 3,
        MAXIMUM_PACKET_SIZE: 1623,
        RETAIN_AVAILABLE: 0,
        MAXIMUM_QOS: 1,
        SERVER_KEEP_ALIVE: 30,
    }
    found = ask(broker.port)
    assert failed(found) == {"packets"}  # one byte too few: 1,024 of a result and 600 around it
    assert "at most 1623 bytes, a result may need 1624" in found["packets"].detail
    assert found["window"].detail.startswith("3 ") and found["retained"].detail.startswith("no")
    assert found["qos"].detail.startswith("QoS 1,") and "asks for 30 s" in found["keepalive"].detail
    broker.behaviour.properties = {MAXIMUM_PACKET_SIZE: 1624}
    assert failed(ask(broker.port)) == set()


def test_a_broker_that_cannot_carry_results_is_said_to_be_useless(broker: FakeBroker) -> None:
    broker.behaviour.properties = {MAXIMUM_QOS: 0}
    found = ask(broker.port)
    assert set(found) == failed(found) == {"broker"} and found["broker"].detail.startswith("M-QOS")


@pytest.mark.parametrize("behaviour", [Behaviour(disconnect=(1, 0x87)), Behaviour(drop_after=1)])
def test_a_broker_that_hangs_up_on_what_it_forbids_is_not_a_success(broker: FakeBroker, behaviour: Behaviour) -> None:
    broker.behaviour = behaviour
    found = ask(broker.port)
    assert failed(found) == {"write"} and "connection" in found["write"].detail


def test_a_broker_that_never_acknowledges_is_said(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_probe, "ANSWER_S", 0.2)
    broker.behaviour.puback = lambda _: None
    found = ask(broker.port)
    assert failed(found) == {"write"} and found["write"].detail.startswith("M-NO-PUBACK")


@pytest.mark.broker
def test_with_mqtt_3_1_1_an_acknowledgement_is_not_called_a_right(mosquitto: Mosquitto) -> None:
    found = ask(mosquitto.port, ', version: "3.1.1"')
    assert failed(found) == set() and "a refusal would look the same" in found["write"].detail
