"""One line, put together: which part gets what from whom. The supervisor starts it, watches it and ends it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from devices.capture import Capture
from devices.outputs import open_output
from devices.triggers import Shot
from edge_dkm import __version__
from edge_dkm.afterwards import Afterwards
from edge_dkm.alarms import Alarms
from edge_dkm.announcer import Announcer
from edge_dkm.commands.commands import Commands
from edge_dkm.commands.handlers import line_handlers
from edge_dkm.commands.live_settings import KEY, LineFacts, LiveControl, LiveSettings, ModelTable
from edge_dkm.conditions import Conditions
from edge_dkm.decision import Policy
from edge_dkm.drift.follower import DriftFollower
from edge_dkm.frames.novel_frames import FOLDER as FRAMES
from edge_dkm.frames.novel_frames import NovelFrames, spaces_of
from edge_dkm.health import STUCK_S
from edge_dkm.inspector import Inspector
from edge_dkm.mqtt.publisher import Publisher
from edge_dkm.outbox import Draft, Outbox
from edge_dkm.part_observer import PartObserver
from edge_dkm.pipeline import Pipeline
from edge_dkm.recentring.reservoir_follower import ReservoirFollower
from edge_dkm.reject import RejectOutput
from edge_dkm.results import restart_draft
from edge_dkm.service.restarts import RestartCounts
from edge_dkm.settings import LineSettings
from edge_dkm.state import StateFolder
from edge_dkm.station_codebooks import StationCodebooks
from edge_dkm.vitals import Vitals

CLOSE_S = 1.5

log = logging.getLogger(__name__)


class Line:
    """The parts of one running line, public to those that look after it; nothing is started by the constructor."""

    def __init__(
        self,
        settings: LineSettings,
        folder: StateFolder,
        outbox: Outbox,
        inspectors: dict[str, Inspector],
        publisher: Publisher | None = None,
    ) -> None:
        self.settings, self.folder, self.outbox, self.inspectors = settings, folder, outbox, inspectors
        self.attention = threading.Event()
        self.codebooks = StationCodebooks(folder.path, inspectors)
        self.codebooks.load()
        # A start that took long has one running already.
        self.publisher = publisher or Publisher(settings, outbox, f"edge-dkm {__version__}")
        self.publisher.on_change = self.attention.set
        self.pipeline = Pipeline(
            settings.station, settings.cameras, inspectors, outbox, self.result_topic, self.attention.set
        )
        self.captures = {
            name: Capture(name, camera, self._take, self._camera_changed, self.pipeline.skipped)
            for name, camera in settings.cameras.items()
        }
        self.alarms = Alarms(settings.base_topic, self.publisher.announce, folder.path / "alarms.json")
        self.restarts = RestartCounts(folder.path)
        self.live = LiveControl(self._facts(), outbox.recall(KEY), self._live_changed)
        self.commands = Commands(
            settings.base_topic, line_handlers(self), outbox, self.publisher.say, self.pipeline.blocked
        )
        self.publisher.on_command = self.commands.submit
        self.vitals = Vitals(self)
        self.rejects = {
            name: RejectOutput(name, open_output(camera.output), self.attention.set, lambda: self.vitals.is_fresh)
            for name, camera in settings.cameras.items()
            if camera.output is not None
        }
        self.observer = PartObserver(settings, self.rejects, self.publisher.say)
        self.afterwards = Afterwards()
        self.frames = NovelFrames(
            settings, folder.path / FRAMES, spaces_of(inspectors), lambda name: self.captures[name].frame_size
        )
        self.afterwards.add(self.frames)
        self.afterwards.add(ReservoirFollower(folder.path, settings.reservoir, inspectors))
        self.drift = DriftFollower(settings.drift, inspectors, self._drift_changed)
        self.afterwards.add(self.drift)
        self.pipeline.observers = (self.observer, self.afterwards)  # in this order: a machine waits for its output
        # Past its time-out an inference is interrupted; what does not end then hangs.
        self.pipeline.stages["infer"].stuck_s = max(STUCK_S, settings.infer_timeout_s + 3)
        self.conditions = Conditions(self)
        self.announcer = Announcer(self)
        self._apply_live()

    def start(self) -> None:
        """NG at the machine before anything else; the cameras last."""
        for output in self.rejects.values():
            output.start()
        self.announcer.state("warming_up")
        self.afterwards.start()
        cut_off = self._cut_off_parts()  # before a command can announce a part of this run
        self.pipeline.start(cut_off)
        if not self.publisher.is_alive():
            self.publisher.start()
        self.commands.start()
        self.announcer.everything()
        for capture in self.captures.values():
            capture.start()

    def stop_capturing(self, patience_s: float, is_hurried: Callable[[], bool]) -> bool:
        """Takes no more shots or commands, inspects and commits what waits; False where that does not move (`Pipeline.finish`)."""
        for capture in self.captures.values():
            capture.stop()
        if self.commands.is_alive():
            self.commands.close(CLOSE_S)
        self._join_captures()  # a part that was already shot is still handed over
        is_done = self.pipeline.finish(patience_s, is_hurried) if self.pipeline.is_started else True
        if not is_done:
            self.outbox.unblock()  # what cannot be committed stays an open intent, and is declared at the next start
        deadline_s = time.monotonic() + CLOSE_S
        for output in self.rejects.values():
            output.close(max(0.1, deadline_s - time.monotonic()))
        if not self.afterwards.close(CLOSE_S):
            log.warning(
                "what follows parts (drift, reservoir, novel frames) did not end within %g s and is left", CLOSE_S
            )
        self._join_captures()
        return is_done

    def _join_captures(self) -> None:
        """For a moment: one that waits for room in a pipeline that does not move is freed by closing that."""
        deadline_s = time.monotonic() + CLOSE_S
        for capture in self.captures.values():
            if capture.is_alive():
                capture.join(max(0.1, deadline_s - time.monotonic()))

    def expire(self) -> float | None:
        """Gives up announced parts whose frame did not come; returns seconds until the next one is due."""
        for camera, token in self.pipeline.expired():
            self.captures[camera].withdraw(token)
        return self.pipeline.next_expiry_s()

    def result_topic(self, camera: str) -> str:
        """Where a camera's results go."""
        return f"{self.settings.base_topic}/{camera}/result"

    def status(self) -> dict[str, Any]:
        """For `edge-dkm status`, as of the supervisor's last look."""
        is_ready, ready = self.vitals.readyz()
        cameras = {}
        for name, capture in self.captures.items():
            camera = capture.status()
            cameras[name] = {"state": camera.state, "code": camera.code, "fps": camera.fps}
        problem = self.publisher.status().problem
        return {
            "station": self.settings.station,
            "version": __version__,
            "state": self.announcer.state_words(),
            "uptime_s": round(self.vitals.uptime_s, 1),
            "ready": is_ready,
            "why": "; ".join(ready["why"]) or None,
            "broker": f"{problem.code} {problem.text}" if problem else "connected",
            "cameras": cameras,
            "stages": {name: stage.model_dump() for name, stage in self.vitals.stages.items()},
            "restarts": self.vitals.restarts(),
            "counters": {name: tally.counters().model_dump() for name, tally in self.pipeline.tallies.items()},
            "alarms": [{"code": a.code, "since": a.since, "detail": a.detail} for a in self.alarms.active()],
            "disk_free_mb": self.vitals.free_mb,
        }

    def _take(self, camera: str, shot: Shot) -> None:
        self.pipeline.take(camera, shot, self.captures[camera].stands_for_part)

    def _camera_changed(self, camera: str) -> None:
        if camera in self.rejects and self.captures[camera].status().state != "online":
            self.rejects[camera].fail(f"camera {camera} gives no usable frames")
        self.announcer.camera(camera)
        self.attention.set()

    def _drift_changed(self, camera: str) -> None:
        self.announcer.drift(camera)
        self.attention.set()

    def _facts(self) -> LineFacts:
        verdicts = self.settings.verdicts
        models = {
            name: ModelTable(inspector.file.sha256, inspector.file.name, inspector.metadata.clusters)
            for name, inspector in self.inspectors.items()
        }
        policy = Policy(verdicts.default, verdicts.novel, verdicts.clusters)
        return LineFacts(models, policy, self.settings.novelty_threshold)

    def _live_changed(self, live: LiveSettings) -> None:
        self._apply_live()
        self.announcer.info()
        self.attention.set()

    def _apply_live(self) -> None:
        """Puts pause, thresholds and labels into force."""
        is_paused = self.live.current.paused
        if is_paused and not self.pipeline.is_paused:
            for output in self.rejects.values():
                output.fail("the line is paused")
        self.pipeline.is_paused = is_paused
        for name, inspector in self.inspectors.items():
            inspector.relabel(*self.live.table_of(name))
            threshold = self.live.threshold_of(name)
            inspector.set_novelty_threshold(inspector.default_threshold if threshold is None else threshold)

    def _cut_off_parts(self) -> list[Draft]:
        """For the committing thread: a full outbox may make it wait, and the supervisor must not."""
        intents = self.outbox.open_intents()
        if not intents:
            return []
        log.warning("%d parts were cut off by the last end of this program; each gets a failed result", len(intents))
        return [restart_draft(intent, self.settings.station, self.result_topic(intent.camera)) for intent in intents]
