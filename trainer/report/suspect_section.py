"""The section of report.html on training images that look as if they did not belong."""

from __future__ import annotations

from pathlib import Path

from trainer.images import Item
from trainer.report.gallery import captioned
from trainer.suspects import FILE, read_suspects

SHOWN = 60


def suspect_section(folder: Path, items: dict[str, Item]) -> str:
    """HTML; empty where the run was not looked over (a run of an older version, or too few images)."""
    found = read_suspects(folder)
    if found is None:
        return ""
    head = "<h2>Suspects among the training images</h2>"
    if not found:
        return f"{head}<p>None: no training image is farther from the others than chance gives.</p>"
    rows = [(file, f"{score:.2f}, p {p:.1g}") for file, score, p in found[:SHOWN]]
    more = f" The first {SHOWN} are shown." if len(found) > SHOWN else ""
    return (
        f"{head}<p>{len(found)} training images are farther from those of other groups than chance gives. Defective parts among the good "
        f"ones raise the threshold: look at these, and take out what does not belong before you train again. Under each picture how "
        f"many times the usual distance it has, and the p-value; all are listed in <code>{FILE}</code>.{more}</p>{captioned(rows, items)}"
    )
