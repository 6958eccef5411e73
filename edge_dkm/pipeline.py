"""From shots to committed results: a buffer, an inspecting thread, a committing thread. The supervisor starts it and looks after it.

    capture threads --put--> ShotBuffer --> inspect --> commit (groups what has queued up meanwhile) --> Outbox --wakes--> publisher

A shot that stands for a part has an intent row on disk before it enters the buffer and ends in exactly one result.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.health import Stage
from edge_dkm.inspector import Inspection, Inspector
from edge_dkm.message import CameraCounters, ModelInfo, TriggerInfo, new_result_id
from edge_dkm.outbox import Draft, Intent, Numbers, Outbox
from edge_dkm.results import Case, Clockings, completed, model_info, timestamp, without_answer

MAX_WAITING = 16  # shots per camera that may wait for inspection
MAX_UNCOMMITTED = 64  # results that may wait for the disk
KEPT_TIMINGS = 20_000

log = logging.getLogger(__name__)
Policy = Literal["latest", "every"]


@dataclass
class Tally:
    """Counts of one camera. frames = results + bad + dropped + those under way."""

    frames: int = 0
    results: int = 0
    bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)

    def counters(self) -> CameraCounters:
        """As health messages carry them."""
        return CameraCounters(frames=self.frames, results=self.results, bad=self.bad, dropped=dict(self.dropped))


class ShotBuffer:
    """Shots waiting for inspection. A part always finds room or waits for it; a counted frame replaces its elder with policy `latest`."""

    def __init__(self, cameras: Mapping[str, Policy], tallies: Mapping[str, Tally]) -> None:
        self._policies, self._tallies = cameras, tallies
        self._waiting: dict[str, deque[tuple[Case, Shot]]] = {name: deque() for name in cameras}
        self._turn: deque[str] = deque(cameras)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, case: Case, shot: Shot, is_part: bool) -> bool:
        """Adds a shot; blocks while there is no room for one that may not be dropped. False once the buffer is closed."""
        with self._changed:
            waiting = self._waiting[case.camera]
            if not is_part and self._policies[case.camera] == "latest":
                while waiting:
                    waiting.popleft()
                    self._tallies[case.camera].dropped["superseded"] += 1
            self._changed.wait_for(lambda: len(waiting) < MAX_WAITING or self._closed)
            if self._closed:
                return False
            self._tallies[case.camera].frames += 1
            waiting.append((case, shot))
            self._changed.notify_all()
            return True

    def get(self) -> tuple[Case, Shot] | None:
        """The next shot, the cameras taking turns; None once the buffer is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or any(self._waiting.values()))
            for _ in range(len(self._turn)):
                self._turn.rotate(-1)
                waiting = self._waiting[self._turn[-1]]
                if waiting:
                    found = waiting.popleft()
                    self._changed.notify_all()
                    return found
            return None

    def close(self) -> None:
        """No more shots are taken; those waiting are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one completed inspection: inference, capture to answer, capture to commit."""

    infer: float
    total: float
    committed: float


@dataclass(frozen=True)
class _Done:
    draft: Draft
    case: Case
    inspection: Inspection | None
    error: InspectionError | None
    clockings: Clockings


