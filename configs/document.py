"""A YAML text as a tree of values that know where they came from; the loader turns it into settings.

YAML 1.2 core scalars, unlike PyYAML's 1.1: `on`, `yes` and `12:30` stay strings, `1e-3` is a number. Duplicate keys,
anchors and tags are refused: each has hidden a wrong setting from somebody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 16

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]


class ConfigError(ValueError):
    """Settings that cannot be used. `problems` holds one complete line each; exit code 2."""

    exit_code = 2

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass
class Node:
    """One value. `place` is `file:line`, `--set` or the environment variable; `raw` is the text as written.

    `raw` is what messages show: a `${SECRET}` is never expanded in them. `loose` marks a value whose type the writer could
    not state (an override, or a substituted variable); the loader may read it as text or as a number, whichever fits.
    """

    value: Scalar | list[Node] | dict[str, Node]
    place: str
    raw: str
    loose: bool = False
    text: str | None = None
    key_places: dict[str, str] = field(default_factory=dict)

    def plain(self) -> Plain:
        """The same as lists, dicts and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def shown(self) -> str:
        """The value for a message: short, on one line, secrets unexpanded."""
        return self.raw if len(self.raw) <= 60 else self.raw[:57] + "..."


def read_document(path: Path, environ: Mapping[str, str] = os.environ) -> Node:
    """Reads one YAML file into a Node whose value is a mapping."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError([f"{path} has {size} bytes, expected a settings file of at most {MAX_BYTES}"])
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path} cannot be read: {error.strerror or error}"]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            [f"{path} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); save it as UTF-8"]
        ) from None
    return parse_document(text, str(path), environ)


def parse_document(text: str, name: str, environ: Mapping[str, str] = os.environ) -> Node:
    """Parses YAML text; `name` stands in places, as in `name:7`."""
    root = _compose(text, name)
    if root is None:
        raise ConfigError([f"{name} is empty, expected settings as `key: value` lines"])
    node = _convert(root, name, environ, depth=0)
    if not isinstance(node.value, dict):
        raise ConfigError([f"{node.place} is {node.shown()}, expected settings as `key: value` lines"])
    return node


def parse_value(text: str, place: str, environ: Mapping[str, str] = os.environ) -> Node:
    """One value given outside a file (`--set`, environment), in YAML's flow form."""
    root = _compose(text, place)
    if root is None:
        return Node(None, place, text, loose=True, text=text)
    node = _convert(root, place, environ, depth=0, lines=False)
    if not isinstance(node.value, dict | list):
        node.loose, node.text = True, text
    return node


def _compose(text: str, name: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        hint = " (use spaces, not tabs)" if mark and mark.buffer and "\t" in _line(mark) else ""
        raise ConfigError([f"{name}{line} is not valid YAML: {error.problem}{hint}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{name} is not valid YAML: {' '.join(str(error).split())}"]) from None


def _line(mark: yaml.Mark) -> str:
    start = mark.buffer.rfind("\n", 0, mark.pointer) + 1 if mark.buffer else 0
    return mark.buffer[start : mark.pointer + 1] if mark.buffer else ""


def _convert(
    node: yaml.Node,
    name: str,
    environ: Mapping[str, str],
    *,
    depth: int,
    lines: bool = True,
    seen: set[int] | None = None,
) -> Node:
    seen = set() if seen is None else seen
    place = f"{name}:{node.start_mark.line + 1}" if lines else name
    if id(node) in seen:
        raise ConfigError([f"{place} uses an anchor or alias; write the value out"])
    seen.add(id(node))
    if depth > MAX_DEPTH:
        raise ConfigError([f"{place} is nested more than {MAX_DEPTH} deep"])
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, name, environ, depth=depth, lines=lines, seen=seen)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, name, environ, depth=depth + 1, lines=lines, seen=seen) for item in node.value]
        return Node(items, place, "[" + ", ".join(item.raw for item in items) + "]")
    if node.tag != "tag:yaml.org,2002:str":
        raise ConfigError([f"{place} has the tag {node.tag}, expected a plain value"])
    quoted = isinstance(node, yaml.ScalarNode) and node.style is not None
    return _scalar_node(node.value, place, environ, quoted=quoted)


def _convert_mapping(
    node: yaml.MappingNode, name: str, environ: Mapping[str, str], *, depth: int, lines: bool, seen: set[int]
) -> Node:
    place = f"{name}:{node.start_mark.line + 1}" if lines else name
    result: dict[str, Node] = {}
    places: dict[str, str] = {}
    for key_node, value_node in node.value:
        key_place = f"{name}:{key_node.start_mark.line + 1}" if lines else name
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError([f"{key_place} has a key that is a list or mapping, expected a name"])
        key = key_node.value
        if key in result:
            raise ConfigError([f"{key_place} {key} is given twice (first at {places[key]}); keep one"])
        places[key] = key_place
        result[key] = _convert(value_node, name, environ, depth=depth + 1, lines=lines, seen=seen)
    raw = "{" + ", ".join(f"{key}: {value.raw}" for key, value in result.items()) + "}"
    return Node(result, place, raw, key_places=places)


_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def _scalar_node(text: str, place: str, environ: Mapping[str, str], *, quoted: bool) -> Node:
    if "${" not in text:
        return Node(text, place, f"'{text}'") if quoted else Node(read_scalar(text), place, text)

    def substitute(match: re.Match[str]) -> str:
        variable = match.group(1)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ConfigError(
                [f"{place} has {match.group(0)}, expected the name of an environment variable, as ${{MQTT_PASS}}"]
            )
        if variable not in environ:
            raise ConfigError([f"{place} needs the environment variable {variable}, which is not set"])
        return environ[variable]

    expanded = _VARIABLE.sub(substitute, text)
    return Node(expanded, place, text, loose=not quoted, text=expanded)


_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    "": None,
    "~": None,
    "null": None,
    "Null": None,
    "NULL": None,
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
    ".inf": float("inf"),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}


def read_scalar(text: str) -> Scalar:
    """A plain scalar by YAML 1.2's core schema."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
