"""The independent verdict on a delivery: the producer's ledger against what the consumer got. Shares no code with what it judges.

Ledger: JSON lines `{"intended": result_id, "camera": ..}`, written before the commit, and `{"result_id", "camera", "epoch", "seq",
"cseq", "crc"}`, written after it has returned. A result of which only the intention is there (the process died in between) may be
committed or not: it need not arrive, but may.
Received: JSON lines `{"topic", "payload"}`, the payload as the text that came, in order of arrival.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Stream = tuple[str, str]  # camera, epoch


@dataclass
class Verdict:
    """What an honest witness would say. The lists hold result ids and must be empty; `declared` counts results that gap records cover."""

    produced: int = 0
    received: int = 0
    duplicates: int = 0
    declared: int = 0
    replayed: int = 0  # first copies that came marked `historical`: holes that a replay has filled
    unconfirmed: int = 0  # intended, the process died, and they arrived: they were committed
    lost: list[str] = field(default_factory=list)
    altered: list[str] = field(
        default_factory=list
    )  # a copy differs from the first one, or the first one from the ledger
    misplaced: list[str] = field(default_factory=list)  # a first copy that came after one with a higher cseq
    unknown: list[str] = field(default_factory=list)  # nobody has produced them
    contradicted: list[str] = field(default_factory=list)  # declared as dropped, and received
    holes: dict[Stream, list[int]] = field(
        default_factory=dict
    )  # cseq neither received nor declared, below the highest seen

    @property
    def is_kept(self) -> bool:
        """Whether the promise is kept: received + declared gaps = produced, in order, every copy identical."""
        wrong = (self.lost, self.altered, self.misplaced, self.unknown, self.contradicted)
        return not any(wrong) and not self.holes

    def rows(self) -> list[tuple[str, int]]:
        """For a table."""
        return [
            ("produced", self.produced),
            ("of these committed but cut off before the ledger said so", self.unconfirmed),
            ("received (distinct)", self.received),
            ("of these filled by replay", self.replayed),
            ("duplicates", self.duplicates),
            ("declared as dropped", self.declared),
            ("lost", len(self.lost)),
            ("altered", len(self.altered)),
            ("first copies out of order", len(self.misplaced)),
            ("of unknown origin", len(self.unknown)),
            ("declared and received", len(self.contradicted)),
            ("holes in cseq", sum(map(len, self.holes.values()))),
        ]


def read_lines(paths: Iterable[Path]) -> Iterator[Line]:
    """JSON lines of several files, one after the other; a last line that a kill has torn is left out.

    Raises:
        ValueError: a whole line is no JSON.
    """
    for path in paths:
        with path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)


def body_crc(payload: bytes | str) -> int:
    """Of what a message says, whether or not it is marked as a replay."""
    body = json.loads(payload)
    body.pop("historical", None)
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def judge(ledger: Iterable[Line], received: Iterable[Line]) -> Verdict:
    """Compares the two. Lines of a topic that carry neither `dkm.result/1` nor `dkm.gap/1` are passed over."""
    verdict = Verdict()
    intended, confirmed = _produced(ledger)
    first: dict[
        str, tuple[str, int]
    ] = {}  # result_id -> the text of its first copy that was no replay, crc of its body
    numbers: dict[Stream, set[int]] = defaultdict(set)
    declared: dict[Stream, set[int]] = defaultdict(set)
    order = _Order()
    for line in received:
        body = json.loads(line["payload"])
        stream = (body.get("camera", ""), body.get("epoch", ""))
        if body.get("schema") == "dkm.gap/1":
            declared[stream].update(range(body["from"], body["to"] + 1))
        if body.get("schema") != "dkm.result/1":
            continue
        name = body["result_id"]
        crc = body_crc(line["payload"])
        if name in first:
            verdict.duplicates += 1
            _compare(verdict, name, line["payload"], crc, first)
            continue
        first[name] = ("" if body.get("historical") else line["payload"], crc)
        numbers[stream].add(body["cseq"])
        verdict.replayed += bool(body.get("historical"))
        _check_origin(verdict, body, crc, intended, confirmed)
        if order.is_broken_by(line["topic"], body):
            verdict.misplaced.append(name)
    verdict.received = len(first)
    verdict.produced = len(confirmed) + sum(name not in confirmed for name in first if name in intended)
    _account(verdict, confirmed, set(first), numbers, declared)
    return verdict


def _produced(ledger: Iterable[Line]) -> tuple[set[str], dict[str, Line]]:
    intended: set[str] = set()
    confirmed: dict[str, Line] = {}
    for line in ledger:
        if "intended" in line:
            intended.add(line["intended"])
        else:
            confirmed[line["result_id"]] = line
    return intended | confirmed.keys(), confirmed


def _compare(verdict: Verdict, name: str, payload: str, crc: int, first: dict[str, tuple[str, int]]) -> None:
    """Copies are identical to the byte; a replay differs in its mark only."""
    text, first_crc = first[name]
    is_replay = bool(json.loads(payload).get("historical"))
    if crc != first_crc or (text and not is_replay and payload != text):
        verdict.altered.append(name)
    elif not text and not is_replay:
        first[name] = (payload, crc)


def _check_origin(verdict: Verdict, body: Line, crc: int, intended: set[str], confirmed: dict[str, Line]) -> None:
    name = body["result_id"]
    if name not in intended:
        verdict.unknown.append(name)
    elif name not in confirmed:
        verdict.unconfirmed += 1
    else:
        said = confirmed[name]
        keys = ("camera", "epoch", "seq", "cseq")
        if crc != said["crc"] or any(body[key] != said[key] for key in keys):
            verdict.altered.append(name)


class _Order:
    """First copies per topic: cseq rises within an epoch, and an epoch that has ended does not come back."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, int]] = {}
        self._ended: dict[str, set[str]] = defaultdict(set)

    def is_broken_by(self, topic: str, body: Line) -> bool:
        """Replays on the result topic fill holes and are not held to an order."""
        if body.get("historical") and not topic.endswith("/history"):
            return False
        epoch, cseq = body["epoch"], body["cseq"]
        last_epoch, last = self._last.get(topic, (epoch, 0))
        if epoch != last_epoch:
            if epoch in self._ended[topic]:
                return True
            self._ended[topic].add(last_epoch)
            last = 0
        if cseq <= last:
            return True
        self._last[topic] = (epoch, cseq)
        return False


def _account(
    verdict: Verdict,
    confirmed: dict[str, Line],
    received: set[str],
    numbers: dict[Stream, set[int]],
    declared: dict[Stream, set[int]],
) -> None:
    for name, said in confirmed.items():
        covered = said["cseq"] in declared[said["camera"], said["epoch"]]
        if name not in received and not covered:
            verdict.lost.append(name)
        if name in received and covered:
            verdict.contradicted.append(name)
    verdict.declared = sum(map(len, declared.values()))
    for stream in {*numbers, *declared}:
        seen = numbers[stream] | declared[stream]
        holes = sorted(set(range(1, max(seen, default=0) + 1)) - seen)
        if holes:
            verdict.holes[stream] = holes
