"""`edge-dkm watch`: shows what a station publishes, as it comes. A small consumer to try a line with."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

from edge_dkm.errors import BrokerError
from edge_dkm.mqtt.embedded_broker import as_embedded_speaks
from edge_dkm.mqtt.link import Link, await_connack, open_link, pump
from edge_dkm.settings import EMBEDDED, LineSettings

RETRY_S = 0.2


def watch(settings: LineSettings, show: Callable[[str, bytes], bool], wait_s: float) -> None:
    """Calls `show(topic, payload)` for every message below the station's topic until it returns False, or line and broker have ended.

    Raises:
        BrokerError: the broker is not there within `wait_s`, or goes away.
    """
    settings = as_embedded_speaks(settings)
    link = _connect(settings, time.monotonic() + wait_s)
    try:
        link.client.subscribe(f"{settings.base_topic}/#", qos=1)
        has_stopped = False
        while link.lost is None:
            pump(link, 1.0)
            messages, link.messages = link.messages, []
            for message in messages:
                payload = bytes(message.payload)
                if message.topic == f"{settings.base_topic}/status":
                    has_stopped = b'"stopped"' in payload
                if not show(message.topic, payload):
                    return
        # An embedded broker ends with its line, at once: what it had not sent yet is gone, the line's goodbye with it.
        if has_stopped or settings.mqtt.host == EMBEDDED:
            return
        raise BrokerError(f"MQTT broker {settings.mqtt.host}:{settings.mqtt.effective_port} {link.lost}")
    finally:
        link.client.disconnect()


def _connect(settings: LineSettings, deadline_s: float) -> Link:
    """A broker that is being started refuses at first, or accepts and hangs up; another process's start has no event to wait for."""
    while True:
        link = None
        try:
            link = open_link(settings.mqtt, f"edge-dkm-watch-{settings.station}-{os.getpid()}", clean=True)
            await_connack(link, settings.mqtt)
            return link
        except BrokerError as error:
            if link is not None:
                link.client.disconnect()
            may_change = settings.mqtt.host == EMBEDDED or error.code in {"M-OFFLINE", "M-DNS"}
            if not may_change or time.monotonic() > deadline_s:
                raise
            time.sleep(RETRY_S)


def describe(topic: str, payload: bytes, base: str) -> str:
    """One line for people; results in words, everything else as it is."""
    place = topic.removeprefix(f"{base}/")
    try:
        message = json.loads(payload)
    except ValueError:
        return f"{place}: {payload[:100]!r}"
    schema = message.get("schema", "")
    if schema == "dkm.result/1":
        cluster = message.get("cluster", {}).get("name", message.get("error", {}).get("code", ""))
        novelty = message.get("novelty", {})
        score = f" novelty {novelty['score']:.2f}" if novelty else ""
        again = " (again)" if message["historical"] else ""
        return f"{message['ts'][11:23]} {message['camera']} #{message['cseq']} {message['verdict']:<7}{cluster}{score}{again}"
    if schema == "dkm.gap/1":
        return (
            f"{message['ts'][11:23]} {message['camera']} GAP {message['from']} to {message['to']}: {message['reason']}"
        )
    return f"{place}: {json.dumps({k: v for k, v in message.items() if k not in {'schema', 'ts', 'station', 'session'}}, ensure_ascii=False)}"
