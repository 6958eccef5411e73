"""What the station says over MQTT: one frozen model per schema. `docs/contracts.md` is the page for integrators.

Unknown values are left out, never null or NaN; keys may be added within a version, so a reader must ignore what it does not know.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from edge_dkm.clock import wall_s

MAX_RESULT_BYTES = 1024
MAX_DETAIL_BYTES = 200


def _wire_text(text: str) -> str:
    """Cut to a size, and free of what UTF-8 cannot say (a file name may hold it): a message must never fail for its detail."""
    return text.encode("utf-8", "replace")[:MAX_DETAIL_BYTES].decode("utf-8", "ignore")


Detail = Annotated[str, BeforeValidator(_wire_text)]


class Message(BaseModel):
    """Base of every payload."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, ser_json_inf_nan="null", protected_namespaces=())

    def payload(self) -> bytes:
        """Compact UTF-8 JSON without unknown values."""
        return self.model_dump_json(by_alias=True, exclude_none=True).encode()


class Part(Message):
    """Which part, where a trigger said so."""

    id: str
    product: str | None = None


class TriggerInfo(Message):
    """What started the inspection; `id` counts per camera and run of the program."""

    kind: Literal["free", "timer", "part_present", "mqtt", "plc"]
    id: int


class ModelInfo(Message):
    """Which model judged, with which codebook (`base` or the 12-digit digest of a station's own)."""

    id: str
    sha256: str
    codebook: str
    contract: int


class ClusterInfo(Message):
    """The nearest cluster; `margin` is how much further the second nearest lies."""

    id: int
    name: str
    distance: float
    margin: float | None = None


class NoveltyInfo(Message):
    """How strange the part looks; 1.0 is the edge at the model's target false-reject rate."""

    score: float
    threshold: float
    p_value: float
    is_novel: bool


class Timing(Message):
    """Milliseconds: waiting and cutting out, inference, from capture to the answer."""

    capture: float
    infer: float
    total: float


class ErrorInfo(Message):
    """Why there is no answer."""

    code: str
    detail: Detail


class Result(Message):
    """One part or frame: `dkm.result/1`. `bad_frame` and `failed` carry `error` and verdict `error`, no cluster and no novelty."""

    schema_: Literal["dkm.result/1"] = Field("dkm.result/1", alias="schema")
    result_id: str
    epoch: str
    seq: int
    cseq: int
    boot_id: str
    ts: str
    station: str
    camera: str
    state: Literal["completed", "bad_frame", "failed"]
    trigger: TriggerInfo
    part: Part | None = None
    model: ModelInfo | None = None
    cluster: ClusterInfo | None = None
    novelty: NoveltyInfo | None = None
    verdict: Literal["pass", "review", "reject", "error"]
    reason: Literal["cluster_verdict", "novel", "default", "bad_frame", "failed"]
    error: ErrorInfo | None = None
    timing_ms: Timing | None = None
    historical: bool = False


class Gap(Message):
    """Results that a limit dropped: `dkm.gap/1`, on the result topic. `from` and `to` are cseq, inclusive."""

    schema_: Literal["dkm.gap/1"] = Field("dkm.gap/1", alias="schema")
    ts: str
    station: str
    camera: str
    epoch: str
    seq: int
    from_: int = Field(alias="from")
    to: int
    n: int
    reason: Literal["drop_oldest", "drop_newest", "age", "row_corrupt", "disk_full"]


class Announcement(Message):
    """What all messages but results share; `session` is the counter of the last will."""

    ts: str
    station: str
    session: int


class Status(Announcement):
    """Whether the station is there; `offline` is the last will's word."""

    schema_: Literal["dkm.status/1"] = Field("dkm.status/1", alias="schema")
    state: Literal["online", "stopped", "offline"]
    boot_id: str
    epoch: str
    sw: str
    reason: str | None = None


class InfoModel(Message):
    """A loaded model."""

    id: str
    sha256: str
    codebook: str
    contract: int


class InfoCluster(Message):
    """One row of the cluster table; without a verdict, the line's default applies."""

    id: int
    name: str
    verdict: Literal["pass", "review", "reject"] | None = None
    n: int


class Providers(Message):
    """What the device profile asks for, and what runs the graph; `kernels`: how many of one frame ran on each, where they are several."""

    requested: list[str]
    actual: list[str]
    kernels: dict[str, int] | None = None


class InfoDevice(Message):
    """The device profile. `run_here`: whether this project has ever run it; `asked`: the precision it asks for, `why`: why not used.

    `head`: who computes cluster and novelty where a codebook or threshold is replaced.
    """

    title: str
    run_here: bool
    head: Literal["graph", "runtime"]
    compile_s: float
    asked: str
    why: Detail | None = None


class InfoCamera(Message):
    """One camera; w and h are those of its frames, once it has given some."""

    kind: str
    w: int | None = None
    h: int | None = None
    roi: tuple[int, int, int, int] | None = None


class InfoProblem(Message):
    """Why something else runs than was chosen."""

    code: str
    detail: Detail


class InfoCodebook(Message):
    """What judges a camera's parts: `base`, or a station codebook by its 12-digit digest. `promised_frr`: the false-reject rate it keeps."""

    codebook: str
    parent: str | None = None
    created: str | None = None
    since: str | None = None
    promised_frr: float | None = None
    problem: InfoProblem | None = None


