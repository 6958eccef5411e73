"""Addresses without their passwords, for messages and logs: the account's password, and what a query keeps secret."""

from __future__ import annotations

import re

_NAMES = r"(?:pass(?:word|wd|phrase)?|pas|pwd|token|key|secret|auth|sig)="
_IN_ADDRESS = re.compile(rf"({_NAMES})[^&\s\"]+", re.IGNORECASE)
# In free text only behind a ? or &: `key=value` is also how a log line is written.
_IN_TEXT = re.compile(rf"([?&][\w.-]{{0,40}}{_NAMES})[^&\s'\"]+", re.IGNORECASE)
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")


def mask(address: str) -> str:
    """One address without its passwords."""
    address = _IN_ADDRESS.sub(r"\1***", address)
    scheme, separator, rest = address.partition("://")
    if not separator or "@" not in rest:
        return address
    account, _, host = rest.rpartition("@")
    return f"{scheme}://{account.partition(':')[0]}:***@{host}"


def mask_text(text: str) -> str:
    """A text without the passwords of the addresses in it, whole ones and pieces (`/mjpg?password=...`)."""
    return _IN_TEXT.sub(r"\1***", _ADDRESS.sub(lambda found: mask(found[0]), text))
