from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults import small_disk
from tests.trainer.learning import KINDS, blob_learner
from tests.trainer.test_fitting import dec
from trainer import FitOptions, fit
from trainer.checkpoint import (
    FOLDER,
    GOOD,
    NAME,
    PREVIOUS,
    Checkpoint,
    Checkpoints,
    Position,
    has_checkpoint,
    leave_good_checkpoint,
    settings_digest,
    training_state,
)
from trainer.errors import ArtifactError
from trainer.loop import append_metrics
from trainer.methods import METHODS
from trainer.progress import Silent
from trainer.stage import Stage

PLACE = Position(2, 10, "c" * 64, "m" * 64, "dec")


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def some(value: float, n: int = 1000) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((n,), float(value)), "method.ids": torch.arange(5), "method.flag": torch.tensor(True)}


def saved(run: Path, values: list[float], max_mb: float = 100, say: Callable[[str], None] = print) -> Checkpoints:
    checkpoints = Checkpoints(run, 0, max_mb, say)
    for n, value in enumerate(values):
        checkpoints.save(replace(PLACE, step=n), some(value))
    return checkpoints


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_in_the_values(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def flip_in_the_position(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'\\"step\\": 1', b'\\"step\\": 7'))


DAMAGES = [truncate, empty, flip_in_the_values, flip_in_the_position]


def test_two_checkpoints_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3])
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [NAME, PREVIOUS]
    found = Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64)
    assert found is not None and found.position == replace(PLACE, step=2)
    assert all(torch.equal(found.tensors[key], value) for key, value in some(3).items())


def test_without_any_there_is_nothing_to_read(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64) is None and not has_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    saved(tmp_path, [1, 2])
    damage(tmp_path / FOLDER / NAME)
    said: list[str] = []
    again = Checkpoints(tmp_path, 0, 100, said.append)
    found = again.load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 0 and float(found.tensors["model.a"][0]) == 1
    assert len(said) == 1 and f"{NAME} cannot be read" in said[0] and "before it, stage dec, step 0" in said[0]
    again.save(replace(PLACE, step=5), some(5))
    # The damaged one has not taken the place of the whole one.
    truncate(tmp_path / FOLDER / NAME)
    kept = Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64)
    assert kept is not None and kept.position.step == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_the_error_names_both_and_what_to_do(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    saved(tmp_path, [1, 2])
    flip_in_the_values(tmp_path / FOLDER / PREVIOUS)
    damage(tmp_path / FOLDER / NAME)
    with pytest.raises(
        ArtifactError, match=rf"{NAME} cannot be read.*{PREVIOUS} cannot be read.*; delete .* to start again"
    ):
        Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64)


def test_a_process_that_was_killed_between_the_two_renames_leaves_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2])
    (tmp_path / FOLDER / NAME).replace(tmp_path / FOLDER / PREVIOUS)
    (tmp_path / FOLDER / f".{NAME}.0.tmp").write_bytes(b"half")
    assert has_checkpoint(tmp_path)
    found = Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 1
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == [PREVIOUS]  # the half file is gone


def test_other_settings_and_other_images_are_refused_with_both_digests(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    checkpoints = Checkpoints(tmp_path, 0, 100, print)
    with pytest.raises(ArtifactError, match="other settings .sha256 cccccccccccc, now dddddddddddd"):
        checkpoints.load("d" * 64, "m" * 64)
    with pytest.raises(ArtifactError, match="other images .manifest mmmmmmmmmmmm, now nnnnnnnnnnnn.; restore the data"):
        checkpoints.load("c" * 64, "n" * 64)


def test_what_only_says_when_to_save_may_change_under_a_resume(image_folder: Path) -> None:
    settings = dec(image_folder)

    def digest(**changes: Any) -> str:
        train = settings.train.model_copy(update=changes)
        return settings_digest(settings.model_copy(update={"train": train}).plain())

    assert digest() == digest(checkpoint_max_mb=5, checkpoint_every_s=7) != digest(seed=1)


def test_where_three_files_do_not_fit_one_is_kept_and_where_two_do_not_none_is_each_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    need = sum(value.nbytes for value in some(0).values()) / 1e6  # MB
    saved(tmp_path / "two", [1, 2, 3], 3.1 * need, said.append)
    assert not said and (tmp_path / "two" / FOLDER / PREVIOUS).exists()  # control
    saved(tmp_path / "one", [1, 2, 3], 2.9 * need, said.append)
    assert [path.name for path in (tmp_path / "one" / FOLDER).iterdir()] == [NAME]
    assert (
        len(said) == 1
        and "has 0.00404 MB, train.checkpoint_max_mb is 0.01" in said[0]
        and "only the last one is kept" in said[0]
    )
    none = saved(tmp_path / "none", [1, 2, 3], 1.9 * need, said.append)
    assert not has_checkpoint(tmp_path / "none") and len(said) == 2
    assert (
        "no checkpoint at stage dec, step 0: a checkpoint has 0.00404 MB" in said[1] and "there is none yet" in said[1]
    )
    assert "nothing could be saved" in none.outcome and "starts from the beginning" in none.outcome


def test_the_one_before_a_damaged_one_stays_until_a_new_one_is_whole(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2])
    truncate(tmp_path / FOLDER / NAME)
    room_for_one = 2.9 * sum(value.nbytes for value in some(0).values()) / 1e6  # MB
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, 0, room_for_one, said.append)
    checkpoints.load("c" * 64, "m" * 64)
    with files_of_at_most(100):
        assert not checkpoints.save(replace(PLACE, step=5), some(5))
    found = Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 0


