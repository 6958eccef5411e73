"""Compares methods and settings on one set without labels; `dkm-train sweep` calls it. The control comes first, and may well win.

Ranked by the mean rank over three criteria: ARI between seeds (does it give the same answer twice), silhouette in ONE fixed space, the
control's embedding (inside its own space every method looks better the longer it trains), and agreement, the mean ARI with the other
rows (in a study on steel strip it correlated with accuracy at .64). A row beats the control if it is better by two of the three.
Labels, where there are class folders, are shown and never ranked by.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from configs import ConfigError
from trainer import metric
from trainer.artifact import Run
from trainer.errors import DataError, TrainerError
from trainer.frozen_features import embeddings
from trainer.loop import InterruptedTraining
from trainer.progress import Progress, Silent
from trainer.report.assignment_table import read_assignments
from trainer.report.sweep_page import sweep_page
from trainer.settings import TrainSettings
from trainer.trials import changed, fit_or_reuse, load_base, read_images
from trainer.variants import Variant, expand, parse_grid, with_method
from trainer.whole_file import write_whole

SCHEMA = "dkm.sweep/1"
CRITERIA = ("seed_ari", "silhouette", "agreement")
IN_WORDS = {"seed_ari": "stability between seeds", "silhouette": "silhouette", "agreement": "agreement with the others"}
MARGIN = 0.005  # a smaller difference is a tie
CONTROL_NAME = "control: ae_kmeans"

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class SweepOptions:
    """`methods` in place of the settings' own; `grid` items `a.b=1,2`; `search` draws instead of every combination; fits per row."""

    methods: Sequence[str] = ()
    grid: Sequence[str] = ()
    search: int | None = None
    seeds: int = 3
    out: Path | None = None
    overrides: Sequence[str] = ()
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True)
class SweepRow:
    """One variant. `failed` says why there are no figures. `acc` and `nmi` come from class folders and are not ranked by."""

    name: str
    method: str
    runs: list[str] = field(default_factory=list)
    failed: str | None = None
    seed_ari: float | None = None
    silhouette: float | None = None
    agreement: float | None = None
    mean_rank: float | None = None
    beats_control: bool | None = None
    acc: float | None = None
    nmi: float | None = None
    minutes: float | None = None


@dataclass(frozen=True)
class Sweep:
    """The rows, control first, then by rank, failed ones last; `verdict` in words. `settings` of each row by its name."""

    verdict: str
    rows: list[SweepRow]
    settings: dict[str, TrainSettings]
    out: Path

    def gain(self, row: SweepRow) -> str:
        """What a row gains over the control, criterion by criterion, in words."""
        gains = [(key, _or_lowest(getattr(row, key)) - _or_lowest(getattr(self.rows[0], key))) for key in CRITERIA]
        return ", ".join(f"{IN_WORDS[key]} {gain:+.3f}" for key, gain in gains)

    @property
    def best(self) -> SweepRow:
        """The first of the rows that beat the control, else the control."""
        return next((row for row in self.rows if row.beats_control), self.rows[0])

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "labels_used_for_ranking": False} for row in self.rows]
        return {"schema": SCHEMA, "verdict": self.verdict, "best": self.best.name, "rows": rows, "out": str(self.out)}

    def text(self) -> str:
        """For people."""
        width = max(len(row.name) for row in self.rows)
        has_labels = any(row.acc is not None for row in self.rows)
        head = f"{'':{width}}   rank  seeds  silhouette  agreement  minutes"
        lines = [head + ("  | ACC   NMI   (labels, not used for ranking)" if has_labels else "")]
        for row in self.rows:
            if row.failed is not None:
                lines.append(f"{row.name:{width}}   failed: {row.failed}")
                continue
            cells = f"  {row.mean_rank:5.2f}  {row.seed_ari:5.2f}  {row.silhouette or 0:10.3f}  {row.agreement or 0:9.2f}  {row.minutes or 0:7.1f}"
            lines.append(
                f"{row.name:{width}} {cells}" + (f"  | {row.acc:.3f} {row.nmi:.3f}" if row.acc is not None else "")
            )
        return "\n".join([*lines, f"verdict   {self.verdict}", f"page      {self.out / 'sweep.html'}"])


