"""From shots to committed results: a buffer, an inspecting thread, a committing thread. The supervisor starts it and looks after it.

    capture threads --put--> ShotBuffer --> inspect --> commit (groups what has queued up meanwhile) --> Outbox --wakes--> publisher

A shot that stands for a part has an intent row on disk before it enters the buffer and ends in exactly one result. A part that a
command announced (`promise`) has it before there is a frame.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm.batching import Limits
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.health import Stage
from edge_dkm.inspecting import Answer, Inspecting
from edge_dkm.inspector import Inspection, Inspector
from edge_dkm.message import Part, TriggerInfo, new_result_id
from edge_dkm.outbox import Draft, Intent, Numbers, Outbox
from edge_dkm.results import Case, Clockings, completed, fitted, model_info, timestamp, without_answer
from edge_dkm.shot_buffer import ShotBuffer, Tally

MAX_UNCOMMITTED = 64  # results that may wait for the disk
KEPT_TIMINGS = 20_000
HURRIED_PATIENCE_S = 3.0  # without progress, when finishing in a hurry
HURRY_S = 2.0  # for what waits, when finishing in a hurry
TRIM_EVERY_S = 5.0
LATER_S = 0.2  # where an announced part is over time and the disk is behind
NO_FRAME_S = 5.0  # for a part that a command announced, where the camera has no deadline_ms

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one completed inspection: inference, capture to answer, capture to commit."""

    infer: float
    total: float
    committed: float


@dataclass(frozen=True)
class Outcome:
    """One committed result: the answer, or why there is none. `image` is what was inspected, (H, W, 3) uint8 BGR, where there was a frame."""

    case: Case
    inspection: Inspection | None
    error: InspectionError | None
    timings: Timings | None
    image: NDArray[np.uint8] | None

    @property
    def verdict(self) -> str:
        """As the message has it."""
        return self.inspection.verdict if self.inspection else "error"

    @property
    def state(self) -> str:
        """As the message has it."""
        if self.inspection is not None:
            return "completed"
        return "bad_frame" if isinstance(self.error, FrameError) else "failed"


class Observer(Protocol):
    """Who wants to know of parts as they pass. Called from the pipeline's threads; must not block."""

    def armed(self, case: Case) -> None:
        """A trigger fired."""

    def committed(self, outcome: Outcome) -> None:
        """The result is on disk."""


