"""Learns a model from settings: data, split, stages, calibration, run folder, report. `dkm-train fit` calls it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from configs import Sources, find, load_settings
from trainer import ranks
from trainer.artifact import COLLAPSED, METRICS, Run, build_model, load_run, save_run, write_config
from trainer.autoencoder import Recipe, SharedAutoencoder
from trainer.bank.fitting import check_bank, equip
from trainer.checkpoint import (
    Checkpoints,
    Position,
    has_checkpoint,
    leave_good_checkpoint,
    remove_checkpoints,
    settings_digest,
)
from trainer.codebook import Embedded, cluster_table, finish, set_calibration
from trainer.data import Dataset, load_dataset, open_dataset
from trainer.denormals import denormals_as_zero
from trainer.encoders.weights import with_digests
from trainer.errors import CollapseError, DataError
from trainer.frozen_features import frozen_features
from trainer.golden import choose, save_images
from trainer.guards import check_embeddings_finite, empty_clusters
from trainer.images import open_images
from trainer.learner import SCRATCH, Learner, LearnerOptions, Supervision
from trainer.loop import Loop, append_metrics
from trainer.methods import METHODS, Method
from trainer.model import Seen
from trainer.novelty import NoveltySettings
from trainer.pixel_place import StorePlace
from trainer.precision import check_precision
from trainer.progress import Progress, Silent
from trainer.provenance import Outcome, describe
from trainer.report import write_report
from trainer.run_lock import only_one_in
from trainer.settings import TrainSettings
from trainer.splits import Split, split_all_train, split_by_group
from trainer.stage import OptimizerSettings, Stage
from trainer.stored_pixels import select
from trainer.suspects import suspects, write_suspects


@dataclass(frozen=True)
class FitOptions:
    """Where the run goes and what it reports to. `overrides` are `a.b=c` items, as with `--set`."""

    out: Path | None = None
    overrides: Sequence[str] = ()
    resume: bool = False
    progress: Progress = field(default_factory=Silent)


def fit(config: str | Path | TrainSettings, options: FitOptions | None = None) -> Run:
    """Trains what the settings describe and writes the run folder.

    Args:
        config: a settings file, a shipped name, or settings; `options.out` is `runs/<name>` unless given.

    Raises:
        ConfigError, DataError: the settings or the images are not usable.
        CollapseError: a guard stopped the training.
        InterruptedTraining: Ctrl-C; `resume` continues.
    """
    options = options or FitOptions()
    if isinstance(config, TrainSettings):
        settings, name = config, "run"
    else:
        settings = load_settings(TrainSettings, config, "train", Sources(options.overrides, "DKM_TRAIN"))
        name = find(config, "train").stem
    folder = options.out or Path("runs") / name
    with (
        denormals_as_zero(),
        ranks.joined() as together,
        _determinism(settings.train.deterministic),
        contextlib.ExitStack() as held,
    ):
        together.same(lambda: held.enter_context(only_one_in(folder)))
        # Of several machines torchrun counts the restart on that where a process died, perhaps not on the others.
        is_restarted = any(together.gather(ranks.is_restarted()))
        if is_restarted and together.same((folder / "model.json").exists):
            return together.same(lambda: load_run(folder))  # a process died after the last file was written
        options = replace(
            options,
            resume=options.resume or is_restarted,
            progress=options.progress if together.is_first else Silent(),
        )
        together.check_same("the settings", json.dumps(settings.plain(), sort_keys=True))
        together.same(lambda: _claim(folder, settings, options))
        return _fit(settings, folder, options)


def _fit(settings: TrainSettings, folder: Path, options: FitOptions) -> Run:
    """All of `fit` behind the settings; every process does all of it, and the first one writes."""
    together, started_s = ranks.current(), time.monotonic()
    device = _device(settings.train.device)
    check_precision(settings.train.precision, device)
    torch.manual_seed(settings.train.seed)
    options.progress.say(f"reading {settings.data.path}")
    dataset, split = _load(settings, options.progress, folder)
    _check_same(settings, dataset, split)
    learner, frozen = _prepare(settings, (dataset, split), device, folder)
    try:
        method, earlier_s = _train(settings, learner, (dataset, split), folder, options)
        run, outcome = _finish(settings, method, frozen, (dataset, split), options.progress.say)
    except CollapseError as error:
        if together.is_first:
            leave_good_checkpoint(folder)
            append_metrics(folder, {"stage": COLLAPSED, "guard": error.guard, "why": str(error)})
        raise
    run.metrics |= method.figures()  # the same dictionary as run.info["metrics"]
    run.info["train"] |= {
        "warnings": [*method.warnings(), *([] if method.finds_clusters else empty_clusters(run.clusters))],
        "refusal": method.refusal(),
        "processes": together.count,
    }
    if together.is_first:
        with ranks.alone():
            _write(run, method, outcome, folder, options.progress.say)
            run.info["train"]["minutes"] = round((time.monotonic() - started_s + earlier_s) / 60, 2)
            save_run(run, folder, outcome.assignments())
            write_report(run, dataset.skipped, folder / "report.html")
        remove_checkpoints(folder)
    together.wait()
    if together.local_index == 0:
        _place(settings, folder, options.progress.say).remove()
    options.progress.close()
    return run


def _check_same(settings: TrainSettings, dataset: Dataset, split: Split) -> None:
    """Refuses to train where another machine has other images, labels, groups or pretrained weights."""
    together, known = ranks.current(), hashlib.sha256(json.dumps(dataset.classes).encode())
    for column in (dataset.known, dataset.groups, split.train, split.radius, split.calibration):
        known.update(np.ascontiguousarray(column).tobytes())
    weights = json.dumps(with_digests(settings.plain()["encoder"]), sort_keys=True)
    together.check_same(f"data.path {settings.data.path}", dataset.manifest_sha256)
    together.check_same("what the labels and data.groups say of the images", known.hexdigest())
    together.check_same("the encoder with its pretrained weights", hashlib.sha256(weights.encode()).hexdigest())


def _write(run: Run, method: Method, outcome: Outcome, folder: Path, say: Callable[[str], None]) -> None:
    """What lies in the run folder beside the run itself."""
    say("looking for suspects among the training images")
    _write_suspects(outcome, folder, say)
    shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    save_images([outcome.dataset.items[n] for n in choose(run.model, outcome.z)], folder / "golden")
    append_metrics(folder, {"stage": "result", **run.metrics})
    _write_review(method.review(), outcome, folder / "review.csv")


def _claim(folder: Path, settings: TrainSettings, options: FitOptions) -> None:
    if (folder / "model.json").exists():
        raise DataError(f"{folder} already holds a complete run; choose another place with --out, or delete it")
    if has_checkpoint(folder):
        if options.resume:
            return  # its config.yaml is that of the checkpoint, which refuses other settings
        raise DataError(f"{folder} holds an interrupted run; --resume continues it, --out starts another")
    try:
        write_config(settings, folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / METRICS).unlink(missing_ok=True)  # of an attempt that did not get to a checkpoint
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}") from None


def _read(settings: TrainSettings, progress: Progress, folder: Path) -> Dataset:
    """The data set; of several processes on one machine the first one decodes, and the others take what it has put on disk."""
    together, place = ranks.current(), _place(settings, folder, progress.say)
    images = open_images(settings.data)
    if together.local_index == 0:
        dataset, _ = load_dataset(images, settings.data, settings.preprocess, progress.read, place)
    together.wait()
    if together.local_index > 0:
        dataset, _ = open_dataset(images, settings.data, settings.preprocess, place)
    return dataset


def _place(settings: TrainSettings, folder: Path, say: Callable[[str], None]) -> StorePlace:
    """Where this machine keeps decoded pixels."""
    together = ranks.current()
    return StorePlace.of(settings.data, folder, together.local_count, together.machine, say)


def _load(settings: TrainSettings, progress: Progress, folder: Path) -> tuple[Dataset, Split]:
    dataset = _read(settings, progress, folder)
    for skipped in dataset.skipped[:5]:
        progress.say(f"skipped {skipped.name}: {skipped.reason}")
    if len(dataset.skipped) > 5:
        progress.say(f"skipped {len(dataset.skipped)} images in all; `dkm-train scan` lists them")
    novelty = settings.calibration
    split = (
        split_all_train(dataset) if novelty is None else split_by_group(dataset, novelty.shares, settings.train.seed)
    )
    if METHODS[settings.method.name].finds_clusters:
        return dataset, split
    if len(split.train) < settings.method.n_clusters:
        raise DataError(
            f"method.n_clusters is {settings.method.n_clusters}, but there are {len(split.train)} training images "
            f"(of {len(dataset)}); use fewer clusters or more images"
        )
    distinct = _distinct(dataset, split, settings.method.n_clusters)
    if distinct < settings.method.n_clusters:
        raise DataError(
            f"method.n_clusters is {settings.method.n_clusters}, but the {len(split.train)} images have only {distinct} different "
            f"pictures among them; use fewer clusters or more images"
        )
    return dataset, split


def _distinct(dataset: Dataset, split: Split, enough: int) -> int:
    """Number of different training images, counted up to `enough`: identical ones may differ in a float's last digit once embedded."""
    seen: set[bytes] = set()
    for n in split.train.tolist():
        seen.add(dataset.pixels[n].numpy().tobytes())
        if len(seen) >= enough:
            break
    return len(seen)


