"""Settings of one camera: where frames come from, which part of them counts, when a frame is inspected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, model_validator

from configs import Settings
from devices.frame_checks import CheckSettings
from devices.outputs import AnyOutput
from devices.privacy import Polygon
from devices.triggers import TRIGGERS
from devices.triggers.base import PlannedTriggerSettings, TriggerSettings
from devices.triggers.free import FreeSettings

if TYPE_CHECKING:
    AnyTrigger = TriggerSettings
else:  # the registry decides at run time what may stand here
    AnyTrigger = Annotated[
        Union[(*(trigger.Settings for trigger in TRIGGERS.values()), PlannedTriggerSettings)],
        Field(discriminator="kind"),
    ]

RoiBox = tuple[
    Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]
]


class CameraSettings(Settings):
    """One camera of a line.

    `source`: usb:0, rtsp://user:password@host/path, a film (file:path), a folder of images (folder:path), synthetic:options.
    `roi` (x, y, w, h) in frame pixels: what the model sees. `policy`: `latest` inspects the newest frame and counts the skipped ones,
    `every` waits for the inspection. `pace` and `loop` are for recorded material. `framing: any` accepts a ROI or frame size
    other than the training's. `deadline_ms`: a frame that has no result by then ends in a `failed` result. `mask`: polygons in frame pixels
    that are black before anything looks at a frame. A live camera is given up and opened anew when it gives no frame for `stall_s`, or
    does not open within `open_timeout_s`. `output`: where OK and NG go.
    """

    source: str = Field(min_length=1, description="usb:0, rtsp://..., a film, a folder or synthetic:")
    roi: RoiBox | None = None
    policy: Literal["latest", "every"] = "latest"
    trigger: AnyTrigger = FreeSettings()
    pace: Literal["source", "max"] = "source"
    loop: bool = False
    fps: float | None = Field(None, gt=0, le=1000, description="overrides the rate of recorded material")
    framing: Literal["same", "any"] = "same"
    deadline_ms: int | None = Field(None, ge=1, le=3_600_000)
    mask: tuple[Polygon, ...] = ()
    checks: CheckSettings = CheckSettings()
    stall_s: float = Field(5.0, gt=0, le=3600)
    open_timeout_s: float = Field(10.0, gt=0, le=3600)
    output: AnyOutput | None = None
    model: str | None = Field(None, description="this camera's own model instead of the line's")

    @model_validator(mode="after")
    def _region_inside(self) -> CameraSettings:
        region = getattr(self.trigger, "region", None)
        if region is not None and self.roi is not None:
            x, y, w, h = region
            left, top, width, height = self.roi
            if x < left or y < top or x + w > left + width or y + h > top + height:
                raise ValueError(
                    f"trigger.region {list(region)} does not lie inside roi {list(self.roi)} (both in frame pixels)"
                )
        return self
