"""Factory images: fitted on one half, scored on the half never seen, over seeds; and which variant one would choose without labels.

Labels serve scoring only. The variant is chosen on seed 0 as the one whose answers on the unseen half agree best with those of the
other variants (mean ARI), then scored on the other seeds. The encoder is frozen, so its features are computed once per image size and
layers; `--check` fits and predicts for real, from files, and compares.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from benchmarks.table import WEIGHTS, real_set, show_table, spread
from configs import Sources, load_settings
from trainer import FitOptions, fit
from trainer.artifact import build_model
from trainer.data import Dataset
from trainer.evaluate import predict
from trainer.frozen_features import frozen_features
from trainer.learner import Learner, LearnerOptions
from trainer.methods import METHODS
from trainer.metric import score_labels
from trainer.progress import Silent
from trainer.settings import TrainSettings
from trainer.trials import read_images

Index = NDArray[np.int64]
PLAIN, SMOOTHED = "x_sdd_ae_kmeans", "x_sdd_smoothed_kmeans"
DEEP = ("encoder.layers=[fire8,fire9]", "encoder.pool=mean_std")
ALL = ("encoder.pool=mean_std",)


def sized(px: int) -> tuple[str, str]:
    return f"preprocess.height_px={px}", f"preprocess.width_px={px}"


@dataclass(frozen=True)
class Variant:
    """A shipped settings file and what differs from it."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()


def variants(px: int, large_px: int | None) -> list[Variant]:
    """The control first."""
    small = sized(px)
    found = [
        Variant("ae_kmeans: the control", PLAIN, small),
        Variant("smoothed_kmeans", SMOOTHED, small),
        Variant("ae_kmeans, fire8+9 mean+std", PLAIN, (*small, *DEEP)),
        Variant("smoothed_kmeans, fire8+9 mean+std", SMOOTHED, (*small, *DEEP)),
        Variant("smoothed_kmeans, fire4+8+9 mean+std", SMOOTHED, (*small, *ALL)),
    ]
    if large_px:
        large = (*sized(large_px), *DEEP)
        found += [
            Variant(f"ae_kmeans, fire8+9 mean+std, {large_px} px", PLAIN, large),
            Variant(f"smoothed_kmeans, fire8+9 mean+std, {large_px} px", SMOOTHED, large),
        ]
    return found


@dataclass(frozen=True)
class FactorySet:
    """`group_of` gives what must not be cut in two, per image; `px` the size for the encoder, `large_px` one more to try."""

    n_clusters: int
    overrides: Callable[[], list[str]]
    group_of: Callable[[Dataset], NDArray[np.generic]]
    px: int
    large_px: int | None = None
    asked: str = ""


def single(dataset: Dataset) -> NDArray[np.generic]:
    """Every image for itself."""
    return np.arange(len(dataset))


def board(dataset: Dataset) -> NDArray[np.generic]:
    """The circuit board of each patch."""
    with np.load(real_set("deeppcb_patches.npz")) as archive:
        boards = archive["board"]
    return boards[[int(item.name.split("[")[1][:-1]) for item in dataset.items]]


def tile_overrides() -> list[str]:
    folder = real_set("magnetic_tile")
    kinds = "data.classes=[Blowhole,Break,Crack,Fray,Uneven]"
    return [f"data.path={folder}", kinds, f"data.groups={folder / 'groups.csv'}", "data.group_column=group_r0.60"]


SETS = {
    "x_sdd": FactorySet(
        7, lambda: [f"data.path={real_set('x_sdd')}"], single, 128, 224, "control .74, best .80, moonshot .90"
    ),
    "deeppcb_patches": FactorySet(
        6,
        lambda: [
            f"data.path={real_set('deeppcb_patches.npz')}",
            "data.classes=[open,short,mousebite,spur,copper,pin-hole]",
        ],
        board,
        64,
        asked=".45",
    ),
    "magnetic_tile": FactorySet(5, tile_overrides, lambda dataset: dataset.groups, 128, 224, "more than the control"),
}


@dataclass
class Measured:
    """Of one variant: scores, agreement with smoothing and the answers on the unseen half, per seed."""

    acc: list[float] = field(default_factory=list)
    nmi: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    ids: list[Index] = field(default_factory=list)


