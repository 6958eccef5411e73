"""select_k.html: the recommendation in words and the curves behind it. One file, no network."""

from __future__ import annotations

from html import escape
from typing import Any

from trainer.report import chart
from trainer.report.frame import html_page, table

CURVES = (
    (
        "weakest",
        "weakest cluster",
        "Does every cluster come back? 1: the same in each resample; .75: the bound of a cluster that counts.",
    ),
    (
        "ari",
        "ARI between resamples",
        "Agreement of two k-means fits on disjoint halves, corrected for chance; it hides one split cluster among many.",
    ),
    (
        "seeds_ari",
        "ARI between seeds",
        "Agreement of clusterings of different seeds; with one embedding, of k-means alone.",
    ),
    (
        "gap",
        "gap",
        "Log inertia of structureless data of the same covariance, minus that of the images; at or below 0: no structure.",
    ),
    (
        "generalizability",
        "G(K)",
        "Loss of DEC on the training part over that on the validation part (Xie et al. 2016). Shown, not decided by.",
    ),
    ("silhouette", "silhouette", "In the embedding that was clustered; it prefers few, round clusters."),
)


def select_k_page(name: str, selection: dict[str, Any]) -> str:
    """HTML text for what `KSelection.plain` gives."""
    rows, choice = selection["rows"], selection["recommendation"]
    head = f'<h1>How many clusters: {escape(name)}</h1><p class="warn">{escape(choice["why"])}.</p>'
    head += f"<p>{selection['images']} images, {selection['embeddings']} embedding(s). No label was used.</p>"
    charts = ""
    for key, title, meaning in CURVES:
        points = [(row["k"], row[key]) for row in rows if row[key] is not None]
        if points:
            charts += (
                f"<h2>{escape(title)}</h2><p>{escape(meaning)}</p>{chart.lines({title: points}, choice['k'], 'K')}"
            )
    cells = [[row["k"], *(row[key] for key, _, _ in CURVES)] for row in rows]
    return html_page(
        f"{name}: number of clusters",
        head + charts + "<h2>Figures</h2>" + table(["K", *(t for _, t, _ in CURVES)], cells),
    )
