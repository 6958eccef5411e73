"""Device profiles: one execution target = one YAML under configs/device/. Read by the line, the exporter and the commands about a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from configs import Settings, Sources, load_settings, shipped_names


class DeviceProfile(Settings):
    """How a model runs on one kind of device.

    `providers` in order of preference, with their `options`; `threads` 0: one per core. `precision` other than fp32: the provider
    lowers the whole graph, which the golden images must allow. `warm_up`: runs before the first frame. `fixed_frame`: the provider
    needs a graph exported with --frame. `resize`: the pre-processing modes it can run. `cache`: folder of compiled models, instead of
    the line's. `run_here` False: written from documentation, never run by this project.
    """

    version: Literal[1] = 1
    title: str
    providers: tuple[str, ...] = Field(("CPUExecutionProvider",), min_length=1)
    options: dict[str, dict[str, str]] = Field(default_factory=dict)
    threads: int = Field(0, ge=0, le=1024)
    spinning: bool = False
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    warm_up: int = Field(3, ge=0, le=1000)
    io_binding: bool = False
    fixed_frame: bool = False
    resize: tuple[Literal["none", "onnx", "matmul"], ...] = ("none", "onnx", "matmul")
    cache: Path | None = None
    run_here: bool = False

    @property
    def named(self) -> str:
        """The title, marked where this project has never run the profile."""
        return self.title if self.run_here else f"{self.title} (never run by this project)"


def load_profile(name: str | Path) -> DeviceProfile:
    """Reads a shipped profile by name, or a user's file."""
    return load_settings(DeviceProfile, name, "device", Sources())


def shipped_profiles() -> dict[str, DeviceProfile]:
    """Every shipped profile by name."""
    return {name: load_profile(name) for name in shipped_names("device")}
