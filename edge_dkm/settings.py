"""The settings of a line: one YAML per station. What is planned but not built yet is refused, never ignored."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from configs import Settings, Sources, load_settings
from devices.settings import CameraSettings
from edge_dkm.contract import Verdict

ENVIRONMENT_PREFIX = "EDGE_DKM"
Slug = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=64)]
CameraName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=32)]
EMBEDDED = "embedded"
EMBEDDED_PORT = 18830  # not 1883: a broker of the system may run there


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

    host: str = EMBEDDED
    port: int | None = Field(None, ge=1, le=65535, description="default 1883, with TLS 8883, embedded 18830")
    tls: TlsSettings | None = None
    username: str | None = None
    password: str | None = None
    keepalive_s: int = Field(15, ge=5, le=600)
    version: Literal["5", "3.1.1"] = "5"

    @field_validator("host")
    @classmethod
    def _usable_host(cls, host: str) -> str:
        # A label of over 63 bytes raises UnicodeError deep inside the MQTT client's thread.
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,253}", host) or any(len(label) > 63 for label in host.split(".")):
            raise ValueError("expected a host name or an IP address (or embedded)")
        return host

    @property
    def effective_port(self) -> int:
        """The port to connect to."""
        return self.port or (EMBEDDED_PORT if self.host == EMBEDDED else 8883 if self.tls else 1883)


class DeliverySettings(Settings):
    """How results are kept and sent. `limit` says what happens when `max_rows`, `max_mb` or `max_age_h` is reached."""

    mode: Literal["puback", "journal", "e2e"] = "journal"
    order: Literal["strict", "live_first"] = "strict"
    limit: Literal["drop_oldest", "block", "drop_newest"] = "drop_oldest"
    max_rows: int = Field(1_000_000, ge=10)
    max_mb: float = Field(512, gt=0)
    max_age_h: float = Field(168, gt=0)
    keep_h: float = Field(72, ge=0)
    drain_timeout_s: float = Field(
        30, ge=0, description="how long to wait for the broker when a film or folder has ended"
    )

    @field_validator("mode", "order", "limit")
    @classmethod
    def _built(cls, value: str) -> str:
        if value not in {"journal", "strict", "drop_oldest"}:
            raise ValueError(f"{value} is not built yet, expected journal, strict and drop_oldest")
        return value


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