def test_a_state_that_grows_over_the_limit_leaves_the_last_one_that_fitted(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = saved(tmp_path, [1], 0.07, said.append)
    assert not checkpoints.save(replace(PLACE, step=9), some(2, 10_000))
    assert "the last one is of stage dec, step 0" in said[0] and "goes back to stage dec, step 0" in checkpoints.outcome
    found = checkpoints.load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 0


def kept_after_a_collapse(run: Path, vouched: bool, max_mb: float = 100) -> int:
    """The step of the checkpoint that is left of three, of which the guards may have vouched for the first."""
    checkpoints = saved(run, [1], max_mb)
    for step in (1, 2):
        if vouched and step == 1:
            checkpoints.vouch()
        checkpoints.save(replace(PLACE, step=step), some(step))
    leave_good_checkpoint(run)
    found = checkpoints.load("c" * 64, "m" * 64)
    assert found is not None
    return found.position.step


def test_after_a_collapse_the_one_that_a_guard_vouched_for_is_left(tmp_path: Path) -> None:
    assert kept_after_a_collapse(tmp_path / "good", vouched=True) == 0
    assert kept_after_a_collapse(tmp_path / "unknown", vouched=False) == 2
    need = sum(value.nbytes for value in some(0).values()) / 1e6
    assert (
        kept_after_a_collapse(tmp_path / "small", vouched=True, max_mb=3.9 * need) == 2
    )  # a fourth file would not fit


def test_the_newest_is_the_good_one_where_nothing_was_saved_since(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    checkpoints.vouch()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [GOOD, NAME, PREVIOUS]
    leave_good_checkpoint(tmp_path)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == [GOOD, NAME]
    found = checkpoints.load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 1


def test_a_good_one_that_is_damaged_never_replaces_a_whole_one(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1, 2])
    checkpoints.vouch()
    flip_in_the_values(tmp_path / FOLDER / NAME)  # and so its other name
    for _ in range(2):
        found = checkpoints.load("c" * 64, "m" * 64)
        assert found is not None and found.position.step == 0
        leave_good_checkpoint(tmp_path)


def test_the_good_one_is_the_last_resort(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    checkpoints.vouch()
    for step in (1, 2):
        checkpoints.save(replace(PLACE, step=step), some(step))
    for name in (NAME, PREVIOUS):
        flip_in_the_values(tmp_path / FOLDER / name)
    found = checkpoints.load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 0


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path) -> None:
    learner = blob_learner()
    method = METHODS["dcn"](METHODS["dcn"].Settings.model_validate({"name": "dcn", "n_clusters": KINDS}), learner, 16)
    tensors = training_state(learner, method, torch.optim.SGD(learner.model.parameters(), 0.1))
    del tensors["method.convergence.looks"]
    with pytest.raises(ArtifactError, match=r"lacks 'convergence\.looks': another version"):
        Checkpoint(PLACE, tensors).restore(learner, method)


def test_a_model_that_is_not_finite_does_not_replace_one_that_is(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, [1])
    assert not checkpoints.save(replace(PLACE, step=1), some(float("nan")))
    found = checkpoints.load("c" * 64, "m" * 64)
    assert found is not None and found.position.step == 0


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_model_method_and_optimizer_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    settings = METHODS["idec"].Settings.model_validate(
        {"name": "idec", "n_clusters": KINDS, "optimizer": {"kind": kind, "lr": 0.01}}
    )

    def begun() -> tuple[Any, Stage, torch.optim.Optimizer]:
        method = METHODS["idec"](settings, blob_learner(), 20)
        stage = method.stages()[0]
        return method, stage, stage.optimizer.build(stage.parameters, stage.renewed)

    def step(stage: Stage, optimizer: torch.optim.Optimizer, n: int) -> float:
        stage.before_step(n)
        loss = stage.loss(torch.arange(20) + n)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    method, stage, optimizer = begun()
    stage.begin()
    for n in range(3):
        step(stage, optimizer, n)
    state = {key: value.clone() for key, value in training_state(method.learner, method, optimizer).items()}
    assert {key.partition(".")[0] for key in state} == {"model", "decoder", "method", "optimizer"}
    Checkpoints(tmp_path, 0, 100, print).save(PLACE, state)
    other, other_stage, other_optimizer = begun()
    found = Checkpoints(tmp_path, 0, 100, print).load("c" * 64, "m" * 64)
    assert found is not None
    found.restore(other.learner, other)
    found.restore_optimizer(other_optimizer)
    back = training_state(other.learner, other, other_optimizer)
    assert back.keys() == state.keys()
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in state.items())
    assert step(stage, optimizer, 3) == step(other_stage, other_optimizer, 3)


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(image_folder: Path, tmp_path: Path) -> None:
    if not small_disk.is_permitted(tmp_path):
        pytest.skip("no tmpfs in a namespace here")
    inner = [sys.executable, "-m", "tests.trainer.full_disk", str(tmp_path), str(image_folder)]
    mount = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, str(tmp_path), *inner], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "features.f32 cannot hold 40 MB of features: No space left on device" in found["features"]
    assert found["equal"] == [True, True, True] and found["halves"] == []
    about = [line for line in found["said"] if "checkpoint" in line]
    assert len(about) == 2, found["said"]
    assert about[0].startswith("no checkpoint at stage dec, step ") and "No space left on device" in about[0]
    assert "training goes on, the last one is of stage dec, step " in about[0] and "0 MB are free" in about[0]
    assert about[1].startswith("checkpoints can be saved again; this one is of stage dec, step ")
    assert "nothing could be saved (No space left on device" in found["stopped"]
    assert "goes back to stage dec, step " in found["stopped"]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a quota looks like: the disk has room, and a write fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow_is_told_as_a_full_disk_is(tmp_path: Path) -> None:
    progress = Listening()
    checkpoints = Checkpoints(tmp_path, 0, 100, progress.say)
    with files_of_at_most(20_000):
        assert not checkpoints.save(PLACE, some(1, 100_000)) and not checkpoints.save(PLACE, some(2, 100_000))
    assert len(progress.said) == 1 and "File too large" in progress.said[0]
    assert not list((tmp_path / FOLDER).iterdir())
    assert checkpoints.save(PLACE, some(3)) and len(progress.said) == 2


