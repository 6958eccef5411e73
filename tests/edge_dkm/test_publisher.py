from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_dkm.message import State
from edge_dkm.mqtt import delivery as delivery_module
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, Subscriber, free_port
from tests.stations import Station
from tests.waiting import wait_until

pytestmark = pytest.mark.broker


def test_results_arrive_once_in_order_and_are_marked_sent(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    subscriber = subscribe(mosquitto.port)
    station = start_station(mosquitto.port)
    station.commit(1, 100)
    assert station.publisher.wait_drained(20)
    wait_until(lambda: len(subscriber.of("dkm.result/1")) == 100)
    assert [m["cseq"] for m in subscriber.of("dkm.result/1")] == list(range(1, 101))
    assert station.outbox.status().sent_rows == 100 and station.problem == ""


def test_a_commit_is_published_without_polling(
    mosquitto: Mosquitto,
    subscribe: Callable[..., Subscriber],
    start_station: Callable[..., Station],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        delivery_module, "IDLE_S", 60.0
    )  # a publisher that only looked now and then would take a minute
    subscriber = subscribe(mosquitto.port)
    station = start_station(mosquitto.port)
    wait_until(lambda: station.publisher.status().connected)
    time.sleep(0.3)  # it now waits in select
    station.commit(1, 1)
    wait_until(lambda: len(subscriber.of("dkm.result/1")) >= 1, timeout_s=5)
    assert [m["cseq"] for m in subscriber.of("dkm.result/1")] == [1]


def test_results_wait_while_the_broker_is_away_and_keep_their_order(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    subscriber = subscribe(mosquitto.port)
    station = start_station(mosquitto.port)
    station.commit(1, 20)
    assert station.publisher.wait_drained(20)
    mosquitto.kill()
    station.commit(21, 30)
    wait_until(lambda: station.problem != "")
    assert station.outbox.status().rows == 30
    subscriber.close()
    mosquitto.start()
    late = subscribe(mosquitto.port)
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: len(late.results()) >= 30)
    assert [m["cseq"] for m in late.results()][-30:] == list(range(21, 51))
    late.close()


def test_first_copies_stay_in_order_when_the_broker_dies_again_and_again(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    station = start_station(mosquitto.port)
    received: list[int] = []
    for round_ in range(4):
        subscriber = subscribe(mosquitto.port)
        station.commit(1 + 25 * round_, 25)
        wait_until(lambda subscriber=subscriber: len(subscriber.of("dkm.result/1")) >= 5)  # type: ignore[misc]
        mosquitto.kill()
        subscriber.close()
        received += [m["cseq"] for m in subscriber.of("dkm.result/1")]
        mosquitto.start()
    subscriber = subscribe(mosquitto.port)
    station.commit(101, 1)
    wait_until(lambda: 101 in [m["cseq"] for m in subscriber.of("dkm.result/1")])
    received += [m["cseq"] for m in subscriber.of("dkm.result/1")]
    subscriber.close()
    first_copies = list(dict.fromkeys(received))
    assert first_copies == sorted(
        first_copies
    )  # a broker that dies may lose what it acknowledged; it may never be overtaken


def test_nobody_listening_is_not_delivery(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    station = start_station(mosquitto.port)
    station.commit(1, 5)
    wait_until(lambda: "nobody subscribes" in station.problem)
    assert station.outbox.status().rows == 5 and not station.publisher.wait_drained(0.5)
    subscriber = subscribe(mosquitto.port)
    wait_until(lambda: station.outbox.status().rows == 0)
    wait_until(lambda: len(subscriber.results()) == 5)
    assert [m["cseq"] for m in subscriber.results()] == [1, 2, 3, 4, 5]
    wait_until(lambda: station.problem == "")


def test_a_broker_that_denies_the_topic_keeps_the_rows_and_is_reported(
    tmp_path: Path, start_broker: Callable[..., Mosquitto], start_station: Callable[..., Station]
) -> None:
    (tmp_path / "acl").write_text("topic read #\ntopic write dkm/v1/st1/status\n")
    broker = start_broker(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}\n")
    station = start_station(broker.port)
    station.commit(1, 3)
    wait_until(lambda: "not authorized" in station.problem)
    assert station.outbox.status().rows == 3


def test_status_is_online_then_stopped_and_retained(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    subscriber = subscribe(mosquitto.port)
    station = start_station(mosquitto.port)
    wait_until(lambda: len(subscriber.of("dkm.status/1")) == 1)
    station.close()
    wait_until(lambda: len(subscriber.of("dkm.status/1")) == 2)
    assert [m["state"] for m in subscriber.of("dkm.status/1")] == ["online", "stopped"]
    subscriber.close()
    late = subscribe(mosquitto.port)
    wait_until(lambda: len(late.messages) >= 1)
    assert late.messages[0][2] and late.messages[0][1]["state"] == "stopped"
    late.close()


def test_the_last_will_says_offline_with_the_session_of_the_lost_connection(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], make_line: Callable[..., LineSettings], tmp_path: Path
) -> None:
    import signal
    import subprocess
    import sys

    program = """
import sys, time
from pathlib import Path
from configs import load_text
from edge_dkm.settings import LineSettings
from edge_dkm.outbox import Outbox
from edge_dkm.mqtt.publisher import Publisher
settings = load_text(LineSettings, sys.argv[1], "line.yaml")
Publisher(settings, Outbox(Path(sys.argv[2]), "st1", str), "test").start()
print("started", flush=True)
time.sleep(60)
"""
    text = f"station: st1\nmodel: m\ncameras: {{top: {{source: x}}}}\nmqtt: {{host: 127.0.0.1, port: {mosquitto.port}, keepalive_s: 5}}"
    subscriber = subscribe(mosquitto.port)
    process = subprocess.Popen([sys.executable, "-c", program, text, str(tmp_path / "o.db")], stdout=subprocess.PIPE)
    wait_until(lambda: [m["state"] for m in subscriber.of("dkm.status/1")] == ["online"])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    wait_until(lambda: len(subscriber.of("dkm.status/1")) == 2, timeout_s=30)
    online, offline = subscriber.of("dkm.status/1")
    assert offline["state"] == "offline" and offline["reason"] == "lost" and offline["session"] == online["session"]


def test_retained_announcements_are_said_again_after_a_reconnect(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    station = start_station(mosquitto.port)
    station.publisher.announce(
        "dkm/v1/st1/state", lambda session: State(ts="t", station="st1", session=session, state="running", since="t")
    )
    wait_until(lambda: station.publisher.status().connected)
    mosquitto.kill()
    mosquitto.start()  # its memory is empty
    subscriber = subscribe(mosquitto.port)
    wait_until(lambda: len(subscriber.of("dkm.state/1")) >= 1)
    assert subscriber.of("dkm.state/1")[0]["session"] >= 2


def test_results_carry_the_attributes_of_a_cloud_event(
    mosquitto: Mosquitto, subscribe: Callable[..., Subscriber], start_station: Callable[..., Station]
) -> None:
    from edge_dkm.mqtt.link import await_connack, open_link, pump
    from edge_dkm.settings import MqttSettings

    settings = MqttSettings(host="127.0.0.1", port=mosquitto.port)
    link = open_link(settings, "reader", clean=True)
    await_connack(link, settings)
    link.client.subscribe("dkm/v1/st1/top/result", qos=1)
    station = start_station(mosquitto.port)
    station.commit(7, 1)
    wait_until(lambda: pump(link, 0.05) or bool(link.messages))
    properties = link.messages[0].properties
    assert properties is not None
    assert properties.ContentType == "application/json" and properties.PayloadFormatIndicator == 1
    assert dict(properties.UserProperty) == {
        "specversion": "1.0",
        "id": "top-7",
        "type": "dkm.result.v1",
        "source": "dkm/v1/st1/top",
        "time": "t",
    }
    assert not hasattr(properties, "MessageExpiryInterval")
    link.client.disconnect()


def test_stopping_is_quick_where_there_is_no_broker(start_station: Callable[..., Station]) -> None:
    station = start_station(free_port())
    station.commit(1, 2)
    wait_until(lambda: "cannot be reached" in station.problem)
    started = time.monotonic()
    station.close()
    assert time.monotonic() - started < 10


def test_something_that_is_no_broker_is_reported(start_station: Callable[..., Station]) -> None:
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    station = start_station(server.server_port)
    wait_until(lambda: station.problem != "")
    assert not station.publisher.status().connected
    server.shutdown()
    server.server_close()


def test_a_broker_that_wants_a_password_says_so(
    start_broker: Callable[..., Mosquitto], start_station: Callable[..., Station]
) -> None:
    broker = start_broker("allow_anonymous false\n")
    station = start_station(broker.port)
    wait_until(lambda: "refuses the connection: not authorized" in station.problem)
    assert not station.publisher.status().connected
