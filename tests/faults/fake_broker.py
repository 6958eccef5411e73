"""An MQTT 5 broker that misbehaves on demand: enough for one publisher, its own packet parsing, real sockets.

It records what it got in order of arrival, and forwards nothing but what a test sends by `send`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 13, 14
SERVER_KEEP_ALIVE, RECEIVE_MAXIMUM, MAXIMUM_QOS, RETAIN_AVAILABLE, USER_PROPERTY, MAXIMUM_PACKET_SIZE = (
    0x13,
    0x21,
    0x24,
    0x25,
    0x26,
    0x27,
)
# Property -> how many bytes its value has; the others are lengths and text.
FIXED = {0x01: 1, 0x02: 4, 0x11: 4, 0x13: 2, 0x17: 1, 0x18: 4, 0x19: 1, 0x21: 2, 0x22: 2, 0x23: 2, 0x24: 1, 0x25: 1}
FIXED |= {0x27: 4, 0x28: 1, 0x29: 1, 0x2A: 1}


@dataclass(frozen=True)
class Publish:
    """One PUBLISH as it came. `connection` counts from 1."""

    connection: int
    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    mid: int
    user: tuple[tuple[str, str], ...] = ()


@dataclass
class Behaviour:
    """What the broker does; may be changed while it runs. The default is a good broker."""

    connack_delay_s: float = 0.0
    connect_code: int = 0  # 0x84, 0x86, 0x87, 0x9C, ..: refuses
    drop_after: int | None = None  # cuts each connection when it has sent so many PUBLISH
    disconnect: tuple[int, int] | None = None  # (n, code): DISCONNECT with that reason after n PUBLISH
    malformed_after: int | None = None  # after so many PUBLISH sends bytes that are no MQTT
    # The reason code of a PUBACK, None for no answer at all.
    puback: Callable[[Publish], int | None] = lambda _: 0
    properties: dict[int, int] = field(default_factory=dict)  # of CONNACK, by the constants above


class FakeBroker:
    """Listens on `port` of this machine. `received` holds every PUBLISH, `connects` the client ids, `most_open` the most unanswered at once."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.received: list[Publish] = []
        self.connects: list[str] = []
        self.subscriptions: set[str] = set()
        self.most_open = 0
        self._clients: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._start(self._accept_all)

    def __enter__(self) -> FakeBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, topic: str) -> list[Publish]:
        """What came on one topic."""
        return [publish for publish in list(self.received) if publish.topic == topic]

    def send(self, topic: str, payload: bytes) -> None:
        """A QoS 0 message to whoever is connected."""
        for client in list(self._clients.values()):
            with contextlib.suppress(OSError):
                client.sendall(_packet(PUBLISH << 4, _text(topic) + b"\0" + payload))

    def cut(self) -> None:
        """Ends the connections that are there."""
        for client in list(self._clients.values()):
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Ends everything and waits for it."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            while thread.is_alive():
                self.cut()
                thread.join(0.2)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="fake-broker", daemon=True)
        self._threads = [other for other in self._threads if other.is_alive()] + [thread]
        thread.start()

    def _accept_all(self) -> None:
        number = 0
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number += 1
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._clients[number] = client
            self._start(self._serve, number, client)

    def _serve(self, number: int, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError):
            _Session(self, number, client).run()
        self._clients.pop(number, None)


