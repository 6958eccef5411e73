"""The settings of a line: one YAML per station. What is planned but not built yet is refused, never ignored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from configs import Settings, Sources, load_settings
from devices.settings import CameraSettings
from edge_dkm.contract import Verdict

ENVIRONMENT_PREFIX = "EDGE_DKM"
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)]
STATION_TOPICS = ("ack", "alarm", "cmd", "health", "info", "part", "reply", "state", "status")
EMBEDDED = "embedded"
MAX_HOURS = 876_000  # a hundred years
EMBEDDED_PORT = 18830  # not 1883: a broker of the system may run there


def _no_station_topic(name: str) -> str:
    if name in STATION_TOPICS:
        raise ValueError(
            f"a name other than {', '.join(STATION_TOPICS)}: these are the station's own topics, beside those of its cameras"
        )
    return name


def _usable_host(host: str) -> str:
    # An empty label, or one of over 63 bytes, raises UnicodeError deep inside the MQTT client's thread.
    labels = host.removesuffix(".").split(".")
    if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,253}", host) or not all(1 <= len(label) <= 63 for label in labels):
        raise ValueError("expected a host name or an IP address (or embedded)")
    return host


CameraName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=32), AfterValidator(_no_station_topic)]
Host = Annotated[str, AfterValidator(_usable_host)]
Credential = Annotated[str, Field(max_length=16_384)]  # MQTT has room for 65535 bytes


class UnsSettings(Settings):
    """ISA-95 levels in front of the topics; any may be absent."""

    enterprise: Slug | None = None
    site: Slug | None = None
    area: Slug | None = None
    line: Slug | None = None
    cell: Slug | None = None

    @property
    def levels(self) -> list[str]:
        """Those that are set, from the top."""
        return [level for level in (self.enterprise, self.site, self.area, self.line, self.cell) if level is not None]


class VerdictSettings(Settings):
    """What the line makes of clusters, by name or id; wins over the verdicts in the model."""

    default: Verdict = "pass"
    novel: Verdict = "review"
    clusters: dict[str, Verdict] = Field(default_factory=dict)


class TlsSettings(Settings):
    """PEM files. Without `ca`, the system's certificates are trusted; `cert` and `key` identify this station to the broker."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @model_validator(mode="after")
    def _pair(self) -> TlsSettings:
        if (self.cert is None) != (self.key is None):
            raise ValueError("expected cert and key together, or neither")
        return self


class MqttSettings(Settings):
    """The broker. `host: embedded` starts one as a child, for a first try. `version` 3.1.1 hides refusals: results may be lost unseen."""

    host: Host = EMBEDDED
    port: int | None = Field(None, ge=1, le=65535, description="default 1883, with TLS 8883, embedded 18830")
    tls: TlsSettings | None = None
    username: Credential | None = None
    password: Credential | None = None
    keepalive_s: int = Field(4, ge=2, le=600, description="a broker that is silent for twice this is taken for gone")
    version: Literal["5", "3.1.1"] = "5"

    @property
    def effective_port(self) -> int:
        """The port to connect to."""
        return self.port or (EMBEDDED_PORT if self.host == EMBEDDED else 8883 if self.tls else 1883)


class DeliverySettings(Settings):
    """How results are kept and sent.

    `mode`: when a row counts as delivered: the broker's PUBACK (`puback`: then deleted, `journal`: then kept `keep_h` for replays) or the
    consumer's own acknowledgement (`e2e`). `order: live_first` sends what waited during an outage to `<camera>/history`, behind new
    results. `limit` says what happens when `max_rows`, `max_mb` or `max_age_h` is reached.
    """

    mode: Literal["puback", "journal", "e2e"] = "journal"
    order: Literal["strict", "live_first"] = "strict"
    limit: Literal["drop_oldest", "block", "drop_newest"] = "drop_oldest"
    max_rows: int = Field(1_000_000, ge=10, le=1_000_000_000)
    max_mb: float = Field(512, gt=0, le=1_000_000)
    max_age_h: float = Field(168, gt=0, le=MAX_HOURS)
    keep_h: float = Field(72, ge=0, le=MAX_HOURS)
    history_per_s: float = Field(
        500, ge=1, le=100_000, description="pace of the backlog with live_first: below what the slowest consumer takes"
    )
    drain_timeout_s: float = Field(
        30, ge=0, le=86_400, description="how long to wait for the broker when a film or folder has ended"
    )

    @model_validator(mode="after")
    def _in_order(self) -> DeliverySettings:
        if self.mode == "e2e" and self.order != "strict":
            raise ValueError(
                "mode e2e needs order: strict, since the consumer acknowledges all up to a number; expected strict, or mode journal"
            )
        return self


