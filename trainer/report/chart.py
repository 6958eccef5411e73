"""Small SVG charts as text, without a plotting library: bars of counts, a histogram with an edge, curves, a falling staircase with its band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

PALETTE = ("#3b6fb6", "#d1802f", "#4b9a6a", "#9b5aa5", "#b5484a", "#6b7785")
WIDTH_PX, BAR_PX, HISTOGRAM_PX, CURVE_PX, STEPS_PX = 640, 22, 180, 200, 220
N_BINS = 48
FAR_EDGES = 2.0  # where a staircase ends on the right: what lies further says nothing about the edge


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """Horizontal bars of (name, count)."""
    most = max((count for _, count in rows), default=1) or 1
    parts = []
    for n, (name, count) in enumerate(rows):
        y, width = n * BAR_PX, count / most * (WIDTH_PX - 260)
        parts.append(
            f'<text x="150" y="{y + 15}" text-anchor="end">{escape(name[:24])}</text>'
            f'<rect x="160" y="{y + 3}" width="{width:.1f}" height="{BAR_PX - 7}" fill="{PALETTE[n % len(PALETTE)]}"/>'
            f'<text x="{166 + width:.1f}" y="{y + 15}">{count}</text>'
        )
    return _svg(BAR_PX * len(rows) + 4, "".join(parts))


def histogram(series: Mapping[str, NDArray[np.float64]], edge: float, unit: str) -> str:
    """Outlined histograms of several samples on one axis, each scaled to its own size, with a vertical line at `edge`."""
    values = np.concatenate([v for v in series.values() if len(v)])
    top = max(float(np.quantile(values, 0.995)), 1.3 * edge)
    bins = np.linspace(0.0, top, N_BINS + 1)
    parts, base = [], HISTOGRAM_PX - 24
    for n, (name, sample) in enumerate(series.items()):
        if not len(sample):
            continue
        heights = np.histogram(np.minimum(sample, top), bins)[0] / len(sample)
        scaled = heights / heights.max() * (base - 24)
        points = " ".join(
            f"{x:.1f},{base - h:.1f}" for x, h in zip(np.linspace(10, WIDTH_PX - 10, N_BINS), scaled, strict=True)
        )
        colour = PALETTE[n % len(PALETTE)]
        parts.append(
            f'<polyline points="10,{base} {points} {WIDTH_PX - 10},{base}" fill="{colour}" fill-opacity=".12" stroke="{colour}" stroke-width="1.5"/>'
            f'<text x="{WIDTH_PX - 12}" y="{16 + 15 * n}" text-anchor="end" fill="{colour}">{escape(name)} ({len(sample)})</text>'
        )
    x = 10 + edge / top * (WIDTH_PX - 20)
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{base}" stroke="#b5484a" stroke-dasharray="5 3"/>'
        f'<text x="{x + 5:.1f}" y="14" fill="#b5484a">{edge:g} = novel</text>'
        f'<line x1="10" x2="{WIDTH_PX - 10}" y1="{base}" y2="{base}" stroke="currentColor"/>'
    )
    parts += [
        f'<text x="{10 + v / top * (WIDTH_PX - 20):.1f}" y="{base + 16}" text-anchor="middle">{v:.2g}</text>'
        for v in np.linspace(0, top, 6)
    ]
    parts.append(f'<text x="10" y="{HISTOGRAM_PX + 4}">{escape(unit)}</text>')
    return _svg(HISTOGRAM_PX + 10, "".join(parts))


def lines(series: Mapping[str, Sequence[tuple[float, float]]], marked: float | None, unit: str) -> str:
    """Curves of (x, y) points on common axes, with a dot per point and a vertical line at x = `marked`; `unit` names the x axis."""
    points = [point for curve in series.values() for point in curve]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, low, high = min(xs), max(xs), min(*ys, 0.0), max(*ys, 0.0)
    base = CURVE_PX - 24

    def x_px(x: float) -> float:
        return 50 + (x - left) / ((right - left) or 1) * (WIDTH_PX - 70)

    def y_px(y: float) -> float:
        return base - (y - low) / ((high - low) or 1) * (base - 20)

    parts = []
    for n, (name, curve) in enumerate(series.items()):
        colour = PALETTE[n % len(PALETTE)]
        path = " ".join(f"{x_px(x):.1f},{y_px(y):.1f}" for x, y in curve)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x_px(x):.1f}" cy="{y_px(y):.1f}" r="3" fill="{colour}"/>' for x, y in curve]
        parts.append(
            f'<text x="{WIDTH_PX - 12}" y="{12 + 15 * n}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
    if marked is not None and left <= marked <= right:
        parts.append(
            f'<line x1="{x_px(marked):.1f}" x2="{x_px(marked):.1f}" y1="4" y2="{base}" stroke="#b5484a" stroke-dasharray="5 3"/>'
        )
    parts.append(
        f'<line x1="50" x2="{WIDTH_PX - 20}" y1="{y_px(0):.1f}" y2="{y_px(0):.1f}" stroke="currentColor" stroke-opacity=".4"/>'
    )
    parts += [f'<text x="{x_px(x):.1f}" y="{base + 16}" text-anchor="middle">{x:g}</text>' for x in sorted(set(xs))]
    parts += [f'<text x="44" y="{y_px(y) + 4:.1f}" text-anchor="end">{y:.2f}</text>' for y in sorted({low, high})]
    parts.append(f'<text x="10" y="{base + 16}">{escape(unit)}</text>')
    return _svg(CURVE_PX, "".join(parts))


@dataclass(frozen=True)
class Steps:
    """A share `y` (J,) that falls at each x (J,), rising, and what it may be in truth: between `low` and `high` (J,), known at each x."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def steps(curve: Steps, edge: tuple[float, str], levels: Mapping[str, float], top: float, unit: str) -> str:
    """The staircase and its band, near `edge` and up to the share `top`; a vertical line at `edge`, horizontal ones at `levels`; `unit` names the x axis."""
    below = np.flatnonzero(curve.y <= top)
    left = min(float(curve.x[below[0]]) if len(below) else edge[0], 0.95 * edge[0])
    right = min(max(float(curve.x[-1]) * 1.03, 1.15 * edge[0]), FAR_EDGES * edge[0])
    base = STEPS_PX - 24

    def across(x: float) -> float:
        return 50 + (x - left) / (right - left) * (WIDTH_PX - 70)

    def up(y: float) -> float:
        return base - min(y, top) / top * (base - 12)

    colour, red, edge_px = PALETTE[0], PALETTE[4], across(edge[0])
    upper, middle, lower = (
        [f"{across(x):.1f},{up(y):.1f}" for x, y in corners] for corners in _corners(curve, left, right)
    )
    parts = [
        f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" fill-opacity=".15"/>',
        f'<polyline points="{" ".join(middle)}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<line x1="{edge_px:.1f}" x2="{edge_px:.1f}" y1="4" y2="{base}" stroke="{red}" stroke-dasharray="5 3"/>',
        f'<text x="{edge_px + 5:.1f}" y="14" fill="{red}">{edge[0]:g} = {escape(edge[1])}</text>',
        f'<line x1="50" x2="{WIDTH_PX - 20}" y1="{base}" y2="{base}" stroke="currentColor"/>',
    ]
    for n, (name, level) in enumerate(levels.items()):
        hue = PALETTE[1 + n]
        parts.append(
            f'<line x1="50" x2="{WIDTH_PX - 20}" y1="{up(level):.1f}" y2="{up(level):.1f}" stroke="{hue}" stroke-dasharray="2 3"/>'
            f'<text x="{WIDTH_PX - 20}" y="{up(level) - 4:.1f}" text-anchor="end" fill="{hue}">{escape(name)}</text>'
        )
    parts += [
        f'<text x="{across(x):.1f}" y="{base + 16}" text-anchor="middle">{x:g}</text>' for x in _round(left, right)
    ]
    parts += [f'<text x="44" y="{up(y) + 4:.1f}" text-anchor="end">{100 * y:g} %</text>' for y in _round(0.0, top)]
    parts.append(f'<text x="{WIDTH_PX - 20}" y="{STEPS_PX + 6}" text-anchor="end">{escape(unit)}</text>')
    return _svg(STEPS_PX + 10, "".join(parts))


def _corners(curve: Steps, left: float, right: float) -> list[list[tuple[float, float]]]:
    """Points of the upper bound, the share and the lower bound, from `left` to `right`."""
    x = np.array([-np.inf, *curve.x, np.inf])
    # Between two scores the truth is below what the left one allows and above what the right one does.
    bounds = ([1.0, *curve.high], [1.0, *curve.y], [*curve.low, 0.0])
    there = np.flatnonzero((x[:-1] < right) & (x[1:] > left))
    ends = [(max(left, float(x[n])), min(right, float(x[n + 1]))) for n in there]
    return [[(end, float(y[n])) for n, pair in zip(there, ends, strict=True) for end in pair] for y in bounds]


def _round(low: float, high: float) -> list[float]:
    """Four to ten round numbers from `low` to `high`."""
    ideal = (high - low) / 4
    decade = 10.0 ** np.floor(np.log10(ideal))
    step = decade * max(m for m in (1, 2, 5) if m * decade <= ideal)
    return [round(float(n * step), 10) for n in range(int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9) + 1)]


def _svg(height: int, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH_PX} {height}" width="{WIDTH_PX}" role="img">{body}</svg>'
