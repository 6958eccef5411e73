"""The edge runtime: inspect frames with an exported model, keep every result, publish it over MQTT."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "EdgeError",
    "FrameError",
    "Inspection",
    "InspectionError",
    "Inspector",
    "ModelError",
    "Policy",
    "Runtime",
    "__version__",
]

if TYPE_CHECKING:
    from edge_dkm.decision import Policy
    from edge_dkm.errors import EdgeError, FrameError, InspectionError, ModelError
    from edge_dkm.inspector import Inspection, Inspector, Runtime

_HOMES = {
    "Inspector": "inspector",
    "Inspection": "inspector",
    "Runtime": "inspector",
    "Policy": "decision",
    "EdgeError": "errors",
    "FrameError": "errors",
    "InspectionError": "errors",
    "ModelError": "errors",
}


def __getattr__(name: str) -> object:
    """Loads a public name when it is first asked for: `edge-dkm --help` must not wait for onnxruntime."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_dkm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"edge_dkm.{_HOMES[name]}"), name)
