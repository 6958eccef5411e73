"""The one training loop of this repository: runs a stage, logs every epoch, saves checkpoints, stops on Ctrl-C. Called by fitting.py."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from trainer import guards, ranks
from trainer.artifact import METRICS
from trainer.checkpoint import Checkpoint, Checkpoints, Position, training_state
from trainer.errors import TrainerError
from trainer.learner import Learner
from trainer.methods import Method
from trainer.out_of_memory import named_when_out_of_memory
from trainer.progress import Progress
from trainer.stage import Stage
from trainer.whole_file import write_whole


class InterruptedTraining(TrainerError):  # noqa: N818 (it is not a fault of the training)
    """Ctrl-C; the text says what the checkpoint holds."""


class Loop:
    """The one training loop. Sample order and dropout depend on (seed, stage, step) alone, so a resumed run repeats them."""

    def __init__(
        self,
        learner: Learner,
        method: Method,
        folder: Path,
        progress: Progress,
        checkpoints: Checkpoints,
        origin: Position,
    ) -> None:
        self.learner, self.method, self.folder, self.progress = learner, method, folder, progress
        self.checkpoints, self.origin = checkpoints, origin
        self._loss_sum = torch.zeros((), device=learner.device)  # of the epoch so far
        self._is_log_whole = True
        self._looks = 0  # of the method, as many as `_vouch` knows of
        self.interrupted = threading.Event()
        self.ranks = ranks.current()
        self._all_leave = False

    def run(self, number: int, stage: Stage, checkpoint: Checkpoint | None) -> None:
        """One stage, from its beginning or from a checkpoint inside it."""
        self._looks = self.method.looks
        if checkpoint is None:
            self._reseed(number, 0, 3)  # whatever the stage before has drawn, or not
            stage.begin()
        self.learner.spread()
        if stage.epochs == 0:
            return
        optimizer = stage.optimizer.build(stage.parameters, stage.renewed)
        steps = self._steps(stage)
        first = 0
        if checkpoint is not None:
            checkpoint.restore_optimizer(optimizer)
            first = checkpoint.position.step
            self._loss_sum.fill_(checkpoint.position.loss_sum)
        elif number:
            self._save(number, stage, 0, optimizer)  # a stage that collapses leaves what it started from
            self._vouch()  # of a stage that the guards watch: they measure by it
        self.progress.stage(stage.name, stage.epochs, first // steps)
        for epoch in range(first // steps, stage.epochs):
            started_s = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = stage.optimizer.lr_at(epoch)
            loss = self._epoch(number, stage, optimizer, epoch, steps, first % steps if epoch == first // steps else 0)
            guards.check_finite(loss, stage.name, epoch)
            report = stage.after_epoch(epoch)
            self._vouch()
            figures = {
                "loss": loss,
                **report.figures,
                "lr": stage.optimizer.lr_at(epoch),
                "seconds": round(time.monotonic() - started_s, 3),
            }
            self._log(stage.name, epoch, figures)
            if self.ranks.same(partial(bool, report.stop)):
                self.progress.say(f"{stage.name}: converged after {epoch + 1} epochs")
                break
            if self.checkpoints.are_due:
                self._save(number, stage, (epoch + 1) * steps, optimizer)
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
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        return float(sum(row.get("seconds", 0) for row in kept))

    def _epoch(
        self, number: int, stage: Stage, optimizer: torch.optim.Optimizer, epoch: int, steps: int, first: int
    ) -> float:
        """Runs steps `first` to `steps` of one epoch and returns their mean loss."""
        if first == 0:
            # A checkpoint at step 0 of an epoch is of the state before this hook: resumed, the epoch calls it again.
            self._leave_if_interrupted(number, stage, epoch * steps, optimizer)
            self._reseed(number, epoch, 2)
            self.learner.spread()
            stage.before_epoch(epoch, optimizer)
            self._loss_sum.zero_()
        generator = torch.Generator().manual_seed(_mix(self.learner.seed, number, epoch))
        order = stage.order(generator) if stage.order else torch.randperm(len(self.learner), generator=generator)
        batches = order.to(self.learner.device).tensor_split(steps)
        for module in stage.modules:
            module.train()
        shared = self._shared(stage)
        for position in range(first, steps):
            step = epoch * steps + position
            if position > 0:
                self._leave_if_interrupted(number, stage, step, optimizer)
                if position > first and self.checkpoints.are_due:
                    self._save(number, stage, step, optimizer)
            self._reseed(number, step, 1)
            stage.before_step(step)
            self._vouch()
            if position + 1 < steps:
                self.learner.announce(batches[position + 1])
            with named_when_out_of_memory(stage, optimizer, batches[position]):
                self._loss_sum += self._step(stage, optimizer, batches[position], shared)
            stage.after_step(batches[position])
        for module in stage.modules:
            module.eval()
        return float(self._loss_sum) / steps

    def _step(
        self, stage: Stage, optimizer: torch.optim.Optimizer, index: torch.Tensor, shared: list[torch.nn.Parameter]
    ) -> torch.Tensor:
        """One step with samples `index` (B,): its loss."""
        loss = stage.loss(index)
        optimizer.zero_grad(set_to_none=True)
        self.learner.precision.backward(loss)
        self._all_leave = self.ranks.total_gradients(shared, self.interrupted.is_set())
        self.learner.precision.step(optimizer)
        return loss.detach()

    def _reseed(self, *numbers: int) -> None:
        """What is drawn from here on depends on the run's seed and these numbers alone."""
        seed = _mix(self.learner.seed, *numbers)
        if self.learner.device.type == "cpu":
            # torch.manual_seed notes the caller for every kind of GPU, also where there is none: .4 ms of a step.
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)

    def _leave_if_interrupted(self, number: int, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Saves what is needed to go on with `step`, and raises, where Ctrl-C was pressed."""
        # Alone, at once; of several processes one may know a step earlier than another: all leave after the step that told them.
        if self._all_leave if self.ranks.are_many else self.interrupted.is_set():
            self._save(number, stage, step, optimizer)
            self.ranks.wait()  # where one process ends, torchrun ends the others, also one that still writes
            epoch = step // self._steps(stage) + 1
            raise InterruptedTraining(f"interrupted in stage {stage.name}, epoch {epoch}; {self.checkpoints.outcome}")

    def _shared(self, stage: Stage) -> list[torch.nn.Parameter]:
        """Of the stage's parameters, those whose gradients the processes add up."""
        shared = {id(p) for p in self.learner.shared_parameters}
        return [p for p in (*stage.parameters, *stage.renewed) if id(p) in shared]

    def _log(self, stage: str, epoch: int, figures: dict[str, float]) -> None:
        if self.ranks.is_first:
            try:
                append_metrics(self.folder, {"stage": stage, "epoch": epoch, **figures})
            except OSError as error:
                if self._is_log_whole:
                    self.progress.say(
                        f"{self.folder / METRICS} misses epochs from {stage} {epoch + 1} on: {error.strerror}"
                    )
                self._is_log_whole = False
        self.progress.epoch(epoch, figures)

    def _save(self, number: int, stage: Stage, step: int, optimizer: torch.optim.Optimizer) -> None:
        """What is needed to go on with `step`; where it cannot be saved, that is said."""
        if self.ranks.is_first:
            position = dataclasses.replace(
                self.origin, stage=number, step=step, name=stage.name, loss_sum=float(self._loss_sum)
            )
            self.checkpoints.save(position, training_state(self.learner, self.method, optimizer))

    def _vouch(self) -> None:
        """Where the guards have just looked, the last checkpoint is good."""
        if self.method.looks > self._looks:
            self._looks = self.method.looks
            if self.ranks.is_first:
                self.checkpoints.vouch()

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
    """One more line of metrics.jsonl, or an OSError and no part of it."""
    line = (json.dumps(row) + "\n").encode()
    with (folder / METRICS).open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if file.write(line) < len(line):
            file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
