"""Does what the MES asks, once per id, in order, on a thread of its own, and answers each on `<base>/reply`.

`submit` is called by the MQTT thread and never waits. A stored answer is the proof that a command was done: it is written in the
same transaction as what must survive (`Outcome.remember`), and is given again when the id comes again, also after a restart.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.commands.decoder import MAX_COMMAND_BYTES, Command, Refusal, decode
from edge_dkm.errors import EdgeError
from edge_dkm.health import Stage
from edge_dkm.message import Reply

MAX_WAITING = 32
REFUSALS_BURST, REFUSALS_PER_S = 10.0, 1.0
AT_MOST_ONCE = frozenset(
    {"trigger"}
)  # a second part must not be made of one; the others may be done again without harm
CUT_OFF = "the program ended while it did this; whether it took effect is not known. Ask again with a new id"

log = logging.getLogger(__name__)
Say = Callable[[str, Callable[[int], bytes], int], None]


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    `remember` is stored together with the answer; `then` takes effect in memory after that, so a full disk changes nothing at all.
    """

    ok: bool
    code: str | None = None
    detail: str | None = None
    remember: Mapping[str, str] = field(default_factory=dict)
    then: Callable[[], None] | None = None


def refused(code: str, detail: str) -> Outcome:
    """An outcome that changed nothing."""
    return Outcome(False, code, detail)


Handler = Callable[[Command], Outcome]


class Store(Protocol):
    """Where answers survive (the outbox). Both raise StorageError where the disk fails."""

    def find_reply(self, command_id: str) -> bytes | None:
        """The stored answer."""

    def record_reply(self, command_id: str, reply: bytes, remember: Mapping[str, str]) -> object:
        """Stores or replaces the answer, with `remember`, in one transaction."""


@dataclass(frozen=True)
class CommandCounts:
    """Since the start. `unanswered`: refusals beyond the rate at which ill-formed messages are answered, and empty messages."""

    done: int
    refused: int
    repeated: int
    unanswered: int
    waiting: int


@dataclass(frozen=True)
class _Message:
    """As it came; of one that is too long, only as much as shows it."""

    topic: str
    payload: bytes
    retained: bool


