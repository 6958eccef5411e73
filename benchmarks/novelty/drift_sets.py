"""Real sets as lines that run and then change: fit on a part of the groups, export, and see the other groups through the exported model.

The reference is the exported model's own. Groups are split at random: 70 % are fitted on, the others are the stream. A name with `_bank` is
the same set seen by a model with a bank.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.novelty.false_rejects import GAUSSIAN_BANK
from benchmarks.novelty.parts import GOOD
from benchmarks.novelty.tile import NO_GROUPS, tiles
from benchmarks.table import WEIGHTS, real_set
from edge_dkm import Inspector
from edge_dkm.contract import Metadata
from edge_dkm.drift.quality import Quality, measure
from edge_dkm.drift.reference import Reference, read_reference
from edge_dkm.drift.statistic import Sighting
from exporters.export import export_run
from trainer import FitOptions, fit

FITTED = 0.7
PCB_SOURCES = 360
PER_CLASS = 60
BANK = "_bank"
RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bottle": ("bottle_ae_kmeans", ()),
    "x_sdd": ("x_sdd_ae_kmeans", ("novelty={target_frr: 0.01}",)),
    "deeppcb": (
        "bottle_ae_kmeans",
        ("preprocess.height_px=64", "preprocess.width_px=64", "novelty={target_frr: 0.01}"),
    ),
    "x_sdd_bank": ("x_sdd_novelty", ()),
    "tile_bank": ("tile_bank", (*NO_GROUPS, GAUSSIAN_BANK)),
    "deeppcb_bank": (
        "bottle_ae_kmeans",
        (
            "preprocess.height_px=64",
            "preprocess.width_px=64",
            "method.n_clusters=8",
            "novelty={target_frr: 0.01, bank: {layers: [fire8, fire9]}}",
        ),
    ),
}

Image = NDArray[np.uint8]
Change = Callable[[Image], Image]
CHANGES: dict[str, Change] = {
    "gain +20 %": lambda image: np.clip(image.astype(np.float32) * 1.2 + 0.5, 0, 255).astype(np.uint8),
    "blur 1 px": lambda image: np.asarray(cv2.GaussianBlur(image, (0, 0), 1.0), np.uint8),
}


class Remembering(Reference):
    """Works out the statistics of each part once: the same few hundred come again a hundred thousand times."""

    def observe(self, sighting: Sighting) -> NDArray[np.float64]:
        known: dict[int, NDArray[np.float64]] = self.__dict__.setdefault("known", {})
        if id(sighting) not in known:
            known[id(sighting)] = super().observe(sighting)
        return known[id(sighting)]

    def __deepcopy__(self, memo: object) -> Remembering:
        return self


@dataclass(frozen=True)
class Seen:
    """What an exported model saw. `pool`: parts of groups (N,) that it was not fitted on.

    changed: by change, the same parts in the same order. foreign: by class, parts of a class that it never saw.
    """

    reference: Reference
    n_clusters: int
    pool: list[Sighting]
    groups: NDArray[np.int64]
    changed: dict[str, list[Sighting]]
    foreign: dict[str, list[Sighting]]


@dataclass(frozen=True)
class _Source:
    """Images of good parts with their groups, and of classes that are left out of the fit."""

    good: list[tuple[str, str]]
    foreign: dict[str, list[str]]


def see(name: str, seed: int, left_out: str | None, cache: Path | None) -> Seen:
    """Fits, exports and looks; `left_out`: the class of x_sdd that is foreign. `cache`: a folder that keeps what was seen."""
    kept = None if cache is None else cache / f"{name}_{seed}_{left_out}.npz"
    if kept is not None and kept.exists():
        return _restored(dict(np.load(kept)))
    with tempfile.TemporaryDirectory() as folder:
        arrays = _look(name, seed, left_out, Path(folder))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **arrays)
    return _restored(arrays)


def _look(name: str, seed: int, left_out: str | None, folder: Path) -> dict[str, Any]:
    source = _sources(name.removesuffix(BANK), left_out, folder)
    groups = np.array([group for _, group in source.good])
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    fitted = set(order[: round(FITTED * len(order))].tolist())
    rows = [f"{path},{group}" for path, group in source.good if group in fitted]
    (folder / "fit.csv").write_text("\n".join(["file,group", *rows]), encoding="utf-8")
    recipe, overrides = RECIPES[name]
    data = (f"data.path={folder / 'fit.csv'}", "data.kind=list", f"train.seed={seed}")
    run = fit(recipe, FitOptions(folder / "run", (*overrides, *data, WEIGHTS)))
    export_run(run, folder / "part.onnx")
    pool = [(path, group) for path, group in source.good if group not in fitted]
    with Inspector(folder / "part.onnx") as inspector:
        arrays: dict[str, Any] = {
            "reference": inspector.metadata.raw["dkm.reference_hist"],
            "k": inspector.metadata.n_clusters,
            "pool.g": np.unique([group for _, group in pool], return_inverse=True)[1],
        }
        paths = [path for path, _ in pool]
        arrays |= _arrays("pool", inspector, paths)
        for word, change in CHANGES.items() if left_out is None else ():
            arrays |= _arrays(f"changed:{word}", inspector, paths, change)
        for word, files in source.foreign.items():
            arrays |= _arrays(f"foreign:{word}", inspector, files)
    return arrays


def _arrays(key: str, inspector: Inspector, paths: Sequence[str], change: Change | None = None) -> dict[str, Any]:
    seen = []
    for path in paths:
        image = np.asarray(cv2.imread(path), np.uint8)
        image = image if change is None else change(image)
        answer, quality = inspector.inspect(image), measure(image)
        numbers = quality.light, quality.contrast, quality.burnt, quality.focus
        seen.append((answer.embedding, answer.cluster.id, answer.novelty_score, numbers, quality.thumbnail))
    columns = [np.array(column) for column in zip(*seen, strict=True)]
    return {f"{key}.{letter}": column for letter, column in zip("ecsqt", columns, strict=True)}


def _restored(arrays: dict[str, Any]) -> Seen:
    def sightings(key: str) -> list[Sighting]:
        e, c, s, q, t = (arrays[f"{key}.{letter}"] for letter in "ecsqt")
        return [Sighting(e[n], int(c[n]), float(s[n]), Quality(*q[n].tolist(), t[n])) for n in range(len(c))]

    def of(kind: str) -> dict[str, list[Sighting]]:
        keys = [key.removesuffix(".e") for key in arrays if key.startswith(f"{kind}:") and key.endswith(".e")]
        return {key.split(":", 1)[1]: sightings(key) for key in keys}

    raw = {"dkm.reference_hist": str(arrays["reference"])}
    metadata = SimpleNamespace(raw=raw, embed_dim=arrays["pool.e"].shape[1], novelty={})
    reference = read_reference(cast(Metadata, metadata))
    if reference.missing:
        raise SystemExit(f"no reference: {json.loads(raw['dkm.reference_hist'])}")
    remembering = Remembering(**{field.name: getattr(reference, field.name) for field in fields(reference)})
    return Seen(remembering, int(arrays["k"]), sightings("pool"), arrays["pool.g"], of("changed"), of("foreign"))


def _sources(name: str, left_out: str | None, folder: Path) -> _Source:
    if name == "bottle":
        root = real_set("mvtec_bottle_225")
        good = sorted([*root.glob("train/good/*.png"), *root.glob("test/good/*.png")])
        kinds = ("broken_large", "broken_small", "contamination")
        foreign = {kind: [str(path) for path in sorted(root.glob(f"test/{kind}/*.png"))] for kind in kinds}
        return _Source([(str(path.resolve()), f"{path.parents[1].name}-{path.stem}") for path in good], foreign)
    if name == "x_sdd":
        paths = sorted(path.resolve() for path in real_set("x_sdd").rglob("*.jpg"))
        kept = [(str(p), f"{p.parent.name}-{p.stem}") for p in paths if p.parent.name != left_out]
        other = [str(p) for p in paths if p.parent.name == left_out]
        return _Source(kept, {left_out: other} if left_out else {})
    return _tile() if name == "tile" else _deeppcb(folder)


def _tile() -> _Source:
    """Defects whose group has a good tile are left out."""
    good = [(str(part.path.resolve()), part.group) for part in tiles() if part.label == GOOD]
    known = {group for _, group in good}
    foreign: dict[str, list[str]] = {}
    for part in tiles():
        if part.label != GOOD and part.group not in known:
            foreign.setdefault(part.label, []).append(str(part.path.resolve()))
    return _Source(good, foreign)


def _deeppcb(folder: Path) -> _Source:
    """Groups are source images; README of the sets: good and defective crops come from different scans."""
    archive = dict(np.load(real_set("deeppcb_patches.npz")))
    x, y, sources = archive["X"], archive["y"], archive["source"]
    rng = np.random.default_rng(5)
    chosen = rng.permutation(np.unique(sources[y == 0]))[:PCB_SOURCES]

    def write(n: int) -> str:
        path = folder / f"{n}.png"
        cv2.imwrite(str(path), x[n])
        return str(path)

    good = [(write(n), str(sources[n]).replace("/", "-")) for n in np.flatnonzero((y == 0) & np.isin(sources, chosen))]
    foreign = {
        str(kind): [write(int(n)) for n in rng.permutation(np.flatnonzero(y == k))[:PER_CLASS]]
        for k, kind in enumerate(archive["classes"])
        if k > 0
    }
    return _Source(good, foreign)
