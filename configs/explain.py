"""Turns pydantic's validation errors into lines that name code, place, key, value and what was expected."""

from __future__ import annotations

import difflib
import math
import re
import typing
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.document import Node

Loc = Sequence[int | str]


def explain(model: type[BaseModel], root: Node, error: ValidationError) -> list[str]:
    """One line per problem, in the order of the file."""
    problems = error.errors(include_url=False)
    lines = [f"{_code(root, problem)} {_line(model, root, problem)}" for problem in problems]
    return list(dict.fromkeys(lines))


_NO_TYPE = {"extra_forbidden": "CFG-KEY", "missing": "CFG-MISSING", "union_tag_invalid": "CFG-VALUE"}


def _code(root: Node, problem: ErrorDetails) -> str:
    kind = problem["type"]
    if kind in _NO_TYPE:
        return _NO_TYPE[kind]
    if not kind.endswith(("_type", "_parsing", "int_from_float", "tag_not_found")):
        return "CFG-VALUE"
    node = node_at(root, problem["loc"])
    is_endless = node is not None and isinstance(node.value, float) and not math.isfinite(node.value)
    return "CFG-VALUE" if is_endless else "CFG-TYPE"


def node_at(root: Node, loc: Loc) -> Node | None:
    """The node at a pydantic location, or None. Union tags in the location (`method.dec.lr`) are passed over."""
    _, node, complete = _walk(root, loc)[-1]
    return node if complete else None


def _walk(root: Node, loc: Loc) -> list[tuple[str, Node, bool]]:
    """(dotted key, node, is it the end of `loc`) for each step of `loc` that exists in the document."""
    steps: list[tuple[str, Node, bool]] = [("", root, not loc)]
    dotted, current = "", root
    for position, key in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(current.value, dict) and str(key) in current.value:
            current = current.value[str(key)]
            dotted = f"{dotted}.{key}" if dotted else str(key)
        elif isinstance(current.value, list) and isinstance(key, int) and key < len(current.value):
            current = current.value[key]
            dotted = f"{dotted}[{key}]"
        elif _is_tag(current, key):
            if last:
                steps[-1] = (dotted, current, True)
            continue
        else:
            break
        steps.append((dotted, current, last))
    return steps


def _is_tag(node: Node, key: int | str) -> bool:
    """Pydantic puts a discriminated union's tag into the location; in the document it is the value of some field."""
    return isinstance(node.value, dict) and any(child.value == key for child in node.value.values())


def _line(model: type[BaseModel], root: Node, problem: ErrorDetails) -> str:
    loc, kind = problem["loc"], problem["type"]
    dotted, node, complete = _walk(root, loc)[-1]
    if kind == "extra_forbidden":
        return _unknown_key(model, root, loc)
    if kind == "missing":
        key = f"{dotted}.{loc[-1]}" if dotted else str(loc[-1])
        return f"{node.place} {key} is missing, expected {_field_words(model, root, loc)}"
    if loc and loc[-1] == "[key]":
        parent = _walk(root, loc[:-2])[-1][1]
        at = parent.key_places.get(str(loc[-2]), node.place)
        return f"{at} {dotted} is not a usable name, expected {_expected(problem)}"
    if kind in {"value_error", "assertion_error"}:
        shown = node.shown()
        # A section too long to show: what is wrong lies between its keys, and the message names them.
        is_cut = isinstance(node.value, dict) and shown.endswith("...")
        what = ""
        if dotted and is_cut:
            what = f" {dotted}:"
        elif dotted and complete:
            what = f" {dotted} is {shown},"
        return f"{node.place}{what} {problem['msg'].removeprefix('Value error, ')}"
    if kind == "union_tag_invalid":
        context = problem["ctx"]
        tags = context["expected_tags"].replace("'", "").split(", ")
        what = f"{dotted} has {context['discriminator'].strip(chr(39))} {context['tag']}"
        return f"{node.place} {what}, expected one of {', '.join(tags)}{_did_you_mean(context['tag'], tags)}"
    return f"{node.place} {dotted} is {node.shown()}, expected {_expected(problem)}{_about_unit(node, kind)}"


def _about_unit(node: Node, kind: str) -> str:
    """`10 s` and `512MB` where a number is expected."""
    number = (
        re.match(r"'?([-+]?[0-9][0-9.]*)\s?[A-Za-z%]{1,7}'?$", node.raw) if kind in {"int_type", "float_type"} else None
    )
    return f", write {number[1]} alone: the unit is in the name of the setting" if number else ""


def _unknown_key(model: type[BaseModel], root: Node, loc: Loc) -> str:
    parents = _walk(root, loc[:-1])
    dotted, parent, _ = parents[-1]
    key = str(loc[-1])
    known = sorted(_known_fields(model, root, loc[:-1]))
    hint = _did_you_mean(key, known) or (f", expected one of {', '.join(known)}" if known else "")
    return (
        f"{parent.key_places.get(key, parent.place)} {dotted + '.' if dotted else ''}{key} is not a known setting{hint}"
    )


def _expected(problem: ErrorDetails) -> str:
    """Pydantic's own words, without their beginning, and the nearest of the allowed words."""
    words = problem["msg"].removeprefix("Value error, ").removeprefix("expected ").removeprefix("Input should be ")
    words = words.replace("String should", "text that should")
    if problem["type"] == "union_tag_not_found":
        return f"a mapping with the key {problem['ctx']['discriminator'].strip(chr(39))}"
    if problem["type"] == "literal_error":
        allowed = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return words + _did_you_mean(str(problem["input"]), allowed)
    return words


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{match[0]}'?" if match else ""


def _field_words(model: type[BaseModel], root: Node, loc: Loc) -> str:
    for candidate in _models_at(model, root, loc[:-1]):
        info = _fields(candidate).get(str(loc[-1]))
        if info is not None and info.description:
            return info.description
    return "a value"


def _known_fields(model: type[BaseModel], root: Node, loc: Loc) -> set[str]:
    return {name for candidate in _models_at(model, root, loc) for name in _fields(candidate)}


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Fields by the name they have in the file."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _models_at(model: type[BaseModel], root: Node, loc: Loc) -> list[type[BaseModel]]:
    """The models that may stand at `loc`, by walking the annotations; a union is narrowed by the fields it shows."""
    found: list[type[BaseModel]] = [model]
    node: Node | None = root
    for key in loc:
        if node is not None and _is_tag(node, key) and not any(str(key) in m.model_fields for m in found):
            found = [
                m
                for m in found
                if any(f.default == key or key in typing.get_args(f.annotation) for f in m.model_fields.values())
            ] or found
            continue
        nested: list[type[BaseModel]] = []
        for candidate in found:
            info = _fields(candidate).get(str(key))
            if info is not None:
                nested += _models_in(info.annotation)
        if nested:
            found = nested
        node = node.value.get(str(key)) if node is not None and isinstance(node.value, dict) else None
    return found


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in typing.get_args(annotation) for m in _models_in(argument)]
