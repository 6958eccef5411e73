from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import run_on_ranks
from tests.trainer.test_fitting import dec
from trainer import FitOptions, fit
from trainer.checkpoint import has_checkpoint
from trainer.errors import TrainerError
from trainer.methods import METHODS
from trainer.out_of_memory import Need, batch_that_fits, named_when_out_of_memory
from trainer.stage import OptimizerSettings, Stage

GB = 10**9


@pytest.mark.parametrize(
    ("need", "free", "failed", "expected"),
    [
        (Need(128, 4 * GB), 10 * GB, 512, 288),  # 9 GB of the 10, at 1/32 GB each
        (Need(128, 4 * GB), 100 * GB, 256, 248),  # never the one that has failed
        (Need(2, 4 * GB), 10 * GB, 4, 3),  # below 8, as it is
        (Need(2, 4 * GB), 1 * GB, 4, 0),
        (Need(64, 0), 1 * GB, 128, 120),  # a step that took nothing
    ],
)
def test_the_batch_that_fits_by_hand(need: Need, free: int, failed: int, expected: int) -> None:
    assert batch_that_fits(need, free, failed) == expected


class Narrow:
    """A loss that has room for so many samples only, as a GPU would say it; or asks a CPU for more than any has."""

    def __init__(self, room: int, is_gpu: bool = True) -> None:
        self.weight, self.room, self.is_gpu = nn.Parameter(torch.ones(1)), room, is_gpu
        self.seen: list[int] = []

    def __call__(self, index: Tensor) -> Tensor:
        self.seen.append(len(index))
        if len(index) > self.room:
            if self.is_gpu:
                raise torch.OutOfMemoryError(
                    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a capacity of 8"
                )
            torch.empty(1 << 60, dtype=torch.uint8)
        return (self.weight * index.float()).sum()

    def step(self, n: int) -> None:
        """As the loop takes one."""
        stage = Stage("dec", 1, n, OptimizerSettings(), [self.weight], self)
        optimizer = stage.optimizer.build(stage.parameters)
        with named_when_out_of_memory(stage, optimizer, torch.arange(n)):
            self(torch.arange(n)).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("is_gpu", [True, False])
def test_the_error_names_a_batch_that_was_tried(is_gpu: bool) -> None:
    loss = Narrow(40, is_gpu)
    with pytest.raises(TrainerError) as caught:
        loss.step(256)
    assert loss.seen == [256, 128, 64, 32]
    text = str(caught.value)
    assert text.startswith("out of memory in stage dec with a batch of 256 (tried to allocate ")
    assert "a batch of 32 would fit: start again with --set train.batch_size=32" in text
    loss.step(32)  # it does


def test_where_not_even_two_fit_it_says_what_else_there_is() -> None:
    with pytest.raises(TrainerError, match="not even a batch of 2 would fit: use smaller images"):
        Narrow(1).step(16)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        Failing(40).step(8)


class Failing(Narrow):
    """Fails in another way, above `room` for want of memory."""

    def __call__(self, index: Tensor) -> Tensor:
        if len(index) > self.room:
            return super().__call__(index)
        raise RuntimeError("a shape that does not fit")


def test_a_loss_that_cannot_be_tried_with_fewer_samples_gets_half_of_them() -> None:
    with pytest.raises(TrainerError, match="a batch of 50 would fit"):
        Failing(80).step(100)


def test_a_fit_that_runs_out_of_memory_names_a_batch_with_which_it_runs(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = METHODS["dec"].loss

    def narrow(self: Any, index: Tensor) -> Tensor:
        if len(index) > 10:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a capacity of 1 GiB"
            )
        return whole(self, index)  # type: ignore[no-any-return]

    monkeypatch.setattr(METHODS["dec"], "loss", narrow)
    settings = dec(image_folder)
    with pytest.raises(
        TrainerError, match=r"stage dec with a batch of 15 .tried to allocate 20.00 mib.; a batch of 7 would"
    ):
        fit(settings, FitOptions(out=tmp_path / "wide"))
    assert has_checkpoint(tmp_path / "wide")
    fitting = settings.train.model_copy(update={"batch_size": 7})
    fit(settings.model_copy(update={"train": fitting}), FitOptions(out=tmp_path / "narrow"))


def fail_together() -> tuple[list[int], str]:
    loss = Narrow(0)
    try:
        loss.step(64)
    except TrainerError as error:
        return loss.seen, str(error)
    return loss.seen, ""


@pytest.mark.slow  # starts processes
def test_one_of_several_processes_does_not_try_for_it_would_wait_for_the_others() -> None:
    for seen, text in run_on_ranks(2, fail_together):
        assert seen == [64] and "a batch of 32 would fit" in text


@pytest.mark.gpu
def test_on_a_gpu_the_batch_that_is_named_fits_and_is_not_far_below_what_would() -> None:
    share = torch.cuda.mem_get_info()[0] // 400  # values: a hundredth of what is free
    weight = nn.Parameter(torch.ones(1, device="cuda"))

    def loss(index: Tensor) -> Tensor:
        return (weight * torch.ones(len(index), share, device="cuda")).square().mean()

    stage = Stage("dec", 1, 256, OptimizerSettings(), [weight], loss)
    optimizer = stage.optimizer.build(stage.parameters)
    index = torch.arange(256, device="cuda")
    with pytest.raises(TrainerError, match="a batch of") as caught, named_when_out_of_memory(stage, optimizer, index):
        loss(index).backward()
    named = int(str(caught.value).partition("a batch of 256")[2].partition("a batch of ")[2].split()[0])
    optimizer.zero_grad()
    loss(index[:named]).backward()
    torch.cuda.empty_cache()
    with pytest.raises(torch.OutOfMemoryError):
        loss(index[: 2 * named]).backward()