class Commands(threading.Thread):
    """Runs commands until `close`.

    Args:
        base: the station's topic.
        handlers: by verb; a verb without one is answered `not_built`.
        store: where answers survive.
        say: publishes (topic, payload by session counter, QoS) once, in order; must not block (`Publisher.say`).
        excuse: why the store makes everybody wait, where it does.
    """

    def __init__(
        self,
        base: str,
        handlers: Mapping[str, Handler],
        store: Store,
        say: Say,
        excuse: Callable[[], str | None] = lambda: None,
    ) -> None:
        super().__init__(name="commands", daemon=True)
        self._base, self._handlers, self._store, self._say = base, handlers, store, say
        self._station = base.rsplit("/", 1)[-1]
        self._waiting: deque[_Message] = deque()
        self._changed = threading.Condition()
        self._closing = self._is_busy = False
        self._refusals = _TokenBucket(REFUSALS_BURST, REFUSALS_PER_S)
        self._done = self._refused = self._repeated = self._unanswered = 0
        self.stage = Stage(lambda: self._is_busy or bool(self._waiting), excuse)

    def submit(self, topic: str, payload: bytes, retained: bool) -> None:
        """Queues a message on a command topic; beyond 32 waiting ones it is answered CMD-BUSY. Never blocks, never raises."""
        message = _Message(topic, payload[: MAX_COMMAND_BYTES + 1], retained)
        with self._changed:
            is_full = len(self._waiting) >= MAX_WAITING
            if not is_full:
                self._waiting.append(message)
                self._changed.notify_all()
        if is_full:
            self._refuse_surplus(message)

    @property
    def counts(self) -> CommandCounts:
        """For health and metrics."""
        with self._changed:
            return CommandCounts(self._done, self._refused, self._repeated, self._unanswered, len(self._waiting))

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends after the command under way. What still waits is neither done nor answered: its sender asks again."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._handle(message)
            except Exception:  # whatever it is, the next command must be heard
                log.exception("command on %s failed", message.topic)
            self._is_busy = False
            self.stage.progress()

    def _next(self) -> _Message | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or bool(self._waiting))
            if self._closing:
                return None
            self._is_busy = True
            return self._waiting.popleft()

    def _handle(self, message: _Message) -> None:
        if not message.payload:  # how somebody clears a topic of a retained message: not for us
            with self._changed:
                self._refused, self._unanswered = self._refused + 1, self._unanswered + 1
            return
        command = decode(self._base, message.topic, message.payload, message.retained)
        asked = command.stale if isinstance(command, Refusal) else command
        try:
            # Also of a stale copy: a sender that waits must not take its success for a failure.
            stored = None if asked is None else self._store.find_reply(asked.id)
            if asked is not None and stored is not None:
                self._repeat(asked, _read(stored))
            elif isinstance(command, Refusal):
                self._refuse(command)
            else:
                self._execute(command)
        except EdgeError as error:  # the store
            log.error("command %s is not done: %s", message.topic, error)
            self._answer(command.id, refused("CMD-STORE", str(error)))

    def _execute(self, command: Command) -> None:
        digest = _digest(command)
        handler = self._handlers.get(command.verb)
        if handler is None:
            self._answer(command.id, refused("not_built", f"this station does not take the command {command.verb}"))
            return
        if command.verb in AT_MOST_ONCE:  # an answer for the case that we do not live to give a better one
            self._record(command.id, refused("CMD-CUT-OFF", CUT_OFF), digest)
        outcome = self._call(command, handler)
        self._record(command.id, outcome, digest)
        if outcome.then is not None:
            failure = self._call(command, lambda _: _after(outcome))
            if not failure.ok:
                outcome = failure
                self._record(command.id, outcome, digest)
        log.info("command %s %s: %s", command.verb, command.id, "done" if outcome.ok else outcome.code)
        self._answer(command.id, outcome)

    def _call(self, command: Command, handler: Handler) -> Outcome:
        try:
            return handler(command)
        except Exception as error:  # a handler's fault must not end the command channel
            log.exception("command %s %s failed", command.verb, command.id)
            text = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
            return Outcome(False, "CMD-FAILED", text)

    def _record(self, command_id: str, outcome: Outcome, digest: str) -> None:
        answer = {"ok": outcome.ok, "code": outcome.code, "detail": outcome.detail, "of": digest}
        self._store.record_reply(command_id, json.dumps(answer).encode(), outcome.remember)

    def _repeat(self, command: Command, answer: Mapping[str, Any]) -> None:
        if answer.get("of") != _digest(command):
            detail = "another command had this id; its answer would be a lie here. Give every command an id of its own"
            self._answer(command.id, refused("CMD-ID-REUSED", detail))
            return
        with self._changed:
            self._repeated += 1
        self._publish(command.id, Outcome(bool(answer.get("ok")), answer.get("code"), answer.get("detail")))

    def _refuse(self, refusal: Refusal) -> None:
        """Answers an ill-formed message, at a bounded rate."""
        with self._changed:
            self._refused += 1
        if self._may_refuse():
            log.warning("command refused: %s %s", refusal.code, refusal.detail)
            self._publish(refusal.id, refused(refusal.code, refusal.detail))

    def _refuse_surplus(self, message: _Message) -> None:
        """On the MQTT thread: reading the id costs a decode, so it is done no oftener than it is answered."""
        with self._changed:
            self._refused += 1
        if not self._may_refuse():
            return
        found = decode(self._base, message.topic, message.payload, message.retained)
        detail = f"{MAX_WAITING} commands wait already; nothing was done, ask again with the same id"
        self._publish(found.id, refused("CMD-BUSY", detail))

    def _may_refuse(self) -> bool:
        with self._changed:
            may = self._refusals.take()
            self._unanswered += not may
        return may

    def _answer(self, command_id: str | None, outcome: Outcome) -> None:
        with self._changed:
            self._done += outcome.ok
            self._refused += not outcome.ok
        self._publish(command_id, outcome)

    def _publish(self, command_id: str | None, outcome: Outcome) -> None:
        def build(session: int) -> bytes:
            return Reply(
                ts=rfc3339(utc_now()),
                station=self._station,
                session=session,
                id=command_id,
                ok=outcome.ok,
                code=outcome.code,
                detail=outcome.detail,
            ).payload()

        self._say(f"{self._base}/reply", build, 1)


class _TokenBucket:
    """At most `burst` at once and `per_s` in the long run, on the monotonic clock. Not thread-safe."""

    def __init__(self, burst: float, per_s: float) -> None:
        self._burst, self._per_s = burst, per_s
        self._tokens, self._filled_s = burst, time.monotonic()

    def take(self) -> bool:
        """Whether one was there."""
        now_s = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now_s - self._filled_s) * self._per_s)
        self._filled_s = now_s
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


def _after(outcome: Outcome) -> Outcome:
    if outcome.then is not None:
        outcome.then()
    return outcome


def _digest(command: Command) -> str:
    """Of what is asked, so that an id used for something else is noticed."""
    asked = [command.verb, command.camera, command.args.model_dump(mode="json", by_alias=True)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _read(stored: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(stored)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {}
