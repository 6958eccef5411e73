"""PatchCore of the same backbone on the same splits as our bank: magnetic tiles as in `tile.py`, bottles as in `bottle.py`.

Roth et al. 2022 (arXiv 2106.08265): maps of the layers averaged over 3x3, brought to the finest grid and put side by side, not scaled; a
greedy coreset of 10 % of them, searched in a random projection to 128 numbers; the distance of each cell to its nearest member is the map; the
image's score is the largest, re-weighted (equation 7, with the nine nearest). It differs from the paper in the backbone and in that the
coreset is drawn of at most `--cells` cells, the same number of each image. It learns from the parts that our bank learns from, and nothing
of it was chosen by a score. Rows with local contrast give it the input that our bank has on tiles.

python -m benchmarks.novelty.patchcore [--sets ...] [--seeds N ...] [--cells N] [--layers ...] [--auto]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from benchmarks.novelty.parts import GOOD, Judged, Part, judge, write_list
from benchmarks.novelty.tile import GRID_PX, mask_of, split, tiles
from benchmarks.table import WEIGHTS, real_set, show_table, spread
from trainer import FitOptions, fit
from trainer.answers import read_like
from trainer.artifact import Run
from trainer.bank.cells import local_mean, to_grid
from trainer.bank.coreset import greedy_coreset
from trainer.data import Dataset
from trainer.encoders.base import Encoder
from trainer.preprocess import Preprocess
from trainer.report.assignment_table import read_assignments

CORESET, PROJECTED, NEIGHBOURS = 0.1, 128, 9
BATCH, QUERIES = 16, 1024
TIMED = 20  # images whose inference is timed one by one
RECIPES = {
    "tile": ("tile_bank", "novelty.bank={layers: [fire8, fire9], learn: gaussian, dim: 80, stride: 2, blur: 2}"),
    "bottle": ("bottle_ae_kmeans", "novelty.bank={layers: [fire8, fire9], learn: kmeans, size: 512, reduce: max}"),
}


@dataclass(frozen=True)
class Found:
    """Scores (N,) and maps (N, h, w) of test parts; seconds to learn, milliseconds for one image from pixels to score, numbers kept."""

    scores: Tensor
    maps: Tensor
    largest: Tensor
    seconds: float
    milliseconds: float
    size: int


@dataclass(frozen=True)
class PatchCore:
    """A memory (M, F) of cells of `layers`."""

    preprocess: Preprocess
    encoder: Encoder
    layers: tuple[str, ...]
    memory: Tensor

    @classmethod
    @torch.no_grad()
    def learn(cls, preprocess: Preprocess, encoder: Encoder, layers: tuple[str, ...], material: Material) -> PatchCore:
        """From pixels of good parts (N, h, w, C)."""
        empty = cls(preprocess, encoder, layers, torch.zeros(0, 0))
        generator = torch.Generator().manual_seed(material.seed)
        each = -(-material.cells // len(material.pixels))
        rows = []
        for part in material.pixels.split(BATCH):
            cells = empty.cells(part).flatten(2).transpose(1, 2)  # (B, h w, F)
            rows += [own[torch.randperm(len(own), generator=generator)[:each]] for own in cells]
        found = torch.cat(rows)
        projection = torch.randn(found.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
        chosen = greedy_coreset(found @ projection, round(CORESET * len(found)), material.seed)
        return cls(preprocess, encoder, layers, found[chosen])

    def cells(self, pixels: Tensor) -> Tensor:
        """(B, F, h, w) on the finest grid."""
        maps = self.encoder.with_maps(self.preprocess.normalise(pixels), self.layers)[1]
        grid = max((m.shape[2], m.shape[3]) for m in maps.values())
        return torch.cat([to_grid(local_mean(maps[layer]), grid) for layer in self.layers], 1)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Score (B,) and map (B, h, w)."""
        cells = self.cells(pixels)
        rows = cells.permute(0, 2, 3, 1).flatten(0, 2)
        near = [torch.cdist(part, self.memory).min(1) for part in rows.split(QUERIES)]
        shape = (len(cells), cells.shape[2] * cells.shape[3])
        distances = torch.cat([each.values for each in near]).view(shape)
        nearest = torch.cat([each.indices for each in near]).view(shape)
        largest, where = distances.max(1)
        strangest = rows.view(*shape, -1)[torch.arange(len(cells)), where]
        member = nearest[torch.arange(len(cells)), where]
        return self._reweighted(largest, strangest, member), distances.view(len(cells), *cells.shape[2:])

    def _reweighted(self, largest: Tensor, strangest: Tensor, member: Tensor) -> Tensor:
        """Higher where the member m nearest to the strangest cell is rare: (1 - exp d(x, m) / sum over m's nine nearest of exp d(x, n)) d."""
        around = torch.cdist(self.memory[member], self.memory).topk(NEIGHBOURS, largest=False).indices  # m among them
        apart = torch.linalg.vector_norm(self.memory[around] - strangest[:, None], dim=-1)
        return (1 - torch.exp(largest - torch.logsumexp(apart, 1))) * largest


