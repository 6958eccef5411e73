"""Finds a settings file: a path of the user's, or one of the files that ship inside this package."""

from __future__ import annotations

import difflib
from pathlib import Path

from configs.errors import ConfigError

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
    if not path.name or not str(name):  # "", ".", "/"
        raise ConfigError([f"{name or '(nothing)'} is no name of a file, expected a settings file"], "CFG-FILE")
    try:
        for candidate in (path, path.with_name(path.name + ".yaml")):
            if candidate.is_file():
                return candidate
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise ConfigError([f"{path} cannot be read: {error.strerror or error}"], "CFG-FILE") from None
    inside = path.with_suffix("") if path.suffix in {".yaml", ".yml"} else path
    if str(inside.parent) in {".", f"configs/{kind}"}:
        shipped = _HERE / kind / f"{inside.name}.yaml"
        if shipped.is_file():
            return shipped
    if path.is_dir() or path.exists():
        kind = "a folder" if path.is_dir() else "a device, pipe or socket"
        raise ConfigError([f"{path} is {kind}, expected a settings file"], "CFG-FILE")
    names = shipped_names(kind)
    match = difflib.get_close_matches(inside.name, names, n=1)
    hint = f", did you mean '{match[0]}'?" if match else ""
    raise ConfigError(
        [
            f"{name}: no such settings file, and no shipped {kind} settings of that name (shipped: {', '.join(names)}){hint}"
        ],
        "CFG-FILE",
    )
