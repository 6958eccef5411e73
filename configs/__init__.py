"""Strict settings: YAML files, overrides and environment read into frozen pydantic models. Imports nothing of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["ConfigError", "Settings", "Sources", "find", "load_settings", "load_text", "shipped_names"]

if TYPE_CHECKING:
    from configs.errors import ConfigError
    from configs.loader import Settings, Sources, load_settings, load_text
    from configs.shipped import find, shipped_names

_HOMES = {
    "ConfigError": "errors",
    "Settings": "loader",
    "Sources": "loader",
    "load_settings": "loader",
    "load_text": "loader",
    "find": "shipped",
    "shipped_names": "shipped",
}


def __getattr__(name: str) -> object:
    """Loads a public name when it is first asked for: the command lines' `--help` must not wait for pydantic."""
    if name not in _HOMES:
        raise AttributeError(f"module 'configs' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"configs.{_HOMES[name]}"), name)
