"""The section of report.html on the bank: what it looks at, in words, and among what it was chosen."""

from __future__ import annotations

from html import escape
from typing import Any

from trainer.bank.settings import BankSettings
from trainer.report.frame import table

LEARNED = {
    "kmeans": "centres found by k-means",
    "stochastic_quantization": "centres found by stochastic quantization in one pass",
    "coreset": "points of a greedy coreset",
    "sample": "points drawn at random",
}
FIGURES = {
    "synthetic_auroc": "AUROC on drawn defects",
    "cluster_auroc": "AUROC on clusters kept from it",
    "spread": "folds apart",
    "cost": "cost",
}


def bank_section(bank: dict[str, Any]) -> str:
    """HTML for `novelty.bank` of model.json; with a table of what was tried where fit chose the bank."""
    settings = BankSettings.model_validate(bank["settings"])
    text = (
        f"<h3>The bank</h3><p>{escape(in_words(settings))} A part's distances are divided by {bank['patch_radius']:.3g} "
        f"(<code>patch_radius</code>), so that an ordinary one has {settings.weight:g}.{_cost(bank)}</p>"
    )
    choice = bank.get("choice")
    if not choice:
        return text
    return f"{text}<p>{escape(_sentence(choice['why']))}</p>{_tried(choice['tried'], settings)}"


def _cost(bank: dict[str, Any]) -> str:
    return f" It costs {bank['cost']:.1%} of the encoder's multiply-adds." if "cost" in bank else ""


def in_words(settings: BankSettings) -> str:
    """What a bank with these settings does, for people."""
    s = settings
    layers = " and ".join([", ".join(s.layers[:-1]), s.layers[-1]] if len(s.layers) > 1 else s.layers)
    if s.cells == "image":
        strength = " (their kind, not their strength)" if s.unit else ""
        looks = f"Looks at means and deviations of {layers} over the whole image{strength}"
    else:
        each = "each cell" if s.stride == 1 else f"every {_ordinal(s.stride)} cell, across and down,"
        looks = f"Looks at {each} of {layers}, averaged over its 3x3 neighbours"
    looks += f", in at most {s.dim} directions (whiten {s.whiten:g})."
    return f"{looks} {_compared(s)} {_reduced(s)}"


def _compared(s: BankSettings) -> str:
    if s.learn == "gaussian":
        smooth = f", shared with the places up to {s.smooth} cells around" if s.smooth else ""
        return f"Each place is compared with the normal distribution of good parts at that place{smooth} (regularise {s.regularise:g})."
    nearest = "the nearest" if s.neighbours == 1 else f"the {s.neighbours} nearest"
    text = f"A cell's distance is that to {nearest} of {s.size} {LEARNED[s.learn]}"
    if s.local:
        text += ", in radii of the centre's own cells"
    if s.per_cluster:
        text += ", of those of the image's own cluster"
    if s.min_groups > 1:
        text += f"; a centre must be known from {s.min_groups} groups"
    return text + "."


def _reduced(s: BankSettings) -> str:
    if s.cells == "image":
        return "It has no map of places."
    if s.reduce == "max":
        return "The strangest cell is the part's score: one cell above the edge makes the part novel."
    if s.reduce == "mean":
        return "The mean over all cells is the part's score, so single cells may lie above the edge."
    return f"The mean of the strangest {s.top_share:.0%} of cells is the part's score, so single cells may lie above the edge."


def _tried(tried: list[dict[str, Any]], chosen: BankSettings) -> str:
    """One row per trial; the settings in which they differ, each in a column."""
    full = [BankSettings.model_validate(trial["settings"]) for trial in tried]
    plain = [settings.model_dump(mode="json") for settings in full]
    keys = [key for key in plain[0] if len({repr(row[key]) for row in plain}) > 1] if plain else []
    figures = [name for name in FIGURES if any(trial.get(name) is not None for trial in tried)]
    rows = [
        [
            *(_cell(row[key]) for key in keys),
            *(_figure(trial.get(name)) for name in figures),
            "chosen" if settings == chosen else "",
        ]
        for trial, row, settings in zip(tried, plain, full, strict=True)
    ]
    return table([*keys, *(FIGURES[name] for name in figures), ""], rows)


def _cell(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third", 4: "fourth"}.get(n, f"{n}th")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!")) else f"{text}."
