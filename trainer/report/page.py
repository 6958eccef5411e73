"""Writes report.html: what was learned, how the clusters look from nearest to farthest, where the novelty edge lies. One file, no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.artifact import Run
from trainer.data import Skipped
from trainer.errors import DataError
from trainer.images import Item, open_images
from trainer.provenance import novelty_sentence
from trainer.report import chart
from trainer.report.assignment_table import Assignment, read_assignments
from trainer.report.frame import html_page
from trainer.report.gallery import PER_CLUSTER, spread, strip
from trainer.report.novelty_section import novelty_section
from trainer.report.suspect_section import suspect_section
from trainer.whole_file import write_whole

SHOWN_SKIPPED = 50


def write_report(run: Run, skipped: Sequence[Skipped] | None, path: Path) -> None:
    """Writes the page for a saved run; images that are no longer where they were leave gaps. `skipped` None: not known any more."""
    if run.path is None:
        raise DataError("a report needs a saved run")
    rows = read_assignments(run.path)
    items = _items(run)
    by_cluster: dict[int, list[Assignment]] = {row["id"]: [] for row in run.clusters}
    for assignment in rows:
        by_cluster[assignment.cluster].append(assignment)
    sections = [_head(run), _warnings(run, rows, skipped), _occupancy(run, by_cluster)]
    sections.append(novelty_section(run, rows, items))
    sections.append(
        "<h2>Clusters, nearest to farthest</h2><p>Under each picture its novelty score; a red frame: above 1.0.</p>"
    )
    for row in run.clusters:
        members = by_cluster[row["id"]]
        sections.append(
            f"<h3>{escape(row['name'])} <small>({len(members)} images)</small></h3>{strip(spread(members), items)}"
        )
    strangest = sorted(rows, key=lambda row: -row.novelty_score)[:PER_CLUSTER]
    sections.append(f"<h2>Strangest images</h2>{strip(strangest, items)}")
    sections.append(suspect_section(run.path, items) + _truth(run, rows) + _origin(run))
    write_whole(path, html_page(f"{run.path.name}: {run.info['method']}", "".join(sections)))


def _items(run: Run) -> dict[str, Item]:
    try:
        return {item.name: item for item in open_images(run.settings.data).items}
    except DataError:
        return {}


def _head(run: Run) -> str:
    train = run.info["train"]
    figures = " &middot; ".join(f"{escape(key)} {value:.3f}" for key, value in run.metrics.items())
    return (
        f"<h1>{escape(run.path.name if run.path else '')}</h1><p>{escape(run.info['method'])} on {escape(run.info['encoder'])} features, "
        f"{train['n']} images ({train['n_train']} train, {train['n_radius']} radius, {train['n_calibration']} calibration), "
        f"seed {train['seed']}.</p><p>{figures}</p>"
    )


def _warnings(run: Run, rows: list[Assignment], skipped: Sequence[Skipped] | None) -> str:
    notes = list(run.info["train"].get("warnings", []))
    novelty = run.info["novelty"]
    if novelty["kind"] == "uncalibrated" or novelty["promised_frr"] > novelty["target_frr"]:
        notes.append(novelty_sentence(novelty))
    if run.metrics.get("largest_share", 0) > 0.9 and run.model.n_clusters > 1:
        notes.append(f"one cluster holds {run.metrics['largest_share']:.0%} of all images")
    if novelty["kind"] != "uncalibrated" and not run.info["train"].get("known_good"):
        notes.append(
            f"there is no folder '{run.settings.data.good}' of known good parts, so novelty was calibrated on all of them: "
            f"defective ones among them raise the threshold (fewer false rejects, more missed defects)"
        )
    empty = [row["name"] for row in run.clusters if row["n"] == 0]
    if empty:
        notes.append(f"no training image lies in {', '.join(empty)}")
    if run.info["train"]["n_left_out"]:
        notes.append(f"{run.info['train']['n_left_out']} known defects of held-out groups were left out of training")
    boxes = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
    count = run.info["train"]["skipped"]
    if not count:
        return boxes
    listed = "".join(f"<li>{escape(s.name)}: {escape(s.reason)}</li>" for s in (skipped or [])[:SHOWN_SKIPPED])
    return f"{boxes}<details><summary>{count} images could not be used</summary><ul>{listed}</ul></details>"


def _occupancy(run: Run, by_cluster: dict[int, list[Assignment]]) -> str:
    bars = chart.bars([(row["name"], len(by_cluster[row["id"]])) for row in run.clusters])
    cells = "".join(
        f"<tr><td>{row['id']}</td><td>{escape(row['name'])}</td><td>{row.get('verdict', 'line default')}</td><td>{row['n']}</td>"
        f"<td>{row['radius']:.3g}</td><td>{row['q50']:.2f}</td><td>{row['q99']:.2f}</td></tr>"
        for row in run.clusters
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("id", "name", "verdict", "training images", "radius", "median", "99 %")
    )
    return (
        f"<h2>Occupancy</h2>{bars}<table><tr>{head}</tr>{cells}</table>"
        f"<p>Edit names and verdicts in <code>labels.yaml</code>, then export. Median and 99 % are of novelty distance / radius.</p>"
    )


def _truth(run: Run, rows: list[Assignment]) -> str:
    """Clusters against class folders, where there are some."""
    labels = sorted({row.label for row in rows if row.label})
    if len(labels) < 2:
        return ""
    counts = Counter((row.cluster, row.label) for row in rows)
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    body = ""
    for row in run.clusters:
        cells = "".join(f"<td>{counts[row['id'], label] or ''}</td>" for label in labels)
        body += f"<tr><th>{escape(row['name'])}</th>{cells}</tr>"
    return f"<h2>Clusters against class folders</h2><p>The method never saw these labels.</p><table><tr><th></th>{head}</tr>{body}</table>"


def _origin(run: Run) -> str:
    info: dict[str, Any] = run.info
    values = {
        "data": run.settings.data.path,
        "manifest sha256": info["train"]["manifest_sha256"],
        "code": info["train"]["git"] or "installed package",
        "created": info["created"],
        **{f"version {k}": v for k, v in info["versions"].items() if v},
    }
    return (
        "<h2>Origin</h2><table>"
        + "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
        + "</table>"
    )
