"""What the JPEG library says on standard error: it decodes a damaged picture without an error and only says so there.

Only a camera's own process listens, since standard error belongs to the whole process; elsewhere `take` gives nothing.
"""

from __future__ import annotations

import os

STDERR = 2
MAX_BYTES = 4096
PADDING = "extraneous bytes"  # some cameras pad their pictures, and the library calls that corrupt, too
FIRST_PICTURES = 3


class DecoderWords:
    """`allow` in a process that has standard error to itself; it is redirected at the first picture."""

    def __init__(self) -> None:
        self._is_allowed = False
        self._file = -1
        self._seen: list[bool] = []  # of the first pictures: whether the library called them padded

    def allow(self) -> None:
        """This process's standard error may be taken."""
        self._is_allowed = True

    def clear(self) -> None:
        """Forgets what was said so far; called before each picture."""
        if not self._is_allowed:
            return
        if self._file < 0:
            self._file = os.memfd_create("decoder-words")
            os.dup2(self._file, STDERR)
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)

    def take(self) -> str | None:
        """The complaint about the picture that was just decoded, or None. A camera whose first pictures are all padded is left alone with that."""
        if self._file < 0:
            return None
        said = os.pread(self._file, MAX_BYTES, 0).decode("utf-8", "replace").strip()
        is_padded = PADDING in said
        if len(self._seen) < FIRST_PICTURES:
            self._seen.append(is_padded)
        if "JPEG" not in said or (is_padded and all(self._seen)):
            return None
        return said.splitlines()[0]


WORDS = DecoderWords()
