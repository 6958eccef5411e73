"""A line of a GPIO chip by libgpiod 2; `output: {kind: gpio, chip: /dev/gpiochip0, line: 17}`.

The line is active for OK alone. What a line shows after its process is gone is up to the chip's driver: pull it to NG in hardware.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from devices.outputs.base import Output, OutputError, OutputSettings, missing_package

if TYPE_CHECKING:
    from gpiod import LineRequest


class GpioSettings(OutputSettings):
    """`line` and `heartbeat_line` are offsets on the chip; `active_low` holds for both: active is then 0 V."""

    kind: Literal["gpio"] = "gpio"
    chip: str = "/dev/gpiochip0"
    line: int = Field(ge=0)
    heartbeat_line: int | None = Field(None, ge=0)
    active_low: bool = False

    @model_validator(mode="after")
    def _two_lines(self) -> GpioSettings:
        if self.heartbeat_line == self.line:
            raise ValueError(f"heartbeat_line is {self.line}, expected another line than line")
        return self


class GpioOutput(Output):
    """The lines are requested once and held; the request itself already puts them to inactive, which is NG."""

    Settings = GpioSettings
    settings: GpioSettings

    def __init__(self, settings: OutputSettings) -> None:
        super().__init__(settings)
        try:
            import gpiod
        except ImportError as error:
            raise missing_package("gpio", "gpiod", error) from error
        self._gpiod = gpiod
        self._request: LineRequest | None = None

    @property
    def has_heartbeat(self) -> bool:
        return self.settings.heartbeat_line is not None

    def _open(self) -> None:
        from gpiod.line import Direction, Value

        if not Path(self.settings.chip).exists():
            raise OutputError("O-NODEV", f"{self}: there is no {self.settings.chip}; `gpiodetect` lists the chips")
        inactive = self._gpiod.LineSettings(
            direction=Direction.OUTPUT, output_value=Value.INACTIVE, active_low=self.settings.active_low
        )
        lines = (self.settings.line, self.settings.heartbeat_line)
        try:
            self._request = self._gpiod.request_lines(
                self.settings.chip, {line: inactive for line in lines if line is not None}, consumer="edge-dkm"
            )
        except (OSError, ValueError) as error:
            raise OutputError(
                "O-REFUSED", f"{self}: {error}; is the line free (`gpioinfo`), and may this user open the chip?"
            ) from error

    def _write(self, is_ok: bool) -> None:
        self._set_line(self.settings.line, is_ok)

    def _beat(self, value: bool) -> None:
        if self.settings.heartbeat_line is not None:
            self._set_line(self.settings.heartbeat_line, value)

    def _set_line(self, line: int, is_active: bool) -> None:
        from gpiod.line import Value

        if self._request is None:
            raise OutputError("O-LOST", f"{self} is not open")
        try:
            self._request.set_value(line, Value.ACTIVE if is_active else Value.INACTIVE)
        except OSError as error:
            raise OutputError("O-LOST", f"{self}: {error}") from error

    def _release(self) -> None:
        request, self._request = self._request, None
        if request is not None:
            request.release()

    def __str__(self) -> str:
        return f"gpio {self.settings.chip} line {self.settings.line}"
