"""What goes into the outbox and comes out of it; plain values, shared by its parts and its callers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Numbers:
    """What a result is numbered with when it is committed: `seq` per epoch, `cseq` per camera and epoch, both never given twice."""

    epoch: str
    seq: int
    cseq: int


@dataclass(frozen=True)
class Draft:
    """A result before it has its numbers; `render` makes the payload of them. Its intent, if there is one, is closed with it."""

    camera: str
    topic: str
    result_id: str
    render: Callable[[Numbers], bytes]


@dataclass(frozen=True)
class Intent:
    """A trigger that stands for a part, on disk before the inspection: after a restart it ends in a declared result."""

    result_id: str
    camera: str
    kind: str
    trigger_id: int
    ts: str
    part_id: str | None = None
    product: str | None = None


@dataclass(frozen=True)
class Row:
    """A row to publish; `cseq` is None for a gap record."""

    seq: int
    topic: str
    body: bytes
    camera: str
    cseq: int | None


@dataclass(frozen=True)
class Kept:
    """What is left of a stretch of results: one that is still held (`first == last`), or a run that is not (`body` None)."""

    first: int
    last: int
    topic: str
    body: bytes | None


@dataclass(frozen=True)
class OutboxStatus:
    """Rows not yet acknowledged, their bytes, the age of the oldest; rows kept after acknowledgement; drops since the start."""

    rows: int
    bytes: int
    oldest_s: float
    sent_rows: int
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # camera -> reason -> results
    is_blocked: bool = False


def row_crc(row: Row) -> int:
    """CRC-32 of all that is sent; SQLite itself does not check its pages."""
    return zlib.crc32(row.body, zlib.crc32(f"{row.seq}\0{row.camera}\0{row.cseq}\0{row.topic}\0".encode()))


def as_bytes(blob: object) -> bytes:
    """A body as it was written; one that is damaged may have become some other type."""
    return blob if isinstance(blob, bytes) else str(blob).encode()


def stretch(rows: Sequence[Row], first: int, last: int, topic: str) -> list[Kept]:
    """What is left of the results `first` to `last`, given the rows that are held, in order of cseq."""
    entries: list[Kept] = []
    for row in rows:
        cseq = row.cseq or 0
        if cseq > first:
            entries.append(Kept(first, cseq - 1, topic, None))
        entries.append(Kept(cseq, cseq, row.topic, row.body))
        first = cseq + 1
    if first <= last:
        entries.append(Kept(first, last, topic, None))
    return entries
