"""A pre-trained autoencoder on disk: written by every run that pre-trains, shared between methods by `pretrain.from` and `pretrain.cache`.

One file `autoencoder.safetensors` holds encoder and decoder as pre-training left them; its header holds the recipe: everything that
decided those tensors. The recipe's sha256 names the file in a cache, so a comparison of methods is paired and pre-trains once per seed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer import ranks
from trainer.encoders.weights import with_digests
from trainer.errors import ArtifactError, DataError
from trainer.learner import Learner
from trainer.pretrain import pretrain_stages
from trainer.settings import TrainSettings
from trainer.splits import Split
from trainer.stage import Stage
from trainer.whole_file import save_tensors

NAME = "autoencoder.safetensors"
MUST_AGREE = ("images", "preprocess", "encoder")  # of another run's autoencoder; its schedule may differ


@dataclass(frozen=True)
class Recipe:
    """What decides a pre-trained autoencoder, as plain values. `is_calibrated`: whether held-out parts must not be among its images."""

    values: dict[str, Any]
    is_calibrated: bool

    @classmethod
    def of(cls, settings: TrainSettings, manifest_sha256: str, split: Split) -> Recipe:
        """The recipe of the run that `settings` describe on the images of that manifest."""
        plain = settings.plain()
        return cls(
            {
                "images": manifest_sha256,
                "train_images": hashlib.sha256(np.ascontiguousarray(split.train).tobytes()).hexdigest(),
                "preprocess": plain["preprocess"],
                "encoder": with_digests(plain["encoder"]),
                "augment": plain["augment"],
                "pretrain": {key: value for key, value in plain["pretrain"].items() if key not in {"from", "cache"}},
                "train": {key: plain["train"][key] for key in ("seed", "batch_size", "precision")},
            },
            split.is_calibrated,
        )

    @property
    def sha256(self) -> str:
        """Names the autoencoder in a cache."""
        return hashlib.sha256(json.dumps(self.values, sort_keys=True).encode()).hexdigest()


class SharedAutoencoder:
    """Decides for one run whether to pre-train or to take what is there, and leaves the autoencoder in the run folder and the cache."""

    def __init__(self, settings: TrainSettings, recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
        self.settings, self.recipe, self.own, self._say = settings, recipe, folder / NAME, say
        pretrain = settings.pretrain
        # What another run learned is not what this recipe gives: it never goes into the cache.
        has_cache = pretrain.cache is not None and pretrain.from_run is None
        self.cached = Path(pretrain.cache or "") / f"{recipe.sha256[:16]}.safetensors" if has_cache else None

    def stages(self, learner: Learner, may_load: bool) -> list[Stage]:
        """Pre-training's stages, or as many empty ones where an autoencoder is there to take (the loop counts stages)."""
        stages = pretrain_stages(self.settings.pretrain, learner, self.settings.train.batch_size)
        if not stages:
            if self.settings.pretrain.from_run is not None:
                raise DataError(
                    f"pretrain.from is {self.settings.pretrain.from_run}, but encoder {self.settings.encoder.name} is frozen and has no autoencoder to "
                    f"take; leave it out"
                )
            return stages
        source = ranks.current().same(self._source) if may_load else None
        if source is None:
            return [*stages[:-1], replace(stages[-1], end=lambda: self._save(learner))]

        def take() -> None:
            load_autoencoder(source, learner, self.recipe)
            shutil.copyfile(source, self.own)  # with the header of the run that learned it

        def load() -> None:
            ranks.current().same(take)  # the loop spreads what the first process has loaded

        return [replace(stage, epochs=0, begin=load if n == 0 else stage.begin) for n, stage in enumerate(stages)]

    def _source(self) -> Path | None:
        if self.settings.pretrain.from_run is not None:
            return Path(self.settings.pretrain.from_run) / NAME
        return self.cached if self.cached is not None and self.cached.is_file() else None

    def _save(self, learner: Learner) -> None:
        if not ranks.current().is_first:
            return
        for path in (self.own, self.cached):
            if path is None:
                continue
            try:
                save_autoencoder(path, learner, self.recipe)
            except OSError as error:  # other runs would have had use of it, this one goes on without
                self._say(f"{path} cannot be written: {error.strerror or error}")


def save_autoencoder(path: Path, learner: Learner, recipe: Recipe) -> None:
    """Writes encoder and decoder."""
    decoder = learner.need_decoder("a saved autoencoder")
    tensors = {f"encoder.{k}": v for k, v in learner.model.encoder.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    save_tensors(path, tensors, {"recipe": json.dumps(recipe.values, sort_keys=True)})


def load_autoencoder(path: Path, learner: Learner, recipe: Recipe) -> None:
    """Copies encoder and decoder from `path` into the learner.

    Raises:
        ArtifactError: it is not there, or damaged.
        DataError: it was learned from other images, or by another pre-processing or encoder, or on parts that novelty is calibrated on.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; a run that pre-trains an autoencoder leaves one")
    try:
        with safe_open(path, "pt") as file:
            found = json.loads(file.metadata()["recipe"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); delete it") from None
    for key in MUST_AGREE:
        if found.get(key) != recipe.values[key]:
            raise DataError(
                f"pretrain.from: {path} was learned with other {key} ({_shown(found.get(key))}, here "
                f"{_shown(recipe.values[key])}), expected the same; take a run of the same data, preprocess and encoder settings"
            )
    if recipe.is_calibrated and found.get("train_images") != recipe.values["train_images"]:
        raise DataError(
            f"pretrain.from: {path} was trained on parts that novelty is calibrated on here, which would void its promise; "
            f"expected the same train.seed, novelty.shares, data.groups and data.good as in that run"
        )
    decoder = learner.need_decoder("pretrain.from")
    learner.model.encoder.load_state_dict(_part(tensors, "encoder."))
    decoder.load_state_dict(_part(tensors, "decoder."))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _shown(value: object) -> str:
    text = value[:12] if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