def test_a_line_of_the_log_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    append_metrics(tmp_path, {"stage": "a", "epoch": 0})
    with files_of_at_most(40), pytest.raises(OSError, match="No space|too large"):
        append_metrics(tmp_path, {"stage": "a", "epoch": 1})
    append_metrics(tmp_path, {"stage": "a", "epoch": 2})
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 2]


def test_a_log_that_cannot_be_written_stops_no_training(image_folder: Path, tmp_path: Path) -> None:
    class Narrow(Listening):
        """From the second epoch on the log may not grow; the rest of the run needs its files again."""

        limit = files_of_at_most(0)

        def stage(self, name: str, epochs: int, first: int) -> None:
            if name == "dec":
                self.limit.__enter__()

        def epoch(self, epoch: int, figures: dict[str, float]) -> None:
            if epoch == 1 and len(self.said) > 1 and "misses" in self.said[-1]:
                self.limit.__exit__(None, None, None)

    progress = Narrow()
    settings = dec(image_folder)
    train = settings.train.model_copy(update={"checkpoint_every_s": 1e6})
    fit(settings.model_copy(update={"train": train}), FitOptions(out=tmp_path, progress=progress))
    assert len([line for line in progress.said if "metrics.jsonl misses epochs from dec 1 on" in line]) == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["stage"] == "dec"] == [2]
