"""Where OK and NG go: kinds of outputs, one per file. Adding one: a file, and a line in OUTPUTS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from devices.outputs.base import Output, OutputError, OutputSettings
from devices.outputs.gpio import GpioOutput
from devices.outputs.modbus import ModbusOutput

OUTPUTS: dict[str, type[Output]] = {
    "modbus": ModbusOutput,
    "gpio": GpioOutput,
}

if TYPE_CHECKING:
    AnyOutput = OutputSettings
else:  # the registry decides at run time what may stand here
    AnyOutput = Annotated[Union[(*(output.Settings for output in OUTPUTS.values()),)], Field(discriminator="kind")]


def open_output(settings: OutputSettings) -> Output:
    """The output of the settings, not connected yet: the first write connects.

    Raises:
        OutputError: O-EXTRA where its optional package is not installed.
    """
    return OUTPUTS[settings.kind](settings)


__all__ = ["OUTPUTS", "AnyOutput", "Output", "OutputError", "OutputSettings", "open_output"]
