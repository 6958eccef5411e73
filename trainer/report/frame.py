"""What all pages share: the HTML around them, and plain tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #8884}table{border-collapse:collapse}
td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #8883}svg{max-width:100%;height:auto;font:12px system-ui,sans-serif;fill:currentColor}
.strip{display:flex;flex-wrap:wrap;gap:4px}figure{margin:0;text-align:center;border:2px solid transparent}figure.novel{border-color:#b5484a}
figure img{display:block;max-width:96px;max-height:96px}figure img.map{display:inline-block;max-width:160px;max-height:160px}
figcaption{font-size:11px;opacity:.7}.gone{font-size:11px;opacity:.6}
.warn{background:#d1802f22;border-left:4px solid #d1802f;padding:.5em 1em}code{background:#8882;padding:.1em .3em;border-radius:3px}
"""


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
