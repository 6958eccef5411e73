"""Whether the promised false-reject rate is kept: 20 splits of held-out good parts by group into radius, calibration and test.

A fit learns from a share of the groups and is kept: what it promises concerns groups that it has not seen. The others are dealt again for
every split; radii, edge and verdicts then come from the functions that `dkm-train fit` uses, on scores computed once. In the test one part
is drawn per group. Given what is held out, splits are independent draws, so the standard error is their deviation over the root of their number.

Expected is 1 - W / (G + 1), W the weight of the G calibration groups up to the edge: exact with one part per group. With several it is the
most that can come, where the parts of a group are alike; where they differ as those of different groups do, it is 1 - W / (G + 1 / n) with
n parts per group. The interval is BetaBinomial's for G groups of one part each (`interval.py`).

deeppcb is dealt by source image inside each board; three boards are left out of everything and stated beside. What must fail, on tile: to
calibrate on the training parts, which a Gaussian per place knows by heart, and to take images for groups, in the test as well.

python -m benchmarks.novelty.false_rejects [--sets ...] [--splits N] [--fits N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.novelty.interval import false_reject_interval
from benchmarks.novelty.parts import GOOD, Part, write_list
from benchmarks.novelty.tile import LARGE, tiles
from benchmarks.table import WEIGHTS, real_set, show_table
from trainer import FitOptions, fit
from trainer.answers import read_like
from trainer.bank.fitting import RADIUS_FLOOR
from trainer.codebook import Embedded, finish, set_calibration
from trainer.model import ClusterModel, Seen
from trainer.novelty import Calibration, NoveltySettings

Mask = NDArray[np.bool_]
BANK = "novelty.bank={layers: [fire8, fire9], learn: kmeans, size: 512, reduce: max}"
GAUSSIAN_BANK = "novelty.bank={layers: [fire8, fire9], learn: gaussian, dim: 80, stride: 2, blur: 2}"
SHARES = "novelty.shares={train: .96, radius: .02, calibration: .02}"  # fit's own calibration is not looked at
RADIUS, CALIBRATION = 0.1, 0.6  # of what is held out; the rest tests
UNSEEN_BOARDS = 3
EMBEDDING, WITH_BANK = "embedding", "embedding and bank"
ON_TRAINING, NO_GROUPS = "control: calibrated on training parts", "control: images for groups"


@dataclass(frozen=True)
class Recipe:
    """How a set is learned: shipped settings with changes, the share of groups that train, the targets."""

    config: str
    overrides: tuple[str, ...]
    train: float
    targets: tuple[float, ...]


RECIPES = {
    "bottle": Recipe("bottle_ae_kmeans", (BANK,), 0.5, (0.05,)),
    "tile": Recipe("tile_bank", (GAUSSIAN_BANK,), 0.5, (0.05,)),
    "deeppcb": Recipe(
        "bottle_ae_kmeans",
        (BANK, "method.n_clusters=8", "preprocess.height_px=64", "preprocess.width_px=64"),
        0.25,
        (0.05, 0.01),
    ),
}


@dataclass(frozen=True)
class Stock:
    """Good parts of a set and the board (or the like) of each, inside which groups are dealt."""

    parts: list[Part]
    strata: NDArray[np.str_]


@dataclass(frozen=True)
class Held:
    """A fitted model, what it was fitted on, and what it makes of parts that it was not fitted on.

    `patch_score` is in units of the fit's own radius: every split sets another. unseen: of strata left out of everything.
    """

    model: ClusterModel
    train: Embedded
    seen: Seen
    groups: NDArray[np.int64]
    strata: NDArray[np.str_]
    is_unseen: Mask


@dataclass(frozen=True)
class Outcome:
    """Of one split. `expected` and `expected_least`: the rate if the parts of a group are alike, and if they are not."""

    flagged: int
    tested: int
    interval: tuple[int, int]
    expected: float
    expected_least: float
    groups: int
    unseen: dict[str, float]

    @property
    def rate(self) -> float:
        """Share of the tested parts called novel."""
        return self.flagged / self.tested

    @property
    def is_inside(self) -> bool:
        """Whether the number lies in its interval."""
        return self.interval[0] <= self.flagged <= self.interval[1]


def stock_of(name: str, folder: Path) -> Stock:
    """Good parts; `folder`: where those are written that come in an archive."""
    if name == "bottle":
        root = real_set("mvtec_bottle_225")
        paths = sorted([*root.glob("train/good/*.png"), *root.glob("test/good/*.png")])
        parts = [Part(path, GOOD, f"{path.parents[1].name}-{path.stem}") for path in paths]
        return Stock(parts, np.full(len(parts), ""))
    if name == "tile":
        parts = [part for part in tiles() if part.label == GOOD]
        return Stock(parts, np.full(len(parts), ""))
    with np.load(real_set("deeppcb_patches.npz")) as archive:
        rows = np.flatnonzero(archive["y"] == 0)
        images, sources, boards = (archive[key][rows] for key in ("X", "source", "board"))
    parts = [Part(folder / f"{n}.png", GOOD, source.replace("/", "-")) for n, source in enumerate(sources.tolist())]
    for part, image in zip(parts, images, strict=True):
        cv2.imwrite(str(part.path), image)
    return Stock(parts, boards)


def deal(
    groups: NDArray[np.int64], strata: NDArray[np.str_], shares: Sequence[float], seed: Sequence[int]
) -> NDArray[np.int64]:
    """For each part the number of the share that its group falls to (N,), inside each stratum; what the shares leave is the last one."""
    rng = np.random.default_rng(list(seed))
    dealt = np.zeros(len(groups), np.int64)
    for stratum in np.unique(strata):
        own = rng.permutation(np.unique(groups[strata == stratum]))
        edges = np.round(np.cumsum(shares) * len(own)).astype(int)
        for n, some in enumerate(np.split(own, edges)):
            dealt[np.isin(groups, some) & (strata == stratum)] = n
    return dealt


def learn(name: str, stock: Stock, seed: int, folder: Path) -> Held:
    """Fits on a share of the groups and looks at the others."""
    recipe = RECIPES[name]
    groups = np.unique([part.group for part in stock.parts], return_inverse=True)[1].astype(np.int64)
    boards = np.random.default_rng((seed, 1)).permutation(np.unique(stock.strata))
    is_unseen = np.isin(stock.strata, boards[:UNSEEN_BOARDS]) if len(boards) > 1 else np.zeros(len(groups), bool)
    large = [group for group, n in Counter(groups.tolist()).items() if n > LARGE * len(groups)]
    is_train = (deal(groups, stock.strata, (recipe.train,), (seed, 2)) == 0) & ~is_unseen | np.isin(groups, large)
    given = [part for part, is_given in zip(stock.parts, is_train, strict=True) if is_given]
    held = [part for part, is_given in zip(stock.parts, is_train, strict=True) if not is_given]
    sets = (f"data={{path: {write_list(given, folder / 'given.csv')}}}", WEIGHTS, f"train.seed={seed}", SHARES)
    run = fit(recipe.config, FitOptions(folder / "run", (*recipe.overrides, *sets)))

    def seen(parts: list[Part], to: str) -> Seen:
        found = run.model.see(read_like(run, str(write_list(parts, folder / to))).pixels)
        if len(found.z) != len(parts):
            raise SystemExit(f"only {len(found.z)} of {len(parts)} images of {name} can be read; the set is damaged")
        return found

    train = Embedded(seen(given, "given.csv"), groups[is_train])
    rest = ~is_train
    return Held(run.model, train, seen(held, "held.csv"), groups[rest], stock.strata[rest], is_unseen[rest])


def split_once(held: Held, way: str, target: float, seed: Sequence[int]) -> Outcome:
    """Deals what is held out, sets radii and edge, judges what tests."""
    dealt = np.where(held.is_unseen, -1, deal(held.groups, held.strata, (RADIUS, CALIBRATION), seed))
    of_radius, of_calibration, of_test = (dealt == n for n in range(3))
    radius = 1.0
    if held.seen.patch_score is not None:  # as trainer.bank.fitting.set_radius has it
        radius = max(float(held.seen.patch_score[torch.from_numpy(of_radius)].quantile(0.5)), RADIUS_FLOOR)

    def view(seen: Seen) -> Seen:
        return Seen(seen.z, None if seen.patch_score is None or way == EMBEDDING else seen.patch_score / radius)

    everything = view(held.seen)

    def embedded(rows: Mask) -> Embedded:
        groups = np.flatnonzero(rows) if way == NO_GROUPS else held.groups[rows]
        return Embedded(everything.take(torch.from_numpy(rows)), groups)

    train = replace(held.train, seen=view(held.train.seen))
    found = finish(held.model, train, embedded(of_radius), None if way == ON_TRAINING else embedded(of_calibration))
    calibration = set_calibration(held.model, found, NoveltySettings(target_frr=target))
    is_novel = (held.model.novelty_scores(everything) > 1).numpy()
    rng = np.random.default_rng([*seed, 1])
    tested = np.flatnonzero(of_test) if way == NO_GROUPS else one_per_group(of_test, held.groups, rng)
    return outcome(calibration, is_novel[tested], _by_stratum(held, is_novel, rng))


def one_per_group(rows: Mask, groups: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of one part of each group among `rows`."""
    drawn = rng.permutation(np.flatnonzero(rows))
    return np.asarray(drawn[np.unique(groups[drawn], return_index=True)[1]])


