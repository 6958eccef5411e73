"""One HTML file with the pictures of proposed families; opens offline."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

import cv2
import numpy as np

from edge_dkm.families.proposals import Proposal, Searched
from edge_dkm.frames.index import FrameRow

THUMB_PX, SHOWN = 128, 24
STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #8884}.strip{display:flex;flex-wrap:wrap;gap:4px}
figure{margin:0;text-align:center}figure img{display:block;max-width:128px;max-height:128px}figcaption{font-size:11px;opacity:.7}
td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #8883}code{background:#8882;padding:.1em .3em;border-radius:3px}
"""


def families_page(station: str, found: Sequence[Searched]) -> str:
    """The whole file."""
    proposals = [proposal for searched in found for proposal in searched.proposals]
    sections = [
        f"<h1>{escape(station)}: {len(proposals) or 'no'} new famil{'y' if len(proposals) == 1 else 'ies'} among the novel parts</h1>",
        "".join(f"<p>{escape(searched.text().splitlines()[0])}</p>" for searched in found),
        *(_section(n, proposal) for n, proposal in enumerate(proposals, 1)),
    ]
    if proposals:
        sections.append(
            "<h2>What to do</h2><p>A family that is a good part, or a defect worth a name of its own, becomes a cluster by training with it: "
            "<code>dkm-train ingest</code> gathers these frames, <code>dkm-train fit</code> learns with one cluster more.</p>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(station)}: families</title><style>{STYLE}</style><body>{''.join(sections)}</body></html>\n"
    )


def _section(number: int, proposal: Proposal) -> str:
    plain, family = proposal.plain(), proposal.family
    rows = {
        "parts, groups": f"{plain['n']}, {plain['groups']}",
        "first seen": plain["first"],
        "last seen": plain["last"],
        "frames kept per hour": "-"
        if plain["kept_per_h"] is None
        else f"{plain['kept_per_h']:.2f} (the line may have seen more)",
        "nearest known cluster": f"{proposal.nearest_name}, {family.raw_score:.2f} of its radii away",
        "scatter": f"{family.scatter:.3g}",
    }
    table = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    known = ""
    if proposal.known:
        known = f"<p>Beside it, ordinary parts of {escape(proposal.nearest_name)}:</p>{_strip(proposal.folder, proposal.known)}"
    return (
        f"<h2>Family {number}, camera {escape(proposal.camera)}</h2><table>{table}</table>"
        f"<p>The most typical first; under each picture its novelty score.</p>{_strip(proposal.folder, proposal.rows[:SHOWN])}{known}"
    )


def _strip(folder: Path, rows: Sequence[FrameRow]) -> str:
    return '<div class="strip">' + "".join(_figure(folder, row) for row in rows) + "</div>"


def _figure(folder: Path, row: FrameRow) -> str:
    url = _data_url(folder / row.file)
    picture = f'<img src="{url}" alt="" loading="lazy">' if url else "gone"
    title = escape(f"{row.file}\n{row.ts}\n{row.cluster}, {row.verdict}", quote=True)
    return f'<figure title="{title}">{picture}<figcaption>{escape(row.novelty_score)}</figcaption></figure>'


def _data_url(path: Path) -> str | None:
    """None where the ring has let go of the frame meanwhile."""
    try:
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error):
        return None
    if image is None:
        return None
    scale = THUMB_PX / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 82])
    return "data:image/jpeg;base64," + base64.b64encode(np.asarray(data).tobytes()).decode()
