"""Fits that are compared with each other: settings changed from one base, run folders that are reused where they are complete.

`select_k`, `sweep` and `pilot` are made of these; each fit leaves a normal run folder, which can be looked at and exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from configs import Sources, find, load_settings, load_text
from trainer.artifact import Run, load_run
from trainer.checkpoint import has_checkpoint
from trainer.data import Dataset, load_dataset
from trainer.errors import DataError
from trainer.fitting import FitOptions, fit
from trainer.images import open_images
from trainer.progress import Progress
from trainer.settings import TrainSettings


def load_base(config: str | Path, overrides: Sequence[str] = ()) -> tuple[TrainSettings, str]:
    """Settings of a file or shipped name with `a.b=c` overrides, as `fit` reads them, and the name of the file.

    Raises:
        ConfigError: the settings are wrong.
    """
    settings = load_settings(TrainSettings, config, "train", Sources(overrides, "DKM_TRAIN"))
    return settings, find(config, "train").stem


def changed(settings: TrainSettings, changes: Mapping[str, Any], place: str) -> TrainSettings:
    """The settings with some keys changed, checked again.

    Args:
        changes: dotted key to plain value, as `{"train.seed": 3}`; a mapping replaces a whole section.
        place: where the changes come from; stands in messages.

    Raises:
        ConfigError: a key or value does not fit.
    """
    plain = settings.plain()
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        section = plain
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise DataError(f"{place} changes {dotted}, but {parent} is {section}, which has no keys below it")
        section[last] = value
    return load_text(TrainSettings, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), place)


def fit_or_reuse(settings: TrainSettings, folder: Path, progress: Progress) -> Run:
    """A run of these settings in `folder`: the complete one that is there, the interrupted one continued, or a new one.

    Raises:
        DataError: the folder holds a run of other settings.
        CollapseError: a guard stopped the training.
    """
    is_begun = has_checkpoint(folder)
    is_complete = (folder / "model.json").is_file()  # written last; a kill right after it may leave the checkpoint
    if is_begun or is_complete:
        if load_settings(TrainSettings, folder / "config.yaml", "train") != settings:
            raise DataError(f"{folder} holds a run of other settings; choose another place with --out, or delete it")
        if is_complete:
            progress.say(f"reusing {folder}")
            return load_run(folder)
    return fit(settings, FitOptions(folder, (), is_begun, progress))


def read_images(settings: TrainSettings, progress: Progress) -> Dataset:
    """The data set that `fit` reads for these settings."""
    return load_dataset(open_images(settings.data), settings.data, settings.preprocess, progress.read)[0]
