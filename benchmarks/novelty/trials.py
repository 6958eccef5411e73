"""magnetic_tile: trials that the bank did not keep, beside it on the same splits: what the encoder shows it, and how its map is read.

    before ReLU   maps of the expand convolutions of fire8 and fire9 as they are before it
    288, 320 px   a larger input of the same encoder; its multiply-adds are in the table
    adapted       fire8 and fire9 trained further on the good training parts alone: to tell where a defect was drawn (as banks are chosen by),
                  or to agree on a cell under another light (SimSiam, Chen and He 2020, arXiv 2011.10566, cell by cell), before the bank learns
    the map       more or fewer means of 3x3 cells, finer cells, and each value where its cell looks instead of the grid stretched over the image

Splits are those of `tile.py`; the banks learn from the training parts of one fit without a bank. AUROC is of the bank alone, so that nothing
else is fitted again (unchanged, seed 0: .843, and .843 together with the embedding). Whoever takes the best row of this table has
chosen by test figures: it is worth less than it shows. Seconds are of all banks of a trial together, with the training before them; maps
of the training parts are kept meanwhile, so that several banks cost one pass. About twenty minutes for a seed on one core.

python -m benchmarks.novelty.trials [--seeds N ...] [--trials ...]
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks.novelty.parts import write_list
from benchmarks.novelty.patchcore import pixel_auroc
from benchmarks.novelty.tile import GRID_PX, NO_GROUPS, split, tiles
from benchmarks.table import WEIGHTS, show_table
from trainer import FitOptions, fit
from trainer.answers import read_like
from trainer.artifact import Run
from trainer.augment import AugmentSettings, augment
from trainer.bank.cells import local_mean, to_grid
from trainer.bank.cost import encoder_operations
from trainer.bank.defects import SEEN, with_defect
from trainer.bank.learning import Material, learn_banks, maps_of, union_of
from trainer.bank.settings import BankSettings
from trainer.data import Dataset
from trainer.encoders.pretrained import FIRES, PretrainedEncoder
from trainer.preprocess import Preprocess
from trainer.report.assignment_table import read_assignments

SIDE_PX, BLUR = 224, 2  # as shipped
# From one cell's middle to the next, and the first one's: no convolution before it is padded.
FIRE8_PX, FIRE8_FIRST_PX = 8, 9.5
BATCH, LR = 16, 2e-4
LIGHT = AugmentSettings(brightness=0.3, contrast=0.3, noise=0.1)
DEEP = ("fire8", "fire9")
WIDTH = sum(FIRES[layer][1] for layer in DEEP)
GAUSSIANS = BankSettings(layers=DEEP, learn="gaussian", dim=80, stride=2)
BANKS = {"Gaussians": GAUSSIANS, "k-means 512": BankSettings(layers=DEEP)}
FINER = {
    "Gaussians, every cell": GAUSSIANS.model_copy(update={"stride": 1}),
    "Gaussians, every cell, fire5 too": GAUSSIANS.model_copy(update={"stride": 1, "layers": ("fire5", *DEEP)}),
}
UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Fitted:
    """A run without a bank, the training parts that banks learn from, and the test parts; `folder` has the lists, `trained` names files."""

    run: Run
    material: Material
    test: Dataset
    folder: Path
    trained: list[str]

    @property
    def side_px(self) -> int:
        """Of the encoder's input."""
        return int(self.run.model.preprocess.height_px)


@dataclass(frozen=True)
class Found:
    """Scores (N,) and maps (N, h, w), not smoothed, of the test parts."""

    settings: BankSettings
    scores: Tensor
    maps: Tensor


@dataclass(frozen=True)
class Costs:
    """Seconds to learn, all banks of a trial together; multiply-adds of the encoder."""

    seconds: float
    operations: int


@dataclass(frozen=True)
class Row:
    """A line of the table for one seed."""

    image: float
    pixel: float
    costs: Costs