class InfoDelivery(Message):
    """How results are delivered."""

    mode: str
    order: str


class Info(Announcement):
    """What runs here."""

    schema_: Literal["dkm.info/1"] = Field("dkm.info/1", alias="schema")
    model: InfoModel
    codebooks: dict[str, InfoCodebook] | None = None
    clusters: list[InfoCluster]
    providers: Providers
    precision: str
    device: InfoDevice | None = None
    cameras: dict[str, InfoCamera]
    delivery: InfoDelivery
    schemas: list[str]
    versions: dict[str, str]


class StateReason(Message):
    """Why the state is what it is."""

    code: str
    detail: Detail


class State(Announcement):
    """What the line is doing, since when."""

    schema_: Literal["dkm.state/1"] = Field("dkm.state/1", alias="schema")
    state: Literal["warming_up", "ready", "running", "degraded", "halted", "error"]
    since: str
    reason: StateReason | None = None


class StageHealth(Message):
    """One stage: how often it has progressed, and how long ago."""

    state: Literal["ok", "idle", "degraded", "stuck"]
    count: int
    age_s: float


class CameraCounters(Message):
    """frames (those that a trigger chose) = results + bad + dropped by reason + those under way."""

    frames: int
    results: int
    bad: int
    dropped: dict[str, int]


class OutboxHealth(Message):
    """Results not yet acknowledged."""

    rows: int
    bytes: int
    oldest_s: float


class Health(Announcement):
    """Every five seconds."""

    schema_: Literal["dkm.health/1"] = Field("dkm.health/1", alias="schema")
    uptime_s: float
    epoch: str
    last: dict[str, int]
    stages: dict[str, StageHealth]
    counters: dict[str, CameraCounters]
    outbox: OutboxHealth
    restarts: dict[str, int] = Field(default_factory=dict)
    alarms: list[str] = Field(default_factory=list)
    disk_free_mb: int
    rss_mb: int | None = None
    clock_synced: bool | None = None


class CameraHealth(Announcement):
    """One camera, on change."""

    schema_: Literal["dkm.camera/1"] = Field("dkm.camera/1", alias="schema")
    camera: str
    state: Literal["online", "offline", "bad"]
    code: str | None = None
    fps: float
    frame_age_ms: int | None = None
    reconnects: int


class Drift(Announcement):
    """Whether one camera still sees what its model was trained on: `dkm.drift/1`, retained, on change.

    n: parts seen with this codebook; shares by cluster id, novelty_rate and shift are of the last few hundred. shift: of the mean
    embedding, in the scatter of the training's held-out parts. left: the statistics that have left their interval, with the side.
    settled: whether the line's own beginning is known, against which small changes are seen. missing: what is not watched, and why.
    """

    schema_: Literal["dkm.drift/1"] = Field("dkm.drift/1", alias="schema")
    camera: str
    codebook: str
    n: int
    shares: dict[str, float]
    novelty_rate: float
    shift: float | None = None
    moved: list[Literal["light", "focus", "position", "new_type", "new_family"]]
    recommended: Literal["none", "camera", "recentre", "retrain"]
    left: list[str]
    settled: bool
    missing: Detail | None = None


class Alarm(Announcement):
    """Something that somebody should look at, raised or cleared: `dkm.alarm/1`, retained."""

    schema_: Literal["dkm.alarm/1"] = Field("dkm.alarm/1", alias="schema")
    code: str
    active: bool
    since: str
    detail: Detail
    camera: str | None = None


class Reply(Announcement):
    """What became of a command: `dkm.reply/1`. `code` (CMD-..., not_built) only where it was refused."""

    schema_: Literal["dkm.reply/1"] = Field("dkm.reply/1", alias="schema")
    id: str | None = None
    ok: bool
    code: str | None = None
    detail: Detail | None = None


class CommandMessage(Message):
    """What the MES asks for: `dkm.cmd/1`; the verb is the topic's last level. The same `id` again is answered again, not done again."""

    schema_: Literal["dkm.cmd/1"] = Field("dkm.cmd/1", alias="schema")
    id: str
    args: dict[str, Any] = Field(default_factory=dict)


class Ack(Message):
    """The consumer has every row up to `seq` `upto`, in the order sent, on its own disk: `dkm.ack/1`."""

    schema_: Literal["dkm.ack/1"] = Field("dkm.ack/1", alias="schema")
    epoch: str = Field(max_length=64)
    upto: int = Field(ge=0, lt=2**63)


MESSAGES: dict[str, type[Message]] = {
    "dkm.status/1": Status,
    "dkm.info/1": Info,
    "dkm.state/1": State,
    "dkm.health/1": Health,
    "dkm.camera/1": CameraHealth,
    "dkm.result/1": Result,
    "dkm.gap/1": Gap,
    "dkm.drift/1": Drift,
    "dkm.alarm/1": Alarm,
    "dkm.cmd/1": CommandMessage,
    "dkm.reply/1": Reply,
    "dkm.ack/1": Ack,
}


def new_result_id() -> str:
    """A UUID of version 7: unique, and in the order of time."""
    stamp_ms, noise = int(wall_s() * 1000), int.from_bytes(os.urandom(10), "big")
    value = (stamp_ms & (2**48 - 1)) << 80 | 0x7 << 76 | (noise >> 64 & 0xFFF) << 64 | 0b10 << 62 | noise & (2**62 - 1)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
