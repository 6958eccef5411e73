"""A YAML text as a tree of values that know where they came from; the loader turns it into settings.

YAML 1.2 core scalars, unlike PyYAML's 1.1: `on`, `yes` and `12:30` stay strings, `1e-3` is a number. Duplicate keys,
anchors and tags are refused: each has hidden a wrong setting from somebody. No message shows what a value may hold of a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from configs.errors import ConfigError
from configs.secrets import hide, is_secret_key, mask

__all__ = ["ConfigError", "Node", "parse_document", "parse_value", "read_document", "read_scalar"]

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_KEY = 100

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]


@dataclass
class Node:
    """One value. `place` is `file:line`, `--set` or the environment variable; `raw` is the text as written.

    `raw` is what messages show: a `${SECRET}` is never expanded in them. `loose` marks a value whose type the writer could
    not state (an override, or a substituted variable); the loader may read it as text or as a number, whichever fits.
    `is_literal`: it stands in the file as it is.
    """

    value: Scalar | list[Node] | dict[str, Node]
    place: str
    raw: str
    loose: bool = False
    text: str | None = None
    key_places: dict[str, str] = field(default_factory=dict)
    is_literal: bool = False

    def plain(self) -> Plain:
        """The same as lists, dicts and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def shown(self) -> str:
        """The value for a message: short, secrets unexpanded."""
        raw = mask(self.raw) or "nothing"
        return raw if len(raw) <= 60 else raw[:57] + "..."


def read_document(path: Path, environ: Mapping[str, str] = os.environ) -> Node:
    """Reads one YAML file into a Node whose value is a mapping."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1) if size <= MAX_BYTES else b""  # a device says that it has 0 bytes
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError([f"{path} cannot be read: {reason}"], "CFG-FILE") from None
    if size > MAX_BYTES:
        raise ConfigError([f"{path} has {size} bytes, expected a settings file of at most {MAX_BYTES}"], "CFG-SIZE")
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{path} has over {MAX_BYTES} bytes, expected a settings file of at most that"], "CFG-SIZE")
    return parse_document(_decode(data, path), str(path), environ)


def _decode(data: bytes, path: Path) -> str:
    if data[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        raise ConfigError([f"{path} is not UTF-8 text, it looks like UTF-16; save it as UTF-8"], "CFG-ENCODING")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            [f"{path}:{line} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}); save it as UTF-8"],
            "CFG-ENCODING",
        ) from None


def parse_document(text: str, name: str, environ: Mapping[str, str] = os.environ) -> Node:
    """Parses YAML text; `name` stands in places, as in `name:7`."""
    root = _compose(text, name)
    if root is None:
        raise ConfigError([f"{name} is empty, expected settings as `key: value` lines"], "CFG-FILE")
    node = _convert(root, name, environ, depth=0)
    if not isinstance(node.value, dict):
        raise ConfigError([f"{node.place} is {node.shown()}, expected settings as `key: value` lines"], "CFG-TYPE")
    return node


def parse_value(text: str, place: str, environ: Mapping[str, str] = os.environ) -> Node:
    """One value given outside a file (`--set`, environment), in YAML's flow form."""
    root = _compose(text, place, lines=False)
    if root is None:
        return Node(None, place, text, loose=True, text=text)
    node = _convert(root, place, environ, depth=0, lines=False)
    if not isinstance(node.value, dict | list):
        node.loose, node.text = True, text
    return node


