"""The one training loop of this repository: runs a stage, logs every epoch, saves checkpoints, stops on Ctrl-C. Called by fitting.py."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trainer import guards
from trainer.artifact import METRICS
from trainer.checkpoint import Checkpoint, Position, save_checkpoint
from trainer.errors import TrainerError
from trainer.learner import Learner
from trainer.methods import Method
from trainer.progress import Progress
from trainer.stage import Stage


class InterruptedTraining(TrainerError):  # noqa: N818 (it is not a fault of the training)
    """Ctrl-C; the checkpoint holds everything up to the last step."""


class Loop:
    """The one training loop. Sample order and dropout depend on (seed, stage, step) alone, so a resumed run repeats them."""

    def __init__(
        self,
        learner: Learner,
        method: Method,
        folder: Path,
        progress: Progress,
        checkpoint_every_s: float,
        origin: Position,
    ) -> None:
        self.learner, self.method, self.folder, self.progress = learner, method, folder, progress
        self.checkpoint_every_s, self.origin = checkpoint_every_s, origin
        self.saved_s = time.monotonic()
        self.interrupted = threading.Event()

    def run(self, number: int, stage: Stage, checkpoint: Checkpoint | None) -> None:
        """One stage, from its beginning or from a checkpoint inside it."""
        if checkpoint is None:
            torch.manual_seed(_mix(self.learner.seed, number, 0, 3))  # whatever the stage before has drawn, or not
            stage.begin()
        if stage.epochs == 0:
            return
        optimizer = stage.optimizer.build(stage.parameters, stage.renewed)
        steps = self._steps(stage)
        first = 0
        if checkpoint is not None:
            checkpoint.restore_optimizer(optimizer)
            first = checkpoint.position.step
        elif number:
            self._save(number, 0, optimizer)  # a stage that collapses leaves what it started from
        self.progress.stage(stage.name, stage.epochs, first // steps)
        for epoch in range(first // steps, stage.epochs):
            started_s = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = stage.optimizer.lr_at(epoch)
            loss = self._epoch(number, stage, optimizer, epoch, steps, first % steps if epoch == first // steps else 0)
            guards.check_finite(loss, stage.name, epoch)
            report = stage.after_epoch(epoch)
            figures = {
                "loss": loss,
                **report.figures,
                "lr": stage.optimizer.lr_at(epoch),
                "seconds": round(time.monotonic() - started_s, 3),
            }
            self._log(stage.name, epoch, figures)
            if report.stop:
                self.progress.say(f"{stage.name}: converged after {epoch + 1} epochs")
                break
            if time.monotonic() - self.saved_s >= self.checkpoint_every_s:
                self._save(number, (epoch + 1) * steps, optimizer)
        stage.end()

    def _steps(self, stage: Stage) -> int:
        """Steps per epoch."""
        return max(1, -(-len(self.learner) // stage.batch_size))

    def rewind_metrics(self, done: Sequence[Stage], current: Stage, step: int) -> float:
        """Drops the logged epochs that a run resumed at `step` of `current` repeats; returns the seconds of those that stay."""
        path, first = self.folder / METRICS, step // self._steps(current)
        names = {stage.name for stage in done}
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        kept = [row for row in rows if row["stage"] in names or (row["stage"] == current.name and row["epoch"] < first)]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        return float(sum(row.get("seconds", 0) for row in kept))

    def _epoch(
        self, number: int, stage: Stage, optimizer: torch.optim.Optimizer, epoch: int, steps: int, first: int
    ) -> float:
        """Runs steps `first` to `steps` of one epoch and returns their mean loss."""
        if first == 0:
            # A checkpoint at step 0 of an epoch is of the state before this hook: resumed, the epoch calls it again.
            self._leave_if_interrupted(number, stage, epoch * steps, optimizer)
            torch.manual_seed(_mix(self.learner.seed, number, epoch, 2))
            stage.before_epoch(epoch, optimizer)
        generator = torch.Generator().manual_seed(_mix(self.learner.seed, number, epoch))
        order = stage.order(generator) if stage.order else torch.randperm(len(self.learner), generator=generator)
        batches = order.to(self.learner.device).tensor_split(steps)
        for module in stage.modules:
            module.train()
        total = torch.zeros((), device=self.learner.device)
        for position in range(first, steps):
            step = epoch * steps + position
            if position > 0:
                self._leave_if_interrupted(number, stage, step, optimizer)
            torch.manual_seed(_mix(self.learner.seed, number, step, 1))
            stage.before_step(step)
            loss = stage.loss(batches[position])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            stage.after_step(batches[position])
            total += loss.detach()
        for module in stage.modules:
            module.eval()
        return float(total) / max(1, steps - first)

    def _leave_if_interrupted(self, number: int, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Saves what is needed to go on with `step`, and raises, where Ctrl-C was pressed."""
        if self.interrupted.is_set():
            self._save(number, step, optimizer)
            epoch = step // self._steps(stage) + 1
            raise InterruptedTraining(f"interrupted in stage {stage.name}, epoch {epoch}; the checkpoint is saved")

    def _log(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        append_metrics(self.folder, {"stage": stage, "epoch": epoch, **figures})
        self.progress.epoch(epoch, figures)

    def _save(self, number: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        position = dataclasses.replace(self.origin, stage=number, step=step)
        save_checkpoint(self.folder / "checkpoints", position, self.learner, self.method, optimizer)
        self.saved_s = time.monotonic()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first Ctrl-C ends the current step and saves; the second ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self.interrupted.is_set():
                raise KeyboardInterrupt
            self.interrupted.set()

        previous = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _mix(*numbers: int) -> int:
    """One seed from several numbers."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """One more line of metrics.jsonl."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
