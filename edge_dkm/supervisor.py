"""Runs a line: starts what it needs in order, announces it, watches it, and stops it so that nothing is lost. `edge-dkm run` calls it."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import numpy as np

from devices.capture import Capture
from devices.errors import CameraError
from devices.triggers import Shot
from edge_dkm import __version__
from edge_dkm.announcer import Announcer
from edge_dkm.embedded_broker import EmbeddedBroker, as_embedded_speaks
from edge_dkm.errors import BrokerError, EdgeError, UsageError
from edge_dkm.framing import frame_problem
from edge_dkm.inspector import Inspector
from edge_dkm.models import load_models
from edge_dkm.mqtt import check_files
from edge_dkm.outbox import Limits, Outbox
from edge_dkm.pipeline import Pipeline, Timings
from edge_dkm.publisher import Publisher
from edge_dkm.results import restart_draft
from edge_dkm.settings import EMBEDDED, LineSettings
from edge_dkm.state import StateFolder

HEALTH_EVERY_S = 5.0
FINISH_S = 10.0  # without progress on what waits, when stopping
STOP_DRAIN_S = 3.0  # to deliver it, when stopped by hand

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LineReport:
    """What a finished line did. `unsent` results wait in the outbox and go out at the next start."""

    parts: int
    bad: int
    dropped: int
    verdicts: dict[str, int]
    unsent: int
    seconds: float
    latency_ms: dict[str, dict[str, float]]

    def text(self) -> str:
        """For people."""
        verdicts = ", ".join(f"{name} {n}" for name, n in sorted(self.verdicts.items())) or "none"
        lines = [
            f"results   {self.parts} ({verdicts}), {self.bad} bad frames, {self.dropped} frames skipped, in {self.seconds:.1f} s"
        ]
        lines += [
            f"latency   {name}: p50 {values['p50']:.1f} ms, p99 {values['p99']:.1f} ms"
            for name, values in self.latency_ms.items()
        ]
        lines.append(
            f"outbox    {'everything delivered' if not self.unsent else f'{self.unsent} results wait for delivery'}"
        )
        return "\n".join(lines)


def run_line(settings: LineSettings, max_parts: int | None = None) -> LineReport:
    """Runs until the recorded sources end, `max_parts` results are committed, or a signal asks to stop.

    Raises:
        EdgeError, CameraError: what stopped it, with its exit code.
    """
    check_files(settings.mqtt)
    with StateFolder(settings.state) as folder, contextlib.ExitStack() as stack:
        if settings.mqtt.host == EMBEDDED:
            broker = EmbeddedBroker(settings.mqtt.effective_port, folder.path / "broker")
            stack.callback(broker.close)
            settings = as_embedded_speaks(settings)
        inspectors = load_models(settings)
        for inspector in set(inspectors.values()):
            stack.callback(inspector.close)
        delivery = settings.delivery
        limits = Limits(delivery.max_rows, int(delivery.max_mb * 1e6), delivery.max_age_h, delivery.keep_h)
        outbox = Outbox(
            folder.outbox, settings.station, lambda camera: f"{settings.base_topic}/{camera}/result", limits
        )
        stack.callback(outbox.close)
        _warn(settings)
        return Line(settings, folder, outbox, inspectors).run(max_parts)


def _warn(settings: LineSettings) -> None:
    if settings.mqtt.version != "5":
        log.warning(
            "mqtt.version is 3.1.1: a broker that refuses a message does not say so; results may be lost unseen"
        )
    local = settings.mqtt.host in {EMBEDDED, "localhost", "127.0.0.1", "::1"}
    if settings.mqtt.tls is None and not local:
        log.warning("mqtt.tls is not set: results and password travel in plain text to %s", settings.mqtt.host)


class Line:
    """One running line."""

    def __init__(
        self, settings: LineSettings, folder: StateFolder, outbox: Outbox, inspectors: dict[str, Inspector]
    ) -> None:
        self.settings, self.folder, self.outbox, self.inspectors = settings, folder, outbox, inspectors
        self.attention = threading.Event()
        self.stop_asked = threading.Event()
        self.publisher = Publisher(settings, outbox, f"edge-dkm {__version__}")
        self.pipeline = Pipeline(
            settings.station, settings.cameras, inspectors, outbox, self._result_topic, self.attention.set
        )
        self.captures = {
            name: Capture(name, camera, self._take, self._camera_changed) for name, camera in settings.cameras.items()
        }
        self.announcer = Announcer(self)

    def run(self, max_parts: int | None) -> LineReport:
        started_s = time.monotonic()
        with self._signals():
            self.announcer.state("warming_up")
            self.publisher.start()
            self.pipeline.start()
            error: BaseException | None
            try:
                self._declare_cut_off_parts()
                self.announcer.everything()
                for capture in self.captures.values():
                    capture.start()
                error = self._watch(max_parts)
            except Exception as caught:  # noqa: BLE001 (it is raised again, after what was inspected is safe and announced)
                error = caught
            unfinished = self._stop_capturing()
            error = error or unfinished
            drained = self._drain(error)
        report = self._report(time.monotonic() - started_s)
        if error is not None:
            raise error
        if not drained and not self.stop_asked.is_set():
            problem = self.publisher.status().problem or "the broker acknowledges too slowly"
            raise BrokerError(
                f"{report.unsent} results wait in the outbox of {self.folder.path} and go out at the next start: {problem}\n{report.text()}"
            )
        return report

    def _watch(self, max_parts: int | None) -> BaseException | None:
        """Until there is a reason to stop; returns the error, where that is one."""
        health_due_s = time.monotonic()
        checked: set[str] = set()
        while True:
            if self.pipeline.failed is not None:
                return self.pipeline.failed
            error = self._framing_error(checked) or self._lost_camera()
            if error is not None:
                return error
            if self.stop_asked.is_set() or (max_parts is not None and self.pipeline.committed >= max_parts):
                return None
            if all(capture.ended.is_set() for capture in self.captures.values()):
                return None
            if time.monotonic() >= health_due_s:
                health_due_s = time.monotonic() + HEALTH_EVERY_S
                self.outbox.trim()
                self.announcer.health()
            self.announcer.state_now()
            self.attention.wait(max(0.0, health_due_s - time.monotonic()))
            self.attention.clear()

    def _framing_error(self, checked: set[str]) -> EdgeError | None:
        """Once per camera, as soon as its frame size is known; info then names it."""
        for name, capture in self.captures.items():
            if name in checked or capture.frame_size is None:
                continue
            checked.add(name)
            problem = frame_problem(name, capture.settings, self.inspectors[name].metadata.input, capture.frame_size)
            if problem is not None:
                return UsageError(problem)
            self.announcer.info()
        return None

    def _lost_camera(self) -> CameraError | None:
        """A film or folder that failed will not come back; a live camera reconnects by itself."""
        return next((capture.error for capture in self.captures.values() if capture.error is not None), None)

    def _take(self, camera: str, shot: Shot) -> None:
        self.pipeline.take(camera, shot, self.captures[camera].stands_for_part)

    def _camera_changed(self, camera: str) -> None:
        self.announcer.camera(camera)
        self.attention.set()

    def _declare_cut_off_parts(self) -> None:
        intents = self.outbox.open_intents()
        if intents:
            log.warning(
                "%d parts were cut off by the last end of this program; each gets a failed result", len(intents)
            )
            self.outbox.commit(
                [restart_draft(intent, self.settings.station, self._result_topic(intent.camera)) for intent in intents]
            )

    def _stop_capturing(self) -> BaseException | None:
        """Inspects and commits what waits; returns what went wrong with it."""
        for capture in self.captures.values():
            capture.stop()
        if not self.pipeline.finish(FINISH_S):
            return EdgeError(f"inspection made no progress for {FINISH_S:g} s; frames that waited have no result")
        return self.pipeline.failed

    def _drain(self, error: BaseException | None) -> bool:
        self.announcer.state("error" if error else "halted", error)
        self.announcer.health()
        by_hand = self.stop_asked.is_set() or error is not None
        timeout_s = STOP_DRAIN_S if by_hand else self.settings.delivery.drain_timeout_s
        problem = self.publisher.status().problem
        if problem is not None and self.outbox.status().rows:
            log.info("waiting up to %g s for delivery: %s", timeout_s, problem)
        drained = self.publisher.wait_drained(timeout_s)
        self.publisher.stop()
        self.publisher.join(STOP_DRAIN_S + 2)
        return drained

    def _result_topic(self, camera: str) -> str:
        return f"{self.settings.base_topic}/{camera}/result"

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask to stop; a second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.stop_asked.is_set():
                raise KeyboardInterrupt
            self.stop_asked.set()
            self.attention.set()

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _report(self, seconds: float) -> LineReport:
        tallies = self.pipeline.tallies.values()
        verdicts: dict[str, int] = {}
        for tally in tallies:
            for verdict, n in tally.verdicts.items():
                verdicts[verdict] = verdicts.get(verdict, 0) + n
        return LineReport(
            sum(t.results for t in tallies),
            sum(t.bad for t in tallies),
            sum(sum(t.dropped.values()) for t in tallies),
            verdicts,
            self.outbox.status().rows,
            seconds,
            _latencies(list(self.pipeline.timings)),
        )


def _latencies(timings: list[Timings]) -> dict[str, dict[str, float]]:
    if not timings:
        return {}
    columns = {
        "infer": [t.infer for t in timings],
        "capture to answer": [t.total for t in timings],
        "capture to commit": [t.committed for t in timings],
    }
    return {
        name: {"p50": round(float(np.percentile(v, 50)), 2), "p99": round(float(np.percentile(v, 99)), 2)}
        for name, v in columns.items()
    }