def _compose(text: str, name: str, *, lines: bool = True) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.composer.ComposerError as error:
        # Its words may hold the value: a password that begins with * is an alias to YAML.
        what = "uses an anchor or alias; write the value out, in quotes where it begins with * or &"
        if error.context is not None and "single document" in error.context:
            what = "begins a second document; one file holds one"
        raise ConfigError([f"{_at(name, error, lines)} {what}"], "CFG-SYNTAX") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = " (use spaces, not tabs)" if mark and mark.buffer and "\t" in _line(mark) else ""
        raise ConfigError(
            [f"{_at(name, error, lines)} is not valid YAML: {error.problem or error.context}{hint}"], "CFG-SYNTAX"
        ) from None
    except yaml.reader.ReaderError as error:
        line = f":{text.count(chr(10), 0, int(error.position)) + 1}" if lines else ""
        kind = "a NUL; is it UTF-16?" if error.character == 0 else f"the character U+{int(error.character):04X}"
        raise ConfigError(
            [f"{name}{line} holds {kind}, expected UTF-8 text without control characters"], "CFG-ENCODING"
        ) from None
    except RecursionError:
        raise ConfigError([f"{name} is nested more than {MAX_DEPTH} deep"], "CFG-SYNTAX") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
    ) as error:  # ValueError: \UFFFFFFFF, a directive of a strange version
        words = " ".join(str(error).split())[:100]
        raise ConfigError([f"{name} is not valid YAML: {words}"], "CFG-SYNTAX") from None


def _at(name: str, error: yaml.MarkedYAMLError, lines: bool) -> str:
    mark = error.problem_mark or error.context_mark
    return f"{name}:{mark.line + 1}" if mark and lines else name


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
        raise ConfigError([f"{place} uses an anchor or alias; write the value out"], "CFG-SYNTAX")
    seen.add(id(node))
    if depth > MAX_DEPTH:
        raise ConfigError([f"{place} is nested more than {MAX_DEPTH} deep"], "CFG-SYNTAX")
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, name, environ, depth=depth, lines=lines, seen=seen)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, name, environ, depth=depth + 1, lines=lines, seen=seen) for item in node.value]
        return Node(items, place, "[" + ", ".join(item.raw for item in items) + "]")
    if node.tag != "tag:yaml.org,2002:str":
        is_ours = not node.tag.startswith("tag:yaml.org")  # it may be a password: !abc
        what = "a tag, expected a plain value, in quotes where it begins with !"
        raise ConfigError(
            [f"{place} has {what}" if is_ours else f"{place} has the tag {node.tag}, expected a plain value"],
            "CFG-SYNTAX",
        )
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
            raise ConfigError([f"{key_place} has a key that is a list or mapping, expected a name"], "CFG-SYNTAX")
        key = key_node.value
        _refuse_unusable(key, key_place)
        if len(key) > MAX_KEY:
            raise ConfigError(
                [f"{key_place} has a key of {len(key)} characters, expected at most {MAX_KEY}"], "CFG-KEY"
            )
        if key in result:
            raise ConfigError([f"{key_place} {key} is given twice (first at {places[key]}); keep one"], "CFG-DUPLICATE")
        places[key] = key_place
        value = _convert(value_node, name, environ, depth=depth + 1, lines=lines, seen=seen)
        result[key] = hide(value) if is_secret_key(key) else value
    raw = "{" + ", ".join(f"{key}: {value.raw}" for key, value in result.items()) + "}"
    return Node(result, place, raw, key_places=places)


_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def _scalar_node(text: str, place: str, environ: Mapping[str, str], *, quoted: bool) -> Node:
    _refuse_unusable(text, place)
    if "${" not in text:
        if quoted:
            return Node(text, place, f"'{text}'", is_literal=True)
        return Node(read_scalar(text), place, text, is_literal=True)

    def substitute(match: re.Match[str]) -> str:
        variable = match.group(1)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ConfigError(
                [f"{place} has a ${{...}} that is no name of an environment variable, expected as ${{MQTT_PASS}}"],
                "CFG-ENV",
            )
        if variable not in environ:
            raise ConfigError([f"{place} needs the environment variable {variable}, which is not set"], "CFG-ENV")
        return environ[variable]

    expanded = _VARIABLE.sub(substitute, text)
    _refuse_unusable(expanded, place)
    return Node(expanded, place, text, loose=not quoted, text=expanded)


def _refuse_unusable(text: str, place: str) -> None:
    """A NUL ends text early wherever C is underneath; half a surrogate pair cannot be written anywhere."""
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(
            [f"{place} holds a NUL or half a character, expected text that can be written as UTF-8"], "CFG-ENCODING"
        )


MAX_DIGITS = 1000
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
    if len(text) > MAX_DIGITS:  # Python refuses to read longer numbers, and no setting needs one
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in {"0o", "0x"} else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