@dataclass(frozen=True)
class Material:
    """What a PatchCore learns from; `cells`: how many of them stand for all."""

    pixels: Tensor
    cells: int
    seed: int


@dataclass(frozen=True)
class Fitted:
    """Our run, its test parts as it judges them, and the pixels that its bank learned from."""

    run: Run
    judged: Judged
    learned: Tensor
    seconds: float


def fitted(name: str, seed: int, folder: Path, is_auto: bool) -> Fitted:
    """Fits our bank on one split."""
    learned, test = split(tiles(), seed, 0.0) if name == "tile" else bottles()
    config, bank = RECIPES[name]
    bank = "novelty.bank=auto" if is_auto else bank
    started_s = time.monotonic()
    path = write_list(learned, folder / "learned.csv")
    sets = (f"data={{path: {path}}}", WEIGHTS, f"train.seed={seed}", bank)
    run = fit(config, FitOptions(folder / "run", sets))
    seconds = time.monotonic() - started_s
    trained = {row.file for row in read_assignments(folder / "run") if row.split == "train"}
    dataset = read_like(run, str(path))
    rows = torch.tensor([n for n, item in enumerate(dataset.items) if item.name in trained])
    return Fitted(run, judge(run, test, folder / "test.csv"), dataset.pixels[rows], seconds)


def bottles() -> tuple[list[Part], list[Part]]:
    """Parts for fit and for the test."""
    root = real_set("mvtec_bottle_225")
    train = [Part(path, GOOD, str(path)) for path in sorted(root.glob("train/good/*.png"))]
    return train, [Part(path, path.parent.name, str(path)) for path in sorted(root.glob("test/*/*.png"))]


def patchcore(ours: Fitted, layers: tuple[str, ...], has_contrast: bool, material: Material) -> Found:
    """Learns and judges; `has_contrast`: looks at the input of our run, and else at plain pixels."""
    preprocess = ours.run.model.preprocess
    if not has_contrast:
        settings = preprocess.settings.model_copy(update={"local_contrast": None})
        preprocess = Preprocess(settings, preprocess.height_px, preprocess.width_px)
        preprocess.fit_normalise(material.pixels)
    started_s = time.monotonic()
    core = PatchCore.learn(preprocess.eval(), ours.run.model.encoder.eval(), layers, material)
    seconds = time.monotonic() - started_s
    pixels = ours.judged.dataset.pixels
    answers = [core.see(part) for part in pixels.split(BATCH)]
    scores, maps = (torch.cat(list(column)) for column in zip(*answers, strict=True))
    taken = [_milliseconds(partial(core.see, pixels[n : n + 1])) for n in range(min(TIMED, len(pixels)))]
    return Found(scores, maps, maps.flatten(1).amax(1), seconds, float(np.median(taken)), core.memory.numel())


