"""The only place that touches the MQTT library: builds clients as the settings ask, and says what a broker's refusal means.

Used by the publisher, `watch` and `check`. Whoever uses a client owns its socket and calls `pump` itself: the library's own network
thread dies silently of an exception in a callback, and reorders messages across reconnects.
"""

from __future__ import annotations

import contextlib
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

from edge_dkm.errors import BrokerError
from edge_dkm.mqtt.tls import BrokerContext, tls_context, tls_failure
from edge_dkm.settings import EMBEDDED, MqttSettings

CONNECT_TIMEOUT_S = 5.0
SESSION_EXPIRY_S = 60
WILL_DELAY_S = 5
WINDOW = 20  # unacknowledged publishes at most; the broker may ask for fewer
NO_MATCHING_SUBSCRIBERS = 0x10
PACKET_MARGIN_BYTES = 600  # topic, properties and header around a payload
TLS_RECORDS = (b"\x15", b"\x16")  # an alert, a handshake: what a TLS port answers to plain text

Client = paho.Client


@dataclass(frozen=True)
class Will:
    """What the broker publishes for us when we are gone. A broker without retained messages refuses whoever leaves a retained one."""

    topic: str
    payload: bytes
    retain: bool = True


class TooLargeError(BrokerError):
    """A message above the broker's limit was not sent: it would end the connection, again and again."""


@dataclass
class Link:
    """One connection: callbacks only write down what happened, here; nothing in them can raise.

    `acks`: (mid, reason code) of publishes; `granted`: mid of a subscription -> its reason codes; `unacknowledged`: mid -> when it was sent.
    The limits are those of the CONNACK.
    """

    client: Client
    context: BrokerContext | None = None
    connected: bool = False
    window: int = WINDOW
    max_packet_bytes: int | None = None
    max_qos: int = 2
    can_retain: bool = True
    server_keepalive_s: int | None = None  # what the broker asks for in place of ours
    refused: int | None = None
    elsewhere: str = ""  # where a broker that has moved says it is; said to people, never followed
    lost: str | None = None
    lost_code: str = "M-OFFLINE"
    acks: list[tuple[int, int]] = field(default_factory=list)
    granted: dict[int, list[int]] = field(default_factory=dict)
    messages: list[paho.MQTTMessage] = field(default_factory=list)
    unacknowledged: dict[int, float] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """How many more QoS 1 publishes the broker takes now: one that gets more than its Receive Maximum ends the connection."""
        return self.window - len(self.unacknowledged)

    @property
    def says_reasons(self) -> bool:
        """Whether a refusal can be told from a success: not with MQTT 3.1.1."""
        return self.client.protocol == MQTTProtocolVersion.MQTTv5

    def oldest_s(self) -> float:
        """For how long the oldest publish has been waiting for its acknowledgement; 0.0 where none is."""
        return time.monotonic() - min(self.unacknowledged.values()) if self.unacknowledged else 0.0


def check_files(settings: MqttSettings) -> None:
    """Raises UsageError where a TLS file cannot be used; called at start, so that it is no reconnect loop."""
    if settings.tls is not None:
        tls_context(settings)


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
    context = tls_context(settings) if settings.tls is not None else None
    if context is not None:
        client.tls_set_context(context)
    if will is not None:
        delay = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=WILL_DELAY_S) if is_v5 else None
        client.will_set(will.topic, will.payload, qos=1, retain=will.retain, properties=delay)
    link = Link(client, context)
    _listen(link, settings.keepalive_s)
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
        code, text = _failure(error, context)
        if context is not None:
            context.close_last()
        raise BrokerError(f"MQTT broker {host}:{settings.effective_port} cannot be reached: {text}", code) from None
    return link


def await_connack(link: Link, settings: MqttSettings) -> None:
    """Pumps until the broker has accepted us; raises BrokerError where it refuses or says nothing."""
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    while not link.connected:
        if link.refused is not None:
            code = "M-AUTH" if link.refused == 0x87 else refusal_code(link.refused)
            raise BrokerError(
                f"MQTT broker {settings.host}:{settings.effective_port} refuses the connection: {refusal(link.refused)}{link.elsewhere}",
                code,
            )
        if link.lost is not None or time.monotonic() > deadline_s:
            code, text = _unanswered(link, settings)
            raise BrokerError(f"MQTT broker {settings.host}:{settings.effective_port} {text}", code)
        pump(link, 0.2)
    if link.max_qos < 1:
        raise BrokerError(
            f"MQTT broker {settings.host}:{settings.effective_port} offers QoS 0 only, which loses results; expected QoS 1",
            "M-QOS",
        )


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
        _read(link)
    if sock in writable:
        client.loop_write()
    if client.loop_misc() != paho.MQTT_ERR_SUCCESS or client.socket() is None:
        link.lost = link.lost or "closed the connection"


