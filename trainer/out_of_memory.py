"""Names the batch size that would fit, where a training step runs out of memory.

One process tries halves of the batch until a step fits and extrapolates from what that one took: a failed step never shows its whole
need. Several processes cannot try, because a step waits for the others; there the need is taken as twice what was seen.
"""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer import ranks
from trainer.errors import TrainerError
from trainer.stage import Stage

SHARE = 0.9  # of what is free: the allocator cannot use every piece


@dataclass(frozen=True)
class Need:
    """What a step with `batch` samples took, in bytes, beside what stays (model, optimizer, images)."""

    batch: int
    peak_bytes: int


def batch_that_fits(need: Need, free_bytes: int, failed: int) -> int:
    """The largest batch size below `failed` whose step fits into `free_bytes`, a multiple of 8 where there is one; 0: none does.

    The need is taken as proportional to the batch, which is too much where a part of it is not: then the answer is on the safe side.
    """
    size = min(int(SHARE * free_bytes * need.batch / max(1, need.peak_bytes)), failed - 1)
    return size - size % 8 if size >= 8 else max(0, size)


@contextlib.contextmanager
def named_when_out_of_memory(stage: Stage, optimizer: torch.optim.Optimizer, index: Tensor) -> Iterator[None]:
    """A step of `stage` with samples `index` (B,); the model is of no use after an error, the checkpoint is.

    Raises:
        TrainerError: there is too little memory for it; the text names the batch size that would fit.
    """
    try:
        yield
        return
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        seen = torch.cuda.memory_allocated(index.device) if index.device.type == "cuda" else 0
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        traceback.clear_frames(error.__traceback__)  # they hold what did not fit
    optimizer.zero_grad(set_to_none=True)
    together, n = ranks.current(), len(index)
    # Every process takes its own samples of the batch.
    size = _guessed(n, seen, index.device)
    if not together.are_many:
        with contextlib.suppress(ValueError, RuntimeError):  # a loss that does not take fewer samples
            size = _tried(stage, optimizer, index)
    advice = (
        f"a batch of {size} would fit: start again with --set train.batch_size={size} (it is part of what is learned, so --resume refuses it)"
        if size
        else "not even a batch of 2 would fit: use smaller images (preprocess) or a smaller encoder, or train.device: cpu"
    )
    text = f" ({asked[0].lower()})" if asked else ""
    raise TrainerError(f"out of memory in stage {stage.name} with a batch of {n}{text}; {advice}")


def _tried(stage: Stage, optimizer: torch.optim.Optimizer, index: Tensor) -> int:
    """By trying halves."""
    n = len(index)
    while (n := n // 2) >= 2:
        free = _free_bytes(optimizer, index.device)
        peak = _try(stage, index[:n])
        optimizer.zero_grad(set_to_none=True)
        if peak is not None:
            return n if free is None else max(n, batch_that_fits(Need(n, peak), free, len(index)))
    return 0


def _try(stage: Stage, index: Tensor) -> int | None:
    """Bytes that a step takes at its peak beside what is there before it (0 where nobody counts); None: too many."""
    counted = index.device.type == "cuda"
    if counted:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(index.device)
    before = torch.cuda.memory_allocated(index.device) if counted else 0
    try:
        stage.loss(index).backward()
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return None
    return torch.cuda.max_memory_allocated(index.device) - before if counted else 0


def _guessed(failed: int, seen_bytes: int, device: torch.device) -> int:
    """Without trying, from what was allocated when the step failed."""
    if device.type != "cuda":
        return failed // 2
    need = Need(failed, 2 * max(1, seen_bytes - torch.cuda.memory_allocated(device)))
    return min(failed // 2, batch_that_fits(need, _free_bytes(None, device) or 0, failed))


def _free_bytes(optimizer: torch.optim.Optimizer | None, device: torch.device) -> int | None:
    """What this process can still get on the device; None where nobody counts."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Adam's two moments are there after the first step only.
    later = (
        0
        if optimizer is None or optimizer.state
        else 2 * sum(p.nbytes for g in optimizer.param_groups for p in g["params"])
    )
    return free + cached - later


def _is_out_of_memory(error: RuntimeError) -> bool:
    """A GPU has an error of its own for it, a CPU does not."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
