"""The number format of training batches: float32, bfloat16, or half precision with a scaled loss. Losses, distances and heads stay float32.

Source: Micikevicius et al., "Mixed precision training", 2017, arXiv 1710.03740. Half precision loses gradients below 6e-8, so the loss is
multiplied by a factor that doubles every 2,000 steps and is halved, the step left out, when a gradient overflows. bfloat16 has the range
of float32 and needs none of it. The factor and the steps since it last changed belong to a checkpoint.
"""

from __future__ import annotations

import contextlib
from typing import Literal

import torch
from torch import Tensor

from trainer.errors import DataError

Format = Literal["fp32", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: Format, device: torch.device) -> None:
    """Raises DataError where the device has no such arithmetic."""
    if precision == "fp16" and device.type == "cpu":
        raise DataError(
            "train.precision is fp16, which is for a GPU, but training runs on a CPU; expected bf16 (half the time where the "
            "processor has it) or fp32"
        )


class Precision:
    """`autocast` is entered around encoder and decoder; `backward` and `step` take the places of the loss' and the optimizer's own."""

    def __init__(self, precision: Format, device: torch.device) -> None:
        self._type, self._dtype = device.type, DTYPES.get(precision)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The format of training batches."""
        return contextlib.nullcontext() if self._dtype is None else torch.autocast(self._type, self._dtype)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled where the format asks for it."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step by those gradients; none where one of them overflowed."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Tensor]:
        """The factor and its age, as a checkpoint keeps them; empty where there is none."""
        found = self._scaler.state_dict()
        return {key: torch.tensor(float(found[key]), dtype=torch.float64) for key in _KEPT if key in found}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""
        if state:
            kept = {"scale": float(state["scale"]), "_growth_tracker": int(state["_growth_tracker"])}
            self._scaler.load_state_dict(self._scaler.state_dict() | kept)


_KEPT = ("scale", "_growth_tracker")  # of a GradScaler's state; the rest are constants
