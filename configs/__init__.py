"""Strict settings: YAML files, overrides and environment read into frozen pydantic models. Imports nothing of ours."""
from configs.document import ConfigError
from configs.loader import Settings, Sources, load_settings, load_text
from configs.shipped import find, shipped_names

__all__ = ["ConfigError", "Settings", "Sources", "find", "load_settings", "load_text", "shipped_names"]
