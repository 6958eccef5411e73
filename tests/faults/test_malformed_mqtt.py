"""Bytes that are no MQTT, as an answer to CONNECT and after it."""

from __future__ import annotations

import random

import pytest

from edge_dkm.errors import BrokerError
from edge_dkm.mqtt import link as mqtt_module
from edge_dkm.mqtt.link import await_connack, open_link, pump
from edge_dkm.settings import MqttSettings
from tests.edge_dkm.test_tls import Listener

CONNACK_OK = bytes.fromhex("2003000000")
MALFORMED = {
    "no mqtt at all": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a length that does not end": b"\x30\xff\xff\xff\xff\xff\xff",
    "a packet of kind 0": b"\x00\x00",
    "a puback of one byte": b"\x40\x01\x00",
    "a publish whose topic is longer than itself": b"\x30\x04\xff\xffab",
    "a publish whose topic is no text": b"\x30\x06\x00\x02\xff\xfe\x00x",
    "a suback without a reason": b"\x90\x03\x00\x01\x00",
    "a property that does not exist": b"\x20\x06\x00\x00\x03\x7f\x00\x00",
    "a reason that does not exist": b"\x40\x04\x00\x01\x7b\x00",
    "a puback of what was never sent": b"\x40\x02\xff\xff",
    "a connack once more": CONNACK_OK,
    "a subscription, as if we were the broker": b"\x82\x06\x00\x01\x00\x00\x01#\x00",
    "a disconnect with a reason of another packet": b"\xe0\x02\x10\x00",
}


def test_bytes_that_are_no_mqtt_end_a_connection_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_module, "CONNECT_TIMEOUT_S", 0.5)
    rng = random.Random(11)
    answers = [words for text in MALFORMED.values() for words in (text, CONNACK_OK + text)]
    answers += [CONNACK_OK + rng.randbytes(rng.randint(1, 60)) for _ in range(100)]
    answers += [bytes([rng.choice((0x20, 0x30, 0x40, 0x90, 0xE0))]) + bytes([n]) + rng.randbytes(n) for n in range(60)]
    listener = Listener()
    settings = MqttSettings(host="127.0.0.1", port=listener.port)
    codes = set()
    try:
        for answer in answers:
            listener.answer = answer
            codes.add(code_of_one_connection(settings))
    finally:
        listener.close()
    assert codes >= {"M-PROTOCOL", "M-OFFLINE"} and all(code.startswith("M-") for code in codes)


def code_of_one_connection(settings: MqttSettings) -> str:
    """Until it ends; anything but a BrokerError or `lost` fails the test."""
    link = open_link(settings, "st1", clean=True)
    try:
        await_connack(link, settings)
        link.client.subscribe("a/b", qos=1)
        while link.lost is None:
            pump(link, 0.2)
        assert all(message.topic for message in link.messages)
        return link.lost_code
    except BrokerError as error:
        return error.code
    finally:
        link.client.disconnect()