def _prepare(
    settings: TrainSettings, data: tuple[Dataset, Split], device: torch.device, folder: Path
) -> tuple[Learner, torch.Tensor | None]:
    """The untrained model on its training images, and the outputs of its frozen part for all images."""
    dataset, split = data
    model = build_model(settings, (dataset.pixels.shape[1], dataset.pixels.shape[2]), len(split.train)).to(device)
    model.eval()
    check_bank(model, settings, dataset.pixels[:1])
    model.encoder.load_pretrained()
    train = torch.from_numpy(split.train)
    pixels = select(dataset.pixels, train)
    model.preprocess.fit_normalise(pixels)
    frozen = frozen_features(settings, model, dataset)
    of_train = None if frozen is None else frozen[train.to(device)]
    if of_train is not None:
        model.encoder.fit_stem(of_train)
    # What a method writes is the first process's to write; the others keep it in memory.
    own = folder if ranks.current().is_first else None
    how = LearnerOptions(settings.train.seed, settings.augment, settings.train.precision, own)
    supervision = None
    if METHODS[settings.method.name].is_supervised:
        supervision = Supervision(torch.from_numpy(dataset.known[split.train]), tuple(dataset.classes))
    return Learner(model, pixels, how, of_train, supervision), frozen


def _write_review(rows: Sequence[tuple[int, str]], outcome: Outcome, path: Path) -> None:
    """review.csv: what the method wants an engineer to look at; no file where there is nothing."""
    path.unlink(missing_ok=True)
    if rows:
        names, train = outcome.dataset.names, outcome.split.train
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "reason"), *((names[train[n]], reason) for n, reason in rows)])