@dataclass(frozen=True)
class _Done:
    draft: Draft
    answer: Answer


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
        self.observers: tuple[Observer, ...] = ()
        self.is_paused = False
        self._topic_of, self._on_event = topic_of, on_event
        self._inspectors = inspectors
        self._buffer = ShotBuffer({name: camera.policy for name, camera in cameras.items()}, self.tallies)
        self._results: queue.Queue[_Done | None] = queue.Queue(MAX_UNCOMMITTED)
        self._promised: dict[str, tuple[Case, float]] = {}  # token -> (case, monotonic seconds at which it fails)
        self._promise_lock = threading.Lock()
        self._promises: Counter[str] = Counter()
        self._inspecting = Inspecting(cameras, inspectors, lambda: self.stages["infer"].progress(0))
        self._first: Sequence[Draft] = ()
        self._trim_due_s = time.monotonic()
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in (("infer", self._inspect_all), ("commit", self._commit_all))
        ]
        self.stages = {
            "infer": Stage(lambda: len(self._buffer) > 0 or self._inspecting.since_s is not None, self.blocked),
            "commit": Stage(lambda: not self._results.empty() or outbox.is_blocked, self.blocked),
        }

    @property
    def is_started(self) -> bool:
        """Whether `start` was called."""
        return self._threads[0].ident is not None

    def share_runs(self, limits: Limits) -> None:
        """Before `start`: how many frames of several cameras may go in one run."""
        self._inspecting.batching.allow(limits)

    def start(self, first: Sequence[Draft] = ()) -> None:
        """Starts the threads; `first` is committed before anything else."""
        self._first = first
        for thread in self._threads:
            thread.start()

    def take(self, camera: str, shot: Shot, is_part: bool) -> None:
        """Called by capture threads for every shot. For a part the intent is on disk when this returns."""
        tally = self.tallies[camera]
        if shot.token is not None:
            self._take_promised(camera, shot, shot.token)
            return
        if self.is_paused:
            tally.frames += 1
            tally.dropped["paused"] += 1
            return
        case = self._case(camera, shot.kind, shot.trigger_id, shot.frame.mono_s, None)
        if is_part and not self._intend(case):
            return
        for observer in self.observers:
            observer.armed(case)
        if self._buffer.put(case, shot, is_part):
            tally.frames += 1

    def promise(self, camera: str, part: Part | None) -> str | None:
        """A part that a command announces: its intent is on disk when this returns, its token goes to the camera. None where the disk failed."""
        fired_s = time.monotonic()
        with self._promise_lock:
            self._promises[camera] += 1
            case = self._case(camera, "mqtt", self._promises[camera], fired_s, part)
        if not self._intend(case):
            return None
        deadline_ms = self.cameras[camera].deadline_ms
        self.tallies[camera].frames += 1
        with self._promise_lock:
            self._promised[case.result_id] = case, fired_s + (deadline_ms / 1000 if deadline_ms else NO_FRAME_S)
        for observer in self.observers:
            observer.armed(case)
        return case.result_id

    def expired(self) -> list[tuple[str, str]]:
        """Fails announced parts for which no frame came in time; returns (camera, token) of each."""
        now_s, given_up = time.monotonic(), []
        with self._promise_lock:
            for token, (case, expires_s) in list(self._promised.items()):
                if expires_s > now_s:
                    continue
                text = f"camera {case.camera} gave no frame for the announced part in time"
                error = InspectionError("R-NO-FRAME", text)
                try:
                    self._results.put_nowait(self._done(Answer(case, None, error, Clockings(now_s, now_s))))
                except queue.Full:  # the disk is behind: a turn later
                    break
                del self._promised[token]
                given_up.append((case.camera, token))
        return given_up

    def next_expiry_s(self) -> float | None:
        """Seconds until the next announced part is given up; None where none is open."""
        with self._promise_lock:
            moment_s = min((expires_s for _, expires_s in self._promised.values()), default=None)
        if moment_s is None:
            return None
        left_s = moment_s - time.monotonic()
        return left_s if left_s > 0 else LATER_S

    def skipped(self, camera: str, n: int) -> None:
        """Frames that a camera's process left out, since newer ones had come."""
        self.tallies[camera].frames += n
        self.tallies[camera].dropped["superseded"] += n

    def interrupt_slow(self, timeout_s: float) -> None:
        """Stops an inference that has taken longer than that; the part ends in a declared failure."""
        self._inspecting.interrupt_slow(timeout_s)

    def finish(self, patience_s: float, is_hurried: Callable[[], bool] = lambda: False) -> bool:
        """Takes no more shots, inspects and commits what waits; a slow model may take its time. False where nothing is done for `patience_s`.

        In a hurry what still waits after a moment is left: parts are declared by their intents at the next start.
        """
        self._buffer.close()
        progress_s, hurry_s, before = time.monotonic(), float("inf"), -1
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.05)
                now_s, count = time.monotonic(), sum(stage.count for stage in self.stages.values())
                if count != before:
                    before, progress_s = count, now_s
                hurried = is_hurried()
                hurry_s = min(hurry_s, now_s + HURRY_S) if hurried else hurry_s
                if now_s >= hurry_s and (left := self._buffer.abandon()):
                    log.warning("%d frames that waited are not inspected: the line stops", left)
                if now_s - progress_s > (min(patience_s, HURRIED_PATIENCE_S) if hurried else patience_s):
                    return False
        return True

    @property
    def committed(self) -> int:
        """Results on disk since the start, of all cameras."""
        return sum(tally.results + tally.bad for tally in self.tallies.values())

    def _take_promised(self, camera: str, shot: Shot, token: str) -> None:
        with self._promise_lock:
            case, _ = self._promised.pop(token, (None, 0.0))
        if case is not None:
            self._buffer.put(case, shot, True)
        else:  # its part was given up: a frame without a part
            self.tallies[camera].frames += 1
            self.tallies[camera].dropped["late"] += 1

    def _case(self, camera: str, kind: str, trigger_id: int, captured_s: float, part: Part | None) -> Case:
        trigger = TriggerInfo.model_validate({"kind": kind, "id": trigger_id})
        ts = timestamp(captured_s)
        return Case(new_result_id(), self.station, camera, trigger, ts, captured_s, time.monotonic(), part)

    def _intend(self, case: Case) -> bool:
        part_id, product = (case.part.id, case.part.product) if case.part else (None, None)
        try:
            self.outbox.intend(
                Intent(case.result_id, case.camera, case.trigger.kind, case.trigger.id, case.ts, part_id, product)
            )
        except Exception as error:  # noqa: BLE001 (it would end the capture thread unseen; the supervisor stops the line with it)
            self._fail(error)
            return False
        return True

    def blocked(self) -> str | None:
        """Why nothing can move though nothing hangs."""
        return "the outbox is full and delivery.limit is block" if self.outbox.is_blocked else None

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
        while (answers := self._inspecting.next_answers(self._buffer)) is not None:
            for answer in answers:
                self._results.put(self._done(answer))
                self.stages["infer"].progress()
                del answer  # while this waits for the next shot, it must not hold a picture of the ring
            del answers
        self._results.put(None)

    def _done(self, answer: Answer) -> _Done:
        case, inspection, error, clockings = answer.case, answer.inspection, answer.error, answer.clockings
        model = model_info(self._inspectors[case.camera], inspection)

        def render(numbers: Numbers) -> bytes:
            if inspection is not None:
                return fitted(completed(case, numbers, model, inspection, clockings))
            return fitted(without_answer(case, numbers, error or InspectionError("R-UNKNOWN", "no answer"), model))

        draft = Draft(case.camera, self._topic_of(case.camera), case.result_id, render)
        return _Done(draft, answer)

    def _commit_all(self) -> None:
        is_last = False
        if self._first:
            self.outbox.commit(self._first)
            self._first = ()
            self._on_event()
        while not is_last:
            batch, is_last = self._next_batch()
            if batch:
                self._commit(batch)
            del batch  # it holds pictures of the cameras' rings
            if time.monotonic() >= self._trim_due_s:  # here, since a slow disk must not hold up the supervisor
                self.outbox.trim()
                self._trim_due_s = time.monotonic() + TRIM_EVERY_S

    def _commit(self, batch: Sequence[_Done]) -> None:
        self.outbox.commit([done.draft for done in batch])
        now_s = time.monotonic()
        for done in batch:
            self._tally(done.answer, now_s)
        self.stages["commit"].progress(len(batch))
        self._on_event()

    def _next_batch(self) -> tuple[list[_Done], bool]:
        """What has queued up while the last commit was under way; nothing is ever held back to fill a group. Empty when it is time to trim."""
        batch: list[_Done] = []
        try:
            item = self._results.get(timeout=max(0.01, self._trim_due_s - time.monotonic()))
        except queue.Empty:
            return batch, False
        while item is not None:
            batch.append(item)
            try:
                item = self._results.get_nowait()
            except queue.Empty:
                return batch, False
        return batch, True

    def _tally(self, answer: Answer, now_s: float) -> None:
        tally = self.tallies[answer.case.camera]
        if isinstance(answer.error, FrameError):
            tally.bad += 1
        else:
            tally.results += 1
        timings = None
        if answer.inspection is not None:
            timing = answer.clockings.timing(answer.case)
            timings = Timings(timing.infer, timing.total, (now_s - answer.case.captured_s) * 1000)
            self.timings.append(timings)
        outcome = Outcome(answer.case, answer.inspection, answer.error, timings, answer.image)
        tally.verdicts[outcome.verdict] += 1
        for observer in self.observers:
            observer.committed(outcome)
