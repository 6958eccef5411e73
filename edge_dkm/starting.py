"""The part of a line's start that may take minutes: models are opened and compiled. What it is at is said on `<base>/state` and to systemd.

`run_line` loads through it. Loading runs in a thread of its own, since nothing interrupts a provider that compiles: so the line still
answers to a signal. A load of two seconds says nothing; after that the publisher is started, which the line then takes over.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from edge_dkm import __version__
from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.commands.commands import Commands, Outcome, refused
from edge_dkm.commands.decoder import VERBS
from edge_dkm.message import State
from edge_dkm.models import Loaded, Tell
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Outbox
from edge_dkm.service.leaving import leave_at_end
from edge_dkm.service.state_log import log_change
from edge_dkm.service.systemd import Notifier
from edge_dkm.settings import LineSettings

QUIET_S = 2.0
SAY_EVERY_S = 5.0
EXTEND_S, EXTEND_AT_MOST_S = 60.0, 7200.0  # systemd: so long at a time, and in all
GOODBYE_S = 2.5

log = logging.getLogger(__name__)
Load = Callable[[Tell], Loaded]


class StoppedError(Exception):
    """A signal asked to stop before the models were loaded."""


class Start:
    """Loads the models of one line. `publisher`: the running one, where loading took so long that it was needed."""

    def __init__(self, settings: LineSettings, outbox: Outbox, own_process: bool) -> None:
        self.publisher: Publisher | None = None
        self._settings, self._outbox, self._own_process = settings, outbox, own_process
        self._notifier = Notifier()
        self._commands: Commands | None = None
        self._attention = threading.Event()
        self._stop_asked = threading.Event()
        self._step: tuple[str, str, float] = ("LOADING", "loading", time.monotonic())
        self._since = rfc3339(utc_now())

    @property
    def is_stopped(self) -> bool:
        """Whether nobody waits for the load any more."""
        return self._stop_asked.is_set()

    def stop(self) -> None:
        """A signal asked to stop."""
        self._stop_asked.set()
        self._attention.set()

    def load(self, load: Load) -> Loaded:
        """What `load` returns or raises.

        Raises:
            StoppedError: a signal came first; the load is left to itself.
        """
        work = _Work(load, self._tell, self._attention.set)
        try:
            if not self.is_stopped:
                work.start()
                self._await(work)
            if self.is_stopped:
                raise StoppedError
            return work.result()
        except BaseException:
            self._stop_asked.set()
            work.abandon()
            if self._own_process and work.is_alive():
                leave_at_end(work)
            raise

    def _await(self, work: _Work) -> None:
        started_s = say_due_s = time.monotonic()
        say_due_s += QUIET_S
        while not work.is_done and not self.is_stopped:
            self._attention.wait(max(0.0, say_due_s - time.monotonic()))
            self._attention.clear()
            if not work.is_done and time.monotonic() >= say_due_s:
                say_due_s = time.monotonic() + SAY_EVERY_S
                self._say(time.monotonic() - started_s)

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """What ends the start inside is said, where anything was said before, and the publisher is ended with it."""
        try:
            yield
        except Exception as error:
            if isinstance(error, StoppedError):
                self._end("halted", None, None)
            else:
                self._end("error", "E-STOPPED", str(error))
            raise
        except BaseException:  # a second signal
            self._end("halted", None, None)
            raise

    def hand_over(self) -> Publisher | None:
        """The running publisher for the line, whose own commands replace ours."""
        if self._commands is not None:
            self._commands.close()
        return self.publisher

    def _tell(self, code: str, detail: str) -> None:
        self._step = (code, detail, time.monotonic())
        self._since = rfc3339(utc_now())

    def _say(self, loading_s: float) -> None:
        code, detail, since_s = self._step
        text = f"{detail}, {time.monotonic() - since_s:.0f} s so far"
        if self.publisher is None:
            self._speak_up()
        log_change(log, code, level=logging.INFO, state="warming_up", detail=text)
        self._state("warming_up", code, text)
        self._notifier.status(f"warming_up ({code}): {text}")
        if loading_s < EXTEND_AT_MOST_S:
            self._notifier.extend_start(EXTEND_S)

    def _speak_up(self) -> None:
        settings = self._settings
        self.publisher = Publisher(settings, self._outbox, f"edge-dkm {__version__}")
        # Held until the line runs, a command such as trigger would mean another part than its sender did.
        self._commands = Commands(
            settings.base_topic, dict.fromkeys(VERBS, self._refuse), self._outbox, self.publisher.say
        )
        self.publisher.on_command = self._commands.submit
        self._commands.start()
        self.publisher.start()

    def _refuse(self, command: object) -> Outcome:
        return refused("CMD-BUSY", f"the station warms up: {self._step[1]}; ask again with a new id when it is ready")

    def _state(self, state: str, code: str | None, detail: str | None) -> None:
        fields: dict[str, Any] = {"station": self._settings.station, "state": state, "since": self._since}
        fields["reason"] = {"code": code, "detail": detail or ""} if code else None
        if self.publisher is not None:
            self.publisher.announce(
                f"{self._settings.base_topic}/state",
                lambda session: State.model_validate({**fields, "ts": rfc3339(utc_now()), "session": session}),
            )

    def _end(self, state: str, code: str | None, detail: str | None) -> None:
        self._since = rfc3339(utc_now())
        self._state(state, code, detail)
        self._notifier.stopping()
        if self._commands is not None:
            self._commands.close()
        if self.publisher is not None and self.publisher.is_alive():
            self.publisher.stop()
            self.publisher.join(GOODBYE_S)


class _Work(threading.Thread):
    """Runs `load` once. A daemon: a provider that compiles for minutes must not hold the end of the process."""

    def __init__(self, load: Load, tell: Tell, done: Callable[[], None]) -> None:
        super().__init__(name="loading", daemon=True)
        self._load, self._tell, self._done = load, tell, done
        self._lock = threading.Lock()
        self._is_abandoned = self.is_done = False
        self._loaded: Loaded | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._loaded = self._load(self._tell)
        except BaseException as error:  # noqa: BLE001 (it is raised again by `result`)
            self._error = error
        with self._lock:
            self.is_done = True
            if self._is_abandoned:
                self._close()
        self._done()

    def result(self) -> Loaded:
        """Once it is done."""
        self.join()
        if self._error is not None or self._loaded is None:
            raise self._error or RuntimeError("the load was not begun")
        return self._loaded

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._is_abandoned = True
            if self.is_done:
                self._close()

    def _close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
