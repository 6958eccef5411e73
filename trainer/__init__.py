"""Learns image encoders and clusters, and calibrates novelty: `fit(settings)` gives a run folder that dkm-export turns into one ONNX file."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["FitOptions", "Run", "TrainSettings", "fit", "load_run"]

if TYPE_CHECKING:
    from trainer.artifact import Run, load_run
    from trainer.fitting import FitOptions, fit
    from trainer.settings import TrainSettings

_HOMES = {
    "fit": "fitting",
    "FitOptions": "fitting",
    "Run": "artifact",
    "load_run": "artifact",
    "TrainSettings": "settings",
}


def __getattr__(name: str) -> object:
    """Loads a public name when it is first asked for: `dkm-train --help` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"trainer.{_HOMES[name]}"), name)
