"""What the pages that compare fits share: the HTML around them and plain tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trainer.report.page import STYLE


def html_page(title: str, body: str) -> str:
    """One complete file; `body` is HTML, `title` is text."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Cells as text: numbers with two decimals, None as a dash."""
    cells = "".join("<tr>" + "".join(f"<td>{escape(_shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(name)}</th>' for name in head)}</tr>{cells}</table>"


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)