def _read(link: Link) -> None:
    is_tls = not link.connected and _is_tls(link)
    is_mqtt = link.client.loop_read() != paho.MQTT_ERR_PROTOCOL
    if is_tls:
        link.lost, link.lost_code = "speaks TLS on this port and mqtt.tls is not set; set mqtt.tls.ca", "M-TLS-NEEDED"
    elif not is_mqtt:
        link.lost, link.lost_code = f"sends what is no MQTT {'5' if link.says_reasons else '3.1.1'}", "M-PROTOCOL"


def _is_tls(link: Link) -> bool:
    """Whether what answers our plain CONNECT is TLS: the library would only see bytes that are no MQTT."""
    sock = link.client.socket()
    if isinstance(sock, ssl.SSLSocket) or not isinstance(sock, socket.socket):
        return False
    with contextlib.suppress(OSError):
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) in TLS_RECORDS
    return False


def _unanswered(link: Link, settings: MqttSettings) -> tuple[str, str]:
    """(code, text) of a connection that ended, or stayed silent, before the broker accepted us."""
    failure = link.context.failure() if link.context is not None else None
    if failure is not None:
        return tls_failure(failure)
    if link.lost is None:
        return "M-OFFLINE", f"does not answer as an MQTT broker within {CONNECT_TIMEOUT_S:g} s"
    if link.lost != "closed the connection":
        return link.lost_code, link.lost + link.elsewhere
    if settings.tls is not None and settings.tls.cert is None:
        text = "closed the connection after the TLS handshake; it may want a certificate of this station: set mqtt.tls.cert and key"
        return "M-TLS-CLIENT", text
    secure = "does this port want TLS, " if settings.tls is None else ""
    return (
        "M-OFFLINE",
        f"closed the connection before it accepted us; {secure}does it speak MQTT 5 and take packets of 1 KB?",
    )


def publish(
    link: Link,
    topic: str,
    payload: bytes,
    *,
    qos: int,
    retain: bool = False,
    user: Sequence[tuple[str, str]] = (),
) -> int:
    """Sends one message and returns its mid. What is no JSON is a JPEG.

    Raises:
        TooLargeError: it is above the broker's limit and was not sent.
        BrokerError: the library would only queue it.
    """
    properties = None
    if link.says_reasons:
        is_text = payload[:1] == b"{"
        properties = _properties(PacketTypes.PUBLISH, ContentType="application/json" if is_text else "image/jpeg")
        properties.PayloadFormatIndicator = int(is_text)
        if user:
            properties.UserProperty = list(user)
    _check_size(link, topic, payload, properties)
    retain = retain and link.can_retain  # a broker without retained messages ends the connection for one
    info = link.client.publish(topic, payload, qos, retain, properties)
    if info.rc != paho.MQTT_ERR_SUCCESS:
        raise BrokerError(f"publishing to {topic} failed: {paho.error_string(info.rc)}")
    if qos:
        link.unacknowledged[info.mid] = time.monotonic()
    return info.mid


def _check_size(link: Link, topic: str, payload: bytes, properties: Properties | None) -> None:
    limit = link.max_packet_bytes
    if limit is None or len(payload) + len(topic) + PACKET_MARGIN_BYTES <= limit:
        return
    around = len(properties.pack()) if properties is not None else 0  # type: ignore[no-untyped-call]
    size = 5 + 2 + len(topic) + 2 + around + len(payload)  # at most: type and length, topic, mid
    if size > limit:
        raise TooLargeError(
            f"the broker takes packets of at most {limit} bytes, a message on {topic} has {size}; raise its limit",
            "M-PACKET",
        )


def refusal(code: int) -> str:
    """A reason code for people, with what to do."""
    return f"{_REFUSALS.get(code, ('', 'reason'))[1]} (0x{code:02x})"