def ours_found(ours: Fitted) -> Found:
    """The same of our run."""
    pixels, bank = ours.judged.dataset.pixels, ours.run.model.bank
    if bank is None or ours.judged.patch_score is None:
        raise SystemExit("the recipe has no bank")
    maps = torch.cat([ours.run.model.novelty_map(part) for part in pixels.split(BATCH)])
    taken = [_milliseconds(partial(ours.run.model.see, pixels[n : n + 1])) for n in range(min(TIMED, len(pixels)))]
    scores, patches = (torch.from_numpy(s) for s in (ours.judged.novelty_score, ours.judged.patch_score))
    size = sum(buffer.numel() for buffer in bank.buffers())
    return Found(scores, maps, patches, ours.seconds, float(np.median(taken)), size)


def _milliseconds(step: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    step()
    return (time.perf_counter() - started_s) * 1000


def pixel_auroc(dataset: Dataset, is_good: np.ndarray, maps: Tensor) -> float:
    """Of maps against the masks, over good and defective parts alike; nan where the set has no masks."""
    defects = [Path(item.name) for item, good in zip(dataset.items, is_good, strict=True) if not good]
    if not (defects[0].parent.parent / "masks").is_dir():
        return float("nan")
    up = [
        torch.nn.functional.interpolate(part[:, None], size=(GRID_PX, GRID_PX), mode="bilinear")[:, 0]
        for part in maps.split(BATCH)
    ]
    truth = np.zeros((len(dataset), GRID_PX, GRID_PX), bool)
    truth[~is_good] = [mask_of(path) for path in defects]
    return float(roc_auc_score(truth.ravel(), torch.cat(up).numpy().ravel()))


Figures = tuple[float, float, float, float, float, float]


def figures(ours: Fitted, found: Found) -> Figures:
    """AUROC of the score, of the largest distance alone, of the pixels; seconds, milliseconds, size."""
    dataset, is_good = ours.judged.dataset, ours.judged.is_good
    image, largest = (float(roc_auc_score(~is_good, scores.numpy())) for scores in (found.scores, found.largest))
    return image, largest, pixel_auroc(dataset, is_good, found.maps), found.seconds, found.milliseconds, found.size


def measure(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Figures]:
    """All ways on one split."""
    with tempfile.TemporaryDirectory() as folder:
        ours = fitted(name, seed, Path(folder), arguments.auto)
        rows = {"our bank": figures(ours, ours_found(ours))}
        layers = tuple(arguments.layers)
        contrasts = [False, True] if ours.run.settings.preprocess.local_contrast is not None else [False]
        for has_contrast in contrasts:
            found = patchcore(ours, layers, has_contrast, Material(ours.learned, arguments.cells, seed))
            word = f"PatchCore {'+'.join(layers)}" + (", local contrast" if has_contrast else "")
            rows[word] = figures(ours, found)
    return rows


def rows_of(name: str, found: Sequence[dict[str, Figures]]) -> list[list[object]]:
    """A row for each way."""
    rows: list[list[object]] = []
    for way in found[0]:
        columns = [list(column) for column in zip(*(each[way] for each in found), strict=True)]
        image, largest, pixel, seconds, milliseconds, size = columns
        pixels = "no masks" if np.isnan(pixel[0]) else spread(pixel)
        costs = [f"{np.mean(seconds):.0f}", f"{np.mean(milliseconds):.0f}", f"{np.mean(size) / 1e6:.2f}"]
        rows.append([name, way, spread(image), spread(largest), pixels, *costs])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--cells", type=int, default=40_000, help="of which a tenth becomes the memory")
    parser.add_argument("--layers", nargs="*", default=["fire4", "fire8"])
    parser.add_argument(
        "--auto", action="store_true", help="let fit choose our bank, which is part of the seconds to learn"
    )
    arguments = parser.parse_args()
    rows = []
    for name in arguments.sets:
        rows += rows_of(name, [measure(name, seed, arguments) for seed in arguments.seeds])
    header = [
        "set",
        "way",
        "image AUROC",
        "of the largest distance",
        "pixel AUROC",
        "s to learn",
        "ms per image",
        "million numbers",
    ]
    title = f"PatchCore, coreset of {CORESET:.0%} of {arguments.cells} cells, seeds {arguments.seeds}"
    show_table(f"{title}; ms in PyTorch, {torch.get_num_threads()} thread(s)", header, rows)


if __name__ == "__main__":
    main()
