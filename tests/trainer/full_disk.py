"""A fit whose disk is full for a while, and one that is interrupted then: `python -m tests.trainer.full_disk DISK IMAGES`, as JSON what was said."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.trainer.test_fitting import dec, tensors
from trainer import FitOptions, fit
from trainer.checkpoint import FOLDER
from trainer.errors import DataError
from trainer.feature_store import FeatureStore
from trainer.loop import InterruptedTraining
from trainer.progress import Silent


class Filler(Silent):
    """Fills the disk at the end of an epoch of stage dec and empties it at the end of another one; presses Ctrl-C where asked."""

    def __init__(self, disk: Path, run: str, full: int, empty: int | None) -> None:
        self.ballast, self.folder, self.full, self.empty = disk / "ballast", disk / run / FOLDER, full, empty
        self.said: list[str] = []
        self.halves: list[str] = []
        self.now = ""

    def stage(self, name: str, epochs: int, first: int) -> None:
        self.now = name

    def say(self, text: str) -> None:
        self.said.append(text)

    def epoch(self, epoch: int, figures: dict[str, float]) -> None:
        if self.now != "dec":
            return
        self.halves += [path.name for path in self.folder.glob(".*")]
        if epoch == self.full:
            fill(self.ballast)
            if self.empty is None:
                os.kill(os.getpid(), signal.SIGINT)
        if epoch == self.empty:
            self.ballast.unlink()


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def refused(path: Path) -> str:
    """What is said of features that have no room there; nothing where they seem to have it."""
    try:
        FeatureStore(10_000, 1000, path)
    except DataError as error:
        return str(error)
    return ""


def run(disk: Path, images: Path) -> dict[str, Any]:
    features = refused(disk / "features.f32")
    first = dec(images)
    settings = first.model_copy(update={"method": first.method.model_copy(update={"epochs": 6})})
    whole = fit(settings, FitOptions(out=disk / "whole"))
    filler = Filler(disk, "filled", 1, 3)
    filled = fit(settings, FitOptions(out=disk / "filled", progress=filler))
    stopper, stopped = Filler(disk, "cut", 1, None), ""
    try:
        fit(settings, FitOptions(out=disk / "cut", progress=stopper))
    except InterruptedTraining as error:
        stopped = str(error)
    stopper.ballast.unlink()
    resumed = fit(settings, FitOptions(out=disk / "cut", resume=True))
    ends = [[value.tolist() for value in tensors(run)] for run in (whole, filled, resumed)]
    return {
        "said": filler.said,
        "halves": filler.halves + stopper.halves,
        "stopped": stopped,
        "features": features,
        "equal": [end == ends[0] for end in ends],
    }


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), Path(sys.argv[2]))))
