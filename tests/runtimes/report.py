"""What the comparison says: one table over all runtimes, the first difference of each kind, and whether all of it is as it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.table import show_table
from tests.runtimes.compare import Comparison
from tests.runtimes.runtime import Runtime

HEADER = (
    "runtime",
    "version",
    "model",
    "resize",
    "precision",
    "frames",
    "ids compared",
    "ids different",
    "novel or p different",
    "largest score gap",
    "largest distance gap",
    "largest patch gap",
    "result",
)


@dataclass(frozen=True)
class Line:
    """One case in one runtime, judged."""

    runtime: Runtime
    about: dict[str, Any]
    comparison: Comparison

    @property
    def verdict(self) -> str:
        """In words; capitals where it is not as it should be."""
        agrees, case = self.comparison.agrees, self.comparison.case
        if case.control is not None:
            if self.comparison.frames == 0:
                return "CONTROL NOT RUN"
            return "CONTROL NOT SEEN" if agrees else f"seen: {case.control}"
        if self.runtime.limit(case) is not None:
            return "NO LONGER DIFFERENT" if agrees else "differs, known"
        return "same" if agrees else "DIFFERENT"

    @property
    def is_right(self) -> bool:
        """Whether it is as it should be."""
        return not self.verdict.isupper()

    def row(self) -> tuple[object, ...]:
        """For the table."""
        c = self.comparison
        return (
            self.about["runtime"],
            self.about["version"],
            c.case.name,
            c.case.resize,
            c.case.precision,
            c.frames,
            c.ids_compared,
            c.ids_different,
            c.others_different,
            f"{c.max_score_gap:.1e}",
            f"{c.max_distance_gap:.1e}",
            f"{c.max_patch_gap:.1e}" if c.case.map_cells else "-",
            self.verdict,
        )


def show(lines: list[Line], not_run: dict[str, str]) -> None:
    """Prints everything."""
    show_table("The same file in every runtime", HEADER, [line.row() for line in lines])
    print()
    for about in {id(line.about): line.about for line in lines}.values():
        print(
            f"{about['runtime']} {about['version']}: "
            + ", ".join(f"{k} {v}" for k, v in about.items() if k[:2] != "ru")
        )
    for line in lines:
        reason = line.runtime.limit(line.comparison.case)
        if reason is not None or not line.is_right:
            print(
                f"\n{line.verdict}: {line.comparison.case.name} in {line.runtime.name}"
                + (f": {reason}" if reason else "")
            )
            for problem in line.comparison.problems:
                print(f"  {problem}")
    for name, why in not_run.items():
        print(f"\nNOT RUN: {name}: {why}")
