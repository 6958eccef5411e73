"""Connects to the broker and keeps connected: one supervised thread owns the client, its socket and the database reads.

A new client per connection; a commit wakes the thread through a socket pair, so nothing is polled. What goes out in which order is
`delivery.Flight`'s business; what comes in (commands, a consumer's acknowledgements) is handed on without waiting.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from edge_dkm.clock import boot_id, rfc3339, utc_now
from edge_dkm.errors import BrokerError
from edge_dkm.message import Ack, Announcement, Status
from edge_dkm.mqtt.delivery import Flight, Problem, Replay
from edge_dkm.mqtt.link import Link, TooLargeError, Will, await_connack, open_link, publish, pump, refusal
from edge_dkm.outbox import Outbox
from edge_dkm.settings import LineSettings

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 10.0
TAKEOVER_PAUSE_S = 30.0  # two stations of one name must not throw each other out again and again
GOODBYE_S = 2.0
MAX_SAYINGS = 200  # replies and pictures that wait for the connection
MAX_REPLAYS = 100

log = logging.getLogger(__name__)
Build = Callable[[int], Announcement]
Inbox = Callable[[str, bytes, bool], None]


@dataclass(frozen=True)
class PublisherStatus:
    """`problem`: why something is not being delivered, or None. `acknowledged` counts rows since the start."""

    connected: bool
    problem: Problem | None
    acknowledged: int
    unacknowledged_by_consumer: int


@dataclass(frozen=True)
class _Saying:
    """A message that is said once, in order; lost with the connection (QoS 0) or with the process."""

    topic: str
    qos: int
    build: Callable[[int], bytes]


class Publisher(threading.Thread):
    """Runs until `stop`. Retained announcements are said again on every connection.

    `on_command` gets (topic, payload, retained) of every message below `<base>/cmd` and `<base>/<camera>/cmd`; it must not block.
    `on_change` is called when `status().problem` or the connection changes.
    """

    def __init__(self, settings: LineSettings, outbox: Outbox, software: str) -> None:
        super().__init__(name="publisher", daemon=True)
        self.settings, self.outbox = settings, outbox
        self.on_command: Inbox | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.codes: Counter[int] = Counter()  # of PUBACKs
        self.loops = 0  # turns of the loop: a thread that hangs shows by it
        self._status_topic = f"{settings.base_topic}/status"
        self._ack_topic = f"{settings.base_topic}/ack"
        self._software = software
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._lock = threading.Condition()
        self._retained: dict[str, tuple[int, Build]] = {}  # topic -> (qos, build)
        self._pending: dict[str, tuple[int, bool, Build]] = {}  # topic -> (qos, retain, build), the newest only
        self._sayings: deque[_Saying] = deque(maxlen=MAX_SAYINGS)
        self._replays: deque[Replay] = deque()
        self._has_been_online = False
        self._can_leave_retained = True  # until a broker has said that it keeps nothing
        self._unsayable: Problem | None = None  # what of our announcements the broker does not take
        self._stop_asked = threading.Event()
        self._status = PublisherStatus(False, None, 0, 0)
        outbox.on_commit = self.wake

    def announce(self, topic: str, build: Build, qos: int = 1) -> None:
        """Publishes a retained message now and after every reconnect; `build` gets the session counter."""
        with self._lock:
            self._retained[topic] = (qos, build)
            self._pending[topic] = (qos, True, build)
        self.wake()

    def tell(self, topic: str, build: Build) -> None:
        """Publishes a message once, QoS 0; while there is no connection only the newest per topic is kept."""
        with self._lock:
            self._pending[topic] = (0, False, build)
        self.wake()

    def say(self, topic: str, build: Callable[[int], bytes], qos: int) -> None:
        """Publishes a message once, after those said before; beyond 200 waiting ones the oldest is forgotten."""
        with self._lock:
            self._sayings.append(_Saying(topic, qos, build))
        self.wake()

    def replay(self, request: Replay) -> bool:
        """Sends kept results again, marked historical; False where too many replays wait already."""
        if len(self._replays) >= MAX_REPLAYS:
            return False
        self._replays.append(request)
        self.wake()
        return True

    def wake(self) -> None:
        """Something is to be sent. Callable from any thread, never blocks."""
        with contextlib.suppress(OSError):  # full: the thread is being woken already; closed: it has ended
            self._wake_write.send(b"w")

    def status(self) -> PublisherStatus:
        """How delivery is doing."""
        with self._lock:
            return self._status

    def wait_drained(self, timeout_s: float) -> bool:
        """Whether every row was acknowledged within the time."""
        with self._lock:
            return self._lock.wait_for(self.outbox.is_drained, timeout_s)

    def stop(self) -> None:
        """Says goodbye (`stopped`) where there is a connection, and ends; what is unsent stays in the outbox."""
        self._stop_asked.set()
        self.wake()

    def run(self) -> None:
        pause_s = BACKOFF_FIRST_S
        while not self._stop_asked.is_set():
            started_s = time.monotonic()
            problem: Problem | None = None
            try:
                self._connection()
            except BrokerError as error:
                problem = Problem(error.code, str(error))
            except Exception as error:  # whatever it is, the line must go on delivering; it is reported and retried
                log.exception("publisher failed")
                problem = Problem("M-FAILED", f"{type(error).__name__}: {error}")
            self._report(False, problem)
            if time.monotonic() - started_s > BACKOFF_MAX_S:
                pause_s = BACKOFF_FIRST_S
            if problem is not None and problem.code == "M-TAKEOVER":
                self._stop_asked.wait(TAKEOVER_PAUSE_S * random.uniform(1.0, 1.3))
            else:
                self._stop_asked.wait(pause_s * random.uniform(0.7, 1.0))
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)
        self._wake_write.close()
        self._wake_read.close()

    def _connection(self) -> None:
        """One connection, from CONNECT to its end."""
        session = self.outbox.next_session()
        mqtt = self.settings.mqtt
        link = open_link(
            mqtt,
            f"edge-dkm-{self.settings.station}",
            Will(
                self._status_topic,
                self._status_message("offline", session, "lost").payload(),
                retain=self._can_leave_retained,
            ),
        )
        try:
            await_connack(link, mqtt)
            with self._lock:
                self._pending |= {topic: (qos, True, build) for topic, (qos, build) in self._retained.items()}
            subscription = self._subscribe(link)  # before our own word replaces the retained status
            self._unsayable = None
            self._publish(link, self._status_topic, self._status_message("online", session).payload(), 1, retain=True)
            self._deliver(link, session, subscription)
        except BrokerError as error:
            if (
                error.code == "M-RETAIN" and not link.connected
            ):  # it refuses a retained will; the next attempt leaves another
                self._can_leave_retained = False
            raise
        finally:
            link.client.disconnect()

    def _subscribe(self, link: Link) -> int | None:
        """Our own status, commands, and with e2e the consumer's acknowledgements; returns the mid of the subscription."""
        base = self.settings.base_topic
        filters = [self._status_topic]
        filters += [] if self.on_command is None else [f"{base}/cmd/+", f"{base}/+/cmd/+"]
        filters += [self._ack_topic] if self.settings.delivery.mode == "e2e" else []
        _, mid = link.client.subscribe([(topic, 1) for topic in filters])
        return mid

    def _deliver(self, link: Link, session: int, subscription: int | None) -> None:
        delivery = self.settings.delivery
        history_per_s = delivery.history_per_s if delivery.order == "live_first" else None
        flight = Flight(self.outbox, delivery.mode, history_per_s, self._replays, self.codes)
        denied: Problem | None = None
        status = self.status()
        before = status.acknowledged
        # A broker that takes our connection and then acknowledges nothing is not delivering again.
        deaf = status.problem if status.problem and status.problem.code == "M-NO-PUBACK" else None
        self._report(True, deaf)
        try:
            while link.lost is None:
                self.loops += 1
                if self._stop_asked.is_set():
                    self._goodbye(link, session)
                    return
                self._say_pending(link, session)
                flight.fill(link)
                pump(link, flight.next_look_s(), self._wake_read)
                self._drain_wakes()
                self._receive(link, flight)
                flight.settle(link)
                if subscription in link.granted:
                    denied = self._denied(link.granted.pop(subscription))
                    subscription = None
                if deaf is not None and (flight.is_answered or self.outbox.status().rows == 0):
                    deaf = None
                self._report(
                    True, flight.problem or denied or self._unsayable or deaf, before + flight.acknowledged, flight
                )
        finally:
            flight.abandon()
            self._has_been_online = True
        mqtt = self.settings.mqtt
        raise BrokerError(f"MQTT broker {mqtt.host}:{mqtt.effective_port} {link.lost}", link.lost_code)

    def _receive(self, link: Link, flight: Flight) -> None:
        messages, link.messages = link.messages, []
        acks: dict[str, int] = {}
        for message in messages:
            if message.topic == self._ack_topic:
                ack = _parse_ack(bytes(message.payload))
                if ack is not None:
                    acks[ack.epoch] = max(acks.get(ack.epoch, 0), ack.upto)
            elif message.topic == self._status_topic:
                if message.retain:
                    self._look_for_a_double(bytes(message.payload))
            elif self.on_command is not None:
                self.on_command(message.topic, bytes(message.payload), bool(message.retain))
        for epoch, upto in acks.items():  # cumulative: one transaction for all that came together
            flight.consumer_acknowledged(epoch, upto)

    def _look_for_a_double(self, payload: bytes) -> None:
        """Whoever else wrote our status since we were online has our name: not every broker says so when it throws one of us out."""
        with contextlib.suppress(ValueError):
            status = Status.model_validate_json(payload)
            if self._has_been_online and status.state == "online" and status.epoch != self.outbox.epoch:
                raise BrokerError(
                    f"another station calls itself {self.settings.station} (epoch {status.epoch}, boot {status.boot_id}); give one of them another name",
                    "M-TAKEOVER",
                )

    def _denied(self, codes: list[int]) -> Problem | None:
        refused = [code for code in codes[1:] if code >= 0x80]
        if not refused:
            return None
        if self.settings.delivery.mode == "e2e" and codes[-1] >= 0x80:
            text = f"the broker does not let us read {self._ack_topic}: {refusal(codes[-1])}; without it nothing counts as delivered"
            return Problem("M-ACK-DENIED", text)
        log.warning("the broker does not let us read commands: %s", refusal(refused[0]))
        return None

    def _say_pending(self, link: Link, session: int) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        for topic, (qos, retain, build) in pending.items():
            if qos and link.room <= 0:
                with self._lock:
                    self._pending.setdefault(topic, (qos, retain, build))
            else:
                self._publish(link, topic, build(session).payload(), qos, retain)
        while self._sayings and (self._sayings[0].qos == 0 or link.room > 0):
            saying = self._sayings.popleft()
            self._publish(link, saying.topic, saying.build(session), saying.qos)

    def _publish(self, link: Link, topic: str, payload: bytes, qos: int, retain: bool = False) -> int | None:
        """What the broker would not take is not said, and that is reported: sending it would end the connection again and again."""
        try:
            return publish(link, topic, payload, qos=qos, retain=retain)
        except TooLargeError as error:
            self._unsayable = Problem(error.code, str(error))
            return None

    def _goodbye(self, link: Link, session: int) -> None:
        deadline_s = time.monotonic() + GOODBYE_S
        self._say_pending(link, session)  # why the line has stopped, before that it has
        while link.lost is None and time.monotonic() < deadline_s and link.room <= 0:
            pump(link, 0.2)
            self._say_pending(link, session)  # what had no room before
        mid = self._publish(
            link, self._status_topic, self._status_message("stopped", session).payload(), 1, retain=True
        )
        while (
            mid is not None
            and link.lost is None
            and time.monotonic() < deadline_s
            and all(acked != mid for acked, _ in link.acks)
        ):
            pump(link, 0.2)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass

    def _report(
        self, connected: bool, problem: Problem | None, acknowledged: int | None = None, flight: Flight | None = None
    ) -> None:
        """Says each change of state once."""
        with self._lock:
            before = self._status
            waiting = flight.unacknowledged_by_consumer if flight else 0
            count = before.acknowledged if acknowledged is None else acknowledged
            self._status = PublisherStatus(connected, problem, count, waiting)
            if self._status != before:
                self._lock.notify_all()
        if (connected, problem) == (before.connected, before.problem):
            return
        if problem is not None and (before.problem is None or before.problem.code != problem.code):
            log.warning("%s %s; results wait in the outbox", problem.code, problem.text)
        elif problem is None and before.problem is not None and connected:
            log.info("delivering again")
        self.on_change()

    def _status_message(self, state: str, session: int, reason: str | None = None) -> Status:
        return Status.model_validate(
            {
                "ts": rfc3339(utc_now()),
                "station": self.settings.station,
                "session": session,
                "state": state,
                "boot_id": boot_id(),
                "epoch": self.outbox.epoch,
                "sw": self._software,
                "reason": reason,
            }
        )


def _parse_ack(payload: bytes) -> Ack | None:
    try:
        return Ack.model_validate_json(payload) if len(payload) <= 1024 else None
    except ValueError:
        log.warning("an acknowledgement that is none: %r", payload[:100])
        return None
