"""One log line per change of state, with a stable code, at a bounded rate and without secrets; as text or as JSON lines.

The modules of a running line call `log_change`; `set_up` is called once by the command line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from devices.sources.masking import mask_text
from edge_dkm.clock import rfc3339

MAX_LINES, PER_S = 5, 60.0
FIELDS = "dkm"  # the attribute of a log record that carries the fields
MAX_TEXT = 4000

_SECRET_KEY = re.compile(r"pass(word|wd|phrase)?$|secret|token$|^key$|credential", re.IGNORECASE)


class RateLimiter:
    """At most `max_lines` per code within `per_s` seconds of the monotonic clock; says how many were left out since the last one."""

    def __init__(
        self, max_lines: int = MAX_LINES, per_s: float = PER_S, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_lines, self._per_s, self._now_s = max_lines, per_s, now_s
        self._lock = threading.Lock()
        self._said: dict[str, deque[float]] = {}
        self._left_out: dict[str, int] = {}

    def admit(self, code: str) -> int | None:
        """How many lines of this code were left out before this one; None where this one is left out too."""
        with self._lock:
            now_s = self._now_s()
            said = self._said.setdefault(code, deque())
            while said and now_s - said[0] >= self._per_s:
                said.popleft()
            if len(said) >= self._max_lines:
                self._left_out[code] = self._left_out.get(code, 0) + 1
                return None
            said.append(now_s)
            return self._left_out.pop(code, 0)


_LIMITER = RateLimiter()


def log_change(
    logger: logging.Logger,
    code: str,
    *,
    level: int = logging.WARNING,
    limiter: RateLimiter | None = None,
    **fields: Any,
) -> None:
    """One line `CODE key=value ...` for a change of state; call it on changes, never per frame. None values are left out.

    Args:
        code: stable, as `S-FULL`; lines are limited per code.
        fields: what changed; names like `password` and addresses with passwords are masked.
    """
    if not logger.isEnabledFor(level):
        return
    left_out = (limiter or _LIMITER).admit(code)
    if left_out is None:
        return
    shown = {key: _clean(key, value) for key, value in fields.items() if value is not None}
    if left_out:
        shown["left_out"] = left_out
    text = " ".join([code, *(f"{key}={_word(value)}" for key, value in shown.items())])
    logger.log(level, "%s", text, extra={FIELDS: {"code": code, **shown}})


class TextFormatter(logging.Formatter):
    """Lines for people, without passwords."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, logger, message, and the fields of `log_change`; without passwords."""

    def format(self, record: logging.LogRecord) -> str:
        plain: dict[str, Any] = {
            "ts": rfc3339(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": mask_text(record.getMessage())[:MAX_TEXT],
        }
        fields = getattr(record, FIELDS, None)
        if isinstance(fields, dict):
            # A field may not stand in for what every line has.
            plain |= {key if key not in plain else f"{key}_": value for key, value in fields.items()}
        if record.exc_info and record.exc_info[0] is not None:
            plain["exception"] = mask_text(self.formatException(record.exc_info))[-MAX_TEXT:]
        return json.dumps(plain, ensure_ascii=False, default=str)


def set_up(style: Literal["text", "json"], stream: TextIO | None = None) -> logging.Handler:
    """Sends everything from INFO on to `stream` (stderr) in that style; replaces the root logger's handlers."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    return handler


def _clean(key: str, value: Any) -> Any:
    if _SECRET_KEY.search(key):
        return "***"
    if isinstance(value, dict):
        return {str(name): _clean(str(name), item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean("", item) for item in value]
    if isinstance(value, bool | int | float):
        return value
    return mask_text(str(value))[:MAX_TEXT]


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return json.dumps(text, ensure_ascii=False) if not text or re.search(r"[\s\"=]", text) else text