class Remembering(PretrainedEncoder):
    """The pretrained encoder; where `known` is a dictionary it keeps the maps of each batch that it has seen."""

    known: dict[bytes, tuple[Tensor, dict[str, Tensor]]] | None = None

    def with_maps(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if self.known is None:
            return self.seen(x, layers)
        key = hashlib.blake2b(x.contiguous().numpy().data, digest_size=16).digest() + ",".join(layers).encode()
        if key not in self.known:
            self.known[key] = self.seen(x, layers)
        return self.known[key]

    def seen(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Features and maps, computed."""
        return super().with_maps(x, layers)


class BeforeReLU(Remembering):
    """Its maps are what the expand convolutions of a fire give; its features are as they were."""

    def seen(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        expanded: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        handles = []
        for layer in layers:
            fire = self.trunk.features[FIRES[layer][0]]
            keep = partial(_keep, expanded[layer])
            handles += [conv.register_forward_hook(keep) for conv in (fire.expand1x1, fire.expand3x3)]
        features, _ = super().seen(x, layers)
        for handle in handles:
            handle.remove()
        return features, {layer: torch.cat(maps, 1) for layer, maps in expanded.items()}


def _keep(found: list[Tensor], module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    found.append(output)


def fitted(seed: int, folder: Path) -> Fitted:
    """Fits without a bank on one split."""
    learned, test = split(tiles(), seed, 0.0)
    path = write_list(learned, folder / "learned.csv")
    write_list(test, folder / "test.csv")
    sets = (f"data.path={path}", *NO_GROUPS, WEIGHTS, f"train.seed={seed}", "novelty.bank=null")
    run = fit("tile_bank", FitOptions(folder / "run", sets))
    trained = [row.file for row in read_assignments(folder / "run") if row.split == "train"]
    return _read(run, seed, folder, trained)


def _read(run: Run, seed: int, folder: Path, trained: list[str]) -> Fitted:
    dataset = read_like(run, str(folder / "learned.csv"))
    rows = np.flatnonzero(np.isin([item.name for item in dataset.items], trained))
    clusters = torch.zeros(len(rows), dtype=torch.int64)  # the recipe has one
    material = Material(dataset.pixels[torch.from_numpy(rows)], dataset.groups[rows], clusters, seed)
    return Fitted(run, material, read_like(run, str(folder / "test.csv")), folder, trained)


def with_side(ours: Fitted, side_px: int) -> Fitted:
    """The same parts at another size."""
    run = copy.deepcopy(ours.run)
    old = run.model.preprocess
    run.model.preprocess = Preprocess(old.settings, side_px, side_px)
    run.model.preprocess.mean, run.model.preprocess.std = old.mean, old.std
    return _read(run, ours.material.seed, ours.folder, ours.trained)


def show(ours: Fitted, encoder: PretrainedEncoder, kind: type[Remembering]) -> None:
    """Gives the run an encoder of this kind with the weights of `encoder`."""
    shown = kind(encoder.settings, encoder.shape)
    shown.load_state_dict(encoder.state_dict())
    ours.run.model.encoder = shown.eval()


@torch.no_grad()
def judged(ours: Fitted, wanted: dict[str, BankSettings]) -> tuple[dict[str, Found], Costs]:
    """Learns banks and judges the test parts."""
    model, layers = ours.run.model, union_of(wanted.values())
    started_s = time.monotonic()
    model.encoder.known = {}
    banks = dict(zip(wanted, learn_banks(list(wanted.values()), model, ours.material), strict=True))
    model.encoder.known = None
    costs = Costs(time.monotonic() - started_s, encoder_operations(model, ours.test.pixels[:1]))
    answers: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in wanted}
    for maps in maps_of(layers, model, ours.test.pixels):
        one_cluster = torch.zeros(len(maps[layers[0]]), dtype=torch.int64)
        for name, bank in banks.items():
            answers[name].append(bank(maps, one_cluster))
    return {name: Found(wanted[name], *map(torch.cat, zip(*answers[name], strict=True))) for name in wanted}, costs


def smoothed(maps: Tensor, times: int) -> Tensor:
    """Maps (N, h, w) as `blur` smooths them."""
    found = maps[:, None]
    for _ in range(times):
        found = local_mean(found)
    return found[:, 0]


def in_place(maps: Tensor, stride: int, side_px: int) -> Tensor:
    """Maps (N, h, w) of the grid of fire8 on a grid of GRID_PX: each value in the middle of what its cell looks at, linear between them."""
    first_px = FIRE8_FIRST_PX + FIRE8_PX * (stride // 2)  # `stride` 2 begins with the second cell
    middles_px = (torch.arange(GRID_PX) + 0.5) * side_px / GRID_PX
    cells = (middles_px - first_px) / (FIRE8_PX * stride)
    down, across = (2 * cells / (size - 1) - 1 for size in maps.shape[1:])
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
    sample = partial(nn.functional.grid_sample, padding_mode="border", align_corners=True)
    return torch.cat([sample(part[:, None], grid.expand(len(part), -1, -1, -1))[:, 0] for part in maps.split(BATCH)])


def adapted(ours: Fitted, objective: str, epochs: int) -> PretrainedEncoder:
    """An encoder whose last two fires were trained further on the good training parts."""
    torch.manual_seed(ours.material.seed)
    encoder = copy.deepcopy(ours.run.model.encoder)
    features = encoder.trunk.features
    trained = features[FIRES["fire8"][0] :]
    loss_of = (DrawnDefects if objective == "drawn defects" else Agreement)(ours, features)
    trained.requires_grad_(True)
    parameters = [each for each in loss_of.parameters() if each.requires_grad]  # those of the fires are among them
    optimizer = torch.optim.Adam(parameters, lr=LR)
    for _ in range(epochs):
        for rows in torch.randperm(len(ours.material.pixels)).split(BATCH):
            optimizer.zero_grad()
            loss_of(ours.material.pixels[rows]).backward()
            optimizer.step()
    return encoder.requires_grad_(False)


class Objective(nn.Module):
    """What fire8 and fire9 are trained to; `features` are the encoder's layers."""

    def __init__(self, ours: Fitted, features: nn.Sequential) -> None:
        super().__init__()
        self.ours = ours
        self.fixed, self.trained = features[: FIRES["fire8"][0]], features[FIRES["fire8"][0] :]

    def cells(self, x: Tensor) -> Tensor:
        """Both maps side by side on the finer grid (B, WIDTH, h, w)."""
        with torch.no_grad():
            x = self.fixed(x)
        fire8 = self.trained[0](x)
        return torch.cat([fire8, to_grid(self.trained[1:](fire8), (fire8.shape[2], fire8.shape[3]))], 1)


class DrawnDefects(Objective):
    """Cross-entropy of a linear answer of each cell to the share of it that a drawn defect has changed."""

    def __init__(self, ours: Fitted, features: nn.Sequential) -> None:
        super().__init__(ours, features)
        self.answer = nn.Conv2d(WIDTH, 1, 1)
        self.rng = np.random.default_rng(ours.material.seed)

    def forward(self, pixels: Tensor) -> Tensor:
        good, others = pixels.numpy(), others_of(self.ours, len(pixels), self.rng)
        drawn = np.stack([with_defect(a, b, self.rng) for a, b in zip(good, others, strict=True)])
        changed = np.abs(drawn.astype(np.float32) - good).mean(3) > 255 * SEEN  # (B, H, W)
        answers = self.answer(self.cells(self.ours.run.model.input_of(torch.from_numpy(drawn))))
        share = nn.functional.adaptive_avg_pool2d(torch.from_numpy(changed)[:, None].float(), answers.shape[2:])
        return nn.functional.binary_cross_entropy_with_logits(answers, share)


class Agreement(Objective):
    """SimSiam of cells: under one light a cell foretells itself under another."""

    def __init__(self, ours: Fitted, features: nn.Sequential) -> None:
        super().__init__(ours, features)
        self.project = nn.Sequential(_layer(WIDTH, 256), nn.Conv2d(256, 256, 1), nn.BatchNorm2d(256, affine=False))
        self.foretell = nn.Sequential(_layer(256, 64), nn.Conv2d(64, 256, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.ours.run.model.input_of(pixels)
        one, other = (self.project(self.cells(augment(x, LIGHT))) for _ in range(2))
        alike = nn.functional.cosine_similarity
        return -(alike(self.foretell(one), other.detach()) + alike(self.foretell(other), one.detach())).mean() / 2


def _layer(width_in: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width_in, width_out, 1), nn.BatchNorm2d(width_out), nn.ReLU())


def others_of(ours: Fitted, count: int, rng: np.random.Generator) -> np.ndarray:
    """Pixels of so many training parts."""
    return ours.material.pixels[torch.from_numpy(rng.integers(len(ours.material.pixels), size=count))].numpy()


Rows = dict[tuple[str, str, str], Row]  # of trial, bank, and how the map is read


def row_of(ours: Fitted, found: Found, costs: Costs, maps: Tensor) -> Row:
    """`maps`: those of the bank as they are read."""
    image = float(roc_auc_score(~ours.test.good, found.scores.numpy()))
    return Row(image, pixel_auroc(ours.test, ours.test.good, maps), costs)


def as_shipped(ours: Fitted, trial: str) -> Rows:
    """Rows of both banks for what the run's encoder shows."""
    found, costs = judged(ours, BANKS)
    return {
        (trial, name, f"blur {BLUR}"): row_of(ours, each, costs, smoothed(each.maps, BLUR))
        for name, each in found.items()
    }


def before_relu(ours: Fitted) -> Rows:
    """Maps before ReLU."""
    show(ours, ours.run.model.encoder, BeforeReLU)
    return as_shipped(ours, "before ReLU")


def larger(ours: Fitted, side_px: int) -> Rows:
    """A larger input."""
    return as_shipped(with_side(ours, side_px), f"{side_px} px")


def further(ours: Fitted, objective: str, epochs: int) -> Rows:
    """Trained further."""
    started_s = time.monotonic()
    show(ours, adapted(ours, objective, epochs), Remembering)
    took_s = time.monotonic() - started_s
    rows = as_shipped(ours, f"adapted: {objective}, {epochs} epochs")
    return {
        key: replace(row, costs=replace(row.costs, seconds=row.costs.seconds + took_s)) for key, row in rows.items()
    }


def readings(ours: Fitted) -> Rows:
    """The map read in other ways, and of finer cells; what is unchanged is among them."""
    found, costs = judged(ours, BANKS | FINER)
    rows: Rows = {}
    for name, each in found.items():
        trial = UNCHANGED if name in BANKS else "finer cells"
        for blur in (BLUR, 0, 4, 8):
            rows[trial, name, f"blur {blur}"] = row_of(ours, each, costs, smoothed(each.maps, blur))
        placed = in_place(smoothed(each.maps, BLUR), each.settings.stride, ours.side_px)
        rows[trial, name, f"blur {BLUR}, in place"] = row_of(ours, each, costs, placed)
    return rows


TRIALS: dict[str, Callable[[Fitted], Rows]] = {
    "map": readings,
    "relu": before_relu,
    "288": partial(larger, side_px=288),
    "320": partial(larger, side_px=320),
    "drawn": partial(further, objective="drawn defects", epochs=4),
    "drawn, longer": partial(further, objective="drawn defects", epochs=12),
    "simsiam": partial(further, objective="SimSiam", epochs=3),
}


def measure(seed: int, trials: Sequence[str]) -> Rows:
    """All trials on one split."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = fitted(seed, Path(folder))
        own = ours.run.model.encoder
        for trial in trials:
            show(ours, own, Remembering)
            new = TRIALS[trial](ours)
            rows |= new
            for key, row in new.items():
                print(f"seed {seed}: {', '.join(key)}: {row.image:.3f} {row.pixel:.3f}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--trials", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    arguments = parser.parse_args()
    found = [measure(seed, arguments.trials) for seed in arguments.seeds]
    least = min(row.costs.operations for row in found[0].values())
    lines = []
    for key in found[0]:
        rows = [each[key] for each in found]
        image, pixel = (", ".join(f"{getattr(row, name):.3f}" for row in rows) for name in ("image", "pixel"))
        seconds = f"{np.mean([row.costs.seconds for row in rows]):.0f}"
        lines.append([*key, image, pixel, seconds, f"{rows[0].costs.operations / least:.2f}"])
    header = ["trial", "bank", "map", "image AUROC", "pixel AUROC", "s to learn", "encoder's multiply-adds"]
    show_table(f"magnetic tile, bank alone, seeds {arguments.seeds} in this order", header, lines)


if __name__ == "__main__":
    main()
