"""What is wrong with settings: lines for people that begin with a stable code for machines.

CFG-FILE       no such file, not readable, empty, or a folder
CFG-SIZE       the file is larger than settings ever are
CFG-ENCODING   not UTF-8, or characters that no setting may hold
CFG-SYNTAX     not YAML, or YAML of a kind that has hidden wrong settings: anchors, tags, deep nesting
CFG-DUPLICATE  a key that is given twice
CFG-KEY        no such setting
CFG-MISSING    a setting without a default is left out
CFG-TYPE       text where a number is expected, and the like
CFG-VALUE      the right type, but not usable
CFG-ENV        an environment variable that is not set, or no name of one
CFG-SECRET     a warning: a password in a file that everybody may read
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from configs.secrets import mask

MAX_LINES = 20
MAX_LINE = 1000
_CODED = re.compile(r"CFG-[A-Z]+ ")


class ConfigError(ValueError):
    """Settings that cannot be used. `problems` holds one complete line each, with its code in front; exit code 2.

    Args:
        problems: may carry their codes already.
        code: for those that do not.
    """

    exit_code = 2

    def __init__(self, problems: Iterable[str], code: str = "CFG-VALUE") -> None:
        lines = [_line(problem, code) for problem in problems]
        if len(lines) > MAX_LINES:
            lines = [*lines[: MAX_LINES - 1], f"{code} and {len(lines) - MAX_LINES + 1} more; put these right first"]
        super().__init__("\n".join(lines))
        self.problems = lines


def _line(problem: str, code: str) -> str:
    """One line of bearable length whatever a file holds, without a password; what cannot be seen is written as its code."""
    coded = problem if _CODED.match(problem) else f"{code} {problem}"
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in mask(coded))
    return plain if len(plain) <= MAX_LINE else plain[: MAX_LINE - 3] + "..."
