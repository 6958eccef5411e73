"""Reads a command from the MQTT topic and payload, or says why it is none: `dkm.cmd/1`, from anybody whom the broker lets write there.

Nothing in a payload can raise, recurse or allocate beyond its own 16 kB. Pure but for the wall clock (`not_after`, `ts`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.contract import Verdict
from edge_dkm.errors import UsageError

MAX_COMMAND_BYTES = 16_384
MAX_DEPTH = 8
MAX_INTEGER_DIGITS = 18  # fits a 64-bit counter
MAX_AHEAD_S = 300.0  # how far a command's `ts` may lie in the future of this clock

NOT_BUILT = ("recipe", "feedback", "model")
ENVELOPE = frozenset({"schema", "id", "args", "ts", "station", "session", "not_after"})
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
_CAMERA = r"^[A-Za-z0-9_-]{1,32}$"
_INTEGER = Annotated[int, Field(ge=1, lt=2**63)]


def _printable(text: str) -> str:
    """Without line breaks, terminal escapes or marks that reorder a line; joiners are spelling in some scripts."""
    for character in text:
        category = unicodedata.category(character)
        if category in {"Cc", "Cs", "Zl", "Zp"} or (category == "Cf" and character not in "\u200c\u200d"):
            raise ValueError(f"holds the character U+{ord(character):04X}")
    return text


Text64 = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Text128 = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Camera = Annotated[str, Field(pattern=_CAMERA)]


class Args(BaseModel):
    """Base of a verb's arguments: exact types, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class PartArgs(Args):
    """Which part stands before the camera."""

    id: Text128
    product: Text64 | None = None


class TriggerArgs(Args):
    """`trigger`: inspect the next frame. The camera is in the topic."""

    part: PartArgs | None = None


class PauseArgs(Args):
    """`pause`: take no more frames."""

    reason: Text128 | None = None


class ResumeArgs(Args):
    """`resume`."""


class ReplayArgs(Args):
    """`replay`: send results `from`..`to` (cseq, inclusive) again."""

    camera: Camera
    epoch: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    from_: _INTEGER = Field(alias="from")
    to: _INTEGER

    @model_validator(mode="after")
    def _in_order(self) -> ReplayArgs:
        if self.from_ > self.to:
            raise ValueError(f"from is {self.from_}, to is {self.to}, expected from <= to")
        return self


class ThresholdArgs(Args):
    """`threshold`: moves the novelty edge. The graph holds it in float32, hence the bounds."""

    value: float = Field(ge=1e-6, le=1e6, allow_inf_nan=False)
    camera: Camera | None = None


class LabelArgs(Args):
    """`label`: names a cluster or gives it a verdict."""

    cluster: int = Field(ge=0, lt=2**16)
    name: Text64 | None = None
    verdict: Verdict | None = None
    camera: Camera | None = None

    @model_validator(mode="after")
    def _says_something(self) -> LabelArgs:
        if self.name is None and self.verdict is None:
            raise ValueError("neither name nor verdict is given")
        return self


VERBS: dict[str, type[Args]] = {
    "trigger": TriggerArgs,
    "pause": PauseArgs,
    "resume": ResumeArgs,
    "replay": ReplayArgs,
    "threshold": ThresholdArgs,
    "label": LabelArgs,
}

Code = Literal[
    "CMD-SIZE",
    "CMD-UTF8",
    "CMD-DEPTH",
    "CMD-JSON",
    "CMD-OBJECT",
    "CMD-DUPLICATE-KEY",
    "CMD-NUMBER",
    "CMD-ID",
    "CMD-TOPIC",
    "CMD-VERB",
    "CMD-SCHEMA",
    "CMD-KEY",
    "CMD-RETAINED",
    "CMD-STATION",
    "CMD-EXPIRED",
    "CMD-FUTURE",
    "CMD-TIME",
    "CMD-ARGS",
    "CMD-ARG-UNKNOWN",
    "CMD-ARG-MISSING",
    "CMD-ARG-VALUE",
    "not_built",
]
A = TypeVar("A", bound=Args)


@dataclass(frozen=True)
class Command:
    """A well-formed command. `camera` is that of the topic (trigger only)."""

    verb: str
    id: str
    args: Args
    camera: str | None = None

    def arguments(self, kind: type[A]) -> A:
        """The arguments, as the type that the verb has."""
        if not isinstance(self.args, kind):
            raise UsageError(f"the arguments of {self.verb} are {type(self.args).__name__}, not {kind.__name__}")
        return self.args


@dataclass(frozen=True)
class Refusal:
    """Why a message is no command. `code` is stable; `id` is there where the message had a readable one.

    `stale`: the command, where it is only too old: it may have been done when it was new.
    """

    code: Code
    detail: str
    id: str | None = None
    stale: Command | None = None


