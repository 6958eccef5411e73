"""The line's figures in Prometheus's words, made at scrape time from one snapshot: nothing is counted a second time. Extra `metrics`.

The supervisor fills `Snapshot`; `Exporter.text` is what `/metrics` answers. Names and meaning: docs/operations.md.
frames_chosen = frames{result} + frames{bad} + frames{dropped} + frames_under_way, per camera.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from edge_dkm.drift.monitor import DriftState, Moved, Recommended
from edge_dkm.errors import UsageError
from edge_dkm.message import CameraCounters, Gap, OutboxHealth, StageHealth
from edge_dkm.service.histogram import HistogramCounts
from edge_dkm.service.restarts import PROCESS

PREFIX = "edge_dkm_"
JUMP_S = 1.0
# Series that stand at 0 from the start: Prometheus sees no increase in a series that begins at 1.
FRAME_REASONS = ("superseded",)
GAP_REASONS: tuple[str, ...] = get_args(Gap.model_fields["reason"].annotation)
MOVED: tuple[str, ...] = get_args(Moved)
RECOMMENDED: tuple[str, ...] = get_args(Recommended)
PUBACKS = (0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99)


@dataclass(frozen=True)
class CameraSnapshot:
    """One camera. `counters` are those of the health message; `states`: results by completed, failed, bad_frame."""

    is_online: bool
    counters: CameraCounters
    states: Mapping[str, int]
    infer_s: HistogramCounts | None = None
    novelty: HistogramCounts | None = None


@dataclass(frozen=True)
class ModelRow:
    """The model of one camera."""

    camera: str
    id: str
    sha256: str
    codebook: str


@dataclass(frozen=True)
class Snapshot:
    """A running line at one moment.

    `outbox_dropped`: results that a limit dropped from the outbox, by camera and reason (not frames: those are in the counters).
    `drift` by camera; `not_followed`: parts left out of drift, reservoir and novel frames.
    `pubacks`: answers of the broker by MQTT reason code. `ack_lag`: rows that were sent and not acknowledged end to end.
    """

    version: str
    uptime_s: float
    cameras: Mapping[str, CameraSnapshot]
    stages: Mapping[str, StageHealth]
    restarts: Mapping[str, int]
    models: tuple[ModelRow, ...]
    outbox: OutboxHealth
    outbox_dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    is_blocked: bool = False
    pubacks: Mapping[int, int] = field(default_factory=dict)
    ack_lag: int = 0
    is_connected: bool = False
    disk_free_bytes: int = 0
    rss_bytes: int | None = None
    state_corrupt: int = 0
    clock_jumps: int = 0
    clock_synced: bool | None = None
    drift: Mapping[str, DriftState] = field(default_factory=dict)
    not_followed: int = 0


class ClockJumps:
    """Counts jumps of the wall clock: it and the monotonic clock no longer agree. Called with both, every few seconds."""

    def __init__(self) -> None:
        self.count = 0
        self._difference_s: float | None = None

    def look(self, wall_s: float, mono_s: float) -> bool:
        """Whether the wall clock has jumped by more than a second since the last look."""
        before, self._difference_s = self._difference_s, wall_s - mono_s
        has_jumped = before is not None and abs(self._difference_s - before) > JUMP_S
        self.count += has_jumped
        return has_jumped


class Exporter:
    """Makes the text of one scrape from one snapshot.

    Raises:
        UsageError: prometheus-client is not installed.
    """

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        try:
            from prometheus_client import CollectorRegistry
        except ModuleNotFoundError:
            raise UsageError(
                "health.metrics is true, but prometheus-client is not installed: pip install 'edge-dkm[metrics]', or say metrics: false"
            ) from None
        # A registry of its own, without the process's default collectors: a host program may have those.
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(take))

    def text(self) -> bytes:
        """Prometheus text format 0.0.4."""
        from prometheus_client import generate_latest

        return bytes(generate_latest(self._registry))


class _Collector:
    """A collector as prometheus-client's registry wants it."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def describe(self) -> list[Any]:
        """Nothing: the registry would else take a snapshot at registration, when the line does not yet stand."""
        return []

    def collect(self) -> Iterator[Any]:
        snapshot = self._take()
        yield from _camera_families(snapshot)
        yield from _delivery_families(snapshot)
        yield from _line_families(snapshot)
        yield from _drift_families(snapshot)
        yield from _histograms(snapshot)