class Features:
    """Features (N, F) of all images of a set, kept per encoder and image size."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Dataset]] = {}

    @torch.no_grad()
    def of(self, settings: TrainSettings) -> tuple[Tensor, Dataset]:
        key = f"{settings.encoder} {settings.preprocess}"
        if key not in self._found:
            dataset = read_images(settings, Silent())
            model = build_model(settings, dataset.pixels.shape[1:3], len(dataset)).eval()
            model.encoder.load_pretrained()
            model.preprocess.fit_normalise(dataset.pixels)  # ImageNet's constants, whatever the pixels
            features = frozen_features(settings, model, dataset)
            assert features is not None, "these variants have frozen encoders"
            self._found[key] = (features, dataset)
        return self._found[key]


def settings_of(variant: Variant, chosen: FactorySet, seed: int) -> TrainSettings:
    overrides = [*chosen.overrides(), WEIGHTS, f"method.n_clusters={chosen.n_clusters}", f"train.seed={seed}"]
    return load_settings(TrainSettings, variant.config, "train", Sources([*overrides, *variant.overrides], "DKM_TRAIN"))


def halves(groups: NDArray[np.generic], seed: int) -> tuple[Index, Index]:
    """Indices of the half to fit on and the half to score on: whole groups at random, no labels, as even as they come."""
    names, group = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    sizes = np.bincount(group)[order]
    first = order[: int(np.abs(np.cumsum(sizes) - len(groups) / 2).argmin()) + 1]
    seen = np.isin(group, first)
    return np.flatnonzero(seen), np.flatnonzero(~seen)


@torch.no_grad()
def answers(settings: TrainSettings, features: Tensor, halves_: tuple[Index, Index]) -> tuple[Index, dict[str, float]]:
    """Cluster ids of the unseen half and the method's own figures."""
    seen, unseen = (torch.from_numpy(half) for half in halves_)
    model = build_model(settings, (settings.preprocess.height_px, settings.preprocess.width_px), len(seen)).eval()
    no_pixels = torch.zeros(len(seen), 1, 1, 1, dtype=torch.uint8)
    learner = Learner(model, no_pixels, LearnerOptions(settings.train.seed), frozen=features[seen])
    model.projection.fit(learner.all_features(), model.n_clusters, learner.seed)
    method = METHODS[settings.method.name](settings.method, learner, settings.train.batch_size)
    method.init_centroids()
    return model.assign(model.projection(features[unseen]))[0].numpy(), method.figures()


def answers_from_files(settings: TrainSettings, dataset: Dataset, halves_: tuple[Index, Index]) -> Index:
    """The same by `fit` on a list of image files and `predict` on another."""
    with tempfile.TemporaryDirectory() as folder:
        lists = [Path(folder) / name for name in ("seen.txt", "unseen.txt")]
        root = Path(settings.data.path).resolve()
        for path, half in zip(lists, halves_, strict=True):
            path.write_text("".join(f"{root / dataset.items[n].name}\n" for n in half))
        data = settings.data.model_copy(
            update={"path": str(lists[0]), "classes": None, "groups": None, "group_column": "group"}
        )
        run = fit(settings.model_copy(update={"data": data}), FitOptions(Path(folder) / "run"))
        return np.array([row.cluster for row in predict(run, str(lists[1]))])


def chosen_without_labels(measured: list[Measured]) -> tuple[int, list[float]]:
    """The variant whose answers on seed 0 agree best with the others', and the mean ARI of each with the others."""
    first = [one.ids[0] for one in measured]
    mean = [
        float(np.mean([adjusted_rand_score(a, b) for m, b in enumerate(first) if m != n])) for n, a in enumerate(first)
    ]
    return int(np.argmax(mean)), mean


def report(name: str, seeds: int, check: bool) -> None:
    """Measures one set and prints its table."""
    chosen, cache, started_s = SETS[name], Features(), time.monotonic()
    listed = variants(chosen.px, chosen.large_px)
    measured = [Measured() for _ in listed]
    checks = []
    for n, variant in enumerate(listed):
        features, dataset = cache.of(settings_of(variant, chosen, 0))
        truth = dataset.labels
        assert truth is not None
        for seed in range(seeds):
            settings = settings_of(variant, chosen, seed)
            split = halves(chosen.group_of(dataset), seed)
            ids, figures = answers(settings, features, split)
            scores = score_labels(truth[split[1]], ids)
            measured[n].acc.append(scores.acc)
            measured[n].nmi.append(scores.nmi)
            measured[n].ids.append(ids)
            measured[n].agreement.append(figures.get("agreement", float("nan")))
            if check and seed == 0 and n < 2:
                checks.append(score_labels(ids, answers_from_files(settings, dataset, split)).acc)
    best, agreement = chosen_without_labels(measured)
    rows = [
        [
            variant.name + (" <- chosen" if n == best else ""),
            spread(one.acc),
            spread(one.acc[1:]) if seeds > 1 else "",
            spread(one.nmi),
            spread(one.agreement) if "smoothed" in variant.name else "",
            agreement[n],
        ]
        for n, (variant, one) in enumerate(zip(listed, measured, strict=True))
    ]
    show_table(
        f"{name}, K {chosen.n_clusters}, fitted on one half, scored on the other, {seeds} seeds: mean (least to most); "
        f"asked: {chosen.asked}; {(time.monotonic() - started_s) / 60:.1f} minutes",
        ["variant", "ACC", "ACC without seed 0", "NMI", "agreement held out", "ARI with the others, seed 0"],
        rows,
    )
    if checks:
        print(
            f"\nequal to fit and predict from files: {', '.join(f'{share:.1%}' for share in checks)} (control, smoothed)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", choices=[*SETS], action="append")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="also fit and predict from files (not deeppcb_patches)")
    arguments = parser.parse_args()
    for name in arguments.images or SETS:
        report(name, arguments.seeds, arguments.check and name != "deeppcb_patches")


if __name__ == "__main__":
    main()
