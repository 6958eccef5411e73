"""sweep.html: the table of a sweep and its verdict in words. One file, no network."""

from __future__ import annotations

from html import escape
from typing import Any

from trainer.report.frame import html_page, table

COLUMNS = (
    ("name", ""),
    ("mean_rank", "mean rank"),
    ("seed_ari", "ARI between seeds"),
    ("silhouette", "silhouette in the control's space"),
    ("agreement", "agreement with the others"),
    ("beats_control", "beats the control"),
    ("minutes", "minutes"),
)
LABELLED = (("acc", "ACC (labels, not used for ranking)"), ("nmi", "NMI (labels, not used for ranking)"))


def sweep_page(name: str, sweep: dict[str, Any]) -> str:
    """HTML text for what `Sweep.plain` gives."""
    has_labels = any(row["acc"] is not None for row in sweep["rows"])
    columns = [*COLUMNS, *(LABELLED if has_labels else ())]
    words = {None: "-", True: "yes", False: "no"}
    sound = [row for row in sweep["rows"] if row["failed"] is None]
    cells = [[words[row[key]] if key == "beats_control" else row[key] for key, _ in columns] for row in sound]
    failed = "".join(
        f"<li>{escape(row['name'])}: {escape(row['failed'])}</li>" for row in sweep["rows"] if row["failed"] is not None
    )
    body = (
        f'<h1>Sweep: {escape(name)}</h1><p class="warn">{escape(sweep["verdict"])}.</p>'
        f"{table([title for _, title in columns], cells)}"
        f"<p>Mean rank over the three criteria; lower is better. A row beats the control if it is better by two of them.</p>"
        + (f"<h2>Failed</h2><ul>{failed}</ul>" if failed else "")
        + "<h2>Runs</h2><p>Each is a run folder that can be exported.</p>"
        + table(["", "runs"], [[row["name"], ", ".join(row["runs"])] for row in sound])
    )
    return html_page(f"{name}: sweep", body)