Rows = list[tuple[tuple[str, ...], float]]


def _counter(name: str, text: str, labels: tuple[str, ...], rows: Rows) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(PREFIX + name, text, labels=labels), rows)


def _gauge(name: str, text: str, labels: tuple[str, ...], rows: Rows) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(PREFIX + name, text, labels=labels), rows)


def _filled(family: Any, rows: Rows) -> Any:
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _camera_families(snapshot: Snapshot) -> Iterator[Any]:
    chosen: Rows = []
    frames: Rows = []
    under_way: Rows = []
    results: Rows = []
    dropped: Rows = []
    for name, camera in snapshot.cameras.items():
        counters = camera.counters
        lost = sum(counters.dropped.values())
        chosen.append(((name,), counters.frames))
        frames += [
            ((name, outcome), n)
            for outcome, n in (("result", counters.results), ("bad", counters.bad), ("dropped", lost))
        ]
        under_way.append(((name,), counters.frames - counters.results - counters.bad - lost))
        results += [((name, state), n) for state, n in camera.states.items()]
        reasons = {**dict.fromkeys(FRAME_REASONS, 0), **counters.dropped}
        dropped += [((name, reason), n) for reason, n in reasons.items()]
    online: Rows = [((name,), camera.is_online) for name, camera in snapshot.cameras.items()]
    yield _counter("frames_chosen", "Frames that a trigger chose.", ("camera",), chosen)
    yield _counter("frames", "Frames by what became of them: result, bad, dropped.", ("camera", "outcome"), frames)
    yield _gauge("frames_under_way", "Frames chosen and not yet result, bad or dropped.", ("camera",), under_way)
    yield _counter("results", "Results: completed, failed, bad_frame.", ("camera", "state"), results)
    yield _counter("dropped", "Frames that got no result, by reason.", ("camera", "reason"), dropped)
    yield _gauge("camera_online", "1 while the camera gives frames.", ("camera",), online)


def _delivery_families(snapshot: Snapshot) -> Iterator[Any]:
    outbox = snapshot.outbox
    lost: Rows = [
        ((name, reason), n)
        for name in dict.fromkeys([*snapshot.cameras, *snapshot.outbox_dropped])
        for reason, n in {**dict.fromkeys(GAP_REASONS, 0), **snapshot.outbox_dropped.get(name, {})}.items()
    ]
    pubacks = {**dict.fromkeys(PUBACKS, 0), **snapshot.pubacks}
    yield _gauge("outbox_rows", "Results not yet acknowledged.", (), [((), outbox.rows)])
    yield _gauge("outbox_bytes", "Their bytes.", (), [((), outbox.bytes)])
    yield _gauge("outbox_oldest_seconds", "Age of the oldest of them.", (), [((), outbox.oldest_s)])
    yield _gauge("outbox_blocked", "1 while a full outbox holds the line.", (), [((), snapshot.is_blocked)])
    yield _counter("outbox_dropped", "Results that a limit dropped, declared as gaps.", ("camera", "reason"), lost)
    yield _counter(
        "puback",
        "Answers of the broker to results, by MQTT reason code.",
        ("code",),
        [((f"0x{code:02x}",), n) for code, n in sorted(pubacks.items())],
    )
    yield _gauge("ack_lag", "Rows sent and not acknowledged end to end.", (), [((), snapshot.ack_lag)])
    yield _gauge("broker_connected", "1 while connected to the broker.", (), [((), snapshot.is_connected)])