@dataclass
class _Fitted:
    """One variant's runs; `labels`: (N,) cluster ids per seed, in the order of the images."""

    variant: Variant
    runs: list[Run] = field(default_factory=list)
    labels: list[Labels] = field(default_factory=list)
    failed: str | None = None


def sweep(configs: Sequence[str | Path | TrainSettings], options: SweepOptions) -> Sweep:
    """Fits every row for every seed (complete runs under `out` are reused) and ranks them.

    Raises:
        ConfigError, DataError: the settings do not fit, or are not about the same images.
        TrainerError: the control itself failed: there is nothing to compare with.
    """
    if options.seeds < 2 or (options.search is not None and options.search < 1):
        raise DataError(
            f"--seeds is {options.seeds} and --search {options.search}, expected at least 2 seeds and 1 draw"
        )
    loaded = [(c, "run") if isinstance(c, TrainSettings) else load_base(c, options.overrides) for c in configs]
    bases, out = [settings for settings, _ in loaded], options.out or Path("runs") / f"{loaded[0][1]}-sweep"
    for (settings, _), config in zip(loaded, configs, strict=True):
        if (settings.data, settings.method.n_clusters) != (bases[0].data, bases[0].method.n_clusters):
            raise DataError(
                f"{config} has other data or method.n_clusters than {configs[0]}, expected the same: figures of different images cannot be compared"
            )
    control = Variant(CONTROL_NAME, with_method(bases[0], "ae_kmeans"))
    variants = [
        v
        for v in expand(bases, options.methods, parse_grid(options.grid), options.search)
        if v.settings != control.settings
    ]
    fitted = []
    for n, variant in enumerate([control, *variants]):
        options.progress.say(f"row {n + 1} of {len(variants) + 1}: {variant.name}")
        fitted.append(_fit(variant, out, options, may_fail=n > 0))
    rows = _rank(fitted, _control_space(fitted[0], options.progress))
    result = Sweep(_verdict(rows), rows, {one.variant.name: one.variant.settings for one in fitted}, out)
    write_whole(out / "sweep.json", json.dumps(result.plain(), indent=1, allow_nan=False) + "\n")
    write_whole(out / "sweep.html", sweep_page(loaded[0][1], result.plain()))
    return result


def _fit(variant: Variant, out: Path, options: SweepOptions, may_fail: bool) -> _Fitted:
    fitted = _Fitted(variant)
    base = variant.settings
    for n in range(options.seeds):
        seed = base.train.seed + n
        # One autoencoder per seed and recipe, shared by all methods: the comparison is paired.
        changes = {"train.seed": seed, "pretrain.cache": base.pretrain.cache or str(out / "pretrained")}
        folder = out / variant.folder / f"seed-{seed}"
        try:
            run = fit_or_reuse(changed(base, changes, "sweep"), folder, options.progress)
        except InterruptedTraining:
            raise
        except (TrainerError, ConfigError) as error:
            options.progress.close()
            if not may_fail:
                raise
            fitted.failed = str(error)
            return fitted
        fitted.runs.append(run)
        fitted.labels.append(np.array([row.cluster for row in read_assignments(folder)]))
    return fitted


def _control_space(control: _Fitted, progress: Progress) -> NDArray[np.float32]:
    """Embeddings (N, D) of all images by the control's first run."""
    run = control.runs[0]
    dataset = read_images(control.variant.settings, progress)
    z = run.model.projection.to_cluster_space(embeddings(run.settings, run.model, dataset))
    array: NDArray[np.float32] = z.cpu().numpy()
    if len(array) != len(control.labels[0]):
        raise DataError(
            f"{run.path} holds {len(control.labels[0])} images, now there are {len(array)}; choose another place with --out"
        )
    return array


