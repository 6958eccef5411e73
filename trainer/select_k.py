"""Chooses the number of clusters without labels; `dkm-train select-k` calls it. Embeds once per seed, then only k-means for each K.

The rule was fixed on drawn data (blobs of 2 to 32 dimensions, 2 to 8 of them, up to 10 : 1 in size; single clouds of several shapes):
the largest K at which every cluster comes back in resamples, among those that beat structureless data by more than any smaller
such K does. Too large a K splits a cluster at a place that changes with the sample; too small a K can be stable as well, so the largest
is taken. trainer/k_criteria.py holds the criteria.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.metrics import adjusted_rand_score

from trainer.errors import DataError
from trainer.frozen_features import embeddings
from trainer.k_criteria import Embedding, KFigures, measure
from trainer.progress import Progress, Silent
from trainer.report.select_k_page import select_k_page
from trainer.settings import TrainSettings
from trainer.trials import changed, fit_or_reuse, load_base, read_images
from trainer.whole_file import write_whole

SCHEMA = "dkm.select_k/1"
RETURNS = 0.75  # Jaccard index of a cluster that comes back (Hennig 2007)
MIN_GAP = 0.02  # log inertia; single clouds stay below it
SURE_DROP = 0.1  # of the weakest cluster from the answer to the next K


@dataclass(frozen=True)
class SelectOptions:
    """`ks` to try, embeddings to learn (`seeds`), where the run folders and the page go (`runs/<name>-select-k`)."""

    ks: Sequence[int] = tuple(range(2, 21))
    seeds: int = 3
    out: Path | None = None
    overrides: Sequence[str] = ()
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True)
class KRow:
    """Means over the seeds. `seeds_ari`: between clusterings of different seeds, None with one; of k-means alone where the embedding is the same."""

    k: int
    weakest: float
    ari: float
    seeds_ari: float | None
    gap: float
    gap_error: float
    generalizability: float
    silhouette: float | None

    @property
    def returns(self) -> bool:
        """Whether every cluster comes back in resamples."""
        return self.weakest >= RETURNS

    @property
    def is_structured(self) -> bool:
        """Whether k-means fits better than it fits structureless data."""
        return self.gap > max(MIN_GAP, 2 * self.gap_error)


@dataclass(frozen=True)
class KChoice:
    """`kind`: clear; likely (the next K is nearly as good); at_least (the range ends here); one_group; unclear. `k` is None where unclear."""

    kind: Literal["clear", "likely", "at_least", "one_group", "unclear"]
    k: int | None
    why: str


@dataclass(frozen=True)
class KSelection:
    """What `select_k` found; `out` holds select_k.json, select_k.html and a run folder per embedding."""

    choice: KChoice
    rows: list[KRow]
    images: int
    embeddings: int
    out: Path

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "recommendation": asdict(self.choice),
            "images": self.images,
            "embeddings": self.embeddings,
            "rows": [{**asdict(row), "returns": row.returns, "is_structured": row.is_structured} for row in self.rows],
            "out": str(self.out),
        }

    def text(self) -> str:
        """For people."""
        lines = ["  K  weakest    ARI  seeds    gap  G(K)  silhouette"]
        lines += [
            f"{row.k:3d}  {row.weakest:7.2f}  {row.ari:5.2f}  {_or_dash(row.seeds_ari)}  {row.gap:5.2f}  "
            f"{row.generalizability:4.2f}  {_or_dash(row.silhouette):>10}{'  <-' if row.k == self.choice.k else ''}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"K         {self.choice.why}", f"curves    {self.out / 'select_k.html'}"])


def _or_dash(value: float | None) -> str:
    return "    -" if value is None else f"{value:5.2f}"


def parse_ks(text: str) -> list[int]:
    """`2..20` or `4,6,8`, or both joined by commas, as sorted numbers.

    Raises:
        DataError: something else, or a number below 2.
    """
    ks: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not first.isdigit() or (dots and not last.isdigit()) or len(first + last) > 8:
            raise DataError(f"--k is {text}, expected whole numbers of at least 2, as 2..20 or 4,6,8")
        ks |= set(range(int(first), int(last) + 1)) if dots else {int(first)}
    if not ks or min(ks) < 2:
        raise DataError(f"--k is {text}, expected whole numbers of at least 2, as 2..20 or 4,6,8")
    return sorted(ks)


def select_k(config: str | Path | TrainSettings, options: SelectOptions) -> KSelection:
    """Embeds the images as the settings say, once per seed, and looks for the number of clusters.

    Raises:
        ConfigError, DataError: the settings, the range of K or the images are not usable.
    """
    settings, name = (config, "run") if isinstance(config, TrainSettings) else load_base(config, options.overrides)
    ks = sorted(set(options.ks))
    if not ks or ks[0] < 2 or options.seeds < 1:
        raise DataError(f"k is {ks} and seeds {options.seeds}, expected numbers of at least 2 and at least one seed")
    out = options.out or Path("runs") / f"{name}-select-k"
    measured: list[list[KFigures]] = []
    embeddings = _embeddings(settings, out, options)
    for n, embedding in enumerate(embeddings):
        options.progress.stage(f"k-means on embedding {n + 1} of {len(embeddings)}", len(ks), 0)
        measured.append([])
        for step, figures in enumerate(measure(embedding, ks)):
            measured[-1].append(figures)
            options.progress.epoch(step, {"K": figures.k, "weakest": figures.weakest, "ari": figures.ari})
    options.progress.close()
    rows = [mean_row([figures[n] for figures in measured]) for n in range(len(ks))]
    selection = KSelection(recommend(rows), rows, len(embeddings[0].z), len({id(e.z) for e in embeddings}), out)
    write_whole(out / "select_k.json", json.dumps(selection.plain(), indent=1, allow_nan=False) + "\n")
    write_whole(out / "select_k.html", select_k_page(name, selection.plain()))
    return selection


def _embeddings(settings: TrainSettings, out: Path, options: SelectOptions) -> list[Embedding]:
    """One per seed; one for all where the encoder is given (frozen, or `pretrain.from`) and the projection needs no clusters."""
    dataset = read_images(settings, options.progress)
    if len(dataset) < 2:
        raise DataError(f"{settings.data.path} has {len(dataset)} usable image, expected many; add images")
    control = {"name": "ae_kmeans", "n_clusters": min(settings.method.n_clusters, len(dataset))}
    found: list[Embedding] = []
    for n in range(options.seeds):
        seed = settings.train.seed + n
        changes = {"method": control, "novelty": "none", "train.seed": seed}
        run = fit_or_reuse(changed(settings, changes, "select-k"), out / f"seed-{seed}", options.progress)
        z = run.model.projection.to_cluster_space(embeddings(run.settings, run.model, dataset))
        found.append(Embedding(z, dataset.groups, settings.projection.l2, seed))
        is_given = not run.model.encoder.is_trainable or settings.pretrain.from_run is not None
        if is_given and settings.projection.kind != "within":
            return [Embedding(z, dataset.groups, settings.projection.l2, seed + m) for m in range(options.seeds)]
    return found


def mean_row(figures: list[KFigures]) -> KRow:
    """One row from the figures of all embeddings at one K."""
    silhouettes = [one.silhouette for one in figures if one.silhouette is not None]
    between = [float(adjusted_rand_score(a.labels, b.labels)) for a, b in combinations(figures, 2)]

    def mean(key: str) -> float:
        return float(np.mean([getattr(one, key) for one in figures]))

    return KRow(
        k=figures[0].k,
        weakest=mean("weakest"),
        ari=mean("ari"),
        seeds_ari=float(np.mean(between)) if between else None,
        gap=mean("gap"),
        gap_error=mean("gap_error"),
        generalizability=mean("generalizability"),
        silhouette=float(np.mean(silhouettes)) if silhouettes else None,
    )


def recommend(rows: Sequence[KRow]) -> KChoice:
    """The rule, on rows of rising K."""
    candidates: list[KRow] = []
    for row in rows:
        if row.returns and row.is_structured and row.gap >= max((one.gap for one in candidates), default=0.0):
            candidates.append(row)
    if not candidates:
        return _none_found(rows)
    chosen = candidates[-1]
    following = [row for row in rows if row.k > chosen.k]
    comes_back = f"{chosen.k}: the largest K whose clusters all come back in resamples (the weakest by {chosen.weakest:.2f} of 1)"
    if not following:
        return KChoice("at_least", chosen.k, f"{comes_back}, and the largest that was tried; widen --k")
    after = following[0]
    fall = (
        f"at {after.k} the weakest comes back by {after.weakest:.2f}, the ARI between resamples goes from {chosen.ari:.2f} to {after.ari:.2f} "
        f"and the gap from {chosen.gap:.2f} to {after.gap:.2f}"
    )
    if chosen.weakest - after.weakest >= SURE_DROP or after.gap < chosen.gap:
        return KChoice("clear", chosen.k, f"{comes_back}; {fall}")
    return KChoice("likely", chosen.k, f"{comes_back}, but not by far: {fall}. Look at {after.k} as well")


def _none_found(rows: Sequence[KRow]) -> KChoice:
    structured = [row for row in rows if row.is_structured]
    if not structured:
        return KChoice(
            "one_group",
            1,
            f"1, or no clear answer: at no K from {rows[0].k} to {rows[-1].k} do clusters fit better than they fit one shapeless cloud",
        )
    best = max(structured, key=lambda row: row.weakest)
    return KChoice(
        "unclear",
        None,
        f"no clear answer: there is structure, but at every K some cluster does not come back in resamples (nearest: {best.k}, "
        f"the weakest by {best.weakest:.2f} of 1, expected {RETURNS}); add images, or try another encoder",
    )
