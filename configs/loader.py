"""Reads settings into frozen pydantic models; the command lines and `trainer.fit` call it.

Precedence: command line `--set a.b=c` > environment `PREFIX__A__B=c` > file > default. Every problem is one line
`CODE place key is value, expected ...`, with the nearest known name where a key is unknown.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from configs.document import MAX_DEPTH, Node, Plain, parse_document, parse_value, read_document, read_scalar
from configs.errors import ConfigError
from configs.explain import explain, node_at
from configs.secrets import hide, is_secret_key, warn_if_readable
from configs.shipped import find


class Settings(BaseModel):
    """Base of all settings: frozen, strict about keys; the default is what we would ship."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True)
class Sources:
    """Where values may come from besides the file: `--set` items and the environment under `prefix`."""

    overrides: Sequence[str] = ()
    prefix: str | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


def load_settings(model: type[S], name: str | Path, kind: str, sources: Sources | None = None) -> S:
    """Reads the file `name`, or the shipped settings of that name, as `model`; warns of a password that everybody may read.

    Args:
        name: a path, or a shipped name (`demo`) of `kind`.
        kind: `train`, `line` or `device`.

    Raises:
        ConfigError: with every problem found, one line each.
    """
    sources = sources or Sources()
    path = find(name, kind)
    root = read_document(path, sources.environ)
    warn_if_readable(path, root)
    return _build(model, root, sources)


def load_text(model: type[S], text: str, name: str, sources: Sources | None = None) -> S:
    """The same for settings held in memory; `name` stands in messages."""
    sources = sources or Sources()
    return _build(model, parse_document(text, name, sources.environ), sources)


def _build(model: type[S], root: Node, sources: Sources) -> S:
    for variable, text in _environment(sources):
        keys = variable.removeprefix(f"{sources.prefix}__").lower().split("__")
        _place(root, keys, parse_value(text, f"environment {variable}", sources.environ))
    for item in sources.overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            shown = "..." if is_secret_key(item) else item[:60]
            raise ConfigError([f"--set {shown}: expected key.subkey=value"], "CFG-SYNTAX")
        _place(root, path.split("."), parse_value(text, "--set", sources.environ))
    return _validate(model, root)


def _environment(sources: Sources) -> list[tuple[str, str]]:
    if sources.prefix is None:
        return []
    return sorted(item for item in sources.environ.items() if item[0].startswith(f"{sources.prefix}__"))


def _place(root: Node, keys: list[str], node: Node) -> None:
    if len(keys) > MAX_DEPTH:
        raise ConfigError([f"{node.place} is nested more than {MAX_DEPTH} deep"], "CFG-SYNTAX")
    if any(is_secret_key(key) for key in keys):
        hide(node)
    current = root
    for depth, key in enumerate(keys, 1):
        if not isinstance(current.value, dict):
            raise ConfigError(
                [
                    f"{node.place}: {'.'.join(keys)} has no sub-keys, because {current.place} holds the value {current.shown()}"
                ],
                "CFG-KEY",
            )
        if depth == len(keys) or key not in current.value:
            current.value[key] = node if depth == len(keys) else Node({}, node.place, "{}")
            current.key_places[key] = node.place
        current = current.value[key]


def _validate(model: type[S], root: Node) -> S:
    for _ in range(8):  # each round re-reads the loosely typed values that the last one refused
        try:
            # JSON mode is the strict mode that still accepts a list for a tuple and a string for a path.
            settings = model.model_validate_json(json.dumps(_finite(root)), strict=True)
        except ValidationError as error:
            if not _reread_loose(root, error):
                raise ConfigError(explain(model, root, error)) from None
        else:
            _refuse_endless(root)
            return settings
    raise ConfigError(["the settings cannot be read: values given as text fit no type"], "CFG-TYPE")


def _reread_loose(root: Node, error: ValidationError) -> bool:
    changed = False
    for problem in error.errors(include_url=False, include_context=False):
        node = node_at(root, problem["loc"])
        if node is None or not node.loose or node.text is None:
            continue
        other = node.text if problem["type"] == "string_type" else read_scalar(node.text)
        if type(other) is not type(node.value):
            node.value, changed = other, True
    return changed


def _finite(node: Node) -> Plain:
    """JSON has no infinity: written as text, it is then refused by name where a number is expected."""
    if isinstance(node.value, dict):
        return {key: _finite(item) for key, item in node.value.items()}
    if isinstance(node.value, list):
        return [_finite(item) for item in node.value]
    if _is_endless(node):
        return node.text if node.loose and node.text is not None else str(node.value)
    return node.value


def _refuse_endless(node: Node, key: str = "") -> None:
    """Where text is expected, `.inf` without quotes would have become another text."""
    if isinstance(node.value, dict):
        for name, item in node.value.items():
            _refuse_endless(item, f"{key}.{name}" if key else name)
    elif isinstance(node.value, list):
        for n, item in enumerate(node.value):
            _refuse_endless(item, f"{key}[{n}]")
    elif _is_endless(node) and not node.loose:
        raise ConfigError([f"{node.place} {key} is {node.shown()}, expected text; put it in quotes"], "CFG-TYPE")


def _is_endless(node: Node) -> bool:
    return isinstance(node.value, float) and not math.isfinite(node.value)