def refusal_code(code: int) -> str:
    """A reason code as the alarm that it raises."""
    return _REFUSALS.get(code, ("M-REFUSED", ""))[0]


_REFUSALS = {
    0x00: ("M-OFFLINE", "without a reason"),
    0x80: ("M-REFUSED", "without a reason"),
    0x84: (
        "M-V5",
        "it does not speak MQTT 5; set mqtt.version: 3.1.1 (refusals are then invisible), or use a newer broker",
    ),
    0x86: ("M-AUTH", "wrong mqtt.username or mqtt.password"),
    0x87: ("M-DENIED", "not authorized; give this station's account the right to connect and publish"),
    0x8B: ("M-OFFLINE", "it is shutting down"),
    0x8D: ("M-OFFLINE", "it heard nothing of us for too long"),
    0x8E: ("M-TAKEOVER", "another client took over this station's client id; two stations of one name?"),
    0x95: ("M-PACKET", "packet too large"),
    0x97: ("M-QUOTA", "quota exceeded"),
    0x99: ("M-REFUSED", "payload format invalid"),
    0x9A: ("M-RETAIN", "it keeps no retained messages"),
    0x9B: ("M-QOS", "it does not offer QoS 1"),
    0x9C: ("M-MOVED", "it wants us to use another server; set mqtt.host to that"),
    0x9D: ("M-MOVED", "it has moved; set mqtt.host to where it is now"),
    NO_MATCHING_SUBSCRIBERS: ("M-NO-CONSUMER", "nobody subscribes to the topic"),
}


def _listen(link: Link, asked_s: int) -> None:
    def on_connect(client: Client, data: Any, flags: Any, reason: ReasonCode, properties: Properties | None) -> None:
        _note_where(link, properties)
        if reason.is_failure:
            link.refused = reason.value
            return
        link.server_keepalive_s = getattr(properties, "ServerKeepAlive", None)
        # A broker may ask for fewer or more pings (AWS: 30 s at least, and 0 is none at all). More often than asked is allowed, and
        # with fewer nobody would see within seconds that it is gone. The library has no other way to set it on a connection.
        client._keepalive = min(asked_s, client._keepalive or asked_s)
        link.window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        link.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        link.max_qos = getattr(properties, "MaximumQoS", 2)
        link.can_retain = bool(getattr(properties, "RetainAvailable", 1))
        link.connected = True

    def on_disconnect(client: Client, data: Any, flags: Any, reason: ReasonCode, properties: Properties | None) -> None:
        if flags.is_disconnect_packet_from_server:
            _note_where(link, properties)
            link.lost = f"ended the connection: {refusal(reason.value)}{link.elsewhere}"
            link.lost_code = refusal_code(reason.value)
        else:
            link.lost = link.lost or "closed the connection"

    def on_publish(client: Client, data: Any, mid: int, reason: ReasonCode, properties: Properties | None) -> None:
        link.acks.append((mid, reason.value))
        link.unacknowledged.pop(mid, None)

    def on_message(client: Client, data: Any, message: paho.MQTTMessage) -> None:
        with contextlib.suppress(UnicodeDecodeError):  # a topic that is no text is none of ours
            if message.topic:
                link.messages.append(message)

    def on_subscribe(
        client: Client, data: Any, mid: int, reasons: list[ReasonCode], properties: Properties | None
    ) -> None:
        link.granted[mid] = [reason.value for reason in reasons]

    link.client.on_connect, link.client.on_disconnect = on_connect, on_disconnect
    link.client.on_publish, link.client.on_message = on_publish, on_message
    link.client.on_subscribe = on_subscribe


def _note_where(link: Link, properties: Properties | None) -> None:
    reference = getattr(properties, "ServerReference", None)
    link.elsewhere = f"; it names {str(reference)[:200]!r}" if reference else ""


def _properties(packet: int, **values: Any) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _failure(error: OSError | ValueError, context: BrokerContext | None) -> tuple[str, str]:
    """(code, text) of a connection that could not be made."""
    if isinstance(error, socket.gaierror):
        return "M-DNS", "the host name is not known"
    if isinstance(error, TimeoutError):
        return "M-OFFLINE", f"no answer within {CONNECT_TIMEOUT_S:g} s"
    if context is not None and context.has_begun and isinstance(error, OSError):
        return tls_failure(error)
    return "M-OFFLINE", getattr(error, "strerror", None) or str(error)
