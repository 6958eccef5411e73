"""Publishes what the outbox holds: one supervised thread owns the database reads, the client and the socket.

A new client per connection; a commit wakes the thread through a socket pair, so nothing is polled; at most a window of rows is
unacknowledged; after a reconnect the oldest unacknowledged row goes first, so the order of first copies is kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_dkm.clock import boot_id, rfc3339, utc_now
from edge_dkm.errors import BrokerError
from edge_dkm.message import Announcement, Status
from edge_dkm.mqtt import Link, Will, await_connack, open_link, publish, pump, refusal
from edge_dkm.outbox import Outbox, Row
from edge_dkm.settings import LineSettings

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 30.0
ACK_TIMEOUT_S = 10.0
HOLD_S = 5.0  # before a refused row is tried again
IDLE_S = 1.0  # longest wait between two looks at the keepalive
GOODBYE_S = 2.0

log = logging.getLogger(__name__)
Build = Callable[[int], Announcement]


@dataclass(frozen=True)
class PublisherStatus:
    """`problem`: why nothing is being delivered, or None. `acknowledged` counts rows since the start."""

    connected: bool
    problem: str | None
    acknowledged: int


class Publisher(threading.Thread):
    """Runs until `stop`. Retained announcements are said again on every connection."""

    def __init__(self, settings: LineSettings, outbox: Outbox, software: str) -> None:
        super().__init__(name="publisher", daemon=True)
        self.settings, self.outbox = settings, outbox
        self._status_topic = f"{settings.base_topic}/status"
        self._software = software
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._lock = threading.Condition()
        self._retained: dict[str, tuple[int, Build]] = {}  # topic -> (qos, build)
        self._pending: dict[str, tuple[int, bool, Build]] = {}  # topic -> (qos, retain, build), the newest only
        self._stop_asked = threading.Event()
        self._connected = False
        self._problem: str | None = None
        self._acknowledged = 0
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

    def wake(self) -> None:
        """Something is to be sent. Callable from any thread, never blocks."""
        with contextlib.suppress(OSError):  # full: the thread is being woken already; closed: it has ended
            self._wake_write.send(b"w")

    def status(self) -> PublisherStatus:
        """How delivery is doing."""
        with self._lock:
            return PublisherStatus(self._connected, self._problem, self._acknowledged)

    def wait_drained(self, timeout_s: float) -> bool:
        """Whether every row was acknowledged within the time."""
        with self._lock:
            return self._lock.wait_for(lambda: self.outbox.status().rows == 0, timeout_s)

    def stop(self) -> None:
        """Says goodbye (`stopped`) where there is a connection, and ends; what is unsent stays in the outbox."""
        self._stop_asked.set()
        self.wake()

    def run(self) -> None:
        pause_s = BACKOFF_FIRST_S
        while not self._stop_asked.is_set():
            started_s = time.monotonic()
            try:
                self._connection()
            except BrokerError as error:
                self._report(str(error))
            except Exception as error:  # whatever it is, the line must go on delivering; it is reported and retried
                log.exception("publisher failed")
                self._report(f"{type(error).__name__}: {error}")
            with self._lock:
                self._connected = False
                self._lock.notify_all()
            if time.monotonic() - started_s > BACKOFF_MAX_S:
                pause_s = BACKOFF_FIRST_S
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
            Will(self._status_topic, self._status_message("offline", session, "lost").payload()),
        )
        try:
            await_connack(link, mqtt)
            with self._lock:
                self._connected = True
                self._pending |= {topic: (qos, True, build) for topic, (qos, build) in self._retained.items()}
            self._report(None)
            publish(link, self._status_topic, self._status_message("online", session).payload(), qos=1, retain=True)
            self._deliver(link, session)
        finally:
            link.client.disconnect()

    def _deliver(self, link: Link, session: int) -> None:
        flight = _Flight(self.outbox)
        while link.lost is None:
            if self._stop_asked.is_set():
                self._goodbye(link, session)
                return
            self._say_pending(link, session)
            flight.fill(link)
            pump(link, min(IDLE_S, flight.next_look_s()), self._wake_read)
            self._drain_wakes()
            problem = flight.settle(link)
            if flight.changed:
                with self._lock:
                    self._acknowledged += flight.take_acknowledged()
                    self._lock.notify_all()
            if problem is not None:
                self._report(problem)
            elif flight.delivering:
                self._report(None)
        raise BrokerError(f"MQTT broker {self.settings.mqtt.host}:{self.settings.mqtt.effective_port} {link.lost}")

    def _say_pending(self, link: Link, session: int) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
        for topic, (qos, retain, build) in pending.items():
            if qos and link.room <= 0:
                with self._lock:
                    self._pending.setdefault(topic, (qos, retain, build))
            else:
                publish(link, topic, build(session).payload(), qos=qos, retain=retain)

    def _goodbye(self, link: Link, session: int) -> None:
        deadline_s = time.monotonic() + GOODBYE_S
        self._say_pending(link, session)  # why the line has stopped, before that it has
        while link.lost is None and time.monotonic() < deadline_s and link.room <= 0:
            pump(link, 0.2)
            self._say_pending(link, session)  # what had no room before
        mid = publish(link, self._status_topic, self._status_message("stopped", session).payload(), qos=1, retain=True)
        while link.lost is None and time.monotonic() < deadline_s and all(acked != mid for acked, _ in link.acks):
            pump(link, 0.2)

    def _drain_wakes(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_read.recv(4096):
                pass

    def _report(self, problem: str | None) -> None:
        """Says each change of state once."""
        with self._lock:
            before, self._problem = self._problem, problem
            self._lock.notify_all()
        if problem is not None and problem != before:
            log.warning("%s; results wait in the outbox", problem)
        elif problem is None and before is not None:
            log.info("delivering again")

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


class _Flight:
    """The rows under way on one connection: what was published and not yet acknowledged, in order."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._sent: dict[int, tuple[Row, float]] = {}  # mid -> (row, when)
        self._after_seq = 0
        self._held_until_s = 0.0
        self._probing = False  # after a refusal one row tries the way for all
        self._acknowledged = 0
        self.delivering = False

    @property
    def changed(self) -> bool:
        """Whether rows were acknowledged since `take_acknowledged`."""
        return self._acknowledged > 0

    def take_acknowledged(self) -> int:
        """How many, once."""
        count, self._acknowledged = self._acknowledged, 0
        return count

    def next_look_s(self) -> float:
        """When a held row is due again."""
        return max(0.0, self._held_until_s - time.monotonic()) if self._held_until_s else IDLE_S

    def fill(self, link: Link) -> None:
        """Publishes the next rows up to the window."""
        if self._held_until_s and time.monotonic() < self._held_until_s:
            return
        self._held_until_s = 0.0
        room = min(link.room, 1 - len(self._sent)) if self._probing else link.room
        if room > 0:
            for row in self._outbox.unsent(self._after_seq, room):
                mid = publish(link, row.topic, row.body, qos=1, user=_cloud_event(row))
                self._sent[mid] = (row, time.monotonic())
                self._after_seq = row.seq

    def settle(self, link: Link) -> str | None:
        """Marks acknowledged rows; returns the problem where a row was refused. Raises BrokerError where no acknowledgement comes."""
        done, problem = [], None
        acks, link.acks = link.acks, []
        for mid, code in acks:
            if mid not in self._sent:
                continue
            row, _ = self._sent.pop(mid)
            if code == 0:
                done.append(row.seq)
            else:
                # Never taken for delivered: the row stays, and all behind it wait, so that the order is kept.
                problem = f"the broker does not deliver {row.topic}: {refusal(code)}"
                self._hold()
        if done:
            self._outbox.mark_sent(done)
            self._acknowledged += len(done)
            self._probing = self._probing and problem is not None
        self.delivering = bool(done) and problem is None
        oldest_s = min((when for _, when in self._sent.values()), default=time.monotonic())
        if time.monotonic() - oldest_s > ACK_TIMEOUT_S:
            raise BrokerError(f"no acknowledgement for {ACK_TIMEOUT_S:g} s; connecting anew")
        return problem

    def _hold(self) -> None:
        self._held_until_s = time.monotonic() + HOLD_S
        self._after_seq = 0
        self._probing = True
        self._sent.clear()


def _cloud_event(row: Row) -> list[tuple[str, str]]:
    """CloudEvents 1.0 attributes, binary mode: the envelope travels as user properties."""
    body = json.loads(row.body)
    source = row.topic.rsplit("/", 1)[0]
    identity = body.get("result_id") or f"{body['epoch']}-{body['seq']}"
    return [
        ("specversion", "1.0"),
        ("id", identity),
        ("type", body["schema"].replace("/", ".v")),
        ("source", source),
        ("time", body["ts"]),
    ]
