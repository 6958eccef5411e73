"""Runs a line: starts what it needs in order, watches it, and stops it so that nothing is lost. `edge-dkm run` calls it."""

from __future__ import annotations

import contextlib
import logging
import threading
import time

from devices.errors import CameraError
from devices.outputs.requirements import output_problem
from edge_dkm.batching import measure_limits
from edge_dkm.errors import BrokerError, EdgeError, UsageError
from edge_dkm.framing import frame_problem
from edge_dkm.line import Line
from edge_dkm.line_report import LineReport, report
from edge_dkm.models import Loaded, Tell, load_models
from edge_dkm.mqtt.delivery import Problem
from edge_dkm.mqtt.embedded_broker import EmbeddedBroker, as_embedded_speaks
from edge_dkm.mqtt.link import check_files
from edge_dkm.outbox import Limits, Outbox
from edge_dkm.service.admin import SOCKET, AdminServer
from edge_dkm.service.admin_handlers import admin_handlers
from edge_dkm.service.http_health import Answers, HealthServer
from edge_dkm.service.metrics import Exporter
from edge_dkm.service.stop_signals import stop_signals
from edge_dkm.service.systemd import Notifier
from edge_dkm.service.watchdog import Watchdog, cancel_end, end_at_latest
from edge_dkm.settings import EMBEDDED, LineSettings
from edge_dkm.starting import Start, StoppedError
from edge_dkm.state import StateFolder
from edge_dkm.vitals import LOOK_EVERY_S

HEALTH_EVERY_S = 5.0
FINISH_S = 10.0  # without progress on what waits, when stopping
STOP_DRAIN_S = 2.5  # to deliver it, when stopped by hand
GOODBYE_S = 2.5
DEAD_MAN_S = 8.5  # a supervisor that does not come round for so long ends its process
END_S = 9.5  # for all of the ending, whatever hangs

log = logging.getLogger(__name__)


def run_line(settings: LineSettings, max_parts: int | None = None, *, own_process: bool = False) -> LineReport:
    """Runs until the recorded sources end, `max_parts` results are committed, or a signal asks to stop.

    Args:
        own_process: this process runs nothing else, so a supervisor that hangs may end it.

    Raises:
        EdgeError, CameraError: what stopped it, with its exit code.
    """
    check_files(settings.mqtt)
    with stop_signals() as wish, StateFolder(settings.state) as folder, contextlib.ExitStack() as stack:
        if settings.mqtt.host == EMBEDDED:
            broker = EmbeddedBroker(settings.mqtt.effective_port, folder.path / "broker")
            stack.callback(broker.close)
            settings = as_embedded_speaks(settings)
        base, limits = settings.base_topic, Limits.of(settings.delivery)
        outbox = Outbox(
            folder.outbox, settings.station, lambda camera: f"{base}/{camera}/result", limits, settings.delivery.mode
        )
        stack.callback(outbox.close)
        _warn(settings)
        start, started_s = Start(settings, outbox, own_process), time.monotonic()
        wish.call(start.stop)
        try:
            with start.announced():
                loaded = start.load(lambda tell: _load(settings, tell, start))
                stack.callback(loaded.close)
                line = Line(settings, folder, outbox, loaded.inspectors, start.hand_over())
                line.pipeline.share_runs(loaded.limits)
                stack.callback(AdminServer(folder.path / SOCKET, admin_handlers(line)).close)
                if settings.health.port is not None:
                    stack.callback(_health_server(line).close)
        except StoppedError:
            return report({}, [], outbox.status().rows, time.monotonic() - started_s)
        supervisor = Supervisor(line, own_process)
        wish.call(supervisor.stop)  # one that came since the load ends the line in order: outputs at NG, a goodbye
        return supervisor.run(max_parts)


def _load(settings: LineSettings, tell: Tell, start: Start) -> Loaded:
    inspectors = load_models(settings, tell)
    return Loaded(inspectors, measure_limits(settings.cameras, inspectors, tell, lambda: start.is_stopped))


def _warn(settings: LineSettings) -> None:
    if settings.mqtt.version != "5":
        log.warning(
            "mqtt.version is 3.1.1: a broker that refuses a message does not say so; results may be lost unseen"
        )
    local = settings.mqtt.host in {EMBEDDED, "localhost", "127.0.0.1", "::1"}
    if settings.mqtt.tls is None and not local:
        log.warning("mqtt.tls is not set: results and password travel in plain text to %s", settings.mqtt.host)
    for name, camera in settings.cameras.items():
        if camera.output is None:
            continue
        if problem := output_problem(camera.output, camera.trigger.kind, camera.deadline_ms):
            log.warning("the output of cameras.%s may say OK of the wrong part: cameras.%s.%s", name, name, problem)


def _health_server(line: Line) -> HealthServer:
    wanted = line.settings.health
    metrics = Exporter(line.vitals.snapshot).text if wanted.metrics else lambda: None
    server = HealthServer(Answers(line.vitals.healthz, line.vitals.readyz, metrics), wanted.host, wanted.port or 0)
    log.info("health at http://%s:%d/healthz, /readyz%s", wanted.host, server.port, ", /metrics" * wanted.metrics)
    return server