def _rank(fitted: list[_Fitted], space: NDArray[np.float32]) -> list[SweepRow]:
    """The rows with figures and ranks, control first."""
    sound = [one for one in fitted if one.failed is None]
    wrong = [one for one in sound if len(one.labels[0]) != len(space)]
    if wrong:
        raise DataError(
            f"{wrong[0].runs[0].path} holds {len(wrong[0].labels[0])} images, expected {len(space)}; choose another --out"
        )
    rows = [_figures(one, [other for other in sound if other is not one], space) for one in sound]
    # Higher is better; a value that is not there (one cluster has no silhouette) ranks last.
    values = np.array([[_or_lowest(getattr(row, key)) for key in CRITERIA] for row in rows])
    ranks = ranks_with_ties(values).mean(1)
    better = (values > values[0] + MARGIN).sum(1) >= 2
    rows = [
        replace(row, mean_rank=float(rank), beats_control=bool(beats) if n else None)
        for n, (row, rank, beats) in enumerate(zip(rows, ranks, better, strict=True))
    ]
    failed = [
        SweepRow(one.variant.name, one.variant.settings.method.name, failed=one.failed) for one in fitted if one.failed
    ]
    return [rows[0], *sorted(rows[1:], key=lambda row: row.mean_rank or 0.0), *failed]


def ranks_with_ties(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks (R, C) of the rows of `values` (R, C) in each column, the highest first: 1 + better rows + half of those within MARGIN."""
    gaps = values[None] - values[:, None]
    return np.asarray(1 + (gaps > MARGIN).sum(1) + ((np.abs(gaps) <= MARGIN).sum(1) - 1) / 2)


def _or_lowest(value: float | None) -> float:
    return -1.0 if value is None else value


def _figures(one: _Fitted, others: list[_Fitted], space: NDArray[np.float32]) -> SweepRow:
    silhouettes = [metric.silhouette(space, labels) for labels in one.labels]
    known = [value for value in silhouettes if value is not None]
    agreements = [float(adjusted_rand_score(a, b)) for other in others for a in one.labels for b in other.labels]
    scores = [run.metrics for run in one.runs]
    has_labels = all("acc" in score for score in scores)
    return SweepRow(
        one.variant.name,
        one.variant.settings.method.name,
        [str(run.path) for run in one.runs],
        seed_ari=float(np.mean([adjusted_rand_score(a, b) for a, b in combinations(one.labels, 2)])),
        silhouette=float(np.mean(known)) if len(known) == len(silhouettes) else None,
        agreement=float(np.mean(agreements)) if agreements else None,
        acc=float(np.mean([score["acc"] for score in scores])) if has_labels else None,
        nmi=float(np.mean([score["nmi"] for score in scores])) if has_labels else None,
        minutes=float(sum(run.info["train"]["minutes"] for run in one.runs)),
    )


def _verdict(rows: list[SweepRow]) -> str:
    sound = [row for row in rows if row.failed is None]
    if len(sound) < 2:
        return "nothing to compare: no other row than the control was fitted; use the control"
    best = next((row for row in sound if row.beats_control), None)
    losers = [row.name for row in sound[1:] if not row.beats_control]
    beaten = f"; not better than the control: {'; '.join(losers)}" if losers else ""
    if best is None:
        return f"nothing beats the control by two of the three criteria: use ae_kmeans{beaten}"
    won = [key for key in CRITERIA if _or_lowest(getattr(best, key)) > _or_lowest(getattr(rows[0], key)) + MARGIN]
    lost = [IN_WORDS[key] for key in CRITERIA if key not in won]
    return (
        f"{best.name} beats the control by {' and '.join(IN_WORDS[key] for key in won)}"
        + (f" (not by {' and '.join(lost)})" if lost else "")
        + beaten
    )
