"""Minutes on part of a set, before anything long: what is there, how many clusters, does a method beat the control, which settings to start from.

`dkm-train pilot` calls it. It ends in `<out>/recommended.yaml`, which `dkm-train fit` takes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from configs import load_text
from trainer.errors import DataError
from trainer.methods import METHODS
from trainer.novelty import NoveltySettings, groups_needed
from trainer.progress import Progress, Silent
from trainer.scan import Scan, scan
from trainer.select_k import KSelection, SelectOptions, select_k
from trainer.settings import TrainSettings
from trainer.sweep import Sweep, SweepOptions, sweep
from trainer.trials import changed
from trainer.variants import is_frozen
from trainer.whole_file import write_whole

SCHEMA = "dkm.pilot/1"
TRIED = ("dec", "smoothed_kmeans")
MOST_K, PER_CLUSTER = 12, 20  # the numbers of clusters looked at; images that a cluster should have
PRETRAINED_PX, SCRATCH_PX = 128, 64  # longest side of the encoder's input
MIN_PX = 32  # below this SqueezeNet's last layers see nothing
FEATURES: dict[str, dict[str, Any]] = {
    "encoder": {"name": "pretrained", "model": "squeezenet1_0", "layers": ["fire8", "fire9"], "pool": "mean_std"},
    "projection": {"kind": "pca", "dim": 64, "whiten": 0.25, "sqrt": True, "l2": True},
}


@dataclass(frozen=True)
class PilotOptions:
    """`k` where it is known; `weights` of SqueezeNet 1.0, else an autoencoder is learned from scratch; `max_images` evenly spaced."""

    k: int | None = None
    weights: Path | None = None
    max_images: int = 2000
    out: Path | None = None
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True)
class Pilot:
    """What the pilot found. `advice`: one sentence each; `selection` and `comparison` are None where they were not needed."""

    found: Scan
    used: int
    n_clusters: int
    selection: KSelection | None
    comparison: Sweep | None
    advice: list[str]
    settings: TrainSettings
    out: Path
    minutes: float

    @property
    def recommended(self) -> Path:
        """The settings file to start from."""
        return self.out / "recommended.yaml"

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "scan": asdict(self.found),
            "used": self.used,
            "minutes": self.minutes,
            "n_clusters": self.n_clusters,
            "select_k": self.selection.plain() if self.selection else None,
            "sweep": self.comparison.plain() if self.comparison else None,
            "advice": self.advice,
            "recommended": str(self.recommended),
        }

    def text(self) -> str:
        """For people."""
        parts = [self.found.text(), f"used        {self.used} images, {self.minutes:.1f} minutes"]
        parts += [part.text() for part in (self.selection, self.comparison) if part is not None]
        parts += [f"advice      {sentence}" for sentence in self.advice]
        return "\n".join([*parts, f"next        dkm-train fit {self.recommended}"])


def pilot(data: str, options: PilotOptions) -> Pilot:
    """Scans, chooses K unless it is given, compares the control with two methods, and writes recommended.yaml.

    Raises:
        DataError: no usable images, or too few for the options.
    """
    if options.max_images < PER_CLUSTER or (options.k is not None and options.k < 1):
        raise DataError(
            f"--max-images is {options.max_images} and --k {options.k}, expected at least {PER_CLUSTER} images and 1 cluster"
        )
    out = options.out or Path("runs") / f"{Path(data).resolve().stem}-pilot"
    started_s = time.monotonic()
    options.progress.say(f"scanning {data}")
    found = scan(data, options.progress.read)
    used = min(found.images, options.max_images)
    # What select_k pre-trains serves the comparison too.
    base = changed(_starting_point(data, found, options), {"pretrain.cache": str(out / "pretrained")}, "pilot")
    selection = None if options.k is not None else _look_for_k(base, used, out, options)
    n_clusters = options.k or _chosen(selection)
    comparison = None
    if n_clusters > 1:
        methods = [name for name in TRIED if name in METHODS]
        settings = changed(base, {"method.n_clusters": n_clusters}, "pilot")
        comparison = sweep([settings], SweepOptions(methods, out=out / "sweep", progress=options.progress))
    best = comparison.settings[comparison.best.name] if comparison else changed(base, {"method.n_clusters": 1}, "pilot")
    settings = _for_everything(best, found)
    advice = _advice(found, selection, comparison, settings)
    minutes = round((time.monotonic() - started_s) / 60, 2)
    result = Pilot(found, used, n_clusters, selection, comparison, advice, settings, out, minutes)
    _write(result)
    return result


def _starting_point(data: str, found: Scan, options: PilotOptions) -> TrainSettings:
    """Settings of the control on at most `max_images`, before K is known."""
    width, height = (int(side) for side in Counter(found.sizes).most_common(1)[0][0].split("x"))
    shrink = min(1.0, (PRETRAINED_PX if options.weights else SCRATCH_PX) / max(width, height))
    size = {"height_px": max(8, round(height * shrink)), "width_px": max(8, round(width * shrink))}
    if options.weights and min(size.values()) < MIN_PX:
        raise DataError(
            f"most images of {data} are {width}x{height}, which leaves {size['width_px']}x{size['height_px']} for --weights {options.weights}, "
            f"expected at least {MIN_PX} on each side; leave --weights out"
        )
    plain: dict[str, Any] = {"data": {"path": data, "limit": options.max_images}, "novelty": "none"}
    plain["method"] = {"name": "ae_kmeans", "n_clusters": 1}
    if options.weights:
        plain |= {**FEATURES, "encoder": {**FEATURES["encoder"], "weights": str(options.weights)}}
        plain["preprocess"] = {**size, "normalise": "imagenet"}
    else:
        plain |= {"preprocess": size, "encoder": {"name": "conv", "dim": 10}, "pretrain": {"epochs": 30}}
        plain["train"] = {"batch_size": 64}
    return load_text(TrainSettings, yaml.safe_dump(plain), "pilot")


def _look_for_k(base: TrainSettings, used: int, out: Path, options: PilotOptions) -> KSelection:
    most = min(MOST_K, used // PER_CLUSTER)
    if most < 2:
        raise DataError(
            f"{base.data.path} has {used} usable images, expected at least {2 * PER_CLUSTER} to look for the number of clusters; "
            f"add images, or give --k"
        )
    return select_k(base, SelectOptions(range(2, most + 1), 2, out / "select_k", progress=options.progress))


def _chosen(selection: KSelection | None) -> int:
    """The K to go on with; where the answer is unclear, the structured one whose weakest cluster is the best."""
    if selection is None:
        return 1
    if selection.choice.k is not None:
        return selection.choice.k
    return max((row for row in selection.rows if row.is_structured), key=lambda row: row.weakest).k


def _for_everything(settings: TrainSettings, found: Scan) -> TrainSettings:
    """The settings without the pilot's limits; novelty is calibrated where there are groups enough to split."""
    novelty = NoveltySettings().model_dump(mode="json") if found.groups >= 10 else "none"
    return changed(settings, {"data.limit": None, "pretrain.cache": None, "novelty": novelty}, "pilot")