class HealthSettings(Settings):
    """`/healthz`, `/readyz` and, with `metrics` (extra `metrics`), `/metrics` over HTTP. Without a port there is no server."""

    host: Host = "127.0.0.1"
    port: int | None = Field(None, ge=0, le=65535, description="0: any free one, said in the log")
    metrics: bool = False


class ImageSettings(Settings):
    """Pictures of inspected parts as JPEG on `<camera>/image`, QoS 0: for people, not for records."""

    when: Literal["never", "not_pass", "always"] = "never"
    quality: int = Field(80, ge=1, le=100)
    max_px: int = Field(640, ge=16, description="longer side")


class FramesSettings(Settings):
    """Frames kept on disk for the next training, in `<state>/frames/<camera>`: the novel ones, with `keep: borderline` also the nearly novel.

    At most `per_hour` of each kind (novel, borderline, ordinary) per camera, a few minutes' worth at once: a flood of novel parts cannot
    wear out the disk. What is too old, and the oldest above `max_mb`, is removed as parts pass.
    """

    keep: Literal["borderline", "novel", "never"] = "borderline"
    borderline: tuple[float, float] = Field((0.85, 1.0), description="of novelty_score / threshold: from, to")
    ordinary: float = Field(
        0.001, ge=0, le=1, description="share of all other parts that is kept, too, drawn by chance"
    )
    per_hour: float = Field(120, gt=0, le=1_000_000)
    max_mb: float = Field(512, gt=0, le=1_000_000, description="per camera")
    max_age_h: float = Field(336, gt=0, le=MAX_HOURS)

    @field_validator("borderline")
    @classmethod
    def _in_order(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError("expected two numbers from 0 on, the smaller one first")
        return value


class ReservoirSettings(Settings):
    """What `edge-dkm recentre` learns from: embeddings of recent parts in `<state>/reservoir`, no pictures. `rows: 0` keeps none.

    `max_mb` is for all cameras together; large embeddings get fewer rows.
    """

    rows: int = Field(20_000, ge=0, le=1_000_000, description="per camera")
    max_mb: float = Field(20, gt=0, le=10_000)


class DriftSettings(Settings):
    """Whether the line still sees what its model was trained on: `<camera>/drift`."""

    enabled: bool = True
    false_alarm_every: int = Field(
        1_000_000, ge=1000, description="parts of one camera to the first false alarm, on average and at least"
    )
    run_in: int = Field(
        3000,
        ge=200,
        le=1_000_000,
        description="so many first parts are the line's own beginning, that later ones are held against",
    )
    max_parts_per_s: float = Field(
        10.0, gt=0, description="of one camera; of a faster one, so many are looked at, evenly in time"
    )


class LineSettings(Settings):
    """What `edge-dkm run` reads."""

    version: Literal[1] = 1
    station: Slug = Field(description="the station's name, [A-Za-z0-9_.-]+")
    uns: UnsSettings = UnsSettings()
    model: str | None = Field(None, description="an ONNX file of dkm-export; a camera may name its own instead")
    recipes: dict[str, str] | None = None
    device: str = "cpu"
    strict_provider: bool = True
    novelty_threshold: float | None = Field(None, gt=0)
    cameras: dict[CameraName, CameraSettings] = Field(min_length=1, description="at least one camera")
    parts: dict[str, Any] | None = None
    verdicts: VerdictSettings = VerdictSettings()
    mqtt: MqttSettings = MqttSettings()
    delivery: DeliverySettings = DeliverySettings()
    health: HealthSettings = HealthSettings()
    image: ImageSettings = ImageSettings()
    drift: DriftSettings = DriftSettings()
    frames: FramesSettings = FramesSettings()
    reservoir: ReservoirSettings = ReservoirSettings()
    infer_timeout_s: float = Field(5.0, gt=0, le=600, description="an inference that takes longer is stopped")
    state: Path = Field(
        Path("state"), validate_default=False, description="the folder for outbox, codebooks and what else must survive"
    )

    @field_validator("recipes", "parts")
    @classmethod
    def _not_built(cls, value: object) -> object:
        if value is not None:
            raise ValueError("it is not built yet; leave it out")
        return value

    @model_validator(mode="after")
    def _every_camera_has_a_model(self) -> LineSettings:
        bare = [name for name, camera in self.cameras.items() if camera.model is None]
        if self.model is None and bare:
            raise ValueError(
                f"model is missing: camera {bare[0]} has none of its own, expected the path of an ONNX file"
            )
        return self

    @property
    def base_topic(self) -> str:
        """`[enterprise/site/area/line/cell/]dkm/v1/<station>`."""
        return "/".join([*self.uns.levels, "dkm", "v1", self.station])


def load_line(name: str | Path, overrides: list[str] | None = None) -> LineSettings:
    """Reads a line file, or a shipped one by name, with `--set` overrides and the environment `EDGE_DKM__...`."""
    return load_settings(LineSettings, name, "line", Sources(overrides or [], ENVIRONMENT_PREFIX))
