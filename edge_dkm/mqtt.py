"""The only place that touches the MQTT library: builds clients as the settings ask, and says what a broker's refusal means.

Used by the publisher, `watch` and `check`. Whoever uses a client owns its socket and calls `pump` itself: the library's own network
thread dies silently of an exception in a callback, and reorders messages across reconnects.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_dkm.errors import BrokerError, UsageError
from edge_dkm.settings import EMBEDDED, MqttSettings

CONNECT_TIMEOUT_S = 5.0
SESSION_EXPIRY_S = 60
WILL_DELAY_S = 5
WINDOW = 20  # unacknowledged publishes at most; the broker may ask for fewer
NO_MATCHING_SUBSCRIBERS = 0x10

Client = paho.Client


@dataclass(frozen=True)
class Will:
    """What the broker publishes for us, retained, when we are gone."""

    topic: str
    payload: bytes


@dataclass
class Link:
    """One connection: callbacks only write down what happened, here; nothing in them can raise. `acks`: (mid, reason code)."""

    client: Client
    connected: bool = False
    window: int = WINDOW
    refused: int | None = None
    lost: str | None = None
    acks: list[tuple[int, int]] = field(default_factory=list)
    messages: list[paho.MQTTMessage] = field(default_factory=list)
    unacknowledged: set[int] = field(default_factory=set)

    @property
    def room(self) -> int:
        """How many more QoS 1 publishes the broker takes now: one that gets more than its Receive Maximum ends the connection."""
        return self.window - len(self.unacknowledged)


def check_files(settings: MqttSettings) -> None:
    """Raises UsageError where a TLS file cannot be used; called at start, so that it is no reconnect loop."""
    if settings.tls is not None:
        _tls_context(settings)


def open_link(settings: MqttSettings, client_id: str, will: Will | None = None, clean: bool = False) -> Link:
    """Connects; the CONNACK is still to come (see `pump`).

    Raises:
        BrokerError: no connection, or a TLS error.
    """
    is_v5 = settings.version == "5"
    protocol = MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=protocol,
        clean_session=None if is_v5 else True,
        reconnect_on_failure=False,
    )
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.max_inflight_messages_set(WINDOW)
    if settings.username is not None:
        client.username_pw_set(settings.username, settings.password)
    context = _tls_context(settings) if settings.tls is not None else None
    if context is not None:
        client.tls_set_context(context)
    if will is not None:
        delay = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=WILL_DELAY_S) if is_v5 else None
        client.will_set(will.topic, will.payload, qos=1, retain=True, properties=delay)
    link = Link(client)
    _listen(link)
    arguments: dict[str, Any] = {}
    if is_v5:
        expiry_s = 0 if clean else SESSION_EXPIRY_S
        arguments = {
            "clean_start": clean,
            "properties": _properties(PacketTypes.CONNECT, SessionExpiryInterval=expiry_s, ReceiveMaximum=WINDOW),
        }
    host = "127.0.0.1" if settings.host == EMBEDDED else settings.host
    try:
        client.connect(host, settings.effective_port, settings.keepalive_s, **arguments)
    except (OSError, ValueError) as error:  # UnicodeError is a ValueError
        if context is not None:
            context.close_last()
        raise BrokerError(f"MQTT broker {host}:{settings.effective_port} cannot be reached: {_why(error)}") from None
    return link


def await_connack(link: Link, settings: MqttSettings) -> None:
    """Pumps until the broker has accepted us; raises BrokerError where it refuses or says nothing."""
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    while not link.connected:
        if link.refused is not None:
            raise BrokerError(
                f"MQTT broker {settings.host}:{settings.effective_port} refuses the connection: {refusal(link.refused)}"
            )
        if link.lost is not None or time.monotonic() > deadline_s:
            raise BrokerError(
                f"MQTT broker {settings.host}:{settings.effective_port} {link.lost or 'does not answer as an MQTT broker'}"
            )
        pump(link, 0.2)


def pump(link: Link, timeout_s: float, wake: socket.socket | None = None) -> None:
    """Waits for the network (or `wake`) at most `timeout_s` and does what is due; sets `link.lost` when the connection is gone."""
    client, sock = link.client, link.client.socket()
    if sock is None:
        link.lost = link.lost or "closed the connection"
        return
    readers: list[Any] = [sock] if wake is None else [sock, wake]
    # TLS may hold decrypted bytes that select cannot see.
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        timeout_s = 0.0
    try:
        readable, writable, _ = select.select(readers, [sock] if client.want_write() else [], [], timeout_s)
    except (OSError, ValueError):
        link.lost = link.lost or "closed the connection"
        return
    if sock in readable or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
        client.loop_read()
    if sock in writable:
        client.loop_write()
    if client.loop_misc() != paho.MQTT_ERR_SUCCESS or client.socket() is None:
        link.lost = link.lost or "closed the connection"


def publish(
    link: Link, topic: str, payload: bytes, *, qos: int, retain: bool = False, user: Sequence[tuple[str, str]] = ()
) -> int:
    """Sends one message and returns its mid; raises BrokerError where the library would only queue it."""
    properties = None
    if link.client.protocol == MQTTProtocolVersion.MQTTv5:
        properties = _properties(PacketTypes.PUBLISH, ContentType="application/json", PayloadFormatIndicator=1)
        if user:
            properties.UserProperty = list(user)
    info = link.client.publish(topic, payload, qos, retain, properties)
    if info.rc != paho.MQTT_ERR_SUCCESS:
        raise BrokerError(f"publishing to {topic} failed: {paho.error_string(info.rc)}")
    if qos:
        link.unacknowledged.add(info.mid)
    return info.mid


def refusal(code: int) -> str:
    """A reason code for people, with what to do."""
    known = {
        0x80: "without a reason",
        0x84: "it does not speak MQTT 5; set mqtt.version: 3.1.1 (refusals are then invisible), or use a newer broker",
        0x86: "wrong mqtt.username or mqtt.password",
        0x87: "not authorized; give this station's account the right to connect and publish",
        0x8E: "another client took over this station's client id; two stations of one name?",
        0x97: "quota exceeded",
        0x99: "payload format invalid",
        0x95: "packet too large",
        NO_MATCHING_SUBSCRIBERS: "nobody subscribes to the topic",
    }
    return f"{known.get(code, 'reason')} (0x{code:02x})"


def _listen(link: Link) -> None:
    def on_connect(client: Client, data: Any, flags: Any, reason: ReasonCode, properties: Properties | None) -> None:
        if reason.is_failure:
            link.refused = reason.value
            return
        link.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW) if properties else WINDOW)
        link.connected = True

    def on_disconnect(client: Client, data: Any, flags: Any, reason: ReasonCode, properties: Properties | None) -> None:
        link.lost = link.lost or f"ended the connection: {refusal(reason.value) if reason.value else 'closed'}"

    def on_publish(client: Client, data: Any, mid: int, reason: ReasonCode, properties: Properties | None) -> None:
        link.acks.append((mid, reason.value))
        link.unacknowledged.discard(mid)

    def on_message(client: Client, data: Any, message: paho.MQTTMessage) -> None:
        link.messages.append(message)

    link.client.on_connect, link.client.on_disconnect = on_connect, on_disconnect
    link.client.on_publish, link.client.on_message = on_publish, on_message


def _properties(packet: int, **values: Any) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


class _Context(ssl.SSLContext):
    """Remembers the socket of a handshake: the library forgets to close it where the handshake fails (paho-mqtt 2.2.0)."""

    _last: ssl.SSLSocket | None = None

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        self._last = super().wrap_socket(*arguments, **options)
        return self._last

    def close_last(self) -> None:
        """Closes the socket of the last handshake."""
        if self._last is not None:
            self._last.close()


def _tls_context(settings: MqttSettings) -> _Context:
    tls = settings.tls
    if tls is None:
        raise UsageError("mqtt.tls is not set")
    try:
        context = _Context(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
        else:
            context.load_default_certs()
        if tls.cert is not None and tls.key is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(str(path) for path in (tls.ca, tls.cert, tls.key) if path)
        raise UsageError(f"mqtt.tls: {files} cannot be used: {_why(error)}") from None
    return context


def _why(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, socket.gaierror):
        return "the host name is not known"
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_TIMEOUT_S:g} s"
    return getattr(error, "strerror", None) or str(error)
