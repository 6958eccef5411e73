"""Reads a line file without the secrets that it takes from the environment: who installs a service or asks a station need not know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import Sources, load_settings
from configs.document import read_document
from configs.shipped import find
from edge_dkm.errors import UsageError
from edge_dkm.settings import LineSettings

NAMING = ("station", "state")  # what must be known for certain


@dataclass(frozen=True)
class Outline:
    """A line file at `path`, with a placeholder where `variables` of the environment stand."""

    path: Path
    settings: LineSettings
    variables: tuple[str, ...]


class _Placeholders(dict[str, str]):
    """An environment that has every variable, and notes which were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, None] = {}

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        self.asked[name] = None
        return "1"  # fits text as well as a number


def read_outline(line: str | Path, overrides: Sequence[str] = ()) -> Outline:
    """Station, state folder and all else that does not come from the environment.

    Raises:
        ConfigError: the line file is not right.
        UsageError: station or state come from the environment.
    """
    environment = _Placeholders()
    path = find(line, "line")
    document = read_document(path, environment)
    for key in NAMING:
        node = document.value.get(key) if isinstance(document.value, dict) else None
        if node is not None and "${" in node.raw:
            raise UsageError(
                f"{node.place} {key} is {node.raw}, expected it written out: it names the service and its folder"
            )
    settings = load_settings(LineSettings, path, "line", Sources(overrides, environ=environment))
    return Outline(path, settings, tuple(environment.asked))
