"""Keeps passwords out of messages, and says where one can be read by everybody."""

from __future__ import annotations

import logging
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.document import Node

HIDDEN = "***"
# Misspelt ones too (pasword, passwrod, apssword): what stands behind them is as secret.
_SECRET_KEY = re.compile(r"pass|pas?w|asw|ssw|psw|word|pwd|secret|token|credential", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"://[^\s,'\"\]}]*@")

log = logging.getLogger(__name__)


def is_secret_key(key: str) -> bool:
    """Whether what stands behind this key is not to be shown."""
    return _SECRET_KEY.search(key) is not None


def mask(text: str) -> str:
    """The text with user and password of every address hidden."""
    return _IN_ADDRESS.sub(f"://{HIDDEN}@", text) if "@" in text else text


def hide(node: Node) -> Node:
    """Shows neither this value nor any below it."""
    node.raw = HIDDEN
    children = node.value.values() if isinstance(node.value, dict) else node.value
    if isinstance(node.value, dict | list):
        for child in children:  # type: ignore[union-attr]
            hide(child)  # type: ignore[arg-type]
    return node


def warn_if_readable(path: Path, root: Node) -> None:
    """Logs CFG-SECRET for each password that is written into a file which others may read; `${NAME}` is none."""
    if os.name != "posix" or not path.stat().st_mode & stat.S_IROTH:
        return
    for key, node in _leaves(root, ""):
        if node.is_literal and isinstance(node.value, str) and node.value:
            what = "an address with a password" if mask(node.value) != node.value else "a password"
            if what == "a password" and not is_secret_key(key.rsplit(".", 1)[-1]):
                continue
            log.warning(
                "CFG-SECRET %s %s holds %s, and everybody on this machine may read the file; write ${NAME} and set it in the "
                "environment, or chmod o-r %s",
                node.place,
                key,
                what,
                path,
            )


def _leaves(node: Node, key: str) -> list[tuple[str, Node]]:
    if isinstance(node.value, dict):
        return [leaf for name, child in node.value.items() for leaf in _leaves(child, f"{key}.{name}" if key else name)]
    if isinstance(node.value, list):
        return [leaf for n, child in enumerate(node.value) for leaf in _leaves(child, f"{key}[{n}]")]
    return [(key, node)]
