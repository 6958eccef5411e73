"""The broker sample of the docs starts, and its ACL does what docs/broker.md says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_dkm.errors import BrokerError
from edge_dkm.mqtt.embedded_broker import find_mosquitto
from edge_dkm.mqtt.link import Link, await_connack, open_link, publish, pump
from edge_dkm.settings import MqttSettings, TlsSettings
from tests.broker import free_port, needs_mosquitto
from tests.edge_dkm.test_tls import Pki
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]
DOCS = Path(__file__).parent.parent / "docs"
OWN = "dkm/v1/st1"
DENIED = 0x87
WRITTEN = [
    *("status", "info", "state", "health", "part", "reply", "alarm/S-FULL"),
    *("top/health", "top/result", "top/history", "top/drift", "top/image"),
]


class Broker:
    """Mosquitto with the files of the docs: only paths, the port and, as root, the user are replaced."""

    def __init__(self, folder: Path, without: str | None = None) -> None:
        self.port, self.folder, self.pki = free_port(), folder, Pki.create(folder)
        self.pki.issue("broker")
        text = (DOCS / "mosquitto.conf").read_text()
        for before, after in {
            "/etc/mosquitto/certs": str(folder),
            "/etc/mosquitto/mosquitto.acl": str(DOCS / "mosquitto.acl"),
            "/var/lib/mosquitto/": f"{folder}/",
            "listener 8883": f"listener {self.port} 127.0.0.1",
        }.items():
            assert before in text
            text = text.replace(before, after)
        text = "\n".join(line for line in text.splitlines() if without is None or without not in line) + "\n"
        (folder / "mosquitto.conf").write_text(text + ("user root\n" if os.geteuid() == 0 else ""))
        self.links: list[Link] = []
        self.start()

    def start(self) -> None:
        path = find_mosquitto()
        assert path is not None
        (self.folder / "log").write_bytes(b"")
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([path, "-c", str(self.folder / "mosquitto.conf")], stdout=log, stderr=log)
        wait_until(lambda: "running" in self.log() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def settings(self, name: str) -> MqttSettings:
        certificate, key = self.pki.issue(name)
        tls = TlsSettings(ca=self.folder / "ca.pem", cert=certificate, key=key)
        return MqttSettings(host="127.0.0.1", port=self.port, tls=tls)

    def connect(self, name: str) -> Link:
        settings = self.settings(name)
        self.links.append(open_link(settings, f"client-{name}", clean=True))
        await_connack(self.links[-1], settings)
        return self.links[-1]

    def close(self) -> None:
        for link in self.links:
            link.client.disconnect()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    running = Broker(tmp_path)
    yield running
    running.close()


def reason(link: Link, topic: str) -> int:
    """The PUBACK's reason code."""
    mid = publish(link, topic, b"{}", qos=1)
    wait_until(lambda: (pump(link, 0.02), any(acked == mid for acked, _ in link.acks))[1])
    return dict(link.acks)[mid]


def test_a_station_writes_its_own_topics_and_nothing_else(broker: Broker) -> None:
    mes = broker.connect("mes")
    mes.client.subscribe("dkm/v1/#", 1)
    pump(mes, 0.2)
    station = broker.connect("st1")
    assert {topic: reason(station, f"{OWN}/{topic}") for topic in WRITTEN} == dict.fromkeys(WRITTEN, 0)
    wait_until(lambda: (pump(mes, 0.02), len(mes.messages) == len(WRITTEN))[1])
    foreign = [f"dkm/v1/st2/{topic}" for topic in WRITTEN]
    forbidden = [f"{OWN}/cmd/pause", f"{OWN}/top/cmd/trigger", f"{OWN}/ack", f"{OWN}/other", "dkm/v1/mes/x", "x"]
    assert {reason(station, topic) for topic in foreign + forbidden} == {DENIED}