class _Session:
    """One connection, from CONNECT to its end. Ends by EOFError or OSError."""

    def __init__(self, broker: FakeBroker, number: int, client: socket.socket) -> None:
        self.broker, self.number, self.client = broker, number, client
        self._file = client.makefile("rb")
        self._published = 0
        self._unanswered = 0

    def run(self) -> None:
        with self._file:
            kind, _, body = self._read()
            if kind != CONNECT:
                return
            length = _number(body[:2])
            at = 2 + length + 1 + 1 + 2  # protocol name, version, flags, keepalive
            at = _skip_properties(body, at)
            self.broker.connects.append(body[at + 2 : at + 2 + _number(body[at : at + 2])].decode())
            behaviour = self.broker.behaviour
            self.broker._closed.wait(behaviour.connack_delay_s)
            self.client.sendall(_packet(CONNACK << 4, bytes([0, behaviour.connect_code]) + _properties(behaviour)))
            while not behaviour.connect_code:
                self._answer(*self._read())

    def _answer(self, kind: int, flags: int, body: bytes) -> None:
        if kind == PUBLISH:
            self._take(_publish(self.number, flags, body))
        elif kind == SUBSCRIBE:
            at, codes = _skip_properties(body, 2), b""
            while at < len(body):
                length = _number(body[at : at + 2])
                self.broker.subscriptions.add(body[at + 2 : at + 2 + length].decode())
                codes += bytes([body[at + 2 + length] & 3])
                at += 3 + length
            self.client.sendall(_packet(SUBACK << 4, body[:2] + b"\0" + codes))
        elif kind == PINGREQ:
            self.client.sendall(_packet(PINGRESP << 4, b""))
        elif kind == DISCONNECT:
            raise EOFError

    def _take(self, publish: Publish) -> None:
        behaviour = self.broker.behaviour
        self.broker.received.append(publish)
        self._published += 1
        code = behaviour.puback(publish)
        if publish.qos:
            self._unanswered += 1
            self.broker.most_open = max(self.broker.most_open, self._unanswered)
        if behaviour.drop_after is not None and self._published >= behaviour.drop_after:
            raise EOFError
        if behaviour.disconnect is not None and self._published >= behaviour.disconnect[0]:
            self.client.sendall(_packet(DISCONNECT << 4, bytes([behaviour.disconnect[1], 0])))
            raise EOFError
        if behaviour.malformed_after is not None and self._published >= behaviour.malformed_after:
            self.client.sendall(b"\xff" * 64)
            raise EOFError
        if publish.qos and code is not None:
            self._unanswered -= 1
            self.client.sendall(_packet(PUBACK << 4, struct.pack("!HBB", publish.mid, code, 0)))

    def _read(self) -> tuple[int, int, bytes]:
        head, length, shift = self._bytes(1)[0], 0, 0
        while True:
            digit = self._bytes(1)[0]
            length |= (digit & 127) << shift
            shift += 7
            if not digit & 128:
                return head >> 4, head & 15, self._bytes(length)

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data


def _publish(number: int, flags: int, body: bytes) -> Publish:
    length, qos = _number(body[:2]), flags >> 1 & 3
    topic, at = body[2 : 2 + length].decode(), 2 + length
    mid = 0
    if qos:
        mid, at = _number(body[at : at + 2]), at + 2
    end = _skip_properties(body, at)
    user = tuple(_user_properties(body[at:end]))
    return Publish(number, topic, body[end:], qos, bool(flags & 1), bool(flags & 8), mid, user)


def _user_properties(block: bytes) -> list[tuple[str, str]]:
    at, found = _length_of_length(block, 0), []
    while at < len(block):
        name = block[at]
        at += 1
        if name in FIXED:
            at += FIXED[name]
            continue
        texts = []
        for _ in range(2 if name == USER_PROPERTY else 1):
            length = _number(block[at : at + 2])
            texts.append(block[at + 2 : at + 2 + length].decode("utf-8", "replace"))
            at += 2 + length
        if name == USER_PROPERTY:
            found.append((texts[0], texts[1]))
    return found


def _properties(behaviour: Behaviour) -> bytes:
    blocks = [bytes([name]) + value.to_bytes(FIXED[name], "big") for name, value in behaviour.properties.items()]
    body = b"".join(blocks)
    return bytes([len(body)]) + body


def _packet(head: int, body: bytes) -> bytes:
    length, digits = len(body), b""
    while True:
        length, digit = divmod(length, 128)
        digits += bytes([digit | 128 if length else digit])
        if not length:
            return bytes([head]) + digits + body


def _skip_properties(body: bytes, at: int) -> int:
    length, shift, start = 0, 0, at
    end = _length_of_length(body, start)
    for digit in body[start:end]:
        length |= (digit & 127) << shift
        shift += 7
    return end + length


def _length_of_length(body: bytes, at: int) -> int:
    while body[at] & 128:
        at += 1
    return at + 1


def _number(two: bytes) -> int:
    return int.from_bytes(two, "big")


def _text(text: str) -> bytes:
    return struct.pack("!H", len(text.encode())) + text.encode()