class Supervisor:
    """Looks after one line from its start to its end."""

    def __init__(self, line: Line, own_process: bool) -> None:
        self._line, self._own_process = line, own_process
        self._stop_asked = threading.Event()
        self._notifier = Notifier()
        self._watchdog = Watchdog(line.restarts, {})
        self._checked: set[str] = set()
        self._undelivered: Problem | None = None
        self._health_due_s = self._ping_due_s = self._dead_man_due_s = time.monotonic()

    def run(self, max_parts: int | None) -> LineReport:
        """Until there is a reason to end; raises it where it is an error."""
        started_s = time.monotonic()
        line = self._line
        error: BaseException | None
        try:
            line.start()
            self._notifier.ready()
            error = self._watch(max_parts)
        except Exception as caught:  # noqa: BLE001 (it is raised again, after what was inspected is safe and announced)
            error = caught
        self._notifier.stopping()
        self._end_in_time(error)
        if error is not None:  # before the stop, which takes seconds where something hangs
            line.announcer.state("error", error)
        # Whatever the reason: outputs are left at NG, and what was inspected is committed.
        trouble = self._stop_capturing(error)
        error = error or trouble
        drained = self._drain(error)
        done = report(
            line.pipeline.tallies, list(line.pipeline.timings), line.outbox.status().rows, time.monotonic() - started_s
        )
        if error is not None:
            raise error
        if not drained and not self._stop_asked.is_set():
            problem = self._undelivered
            raise BrokerError(
                f"{done.unsent} results wait in the outbox of {line.folder.path} and go out at the next start: "
                f"{problem.text if problem else 'the broker acknowledges too slowly'}\n{done.text()}",
                problem.code if problem else "M-OFFLINE",
            )
        return done

    def _watch(self, max_parts: int | None) -> BaseException | None:
        """Until there is a reason to stop; returns the error, where that is one."""
        line = self._line
        while True:
            if line.pipeline.failed is not None:
                return line.pipeline.failed
            error = self._framing_error() or self._lost_camera() or self._look()
            if error is not None:
                return error
            if self._stop_asked.is_set() or (max_parts is not None and line.pipeline.committed >= max_parts):
                return None
            if all(capture.ended.is_set() for capture in line.captures.values()):
                return None
            due_s = line.expire()
            line.attention.wait(LOOK_EVERY_S if due_s is None else min(LOOK_EVERY_S, max(0.0, due_s)))
            line.attention.clear()

    def _look(self) -> EdgeError | None:
        """The regular round: slow inference, stuck stages, ages, health, alarms, state, systemd."""
        line, now_s = self._line, time.monotonic()
        if self._own_process and now_s >= self._dead_man_due_s:
            self._dead_man_due_s = now_s + LOOK_EVERY_S
            end_at_latest(DEAD_MAN_S)
        line.pipeline.interrupt_slow(line.settings.infer_timeout_s)
        judgement = self._watchdog.judge(line.vitals.look(), now_s)
        if now_s >= self._health_due_s:
            self._health_due_s = now_s + HEALTH_EVERY_S
            line.announcer.health()
        conditions = line.conditions.look()
        line.announcer.state_now(conditions)
        if judgement.error is not None:
            return judgement.error
        if self._notifier.ping_every_s is not None and judgement.may_ping and now_s >= self._ping_due_s:
            self._ping_due_s = now_s + self._notifier.ping_every_s
            self._notifier.watchdog()
            self._notifier.status(line.announcer.state_line())
        return None

    def _framing_error(self) -> EdgeError | None:
        """Once per camera, as soon as its frame size is known; info then names it."""
        line = self._line
        for name, capture in line.captures.items():
            if name in self._checked or capture.frame_size is None:
                continue
            self._checked.add(name)
            problem = frame_problem(name, capture.settings, line.inspectors[name].metadata.input, capture.frame_size)
            if problem is not None:
                return UsageError(problem)
            line.announcer.info()
        return None

    def _lost_camera(self) -> CameraError | None:
        """A film or folder that failed will not come back; a live camera reconnects by itself."""
        return next((capture.error for capture in self._line.captures.values() if capture.error is not None), None)

    def _stop_capturing(self, error: BaseException | None) -> BaseException | None:
        """Inspects and commits what waits; returns what went wrong with it."""
        if not self._line.stop_capturing(FINISH_S, lambda: error is not None or self._stop_asked.is_set()):
            return EdgeError("inspection made no progress; frames that waited have no result")
        return self._line.pipeline.failed

    def _drain(self, error: BaseException | None) -> bool:
        line = self._line
        line.announcer.state("error" if error else "halted", error)
        line.announcer.health()
        by_hand = self._stop_asked.is_set() or error is not None
        timeout_s = STOP_DRAIN_S if by_hand else line.settings.delivery.drain_timeout_s
        problem = line.publisher.status().problem
        if problem is not None and line.outbox.status().rows:
            log.info("waiting up to %g s for delivery: %s", timeout_s, problem.text)
        drained = self._wait_drained(timeout_s, by_hand)
        self._undelivered = line.publisher.status().problem
        line.publisher.stop()
        if line.publisher.is_alive():
            line.publisher.join(GOODBYE_S)
        return drained

    def _wait_drained(self, timeout_s: float, was_asked: bool) -> bool:
        """In slices: a signal may come while recorded material is delivered; `was_asked`: `timeout_s` is that of a stop by hand already."""
        end_s = time.monotonic() + timeout_s
        while not self._line.publisher.wait_drained(min(0.2, max(0.0, end_s - time.monotonic()))):
            if self._stop_asked.is_set() and not was_asked:
                was_asked, end_s = True, min(end_s, time.monotonic() + STOP_DRAIN_S)
            if time.monotonic() >= end_s:
                return False
        return True

    def _end_in_time(self, error: BaseException | None) -> None:
        """An ending that hangs is ended; recorded material may take as long as inspecting and delivering it takes."""
        if not self._own_process:
            return
        if self._stop_asked.is_set() or error is not None:
            end_at_latest(END_S)
        else:
            cancel_end()

    def stop(self) -> None:
        """A signal asked to stop."""
        self._stop_asked.set()
        self._line.attention.set()
        if self._own_process:  # also where the end of recorded material is under way already
            end_at_latest(END_S)