class _RefusedError(Exception):
    def __init__(self, code: Code, detail: str, stale: Command | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.stale = code, detail, stale


def decode(base: str, topic: str, payload: bytes, retained: bool) -> Command | Refusal:
    """The command in a message on `<base>/cmd/<verb>` or `<base>/<camera>/cmd/trigger`. Never raises.

    Args:
        base: the station's topic; its last level is the station's name.
        topic: as received.
        payload: as received; at most 16,384 bytes are looked at.
        retained: the message's retain flag: what a broker has kept is old, and would be done again at every connection.
    """
    known_id: str | None = None
    try:
        body = _parse(payload)
        known_id = _identity(body)
        return _command(base, topic, body, known_id, retained)
    except _RefusedError as refused:
        return Refusal(refused.code, refused.detail, known_id, refused.stale)


def _refuse(code: Code, detail: str) -> NoReturn:
    raise _RefusedError(code, detail)


def _parse(payload: bytes) -> dict[str, Any]:
    if len(payload) > MAX_COMMAND_BYTES:
        _refuse("CMD-SIZE", f"{len(payload)} bytes, expected at most {MAX_COMMAND_BYTES}")
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse("CMD-UTF8", f"byte {error.start} is not UTF-8")
    if _depth(text) > MAX_DEPTH:  # before json looks at it: it recurses
        _refuse("CMD-DEPTH", f"nested deeper than {MAX_DEPTH}")
    try:
        body = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite
        )
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        _refuse("CMD-JSON", f"not JSON{where}")
    if not isinstance(body, dict):
        _refuse("CMD-OBJECT", f"a JSON {type(body).__name__}, expected an object {{id, args}}")
    return body


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside of strings; never less than what a JSON parser would reach."""
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            _refuse("CMD-DUPLICATE-KEY", f"the key {_quoted(key)} is given twice")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    _refuse("CMD-NUMBER", f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        _refuse("CMD-NUMBER", f"an integer of {len(digits)} digits, expected at most {MAX_INTEGER_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if abs(value) == float("inf"):
        _refuse("CMD-NUMBER", f"{_quoted(digits)} is beyond the range of a float")
    return value


def _identity(body: dict[str, Any]) -> str:
    name = body.get("id")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        found = "is missing" if "id" not in body else f"is {_quoted(name)}"
        _refuse("CMD-ID", f"id {found}, expected 1 to 64 of A-Z a-z 0-9 _ . : -")
    return name


def _command(base: str, topic: str, body: dict[str, Any], name: str, retained: bool) -> Command:
    verb, camera = _target(base, topic)
    if verb in NOT_BUILT:
        _refuse("not_built", f"the command {verb} is not built yet")
    kind = VERBS.get(verb)
    if kind is None:
        _refuse("CMD-VERB", f"the verb is {_quoted(verb)}, expected one of {', '.join(VERBS)}")
    if camera is not None and verb != "trigger":
        _refuse("CMD-VERB", f"{verb} is a command to the station, expected the topic {base}/cmd/{verb}")
    _check_envelope(body, base.rsplit("/", 1)[-1])
    args = body.get("args", {})
    if not isinstance(args, dict):
        _refuse("CMD-ARGS", f"args is {_quoted(args)}, expected an object")
    if verb == "trigger" and "recipe" in args:
        _refuse("not_built", "recipes are not built yet; leave args.recipe out")
    try:
        command = Command(verb, name, kind.model_validate(args), camera)
    except ValidationError as error:
        raise _wrong_argument(error.errors(include_url=False, include_context=False)[0]) from None
    _check_age(command, body, retained)
    return command


def _target(base: str, topic: str) -> tuple[str, str | None]:
    levels = topic[len(base) + 1 :].split("/") if topic.startswith(f"{base}/") else []
    if len(levels) == 2 and levels[0] == "cmd":
        return levels[1], None
    if len(levels) == 3 and levels[1] == "cmd" and re.fullmatch(_CAMERA, levels[0]):
        return levels[2], levels[0]
    _refuse("CMD-TOPIC", f"the topic is {_quoted(topic)}, expected {base}/cmd/VERB or {base}/CAMERA/cmd/trigger")


def _check_envelope(body: dict[str, Any], station: str) -> None:
    unknown = sorted(set(body) - ENVELOPE)
    if unknown:
        _refuse("CMD-KEY", f"the key {_quoted(unknown[0])} is not known, expected {', '.join(sorted(ENVELOPE))}")
    if body.get("schema", "dkm.cmd/1") != "dkm.cmd/1":
        _refuse("CMD-SCHEMA", f"schema is {_quoted(body['schema'])}, expected dkm.cmd/1")
    if "station" in body and body["station"] != station:
        _refuse("CMD-STATION", f"it is for station {_quoted(body['station'])}, this is {station}")


def _check_age(command: Command, body: dict[str, Any], retained: bool) -> None:
    if retained:
        detail = "the message is retained; publish commands without retain, and clear this topic"
        raise _RefusedError("CMD-RETAINED", detail, command)
    now = utc_now()
    if "not_after" in body and (until := _moment(body, "not_after")) < now:
        detail = f"not_after is {rfc3339(until)}, this clock says {rfc3339(now)}"
        raise _RefusedError("CMD-EXPIRED", detail, command)
    if "ts" in body and (given := _moment(body, "ts")) > now + timedelta(seconds=MAX_AHEAD_S):
        _refuse("CMD-FUTURE", f"ts is {rfc3339(given)}, this clock says {rfc3339(now)}; one of the two is wrong")


def _moment(body: dict[str, Any], key: str) -> datetime:
    value = body[key]
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) and len(value) <= 40 else None
        if moment is not None and moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    _refuse("CMD-TIME", f"{key} is {_quoted(value)}, expected a time as 2026-11-20T23:44:01Z")


def _wrong_argument(error: ErrorDetails) -> _RefusedError:
    where = ".".join(["args", *(str(level) for level in error["loc"])])
    # A key that we do not know is whatever the sender likes.
    where = where if where.isascii() and where.isprintable() and len(where) < 60 else _quoted(where)
    if error["type"] == "extra_forbidden":
        return _RefusedError("CMD-ARG-UNKNOWN", f"{where} is not known")
    if error["type"] == "missing":
        return _RefusedError("CMD-ARG-MISSING", f"{where} is missing")
    if not error["loc"]:  # about several of them together; the text is ours
        return _RefusedError("CMD-ARG-VALUE", f"{where}: {error['msg'].removeprefix('Value error, ')}")
    return _RefusedError("CMD-ARG-VALUE", f"{where} is {_quoted(error['input'])}: {error['msg']}")


def _quoted(value: object) -> str:
    """Short and plain ASCII, whatever it was."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 40 else text[:37] + "...")