class Pipeline:
    """The two threads and what lies between them. `failed` holds the error that ended a thread; `on_event` is called on results and failures."""

    def __init__(
        self,
        station: str,
        cameras: Mapping[str, CameraSettings],
        inspectors: Mapping[str, Inspector],
        outbox: Outbox,
        topic_of: Callable[[str], str],
        on_event: Callable[[], None],
    ) -> None:
        self.station, self.cameras, self.outbox = station, cameras, outbox
        self.tallies = {name: Tally() for name in cameras}
        self.timings: deque[Timings] = deque(maxlen=KEPT_TIMINGS)
        self.failed: BaseException | None = None
        self._inspectors, self._topic_of, self._on_event = inspectors, topic_of, on_event
        self._models: dict[str, ModelInfo] = {name: model_info(inspector) for name, inspector in inspectors.items()}
        self._buffer = ShotBuffer({name: camera.policy for name, camera in cameras.items()}, self.tallies)
        self._results: queue.Queue[_Done | None] = queue.Queue(MAX_UNCOMMITTED)
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in (("infer", self._inspect_all), ("commit", self._commit_all))
        ]
        self.stages = {
            "infer": Stage(lambda: len(self._buffer) > 0),
            "commit": Stage(lambda: not self._results.empty()),
        }

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def take(self, camera: str, shot: Shot, is_part: bool) -> None:
        """Called by capture threads for every shot. For a part the intent is on disk when this returns."""
        fired_s = time.monotonic()
        case = Case(
            new_result_id(),
            self.station,
            camera,
            TriggerInfo.model_validate({"kind": shot.kind, "id": shot.trigger_id}),
            timestamp(shot.frame.mono_s),
            shot.frame.mono_s,
            fired_s,
        )
        try:
            if is_part:
                self.outbox.intend(Intent(case.result_id, camera, shot.kind, shot.trigger_id, case.ts))
        except Exception as error:  # noqa: BLE001 (it would end the capture thread unseen; the supervisor stops the line with it)
            self._fail(error)
            return
        self._buffer.put(case, shot, is_part)

    def finish(self, patience_s: float) -> bool:
        """Takes no more shots, inspects and commits what waits; False if nothing is done for `patience_s` (a slow model may take its time)."""
        self._buffer.close()
        for thread in self._threads:
            while thread.is_alive():
                before = [stage.count for stage in self.stages.values()]
                thread.join(patience_s)
                if thread.is_alive() and before == [stage.count for stage in self.stages.values()]:
                    return False
        return True

    @property
    def committed(self) -> int:
        """Results on disk since the start, of all cameras."""
        return sum(tally.results + tally.bad for tally in self.tallies.values())

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (a thread that ends unseen is a silent stall)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        log.error("the line stops: %s", error)
        self.failed = self.failed or error
        self._buffer.close()
        self._on_event()

    def _inspect_all(self) -> None:
        while (found := self._buffer.get()) is not None:
            case, shot = found
            self._results.put(self._inspect(case, shot))
            self.stages["infer"].progress()
        self._results.put(None)

    def _inspect(self, case: Case, shot: Shot) -> _Done:
        started_s = time.monotonic()
        deadline_ms = self.cameras[case.camera].deadline_ms
        inspection: Inspection | None = None
        error: InspectionError | None = None
        try:
            _check_deadline(case, deadline_ms, started_s)
            if shot.frame.fault is not None:
                raise FrameError(shot.frame.fault.code, shot.frame.fault.detail)
            inspection = self._inspectors[case.camera].inspect(shot.frame.image)
            _check_deadline(case, deadline_ms, time.monotonic())
        except InspectionError as caught:
            inspection, error = None, caught
        clockings = Clockings(started_s, time.monotonic())
        model = self._models[case.camera]

        def render(numbers: Numbers) -> bytes:
            if inspection is not None:
                return completed(case, numbers, model, inspection, clockings).payload()
            return without_answer(case, numbers, error or InspectionError("R-UNKNOWN", "no answer"), model).payload()

        return _Done(
            Draft(case.camera, self._topic_of(case.camera), case.result_id, render), case, inspection, error, clockings
        )

    def _commit_all(self) -> None:
        is_last = False
        while not is_last:
            batch, is_last = self._next_batch()
            if not batch:
                continue
            self.outbox.commit([done.draft for done in batch])
            now_s = time.monotonic()
            for done in batch:
                self._tally(done, now_s)
            self.stages["commit"].progress(len(batch))
            self._on_event()

    def _next_batch(self) -> tuple[list[_Done], bool]:
        """What has queued up while the last commit was under way; nothing is ever held back to fill a group."""
        batch: list[_Done] = []
        item = self._results.get()
        while item is not None:
            batch.append(item)
            try:
                item = self._results.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _tally(self, done: _Done, now_s: float) -> None:
        tally = self.tallies[done.case.camera]
        if isinstance(done.error, FrameError):
            tally.bad += 1
        else:
            tally.results += 1
        tally.verdicts[done.inspection.verdict if done.inspection else "error"] += 1
        if done.inspection is not None:
            timing = done.clockings.timing(done.case)
            self.timings.append(Timings(timing.infer, timing.total, (now_s - done.case.captured_s) * 1000))


def _check_deadline(case: Case, deadline_ms: int | None, now_s: float) -> None:
    late_ms = (now_s - case.fired_s) * 1000
    if deadline_ms is not None and late_ms > deadline_ms:
        raise InspectionError(
            "R-DEADLINE", f"no answer within deadline_ms {deadline_ms} ({late_ms:.0f} ms after the trigger)"
        )
