"""The section of report.html on novelty: scores, false rejects, what the bank is, and maps of what it finds strange."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from trainer.artifact import Run
from trainer.images import Item
from trainer.provenance import novelty_sentence
from trainer.report import chart
from trainer.report.assignment_table import Assignment
from trainer.report.bank_section import bank_section
from trainer.report.novelty_curve import curve_of, curve_section
from trainer.report.novelty_maps import map_strip, scale_bar
from trainer.suspects import read_suspects

SHOWN_STRANGEST, SHOWN_SUSPECTS = 12, 12


def novelty_section(run: Run, rows: Sequence[Assignment], items: dict[str, Item]) -> str:
    """HTML; the curve only where there are calibration parts, bank and maps only where there is a bank."""
    novelty = run.info["novelty"]
    series = {
        split: np.array([row.novelty_score for row in rows if row.split == split])
        for split in ("train", "radius", "calibration", "left_out")
    }
    text = (
        f"<h2>Novelty</h2><p>{escape(novelty_sentence(novelty))}.</p>"
        f"{chart.histogram({k: v for k, v in series.items() if len(v)}, 1.0, 'novelty score')}"
    )
    if novelty["kind"] != "uncalibrated":
        text += curve_section(curve_of(run.model), novelty)
    if run.model.bank is not None:
        text += bank_section(novelty["bank"]) + _maps(run, rows, items)
    return text


def _maps(run: Run, rows: Sequence[Assignment], items: dict[str, Item]) -> str:
    if run.model.bank is None or run.model.bank.settings.cells == "image":
        return ""
    strangest = sorted(rows, key=lambda row: -row.novelty_score)[:SHOWN_STRANGEST]
    shown = [(row.file, f"novelty {row.novelty_score:.2f}, {row.split.replace('_', ' ')}") for row in strangest]
    text = (
        f"<h3>Maps of the strangest images</h3><p>What the encoder saw, and where the bank finds it strange. Training parts look more "
        f"ordinary than they are, since the bank was learned on them.</p>{scale_bar()}{map_strip(run.model, shown, items)}"
    )
    found = (read_suspects(run.path) if run.path else None) or []
    if not found:
        return text
    captions = [(file, f"suspect, {score:.2f} times usual") for file, score, _ in found[:SHOWN_SUSPECTS]]
    return f"{text}<h3>Maps of the suspects</h3>{map_strip(run.model, captions, items)}"
