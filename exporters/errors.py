"""What can go wrong in an export."""

from __future__ import annotations


class ExportError(Exception):
    """The run cannot be exported as asked; nothing was written. Exit code 3."""

    exit_code = 3
