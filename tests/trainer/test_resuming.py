from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import load_text
from tests.trainer.test_checkpoint import Listening, truncate
from tests.trainer.test_fitting import DEC, StopAfter, dec, tensors
from tests.trainer.test_methods import EXTRA, TINY
from trainer import FitOptions, fit, fitting, load_run
from trainer.checkpoint import (
    FOLDER,
    GOOD,
    NAME,
    PREVIOUS,
    Checkpoints,
    Position,
)
from trainer.cli import main
from trainer.errors import ArtifactError
from trainer.loop import InterruptedTraining, Loop
from trainer.settings import TrainSettings
from trainer.stage import Stage


@contextmanager
def ctrl_c_in(stage: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Presses Ctrl-C during step `number` of a stage."""
    whole, seen = Loop._step, [0]

    def pressed(self: Loop, now: Stage, *arguments: Any) -> torch.Tensor:
        seen[0] += now.name == stage
        if now.name == stage and seen[0] == number + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self, now, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", pressed)
        yield


@pytest.mark.parametrize("name", sorted(EXTRA))
def test_a_run_that_was_interrupted_within_an_epoch_ends_as_an_uninterrupted_one(
    name: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TINY.format(path=image_folder).replace("{name: ae_kmeans, n_clusters: 3, n_init: 3}", EXTRA[name])
    settings = load_text(TrainSettings, text.replace("pretrain: {epochs: 3}", "pretrain: {epochs: 1}"), "a.yaml")
    whole = fit(settings, FitOptions(out=tmp_path / "whole"))
    with ctrl_c_in(name, 1, monkeypatch), pytest.raises(InterruptedTraining, match="epoch 1; the checkpoint is saved"):
        fit(settings, FitOptions(out=tmp_path / "cut"))
    resumed = fit(settings, FitOptions(out=tmp_path / "cut", resume=True))
    assert all(np.array_equal(a, b) for a, b in zip(tensors(whole), tensors(resumed), strict=True))
    rows = [
        [
            (row["stage"], row.get("epoch"), row.get("loss"), row.get("reconstruction"))
            for row in map(json.loads, (tmp_path / side / "metrics.jsonl").read_text().splitlines())
        ]
        for side in ("whole", "cut")
    ]
    assert rows[0] == rows[1]


def test_within_an_epoch_a_checkpoint_is_saved_when_its_time_has_come(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = Checkpoints.save, set[int]()

    def noted(self: Checkpoints, position: Position, tensors: Any) -> bool:
        steps.add(position.step)
        return whole(self, position, tensors)

    monkeypatch.setattr(Checkpoints, "save", noted)
    fit(dec(image_folder), FitOptions(out=tmp_path / "often"))
    assert steps == set(range(13))  # 3 epochs of 4 steps
    steps.clear()
    settings = dec(image_folder)
    train = settings.train.model_copy(update={"checkpoint_every_s": 1e6})
    fit(settings.model_copy(update={"train": train}), FitOptions(out=tmp_path / "seldom"))
    assert steps == {0}  # where a stage begins


def test_the_command_that_ctrl_c_prints_ends_the_run(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "dec settings.yaml"
    config.write_text(DEC.format(path=image_folder))
    command = ["fit", str(config), "--out", str(tmp_path / "run"), "--set", "train.seed=3", "--set", "method.n_init=2"]
    with ctrl_c_in("dec", 2, monkeypatch):
        assert main(command) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        "dkm-train: interrupted in stage dec, epoch 1; the checkpoint is saved; go on with: dkm-train fit "
    )
    again = shlex.split(said.partition("go on with: ")[2])
    assert again == ["dkm-train", *command, "--resume"]
    assert main(again[1:]) == 0 and load_run(tmp_path / "run").settings.train.seed == 3


def test_ctrl_c_outside_the_training_says_how_to_go_on_too(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "dec.yaml"
    config.write_text(DEC.format(path=image_folder))
    whole = fitting.load_dataset

    def pressed(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(fitting, "load_dataset", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        assert main(["fit", str(config), "--out", str(tmp_path / "run")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "dkm-train: interrupted; go on with: dkm-train fit " in capsys.readouterr().err


def test_a_run_that_is_killed_again_and_again_ends_as_an_uninterrupted_one(image_folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "dec.yaml"
    text = DEC.format(path=image_folder).replace("epochs: 3, tol", "epochs: 6, tol")
    config.write_text(text)
    lives = subprocess.run(
        [sys.executable, "-m", "tests.trainer.lives", str(config), str(tmp_path / "killed"), "5"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert lives.returncode == 0, lives.stderr
    found = json.loads(lives.stdout.splitlines()[-1])
    assert found["code"] == 0 and found["ended_itself"] < 3, found
    # Killed at each place where a save touches the folder: the one before it, and the new one once it has its name.
    assert len(found["moments"]) > 4 and found["moments"] == sorted(found["moments"])
    assert found["moments"][0] == 1 and found["moments"][-1] == 2 and set(found["moments"]) == {1, 2}
    whole = fit(load_text(TrainSettings, text, "dec.yaml"), FitOptions(out=tmp_path / "whole"))
    again = load_run(tmp_path / "killed" / "run")
    assert all(np.array_equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))
    assert not list((tmp_path / "killed" / "run" / FOLDER).iterdir())


def test_a_fit_that_finds_its_last_checkpoint_damaged_goes_on_from_the_one_before_it(
    image_folder: Path, tmp_path: Path
) -> None:
    whole = fit(dec(image_folder), FitOptions(out=tmp_path / "whole"))
    with pytest.raises(InterruptedTraining):
        fit(dec(image_folder), FitOptions(out=tmp_path / "cut", progress=StopAfter("dec", 1)))
    shutil.copytree(tmp_path / "cut", tmp_path / "lost")
    truncate(tmp_path / "cut" / FOLDER / NAME)
    progress = Listening()
    resumed = fit(dec(image_folder), FitOptions(out=tmp_path / "cut", resume=True, progress=progress))
    assert any("going on from the checkpoint before it" in line for line in progress.said)
    assert all(np.array_equal(a, b) for a, b in zip(tensors(whole), tensors(resumed), strict=True))
    for name in (GOOD, NAME, PREVIOUS):
        truncate(tmp_path / "lost" / FOLDER / name)
    with pytest.raises(ArtifactError, match="delete .* to start again"):
        fit(dec(image_folder), FitOptions(out=tmp_path / "lost", resume=True))