def _write_suspects(outcome: Outcome, folder: Path, say: Callable[[str], None]) -> None:
    """suspects.csv: what lies far from all parts of other groups, among those that are called good."""
    dataset, train, names = outcome.dataset, outcome.split.train, outcome.dataset.names
    index = train[dataset.good[train]]
    found = suspects(outcome.z[index], dataset.groups[index], outcome.ids[index])
    if found.problem is not None:
        say(f"suspects: {found.problem}")
    write_suspects(folder, [names[n] for n in index], found)


def _finish(
    settings: TrainSettings,
    method: Method,
    frozen: torch.Tensor | None,
    data: tuple[Dataset, Split],
    say: Callable[[str], None],
) -> tuple[Run, Outcome]:
    dataset, split = data
    model = method.learner.model.eval()
    seen = Seen(model.embed_dataset(dataset.pixels) if frozen is None else model.embed_frozen(frozen))
    check_embeddings_finite(seen.z)  # the last step of a stage is followed by nobody's look, where its method has none
    bank, model.bank = ranks.current().same(lambda: (equip(model, settings, data, seen, say), model.bank))
    if model.bank is not None:
        seen = model.see(dataset.pixels)

    def embedded(index: NDArray[np.int64]) -> Embedded:
        return Embedded(seen.take(torch.from_numpy(index).to(seen.z.device)), dataset.groups[index])

    train = embedded(split.train)
    held_out = [embedded(index) if len(index) else None for index in (split.radius, split.calibration)]
    parts = finish(model, train, *held_out)
    calibration = set_calibration(model, parts, settings.calibration or NoveltySettings())
    outcome = Outcome.of(model, dataset, split, seen)
    info = describe(
        settings, model, outcome, parts, calibration, cluster_table(model, train, parts, method.cluster_names())
    )
    info["novelty"] |= bank
    return Run(None, settings, model, parts, info, info["metrics"]), outcome


