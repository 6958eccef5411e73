"""Device profiles: one execution target = one YAML under configs/device/. Read by the line, the exporter and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from configs import Settings, Sources, load_settings


class DeviceProfile(Settings):
    """How a model runs on one kind of device.

    `providers` in order of preference, with their `options`; `threads` 0: one per core. `fixed_frame`: the provider needs a graph
    exported with --frame. `resize`: the pre-processing modes it can run. `run_here` False: written from documentation, never run
    by this project.
    """

    version: Literal[1] = 1
    title: str
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    options: dict[str, dict[str, str]] = Field(default_factory=dict)
    threads: int = Field(0, ge=0)
    spinning: bool = False
    fixed_frame: bool = False
    resize: tuple[Literal["none", "onnx", "matmul"], ...] = ("none", "onnx", "matmul")
    run_here: bool = False


def load_profile(name: str | Path) -> DeviceProfile:
    """Reads a shipped profile by name, or a user's file."""
    return load_settings(DeviceProfile, name, "device", Sources())