def test_a_station_hears_its_own_commands_and_acknowledgements_alone(broker: Broker) -> None:
    station, mes = broker.connect("st1"), broker.connect("mes")
    station.client.subscribe("#", 1)
    pump(station, 0.2)
    heard = [f"{OWN}/cmd/pause", f"{OWN}/top/cmd/trigger", f"{OWN}/ack"]
    unheard = ["dkm/v1/st2/cmd/pause", "dkm/v1/st2/ack", "dkm/v1/st2/top/cmd/trigger"]
    assert not {reason(mes, topic) for topic in unheard + heard} & {DENIED}
    wait_until(lambda: (pump(station, 0.02), len(station.messages) >= len(heard))[1])
    assert [message.topic for message in station.messages] == heard


def test_the_mes_commands_and_the_dashboard_only_reads(broker: Broker) -> None:
    mes, dashboard = broker.connect("mes"), broker.connect("dashboard")
    assert {reason(mes, f"{OWN}/{topic}") for topic in ("top/result", "status", "reply", "alarm/S-FULL")} == {DENIED}
    everything = [f"{OWN}/{topic}" for topic in ("cmd/pause", "ack", "top/result", "status")]
    assert {reason(dashboard, topic) for topic in everything} == {DENIED}


def test_without_a_certificate_nobody_gets_in(broker: Broker, tmp_path: Path) -> None:
    bare = MqttSettings(host="127.0.0.1", port=broker.port, tls=TlsSettings(ca=tmp_path / "ca.pem"))
    plain = MqttSettings(host="127.0.0.1", port=broker.port)
    stranger = Pki.create(tmp_path / "other", "ca").issue("st1")
    forged = MqttSettings(
        host="127.0.0.1",
        port=broker.port,
        tls=TlsSettings(ca=tmp_path / "ca.pem", cert=stranger[0], key=stranger[1]),
    )
    for settings in (bare, plain, forged):
        with pytest.raises(BrokerError):
            link = open_link(settings, "intruder", clean=True)
            try:
                await_connack(link, settings)
            finally:
                link.client.disconnect()


def queue_fifty(broker: Broker) -> MqttSettings:
    """Fifty acknowledged results for a consumer that is away; returns its settings."""
    settings = broker.settings("mes")
    link = open_link(settings, "mes", clean=False)
    await_connack(link, settings)
    granted: list[int] = []
    link.client.on_subscribe = lambda *_: granted.append(1)
    link.client.subscribe("dkm/v1/+/+/result", 1)
    wait_until(lambda: (pump(link, 0.02), bool(granted))[1])
    link.client.disconnect()
    station = broker.connect("st1")
    assert {reason(station, f"{OWN}/top/result") for _ in range(50)} == {0}
    return settings


def kill_and_read(broker: Broker, settings: MqttSettings) -> Link:
    """The consumer's connection to the broker that was killed and has started again."""
    broker.process.kill()
    broker.process.wait()
    broker.start()
    link = open_link(settings, "mes", clean=False)
    broker.links.append(link)
    await_connack(link, settings)
    return link


def test_a_queue_survives_a_broker_that_is_killed(broker: Broker) -> None:
    settings = queue_fifty(broker)
    saved = broker.folder / "mosquitto.db"
    wait_until(lambda: saved.exists() and saved.read_bytes().count(b"top/result") >= 50)
    link = kill_and_read(broker, settings)
    wait_until(lambda: (pump(link, 0.02), len(link.messages) == 50)[1])
    assert len(link.messages) == 50


def test_control_with_the_usual_autosave_all_that_was_acknowledged_is_gone(tmp_path: Path) -> None:
    broker = Broker(tmp_path, without="autosave")
    try:
        link = kill_and_read(broker, queue_fifty(broker))
        pump(link, 0.5)
        assert link.messages == [] and not (tmp_path / "mosquitto.db").exists()
    finally:
        broker.close()


def test_the_limits_are_those_that_the_page_names() -> None:
    page, conf = (DOCS / "broker.md").read_text(), (DOCS / "mosquitto.conf").read_text()
    rows = re.findall(r"^\| (`[^|]+) \|", page.split("## Settings")[1].split("## Who")[0], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(named) == 7 and [name for name in named if f"\n{name}" not in conf] == []
