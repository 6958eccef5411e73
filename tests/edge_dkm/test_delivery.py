"""Delivery modes, order and holds, against a real Mosquitto."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from edge_dkm.mqtt import delivery as delivery_module
from edge_dkm.mqtt import pacing
from edge_dkm.mqtt.delivery import Replay
from edge_dkm.mqtt.link import Link, await_connack, open_link, publish, pump
from edge_dkm.settings import MqttSettings
from tests.broker import Mosquitto, Subscriber
from tests.stations import Station
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Start = Callable[..., Station]
Subscribe = Callable[..., Subscriber]
E2E = "{mode: e2e}"


@pytest.fixture
def mes(mosquitto: Mosquitto) -> Iterator[Link]:
    """A connection from which a test speaks for the MES."""
    settings = MqttSettings(host="127.0.0.1", port=mosquitto.port)
    link = open_link(settings, "mes", clean=True)
    await_connack(link, settings)
    yield link
    link.client.disconnect()


def acknowledge(link: Link, epoch: str, upto: int) -> None:
    payload = json.dumps({"schema": "dkm.ack/1", "epoch": epoch, "upto": upto}).encode()
    mid = publish(link, "dkm/v1/st1/ack", payload, qos=1)
    wait_until(lambda: pump(link, 0.02) or mid not in link.unacknowledged)


def numbers(messages: list[dict[str, Any]], camera: str = "top") -> list[int]:
    return [m["cseq"] for m in messages if m["result_id"].startswith(camera)]


def test_end_to_end_a_row_waits_for_the_consumers_word_and_not_for_the_brokers(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start, mes: Link
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery=E2E)
    station.commit(1, 5)
    wait_until(lambda: len(subscriber.results()) == 5 and station.publisher.codes[0] >= 5)
    assert station.outbox.status().rows == 5
    acknowledge(mes, station.outbox.epoch, 3)
    wait_until(lambda: station.outbox.status().rows == 2)
    acknowledge(mes, "another-epoch", 5)
    acknowledge(mes, station.outbox.epoch, 5)
    wait_until(lambda: station.outbox.status().rows == 0)
    assert station.publisher.status().acknowledged == 5


def test_control_a_brokers_word_is_enough_for_the_journal(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port)
    station.commit(1, 5)
    wait_until(lambda: station.outbox.status().rows == 0)
    assert station.outbox.status().sent_rows == 5


def test_puback_mode_keeps_nothing(mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start) -> None:
    subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery="{mode: puback}")
    station.commit(1, 5)
    wait_until(lambda: station.outbox.status().rows == 0)
    assert station.outbox.status().sent_rows == 0


def test_a_silent_consumer_gets_everything_again_in_order_and_is_reported(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start, mes: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "SILENCE_FIRST_S", 0.2)
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery=E2E)
    station.commit(1, 4)
    wait_until(lambda: numbers(subscriber.of("dkm.result/1")).count(1) >= 3)
    assert station.problem.startswith("M-NO-ACK")
    first_copies = list(dict.fromkeys(numbers(subscriber.of("dkm.result/1"))))
    assert first_copies == [1, 2, 3, 4]
    copies = [json.dumps(m) for m in subscriber.of("dkm.result/1") if m["cseq"] == 1]
    assert len(set(copies)) == 1
    acknowledge(mes, station.outbox.epoch, 4)
    wait_until(lambda: station.outbox.status().rows == 0 and station.problem == "")


def test_a_consumer_that_repeats_an_old_word_is_as_silent_as_one_that_says_nothing(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start, mes: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "SILENCE_FIRST_S", 0.3)
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery=E2E)
    station.commit(1, 3)

    def nags() -> bool:
        acknowledge(mes, station.outbox.epoch, 1)
        return numbers(subscriber.of("dkm.result/1")).count(2) >= 2

    wait_until(nags)
    assert station.outbox.status().rows == 2


def test_no_more_is_sent_than_the_consumer_has_room_for(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start, mes: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "E2E_WINDOW", 10)
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery=E2E)
    station.commit(1, 30)
    wait_until(lambda: station.publisher.codes[0] >= 10)
    assert set(numbers(subscriber.of("dkm.result/1"))) <= set(range(1, 11))
    for upto in (10, 20, 30):
        wait_until(lambda upto=upto: upto in numbers(subscriber.of("dkm.result/1")))
        acknowledge(mes, station.outbox.epoch, upto)
    wait_until(lambda: station.outbox.status().rows == 0)


def test_what_the_consumer_did_not_acknowledge_comes_again_after_the_broker_was_away(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    station = start_station(mosquitto.port, delivery=E2E)
    station.commit(1, 3)
    wait_until(lambda: len(subscriber.results()) == 3)
    mosquitto.kill()
    mosquitto.start()
    again = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    wait_until(lambda: numbers(again.of("dkm.result/1"))[:3] == [1, 2, 3])
    assert numbers(subscriber.of("dkm.result/1"))[:3] == [1, 2, 3]


def test_with_live_first_new_results_do_not_wait_for_old_ones(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    mosquitto.kill()
    station = start_station(mosquitto.port, delivery="{order: live_first, history_per_s: 200}")
    station.commit(1, 300)
    wait_until(lambda: station.problem != "")
    mosquitto.start()
    subscriber = subscribe(mosquitto.port)
    wait_until(lambda: station.publisher.status().connected)
    station.commit(301, 5)
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: len(subscriber.of("dkm.result/1")) >= 305)
    topics = [(topic.rsplit("/", 1)[1], m) for topic, m, _ in subscriber.messages if m.get("schema") == "dkm.result/1"]
    old = [m for topic, m in topics if topic == "history"]
    new = [m for topic, m in topics if topic == "result"]
    assert numbers(old) == list(range(1, 301)) and all(m["historical"] for m in old)
    assert numbers(new) == list(range(301, 306)) and not any(m["historical"] for m in new)
    order = [topic for topic, _ in topics]
    assert order.index("result") < len(order) - 5  # not behind the backlog


def test_control_in_strict_order_the_backlog_goes_first_and_is_not_historical(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    mosquitto.kill()
    station = start_station(mosquitto.port)
    station.commit(1, 50)
    mosquitto.start()
    subscriber = subscribe(mosquitto.port)
    station.commit(51, 5)
    wait_until(lambda: len(subscriber.results()) == 55)
    assert numbers(subscriber.results()) == list(range(1, 56))
    assert not any(m["historical"] for m in subscriber.of("dkm.result/1"))


def test_a_replay_sends_kept_results_again_marked_historical(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    station = start_station(mosquitto.port)
    station.commit(1, 60)
    wait_until(lambda: station.outbox.status().rows == 0)
    assert station.publisher.replay(Replay("top", station.outbox.epoch, 11, 50))
    wait_until(lambda: len(subscriber.of("dkm.result/1")) == 100)
    again = [m for m in subscriber.of("dkm.result/1") if m["historical"]]
    assert numbers(again) == list(range(11, 51))
    assert {m["result_id"] for m in again} == {f"top-{n}" for n in range(11, 51)}


def test_a_replay_of_what_is_no_longer_kept_is_answered_by_a_gap_record(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    station = start_station(mosquitto.port)
    station.commit(1, 10)
    wait_until(lambda: station.outbox.status().rows == 0)
    station.outbox.purge()
    station.commit(11, 2)
    wait_until(lambda: station.outbox.status().rows == 0)
    station.publisher.replay(Replay("top", station.outbox.epoch, 5, 12))
    wait_until(lambda: len(subscriber.of("dkm.gap/1")) == 1 and len(subscriber.of("dkm.result/1")) == 14)
    gap = subscriber.of("dkm.gap/1")[0]
    assert (gap["camera"], gap["from"], gap["to"]) == ("top", 5, 10)
    assert numbers([m for m in subscriber.of("dkm.result/1") if m["historical"]]) == [11, 12]


def test_a_replay_that_the_broker_cut_off_goes_on_where_it_was(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    station = start_station(mosquitto.port)
    station.commit(1, 500)
    wait_until(lambda: station.outbox.status().rows == 0)
    before = station.publisher.codes[0]
    station.publisher.replay(Replay("top", station.outbox.epoch, 1, 500))
    wait_until(lambda: station.publisher.codes[0] > before + 20)
    mosquitto.kill()
    mosquitto.start()
    again = subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    wait_until(lambda: 500 in numbers(again.of("dkm.result/1")))
    seen = numbers(again.of("dkm.result/1"))
    assert seen == list(range(seen[0], 501))


def test_a_replay_that_nobody_reads_ends_and_that_is_said_once(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start, caplog: pytest.LogCaptureFixture
) -> None:
    station = start_station(mosquitto.port)
    station.commit(1, 5)
    wait_until(lambda: station.problem.startswith("M-NO-CONSUMER"))
    refused = station.publisher.codes[0x10]
    station.publisher.replay(Replay("top", station.outbox.epoch, 1, 5))
    wait_until(lambda: station.publisher.codes[0x10] >= refused + 5)
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: numbers(subscriber.results()) == [1, 2, 3, 4, 5])
    assert caplog.text.count("a replay of top ends") == 1
    assert not any(m["historical"] for m in subscriber.of("dkm.result/1"))


def test_a_topic_that_nobody_reads_does_not_hold_up_another(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/side/result")
    station = start_station(mosquitto.port)
    for n in range(1, 21):
        station.commit(n, 1, "top")
        station.commit(n, 1, "side")
    wait_until(lambda: len(subscriber.results()) == 20)
    assert numbers(subscriber.results(), "side") == list(range(1, 21))
    wait_until(lambda: station.outbox.status().rows == 20 and station.problem.startswith("M-NO-CONSUMER"))
    late = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    wait_until(lambda: len(late.results()) == 20 and station.outbox.status().rows == 0)
    assert numbers(late.results(), "top") == list(range(1, 21))
    wait_until(lambda: station.problem == "")
    station.commit(21, 3, "top")
    wait_until(lambda: numbers(late.results(), "top") == list(range(1, 24)))


def test_a_packet_that_the_broker_would_not_take_is_not_sent_and_is_reported(
    start_broker: Callable[..., Mosquitto], subscribe: Subscribe, start_station: Start
) -> None:
    broker = start_broker("allow_anonymous true\nmax_packet_size 600\n")
    subscriber = subscribe(broker.port)
    station = start_station(broker.port)
    station.commit(1, 3)
    wait_until(lambda: station.problem.startswith("M-PACKET"))
    assert station.publisher.status().connected and station.outbox.status().rows == 3
    wait_until(lambda: [m["state"] for m in subscriber.of("dkm.status/1")] == ["online"])
    assert subscriber.of("dkm.result/1") == []


def test_a_second_station_of_the_same_name_is_found_and_not_fought(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/status")
    first = start_station(mosquitto.port)
    wait_until(lambda: first.publisher.status().connected)
    second = start_station(mosquitto.port)
    wait_until(lambda: first.problem.startswith("M-TAKEOVER") and second.problem.startswith("M-TAKEOVER"))
    # Each has come back once to look, and then waits half a minute instead of throwing the other out again.
    assert len([m for m in subscriber.of("dkm.status/1") if m["state"] == "online"]) <= 4


def test_a_station_alone_that_begins_a_new_epoch_is_no_double(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    first = start_station(mosquitto.port)
    wait_until(lambda: first.publisher.status().connected)
    first.close()
    second = start_station(mosquitto.port)
    second.commit(1, 2)
    wait_until(lambda: len(subscriber.results()) == 2)
    assert second.problem == ""


def test_a_full_outbox_under_way_declares_every_result_it_drops(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start
) -> None:
    mosquitto.kill()
    station = start_station(mosquitto.port, delivery="{max_rows: 20}")
    station.commit(1, 100)
    mosquitto.start()
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/+/result")
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: 100 in numbers(subscriber.of("dkm.result/1")))
    received = set(numbers(subscriber.of("dkm.result/1")))
    declared = {n for gap in subscriber.of("dkm.gap/1") for n in range(gap["from"], gap["to"] + 1)}
    assert received | declared == set(range(1, 101)) and not received & declared
    assert len(declared) >= 80


def test_commands_are_handed_on_and_answers_said_in_order(
    mosquitto: Mosquitto, subscribe: Subscribe, start_station: Start, mes: Link
) -> None:
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/reply")
    station = start_station(mosquitto.port)
    heard: list[tuple[str, bytes, bool]] = []
    station.publisher.on_command = lambda *message: heard.append(message)
    mosquitto.kill()  # the next connection subscribes
    mosquitto.start()
    again = subscribe(mosquitto.port, "dkm/v1/st1/reply")
    wait_until(lambda: station.publisher.status().connected)
    settings = MqttSettings(host="127.0.0.1", port=mosquitto.port)
    link = open_link(settings, "mes2", clean=True)
    await_connack(link, settings)

    def asks() -> bool:
        publish(link, "dkm/v1/st1/cmd/pause", b'{"id":"1"}', qos=0)
        publish(link, "dkm/v1/st1/top/cmd/trigger", b'{"id":"2"}', qos=0)
        pump(link, 0.05)
        return len({topic for topic, _, _ in heard}) == 2

    wait_until(asks)
    for n in range(20):
        station.publisher.say("dkm/v1/st1/reply", lambda session, n=n: json.dumps({"n": n}).encode(), 1)
    wait_until(lambda: len(again.messages) == 20)
    assert [m["n"] for _, m, _ in again.messages] == list(range(20))
    assert subscriber.messages == []
    link.client.disconnect()
