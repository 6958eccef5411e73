"""Compares what the line published with what was planted in the film."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from devices.sources.synthetic import PlannedPart

MIN_FLAGGED, MAX_FALSE = 0.90, 0.03
MIN_GOOD, MIN_PLANTED = 200, 20


@dataclass(frozen=True)
class Verdicts:
    """The counts behind the table."""

    parts: int
    seen: int
    by_kind: dict[str, tuple[int, int]]  # kind of defect, or good -> (flagged, all)
    clusters: dict[str, int]
    verdicts: dict[str, int]
    published: int
    received: int
    duplicates: int
    has_gaps: bool
    latency_ms: dict[str, dict[str, float]]

    @property
    def planted(self) -> tuple[int, int]:
        """(flagged, all) of everything that should be flagged."""
        rows = [count for kind, count in self.by_kind.items() if kind != "good"]
        return sum(flagged for flagged, _ in rows), sum(total for _, total in rows)

    @property
    def passed(self) -> bool:
        """Whether the line does what the demo promises."""
        flagged, planted = self.planted
        false, good = self.by_kind["good"]
        return (
            good >= MIN_GOOD
            and planted >= MIN_PLANTED
            and self.seen == self.parts
            and flagged >= MIN_FLAGGED * planted
            and false <= MAX_FALSE * good
            and self.published == self.received
            and not self.has_gaps
        )

    def table(self) -> str:
        """For people."""
        flagged, planted = self.planted
        false, good = self.by_kind["good"]
        kinds = ", ".join(
            f"{kind} {n} of {total}" for kind, (n, total) in sorted(self.by_kind.items()) if kind != "good"
        )
        commit = self.latency_ms.get("capture to commit", {})
        infer = self.latency_ms.get("infer", {})
        rows = [
            ("parts on the belt / seen", f"{self.parts} / {self.seen}", "equal"),
            ("clusters", ", ".join(f"{name} {n}" for name, n in sorted(self.clusters.items())), ""),
            ("verdicts", ", ".join(f"{name} {n}" for name, n in sorted(self.verdicts.items())), ""),
            (
                "planted parts flagged",
                f"{flagged} of {planted} ({flagged / planted:.1%}): {kinds}",
                f">= {MIN_FLAGGED:.0%}",
            ),
            ("good parts falsely flagged", f"{false} of {good} ({false / good:.1%})", f"<= {MAX_FALSE:.0%}"),
            (
                "messages published / received",
                f"{self.published} / {self.received} (+ {self.duplicates} duplicates)",
                "equal",
            ),
            ("cseq without holes", "no" if self.has_gaps else "yes", "yes"),
            ("inference p50 / p99", f"{infer.get('p50', 0):.1f} / {infer.get('p99', 0):.1f} ms", ""),
            ("frame to commit p50 / p99", f"{commit.get('p50', 0):.1f} / {commit.get('p99', 0):.1f} ms", ""),
        ]
        width = max(len(row[0]) for row in rows)
        return "\n" + "\n".join(
            f"  {name:<{width}}  {value}{f'   [{wanted}]' if wanted else ''}" for name, value, wanted in rows
        )


def judge(planted: list[PlannedPart], messages: list[dict[str, Any]], report: dict[str, Any]) -> Verdicts:
    """Parts cross the region in the order of the plan, so the n-th trigger is the n-th part."""
    copies = [m for m in messages if m.get("schema") == "dkm.result/1"]
    results = list({m["result_id"]: m for m in copies}.values())
    by_kind: dict[str, list[int]] = {"good": [0, 0]}
    for result in results:
        number = result["trigger"]["id"]
        if number > len(planted):
            continue
        count = by_kind.setdefault(planted[number - 1].defect or "good", [0, 0])
        count[0] += result["verdict"] != "pass"
        count[1] += 1
    cseqs = sorted(r["cseq"] for r in results)
    return Verdicts(
        parts=len(planted),
        seen=len(results),
        by_kind={kind: (n, total) for kind, (n, total) in by_kind.items()},
        clusters=dict(Counter(r["cluster"]["name"] for r in results if "cluster" in r)),
        verdicts=dict(Counter(r["verdict"] for r in results)),
        published=report["parts"] + report["bad"],
        received=len(results),
        duplicates=len(copies) - len(results),
        has_gaps=cseqs != list(range(1, len(cseqs) + 1)),
        latency_ms=report["latency_ms"],
    )
