"""What a broker offers a station and lets it do, asked with a connection of its own that disturbs nobody: for `check`.

The only message is a JSON object on `<base>/check`, QoS 1, not retained: topics that mean something to a consumer stay untouched. So
whether somebody reads results is not asked; that could only be done with a result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.errors import BrokerError
from edge_dkm.message import MAX_RESULT_BYTES
from edge_dkm.mqtt.link import (
    NO_MATCHING_SUBSCRIBERS,
    PACKET_MARGIN_BYTES,
    WINDOW,
    Link,
    await_connack,
    check_files,
    open_link,
    publish,
    pump,
    refusal,
)
from edge_dkm.settings import LineSettings

ANSWER_S = 5.0
FAILED = BrokerError.exit_code


class Probed(NamedTuple):
    """One thing asked; `exit_code` 0: it is all right."""

    what: str
    detail: str
    exit_code: int = 0


def probe(settings: LineSettings) -> Iterator[Probed]:
    """Asks the broker, one line per thing. Without a connection there is one line.

    Raises:
        UsageError: a TLS file cannot be used.
    """
    mqtt = settings.mqtt
    check_files(mqtt)
    client_id = f"edge-dkm-check-{settings.station}"  # the station itself may be running
    link: Link | None = None
    try:
        link = open_link(mqtt, client_id, clean=True)
        await_connack(link, mqtt)
    except BrokerError as error:
        note = f" (asked as client {client_id})" if error.code in {"M-AUTH", "M-DENIED", "M-REFUSED"} else ""
        yield Probed("broker", f"{error.code} {error}{note}", FAILED)
        if link is not None:
            link.client.disconnect()
        return
    try:
        yield Probed("broker", f"{mqtt.host}:{mqtt.effective_port} accepts us, MQTT {mqtt.version}")
        yield from _offers(settings, link)
        yield from _rights(settings, link)
    finally:
        link.client.disconnect()


def _offers(settings: LineSettings, link: Link) -> Iterator[Probed]:
    """What the CONNACK says; MQTT 3.1.1 says nothing."""
    few = "" if link.window >= WINDOW else f", of {WINDOW}: fewer results per second over a slow network"
    yield Probed("window", f"{link.window} messages unacknowledged at most{few}")
    needed, limit = MAX_RESULT_BYTES + PACKET_MARGIN_BYTES, link.max_packet_bytes
    if limit is None:
        yield Probed("packets", "no limit is said")
    elif limit < needed:
        text = f"M-PACKET the broker takes at most {limit} bytes, a result may need {needed}; raise its limit"
        yield Probed("packets", text, FAILED)
    else:
        pictures = "" if settings.image.when == "never" else "; larger pictures are left out"
        yield Probed("packets", f"at most {limit} bytes, a result needs up to {needed}{pictures}")
    yield Probed("qos", f"QoS {link.max_qos}, QoS 1 is needed")
    kept = "yes" if link.can_retain else "no: who connects later does not see status, info and alarms until they change"
    yield Probed("retained", kept)
    asked = link.server_keepalive_s
    wish = "" if asked is None else f", the broker asks for {asked} s"
    yield Probed("keepalive", f"every {settings.mqtt.keepalive_s} s{wish}")


def _rights(settings: LineSettings, link: Link) -> Iterator[Probed]:
    base = settings.base_topic
    yield _write(link, f"{base}/check", settings.station)
    topics = {"status": [f"{base}/status"], "commands": [f"{base}/cmd/+", f"{base}/+/cmd/+"]}
    if settings.delivery.mode == "e2e":
        topics["acks"] = [f"{base}/ack"]
    for what, filters in topics.items():
        if link.lost is not None:
            return
        yield _read(link, f"read {what}", filters)
    text = "not asked: only a result could tell whether somebody reads results; the station raises M-NO-CONSUMER when nobody does"
    yield Probed("consumer", text)


def _write(link: Link, topic: str, station: str) -> Probed:
    payload = f'{{"schema":"dkm.check/1","ts":"{rfc3339(utc_now())}","station":"{station}"}}'.encode()
    try:
        mid = publish(link, topic, payload, qos=1)
        code = _acknowledged(link, mid)
    except BrokerError as error:
        return Probed("write", f"{error.code} {error}", FAILED)
    if code is None:
        text = f"the broker {link.lost or f'does not acknowledge within {ANSWER_S:g} s'} (asked by writing {topic})"
        return Probed("write", f"{link.lost_code if link.lost else 'M-NO-PUBACK'} {text}", FAILED)
    if code not in {0, NO_MATCHING_SUBSCRIBERS}:
        return Probed("write", f"{topic} is refused: {refusal(code)}; expected the right to write {topic}", FAILED)
    if not link.says_reasons:
        return Probed("write", f"{topic} acknowledged; with MQTT 3.1.1 a refusal would look the same")
    readers = "nobody reads it" if code == NO_MATCHING_SUBSCRIBERS else "acknowledged"
    return Probed("write", f"{topic}: {readers} (0x{code:02x})")


def _acknowledged(link: Link, mid: int) -> int | None:
    deadline_s = time.monotonic() + ANSWER_S
    while link.lost is None and time.monotonic() < deadline_s:
        for acked, code in link.acks:
            if acked == mid:
                return code
        pump(link, 0.2)
    return next((code for acked, code in link.acks if acked == mid), None)


def _read(link: Link, what: str, filters: list[str]) -> Probed:
    """Subscribes and takes it back at once; what comes meanwhile goes to nobody."""
    _, mid = link.client.subscribe([(topic, 1) for topic in filters])
    deadline_s = time.monotonic() + ANSWER_S
    while mid not in link.granted and link.lost is None and time.monotonic() < deadline_s:
        pump(link, 0.2)
    codes = link.granted.get(mid) if mid is not None else None
    if codes is None:
        return Probed(what, f"the broker {link.lost or f'does not answer within {ANSWER_S:g} s'}", FAILED)
    link.client.unsubscribe(filters)
    pump(link, 0.05)
    refused = [f"{topic} {refusal(code)}" for topic, code in zip(filters, codes, strict=False) if code >= 0x80]
    if refused:
        return Probed(what, f"refused: {'; '.join(refused)}", FAILED)
    return Probed(what, f"{', '.join(filters)} granted (some brokers grant what they do not deliver)")
