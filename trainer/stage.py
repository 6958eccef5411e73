"""One stage of training: what is minimised, over which parameters, for how long. The loop in loop.py runs a list of them.

Pre-training, annealing and clustering are stages, not loops of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from configs import Settings


class OptimizerSettings(Settings):
    """`lr` is multiplied by `decay` every `decay_every_epochs` (0: never). SGD's learning rate belongs to the mean-reduced losses used here."""

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = Field(1e-3, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    decay: float = Field(0.1, gt=0, le=1)
    decay_every_epochs: int = Field(0, ge=0)

    def build(self, parameters: list[nn.Parameter], renewed: list[nn.Parameter] | None = None) -> torch.optim.Optimizer:
        """An optimizer over `parameters`; SGD moves the `renewed` ones, which start anew now and then, without momentum."""
        if self.kind == "adam":
            # fused: one pass over memory instead of four; the parameters of small encoders are what a CPU waits for.
            return torch.optim.Adam(
                [*parameters, *(renewed or [])], self.lr, weight_decay=self.weight_decay, fused=True
            )
        groups: list[dict[str, Any]] = [{"params": parameters}]
        groups += [{"params": renewed, "momentum": 0.0}] if renewed else []
        return torch.optim.SGD(groups, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)

    def lr_at(self, epoch: int) -> float:
        """The learning rate in `epoch` (from 0)."""
        return self.lr * self.decay ** (epoch // self.decay_every_epochs) if self.decay_every_epochs else self.lr


@dataclass(frozen=True)
class EpochReport:
    """What a stage says at an epoch's end: figures for the log, and whether it has converged."""

    figures: dict[str, float] = field(default_factory=dict)
    stop: bool = False


FIGURE = "figure."


def figures_state(figures: dict[str, float]) -> dict[str, Tensor]:
    """The log's figures as a checkpoint keeps them: an epoch that is resumed shows what an uninterrupted one would."""
    return {f"{FIGURE}{key}": torch.tensor(value, dtype=torch.float64) for key, value in figures.items()}


def figures_of(state: dict[str, Tensor]) -> dict[str, float]:
    """What `figures_state` was given."""
    return {key.removeprefix(FIGURE): float(value) for key, value in state.items() if key.startswith(FIGURE)}


def _nothing() -> None: ...


def _no_step(step: int) -> None: ...


def _no_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None: ...


def _no_batch(index: Tensor) -> None: ...


def _go_on(epoch: int) -> EpochReport:
    return EpochReport()


@dataclass(frozen=True)
class Stage:
    """`loss(index)` of training samples `index` (B,) is all that is mandatory; the hooks have plain defaults.

    `begin` runs once when the stage starts, not when it is resumed; `before_step(step)` before every step, counted from 0 over the
    stage; `after_step(index)` after it, with the step's samples; `after_epoch(epoch)` may stop the stage; `end` runs after
    the last epoch. `modules` are put into training mode. `before_epoch(epoch, optimizer)` runs first in every epoch, `order(generator)`
    then says which samples (M,) it shows, in which order (None: all, shuffled), and is split into as many batches as ever. `renewed`
    are further parameters, which `before_epoch` may start anew.
    """

    name: str
    epochs: int
    batch_size: int
    optimizer: OptimizerSettings
    parameters: list[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    modules: list[nn.Module] = field(default_factory=list)
    begin: Callable[[], None] = _nothing
    before_step: Callable[[int], None] = _no_step
    after_step: Callable[[Tensor], None] = _no_batch
    after_epoch: Callable[[int], EpochReport] = _go_on
    end: Callable[[], None] = _nothing
    before_epoch: Callable[[int, torch.optim.Optimizer], None] = _no_epoch
    order: Callable[[torch.Generator], Tensor] | None = None
    renewed: list[nn.Parameter] = field(default_factory=list)
