"""Number formats of training batches: bfloat16 where asked, half precision with a scaled loss, float32 everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.learning import blob_learner
from tests.trainer.test_fitting import dec
from trainer import FitOptions, fit
from trainer.checkpoint import Checkpoints, Position, training_state
from trainer.errors import DataError
from trainer.methods import METHODS
from trainer.precision import Format, Precision
from trainer.settings import LoopSettings
from trainer.stage import OptimizerSettings

CPU = torch.device("cpu")
PLACE = Position(0, 0, "c" * 64, "m" * 64, "dec")


def stepped(precision: Precision, loss_factor: float) -> torch.Tensor:
    """A weight of 1 after one step at rate 1 against the gradient `loss_factor`."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = OptimizerSettings(kind="sgd", lr=1.0, momentum=0).build([weight])
    precision.backward((weight * loss_factor).sum())
    precision.step(optimizer)
    return weight.detach()


def scale(precision: Precision) -> float:
    return float(precision.state()["scale"])


def test_half_precision_on_a_cpu_is_refused_with_what_to_choose_instead(image_folder: Path, tmp_path: Path) -> None:
    settings = dec(image_folder, train=LoopSettings(precision="fp16", device="cpu"))
    with pytest.raises(DataError, match=r"train\.precision is fp16.*expected bf16"):
        fit(settings, FitOptions(tmp_path / "run"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_batches_are_rounded_and_full_passes_are_not(precision: Format) -> None:
    exact, rounded = blob_learner(), blob_learner(precision=precision)
    index = torch.arange(len(exact))
    found, right = rounded.latents(index), exact.latents(index)
    assert found.dtype is torch.float32
    assert not torch.equal(found, right)
    torch.testing.assert_close(found, right, rtol=0.05, atol=0.02)
    assert torch.equal(rounded.all_latents(), exact.all_latents())


def test_a_full_pass_as_trained_is_rounded_like_a_batch_and_follows_the_weights() -> None:
    learner = blob_learner(precision="bf16")
    first = learner.all_latents(as_trained=True)
    assert first.dtype is torch.float32
    torch.testing.assert_close(first, learner.latents(torch.arange(len(learner))).detach())
    assert not torch.equal(first, learner.all_latents())
    with torch.no_grad():
        for p in learner.model.encoder.parameters():
            p.mul_(1.5)
    assert not torch.allclose(learner.all_latents(as_trained=True), first, rtol=0.1)
    assert not torch.is_autocast_enabled("cpu")


def test_in_float32_a_pass_as_trained_is_the_full_pass() -> None:
    learner = blob_learner()
    assert torch.equal(learner.all_latents(as_trained=True), learner.all_latents())


def test_steps_are_the_optimizers_own_whatever_the_factor() -> None:
    assert stepped(Precision("fp32", CPU), 0.25).item() == 0.75
    assert stepped(Precision("bf16", CPU), 0.25).item() == 0.75
    assert stepped(Precision("fp16", CPU), 0.25).item() == 0.75


def test_a_gradient_too_small_for_half_precision_still_moves_the_weight() -> None:
    def moved(precision: Precision, with_scaling: bool) -> float:
        weight = torch.nn.Parameter(torch.zeros(1, 8))
        with precision.autocast():
            y = torch.nn.functional.linear(torch.ones(4, 8), weight)
        loss = y.float().sum() * 1e-9
        precision.backward(loss) if with_scaling else loss.backward()
        assert weight.grad is not None
        return float(weight.grad.abs().max())

    assert moved(Precision("fp16", CPU), with_scaling=False) == 0  # lost: what the scaling is for
    assert moved(Precision("fp16", CPU), with_scaling=True) > 0


def test_a_step_whose_gradient_overflows_is_left_out_and_the_factor_halved() -> None:
    precision = Precision("fp16", CPU)
    assert stepped(precision, 1.0).item() == 0
    before = scale(precision)
    assert stepped(precision, float("inf")).item() == 1  # not moved
    assert scale(precision) == before / 2
    assert not torch.isfinite(stepped(Precision("fp32", CPU), float("inf")))  # nothing hides it elsewhere


def test_the_factor_belongs_to_a_checkpoint(tmp_path: Path) -> None:
    learner = blob_learner(precision="fp16")
    method = METHODS["ae_kmeans"](METHODS["ae_kmeans"].Settings(name="ae_kmeans", n_clusters=5), learner, 32)
    stepped(learner.precision, float("inf"))
    optimizer = OptimizerSettings().build(list(learner.model.encoder.parameters()))
    checkpoints = Checkpoints(tmp_path, 0, 100, print)
    checkpoints.save(PLACE, training_state(learner, method, optimizer))
    fresh = blob_learner(precision="fp16")
    assert scale(fresh.precision) == 2 * scale(learner.precision)
    checkpoint = checkpoints.load(PLACE.config_sha256, PLACE.manifest_sha256)
    assert checkpoint is not None
    checkpoint.restore(fresh, method)
    assert fresh.precision.state() == learner.precision.state()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_formats_keep_nothing_in_a_checkpoint(precision: Format) -> None:
    found = Precision(precision, CPU)
    stepped(found, 1.0)
    assert found.state() == {}
    found.load_state({})
