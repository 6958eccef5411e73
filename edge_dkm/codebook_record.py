"""Which codebook each camera of a station judges by: `<state>/codebooks/current.json`, replaced as a whole and flushed.

    {"schema": "dkm.codebooks/1", "cameras": {"top": {"<sha256 of the model>": {"codebook": "0123456789ab", "chain": ["base"], ...}}}}

`chain` is what ran before, the newest first: what a rollback goes to, and what runs where a file is damaged. Base is always possible:
it lies in the graph.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edge_dkm.clock import rfc3339, utc_now
from edge_dkm.errors import StorageError
from edge_dkm.frames.append_file import write_atomically
from edge_dkm.set_aside import set_aside

FOLDER, FILE, SCHEMA = "codebooks", "current.json", "dkm.codebooks/1"
BASE = "base"
MAX_CHAIN = 10
KEPT = 30  # files beside those that the record names
How = Literal["recentre", "rollback"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Current:
    """`codebook`: `base` or 12 digits; `chain`: what ran before it, newest first, always ending in base; `since`, `how`: of the switch."""

    codebook: str = BASE
    chain: tuple[str, ...] = ()
    since: str | None = None
    how: How | None = None


class CodebookRecord:
    """Reads and writes the record of one state folder. Whoever writes holds the folder's lock: the station, or a command while none runs."""

    def __init__(self, state: Path) -> None:
        self.folder = state / FOLDER
        self._path = self.folder / FILE

    def file_of(self, codebook: str) -> Path:
        """Where a codebook lies."""
        return self.folder / f"{codebook}.safetensors"

    def current(self, camera: str, model_sha256: str) -> Current:
        """Base, where nothing else was chosen."""
        return self._read().get(camera, {}).get(model_sha256, Current())

    def switch(self, camera: str, model_sha256: str, codebook: str, how: How) -> Current:
        """Writes down that `codebook` judges from now on.

        Raises:
            StorageError: it cannot be written; then what was chosen before still holds.
        """
        found = self._read()
        before = found.get(camera, {}).get(model_sha256, Current())
        now = Current(codebook, _chain(before, codebook, how), rfc3339(utc_now()), how)
        found.setdefault(camera, {})[model_sha256] = now
        plain = {name: {model: asdict(c) for model, c in models.items()} for name, models in found.items()}
        try:
            self._replace(json.dumps({"schema": SCHEMA, "cameras": plain}, indent=1).encode())
        except OSError as error:
            raise StorageError(
                f"S-IO {self._path} cannot be written: {error.strerror or error}; codebook {before.codebook} goes on"
            ) from None
        self._prune(
            codebook for models in found.values() for c in models.values() for codebook in (c.codebook, *c.chain)
        )
        return now

    def _replace(self, data: bytes) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(self._path, data)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the rename, and by that the codebook's own
        finally:
            os.close(folder)

    def _read(self) -> dict[str, dict[str, Current]]:
        try:
            document = json.loads(self._path.read_bytes())
            if document["schema"] != SCHEMA:
                raise ValueError(document["schema"])
            return {
                str(camera): {str(model): _current(entry) for model, entry in models.items()}
                for camera, models in document["cameras"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside: Path | str = "nowhere: it cannot be renamed"
            with contextlib.suppress(OSError):
                aside = set_aside(self._path)
            log.warning("S-CORRUPT %s is damaged (%s), moved to %s; the base codebook runs", self._path, error, aside)
            return {}

    def _prune(self, named: Iterable[str]) -> None:
        """A codebook a night would fill the disk in some years."""
        with contextlib.suppress(OSError):
            keep = {self.file_of(name) for name in named}
            others = [path for path in self.folder.glob("*.safetensors") if path not in keep]
            others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
            for path in others[KEPT:]:
                path.unlink()


def _chain(before: Current, codebook: str, how: How) -> tuple[str, ...]:
    line = (before.codebook, *before.chain)
    if codebook == BASE:
        return ()
    fresh = line if how == "recentre" else (BASE,)
    chain = line[line.index(codebook) + 1 :] if codebook in line else fresh  # of an ancestor: its own past
    return tuple(dict.fromkeys((*(name for name in chain[:MAX_CHAIN] if name != BASE), BASE)))


def _current(entry: dict[str, object]) -> Current:
    codebook, chain, how = entry["codebook"], entry["chain"], entry.get("how")
    if not isinstance(chain, list) or not all(_is_name(name) for name in (codebook, *chain)):
        raise ValueError(f"codebook {codebook!r}")
    since = entry.get("since")
    return Current(
        str(codebook),
        tuple(str(name) for name in chain),
        str(since) if since is not None else None,
        "rollback" if how == "rollback" else "recentre" if how == "recentre" else None,
    )


def _is_name(name: object) -> bool:
    """A name becomes a path: nothing but `base` and 12 digits."""
    return name == BASE or (isinstance(name, str) and len(name) == 12 and not set(name) - set("0123456789abcdef"))