def _train(
    settings: TrainSettings, learner: Learner, data: tuple[Dataset, Split], folder: Path, options: FitOptions
) -> tuple[Method, float]:
    """Pre-training, initial centroids, the method's stages; goes on from a checkpoint where there is one and `resume` is set.

    Returns:
        The method as it ended, and the seconds of the epochs that ran before the checkpoint.
    """
    dataset, split = data
    if len(learner) < 2 and any(isinstance(module, nn.BatchNorm2d) for module in learner.model.encoder.modules()):
        raise DataError(
            f"{settings.data.path} leaves 1 image to train on, but encoder {settings.encoder.name} normalises over a batch; expected at least 2"
        )
    method = METHODS[settings.method.name](settings.method, learner, settings.train.batch_size)

    def init() -> None:
        model = learner.model
        if settings.projection.kind != "none":  # else there is nothing to fit, and a pass over all images to spare
            model.projection.fit(learner.all_features(), model.n_clusters, learner.seed)
        method.init_centroids()

    centroids = Stage("init", 0, settings.train.batch_size, OptimizerSettings(), [], learner.latents, begin=init)
    digest = settings_digest(settings.plain())
    limits = settings.train
    checkpoints = Checkpoints(folder, limits.checkpoint_every_s, limits.checkpoint_max_mb, options.progress.say)
    checkpoint = None
    if options.resume:
        checkpoint = ranks.current().same(lambda: checkpoints.load(digest, dataset.manifest_sha256))
    recipe = Recipe.of(settings, dataset.manifest_sha256, split)
    shared = SharedAutoencoder(settings, recipe, folder, options.progress.say)
    pretraining = shared.stages(learner, may_load=checkpoint is None)
    stages = [*pretraining, centroids, *method.stages()]
    loop = Loop(
        learner,
        method,
        folder,
        options.progress,
        checkpoints,
        Position(0, 0, digest, dataset.manifest_sha256),
    )
    earlier_s = 0.0
    if options.resume and checkpoint is None:
        options.progress.say(f"{folder} holds no checkpoint; starting from the beginning")
    if checkpoint is not None:
        checkpoint.restore(learner, method)
        position = checkpoint.position
        earlier_s = ranks.current().same(
            lambda: loop.rewind_metrics(stages[: position.stage], stages[position.stage], position.step)
        )
        options.progress.say(f"resuming stage {stages[position.stage].name} at step {position.step}")
    with loop.interruptible():
        for n, stage in enumerate(stages):
            if checkpoint is None or n > checkpoint.position.stage:
                loop.run(n, stage, None)
            elif n == checkpoint.position.stage:
                loop.run(n, stage, checkpoint)
    return method, earlier_s


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("train.device is cuda, but this PyTorch sees no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    processes, gpus = ranks.current().local_count, torch.cuda.device_count()
    if processes > gpus:
        raise DataError(
            f"torchrun started {processes} processes on this machine, which has {gpus} GPU(s), expected at most one process for each; "
            f"use --nproc-per-node {gpus}, or train.device: cpu"
        )
    return torch.device("cuda")


@contextlib.contextmanager
def _determinism(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms while fitting; a host program's own choice is restored."""
    before, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # It writes NaN into every new tensor, a tenth of a step in bf16, for code that reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