def _line_families(snapshot: Snapshot) -> Iterator[Any]:
    stages = snapshot.stages
    restarts = {**dict.fromkeys([*stages, PROCESS], 0), **snapshot.restarts}
    yield _gauge(
        "stage_progress_seconds",
        "Time since the stage's last progress; an idle stage's grows.",
        ("stage",),
        [((name,), stage.age_s) for name, stage in stages.items()],
    )
    yield _gauge(
        "stage_stuck",
        "1 while work waits and nothing is done.",
        ("stage",),
        [((name,), stage.state == "stuck") for name, stage in stages.items()],
    )
    yield _counter("stage_done", "What the stage has done.", ("stage",), [((n,), s.count) for n, s in stages.items()])
    yield _counter(
        "stage_restarts",
        "Restarts of a stage, and of the process for a stage's sake; kept over restarts.",
        ("stage",),
        [((name,), n) for name, n in sorted(restarts.items())],
    )
    yield _gauge(
        "model_info",
        "Which model judges.",
        ("camera", "id", "sha256", "codebook", "version"),
        [((row.camera, row.id, row.sha256, row.codebook, snapshot.version), 1) for row in snapshot.models],
    )
    yield _counter("state_corrupt", "Damaged state files that were moved aside.", (), [((), snapshot.state_corrupt)])
    yield _counter("clock_jumps", "Jumps of the wall clock.", (), [((), snapshot.clock_jumps)])
    yield _gauge("disk_free_bytes", "Free space for the state folder.", (), [((), snapshot.disk_free_bytes)])
    yield _gauge("uptime_seconds", "Since the line started.", (), [((), snapshot.uptime_s)])
    if snapshot.rss_bytes is not None:
        yield _gauge("rss_bytes", "Resident memory of the process.", (), [((), snapshot.rss_bytes)])
    if snapshot.clock_synced is not None:
        yield _gauge("clock_synced", "1 while the clock is synchronised.", (), [((), snapshot.clock_synced)])


def _drift_families(snapshot: Snapshot) -> Iterator[Any]:
    moved: Rows = []
    recommended: Rows = []
    for name, state in snapshot.drift.items():
        moved += [((name, what), what in state.moved) for what in MOVED]
        recommended += [((name, what), what == state.recommended) for what in RECOMMENDED]
    shift: Rows = [((name,), state.shift) for name, state in snapshot.drift.items() if state.shift is not None]
    rate: Rows = [((name,), state.novelty_rate) for name, state in snapshot.drift.items()]
    yield _gauge("drift_moved", "1 for what has moved since the training.", ("camera", "what"), moved)
    yield _gauge("drift_recommended", "1 for what is recommended.", ("camera", "what"), recommended)
    yield _gauge("drift_shift", "Shift of recent embeddings in the scatter of the reference.", ("camera",), shift)
    yield _gauge("drift_novelty_rate", "Share of recent parts that are novel.", ("camera",), rate)
    yield _counter(
        "parts_not_followed", "Parts left out of drift, reservoir, novel frames.", (), [((), snapshot.not_followed)]
    )


def _histograms(snapshot: Snapshot) -> Iterator[Any]:
    from prometheus_client.core import HistogramMetricFamily

    infer = HistogramMetricFamily(PREFIX + "infer_seconds", "Inference of one frame.", labels=("camera",))
    novelty = HistogramMetricFamily(
        PREFIX + "novelty_score", "How strange the parts look; 1.0 is the edge.", labels=("camera",)
    )
    for name, camera in snapshot.cameras.items():
        for family, counts in ((infer, camera.infer_s), (novelty, camera.novelty)):
            if counts is not None:
                buckets = [(repr(bound), float(n)) for bound, n in zip(counts.bounds, counts.at_most, strict=True)]
                family.add_metric((name,), [*buckets, ("+Inf", float(counts.count))], counts.total)
    yield infer
    yield novelty
