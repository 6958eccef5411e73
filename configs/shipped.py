"""Finds a settings file: a path of the user's, or one of the files that ship inside this package."""

from __future__ import annotations

import difflib
from pathlib import Path

from configs.document import ConfigError

KINDS = ("train", "line", "device")
_HERE = Path(__file__).parent


def shipped_names(kind: str) -> list[str]:
    """The names that ship for `kind` (`train`, `line`, `device`)."""
    return sorted(path.stem for path in (_HERE / kind).glob("*.yaml"))


def find(name: str | Path, kind: str) -> Path:
    """A user's file wins over a shipped one. `x`, `x.yaml` and `configs/<kind>/x.yaml` all name the shipped `x`.

    Raises:
        ConfigError: neither exists; the message lists the shipped names.
    """
    path = Path(name)
    for candidate in (path, path.with_name(path.name + ".yaml")):
        if candidate.is_file():
            return candidate
    inside = path.with_suffix("") if path.suffix in {".yaml", ".yml"} else path
    if str(inside.parent) in {".", f"configs/{kind}"}:
        shipped = _HERE / kind / f"{inside.name}.yaml"
        if shipped.is_file():
            return shipped
    if path.is_dir():
        raise ConfigError([f"{path} is a folder, expected a settings file"])
    names = shipped_names(kind)
    match = difflib.get_close_matches(inside.name, names, n=1)
    hint = f", did you mean '{match[0]}'?" if match else ""
    raise ConfigError(
        [
            f"{name}: no such settings file, and no shipped {kind} settings of that name (shipped: {', '.join(names)}){hint}"
        ]
    )