def _advice(found: Scan, selection: KSelection | None, comparison: Sweep | None, settings: TrainSettings) -> list[str]:
    """What to do, in words."""
    advice = []
    if selection is not None and selection.choice.kind == "one_group":
        advice.append(
            "clustering does not help here: the images look like one group; the recommended settings have one cluster, for novelty alone"
        )
    elif selection is not None and selection.choice.kind != "clear":
        advice.append(
            f"the number of clusters is not certain ({selection.choice.kind}); look at {selection.out / 'select_k.html'}"
        )
    if comparison is not None:
        gain = (
            "the control is enough: no method tried beats it"
            if comparison.best.beats_control is None
            else f"start from {comparison.best.name} (over the control: {comparison.gain(comparison.best)})"
        )
        advice.append(f"{gain}; labels were not used")
    k = settings.method.n_clusters
    if found.images < PER_CLUSTER * k:
        advice.append(f"record more images: {found.images} for {k} clusters, expected at least {PER_CLUSTER * k}")
    if settings.calibration is None:
        advice.append(f"novelty is not calibrated: {found.groups} groups are too few to split; record at least 10")
    else:
        rate = settings.calibration.target_frr
        needed = round(groups_needed(rate) / settings.calibration.shares.calibration + 0.5)
        there = "enough" if found.groups >= needed else "fewer, so fit will promise a higher rate and say which"
        advice.append(
            f"a false-reject rate of {rate:.1%} needs about {needed} independent parts; there are {found.groups}: {there}"
        )
    if not is_frozen(settings):
        advice.append(
            "an encoder learned from scratch on few images sees little; with --weights the features are far better for photographs"
        )
    return advice


def _write(result: Pilot) -> None:
    head = "# Written by `dkm-train pilot`; start with: dkm-train fit recommended.yaml\n" + "".join(
        f"# {line}\n" for line in result.advice
    )
    result.out.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(result.settings.plain(), sort_keys=False, allow_unicode=True)
    write_whole(result.recommended, head + text)
    write_whole(result.out / "pilot.json", json.dumps(result.plain(), indent=1, allow_nan=False) + "\n")