def outcome(calibration: Calibration, is_novel: Mask, unseen: dict[str, float]) -> Outcome:
    """Counts, and what was to be expected."""
    groups = calibration.groups
    weight = float(calibration.weights[calibration.scores <= calibration.scale].astype(np.float64).sum())
    return Outcome(
        int(is_novel.sum()),
        len(is_novel),
        false_reject_interval(groups, len(is_novel), calibration.promised_frr),
        1 - weight / (groups + 1),
        1 - weight / (groups + groups / calibration.parts),
        groups,
        unseen,
    )


def _by_stratum(held: Held, is_novel: Mask, rng: np.random.Generator) -> dict[str, float]:
    """Rate in each stratum that neither training nor calibration has seen, one part per group."""
    rates = {}
    for stratum in np.unique(held.strata[held.is_unseen]):
        drawn = one_per_group(held.is_unseen & (held.strata == stratum), held.groups, rng)
        rates[str(stratum)] = float(is_novel[drawn].mean())
    return rates


def row_of(name: str, way: str, target: float, found: Sequence[Outcome]) -> list[object]:
    """One row of the table."""
    rates = np.array([each.rate for each in found])
    error = float(rates.std(ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else float("nan")
    least, most = (float(np.mean([getattr(each, key) for each in found])) for key in ("expected_least", "expected"))
    mean = float(rates.mean())
    is_within = least - 2 * error <= mean <= most + 2 * error
    return [
        name,
        way,
        f"{target:.0%}",
        f"{found[0].groups} / {found[0].tested}",
        f"{sum(each.is_inside for each in found)} of {len(found)}",
        f"{mean:.4f}",
        f"{most:.4f}" if most - least < 1e-4 else f"{least:.4f} to {most:.4f}",
        f"{error:.4f}",
        "yes" if is_within else f"no: {mean - (most if mean > most else least):+.4f}",
        f"{rates.min():.3f} to {rates.max():.3f}",
    ]


def unseen_row(name: str, way: str, target: float, found: Sequence[Outcome]) -> list[object]:
    """Rates on strata left out of everything."""
    boards = sorted({board for each in found for board in each.unseen})
    means = {board: float(np.mean([each.unseen[board] for each in found if board in each.unseen])) for board in boards}
    said = ", ".join(f"{board} {rate:.3f}" for board, rate in means.items())
    return [name, way, f"{target:.0%}", f"{np.mean(list(means.values())):.3f}", said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--fits", type=int, default=2, help="models, among which the splits are shared out")
    arguments = parser.parse_args()
    rows: list[list[object]] = []
    beside: list[list[object]] = []
    for name in arguments.sets:
        started_s = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            stock = stock_of(name, Path(folder))
            held = []
            for seed in range(min(arguments.fits, arguments.splits)):
                (Path(folder) / str(seed)).mkdir()
                held.append(learn(name, stock, seed, Path(folder) / str(seed)))
        for target in RECIPES[name].targets:
            ways = [EMBEDDING, WITH_BANK, *([ON_TRAINING, NO_GROUPS] if name == "tile" else [])]
            for way in ways:
                found = [split_once(held[n % len(held)], way, target, (n, 3)) for n in range(arguments.splits)]
                rows.append(row_of(name, way, target, found))
                if found[0].unseen and way in {EMBEDDING, WITH_BANK}:
                    beside.append(unseen_row(name, way, target, found))
        print(f"{name}: {(time.monotonic() - started_s) / 60:.1f} minutes", flush=True)
    columns = ["set", "judged by", "target", "groups calibrating / tested", "inside 95 %", "mean rate", "expected"]
    columns += ["standard error", "within 2 of it", "range"]
    show_table(
        f"False rejects, {arguments.splits} splits, {arguments.fits} fits per set; asked: 17 of 20", columns, rows
    )
    if beside:
        columns = ["set", "judged by", "target", "mean of the boards", "by board"]
        show_table("Boards that neither training nor calibration has seen", columns, beside)


if __name__ == "__main__":
    main()
