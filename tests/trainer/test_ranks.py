"""Two processes learn what one does: real gloo processes, every method, and the parts that a batch shares."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs import load_text
from tests.ranks import run_on_ranks
from tests.trainer.learning import write_blobs
from tests.trainer.shapes import write_shapes
from tests.trainer.test_fitting import StopAfter
from trainer import FitOptions, fit, ranks
from trainer.augment import AugmentSettings, augment
from trainer.encoders.batch_norm import BatchNorm2d
from trainer.errors import DataError
from trainer.loop import InterruptedTraining, Loop
from trainer.methods import METHODS
from trainer.settings import TrainSettings

RUN = """
data: {{path: {path}}}
preprocess: {{resize: none}}
encoder: {encoder}
pretrain: {pretrain}
method: {method}
novelty: none
augment: {augment}
train: {{batch_size: 25, device: cpu}}
"""
CONV = "{name: conv, channels: [4, 6, 8], dim: 5}"
# Adam moves what has no gradient but rounding (a bias in front of a batch normalisation) by whole steps, this way or that.
SGD = "optimizer: {kind: sgd, lr: 0.01}"
SHORT = {
    "dec": "epochs: 1, refresh_steps: 2",
    "idec": "epochs: 1, init: spectral",
    "dcn": "epochs: 1",
    "dkm": "rounds: 1, epochs_per_alpha: 1",
    "centering": "epochs: 1, restarts: 1",
    "dekm": "epochs: 1, refresh_steps: 2",
    "deepcluster": "epochs: 1, pseudo_clusters: 8",
    "deepcluster_v2": "epochs: 1, pseudo_clusters: 8, projector: [16, 8], " + SGD,
    "deepcluster_mixture": "epochs: 1, spread: 0.1",
    "lcc": "epochs: 2, neighbours: 3",
    "stochastic_quantization": "triplet: {epochs: 1, classes_per_batch: 3}",
}


def settings_of(name: str, data: Path, cache: Path, **changes: str) -> TrainSettings:
    values = {
        "path": data,
        "encoder": CONV,
        "pretrain": f"{{epochs: 1, cache: {cache}}}",
        "augment": "{}",
        "method": f"{{name: {name}, n_clusters: 3, {SHORT.get(name, '')}}}",
    }
    text = RUN.format(**values | changes)
    return load_text(TrainSettings, text, f"{name}.yaml")


def learned(settings: TrainSettings, out: Path) -> dict[str, np.ndarray]:
    run = fit(settings, FitOptions(out=out))
    return {name: value.numpy().copy() for name, value in run.model.state_dict().items()}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shapes.npz", per_kind=41)


@pytest.fixture(scope="module")
def cache(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The autoencoder that all of them go on from."""
    folder = tmp_path_factory.mktemp("cache")
    learned(settings_of("ae_kmeans", shapes, folder), folder / "run")
    return folder


@pytest.mark.parametrize("name", list(METHODS))
def test_an_epoch_on_two_processes_ends_where_one_does(name: str, shapes: Path, cache: Path, tmp_path: Path) -> None:
    settings = settings_of(name, shapes, cache)
    alone = learned(settings, tmp_path / "alone")
    first, second = run_on_ranks(2, learned, settings, tmp_path / "together")
    assert np.abs(alone["centroids"] - first["centroids"]).max() <= 1e-4
    for key in alone:
        assert np.array_equal(first[key], second[key]), key
        assert np.allclose(alone[key], first[key], rtol=1e-3, atol=1e-4), key
    assert (tmp_path / "together" / "model.json").is_file()


@pytest.mark.parametrize("name", ["dec", "dekm", "deepcluster"])
def test_batch_normalisation_sees_the_whole_batch(name: str, shapes: Path, tmp_path: Path) -> None:
    changes = {
        "encoder": CONV.replace("}", ", batch_norm: true}"),
        "pretrain": "{kind: none}",
        "method": f"{{name: {name}, n_clusters: 3, {SHORT[name]}, {SGD}}}",
    }
    settings = settings_of(name, shapes, tmp_path, **changes)
    alone = learned(settings, tmp_path / "alone")
    first, _ = run_on_ranks(2, learned, settings, tmp_path / "together")
    for key in alone:
        assert np.allclose(alone[key], first[key], rtol=1e-3, atol=1e-4), key


def test_control_a_gradient_that_is_not_added_up_shows(shapes: Path, cache: Path, tmp_path: Path) -> None:
    settings = settings_of("idec", shapes, cache)
    alone = learned(settings, tmp_path / "alone")
    first, _ = run_on_ranks(2, learned_without_adding_up, settings, tmp_path / "together")
    assert np.abs(alone["centroids"] - first["centroids"]).max() > 1e-4


def learned_without_adding_up(settings: TrainSettings, out: Path) -> dict[str, np.ndarray]:
    before, Loop._shared = Loop._shared, lambda self, stage: []  # type: ignore[method-assign, assignment]
    try:
        return learned(settings, out)
    finally:
        Loop._shared = before  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["end_to_end", "layerwise"])
def test_pre_training_with_augmentation_ends_where_one_process_does(kind: str, tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "blobs.npz", per_kind=15)
    settings = settings_of(
        "ae_kmeans",
        data,
        tmp_path,
        encoder="{name: mlp, hidden: [12], dim: 4}",
        pretrain=f"{{kind: {kind}, epochs: 2, layer_epochs: 2}}",
        augment="{shift: 0.1, brightness: 0.2, contrast: 0.2, noise: 0.1}",
    )
    alone = learned(settings, tmp_path / "alone")
    first, _ = run_on_ranks(2, learned, settings, tmp_path / "together")
    for key in alone:
        assert np.allclose(alone[key], first[key], rtol=1e-3, atol=1e-4), key


def test_what_one_process_sees_differently_is_refused(shapes: Path, cache: Path, tmp_path: Path) -> None:
    settings = settings_of("ae_kmeans", shapes, cache)
    other = settings_of("ae_kmeans", write_shapes(tmp_path / "other.npz", per_kind=41, seed=1), cache)
    for text in run_on_ranks(2, refusal_of_each, [settings, other], tmp_path / "run"):
        assert re.match("the settings differs between processes: rank 0 has .*, rank 1 has", text)
    differs = "differs between processes: rank 0 has [0-9a-f]+, rank 1 has"
    changes: dict[str, object] = {"path": str(tmp_path / "other.npz")}
    for text in run_on_ranks(2, refusal_of_another_machine, settings, changes, tmp_path / "run2"):
        assert re.match(f"data.path .* {differs}", text)
    (tmp_path / "groups.csv").write_text("file,group\n" + "".join(f"shapes.npz[{n}],{n // 2}\n" for n in range(123)))
    changes = {"groups": str(tmp_path / "groups.csv")}
    for text in run_on_ranks(2, refusal_of_another_machine, settings, changes, tmp_path / "run3"):
        assert re.match(f"what the labels and data.groups say of the images {differs}", text)


def refusal_of_each(settings: list[TrainSettings], out: Path) -> str:
    return refusal_of(settings[ranks.current().index], out)


def refusal_of_another_machine(settings: TrainSettings, changes: dict[str, object], out: Path) -> str:
    """As on a machine whose files of the same names hold something else."""
    from trainer import fitting

    opened, together = fitting.open_images, ranks.current()
    machines = ranks._current.set(replace(together, local_index=0, local_count=1, machine=together.index))
    if together.index == 1:
        fitting.open_images = lambda data: opened(data.model_copy(update=changes))
    try:
        return refusal_of(settings, out)
    finally:
        fitting.open_images = opened
        ranks._current.reset(machines)


def test_a_run_goes_on_with_more_processes_though_one_machine_alone_counts_the_restart(
    shapes: Path, cache: Path, tmp_path: Path
) -> None:
    method = "{name: dec, n_clusters: 3, epochs: 2, tol: 0, refresh_steps: 2}"
    settings = settings_of("dec", shapes, cache, method=method)
    whole = learned(settings, tmp_path / "whole")
    with pytest.raises(InterruptedTraining):
        fit(settings, FitOptions(out=tmp_path / "cut", progress=StopAfter("dec", 0)))
    first, second = run_on_ranks(2, learned_after_a_restart, settings, tmp_path / "cut")
    for key in whole:
        assert np.array_equal(first[key], second[key]), key
        assert np.allclose(whole[key], first[key], rtol=1e-3, atol=1e-4), key


def learned_after_a_restart(settings: TrainSettings, out: Path) -> dict[str, np.ndarray]:
    if ranks.current().index == 1:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        return learned(settings, out)
    finally:
        os.environ.pop("TORCHELASTIC_RESTART_COUNT", None)


def test_an_error_of_the_first_process_is_everybody_s(shapes: Path, cache: Path, tmp_path: Path) -> None:
    settings = settings_of("ae_kmeans", shapes, cache)
    learned(settings, tmp_path / "run")
    found = run_on_ranks(2, refusal_of, settings, tmp_path / "run")
    assert found[0] == found[1] and "already holds a complete run" in found[0]


def refusal_of(settings: TrainSettings, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        learned(settings, out)
    return str(caught.value)


def test_rows_come_together_in_order_and_gradients_go_back_to_their_own() -> None:
    for (whole, gradient), expected in zip(run_on_ranks(2, assembled), ([0, 4, 16], [1, 9]), strict=True):
        assert whole.tolist() == [[10.0], [1.0], [12.0], [3.0], [14.0]]
        assert gradient[:, 0].tolist() == expected


def assembled() -> tuple[Tensor, Tensor]:
    own = ranks.current()
    index = torch.arange(5)
    positions = own.own(index)
    rows = (index[positions].float() + (10 if own.index == 0 else 0))[:, None].requires_grad_()
    whole = own.assemble(rows, positions, 5)
    (whole[:, 0] * index.square()).sum().backward()
    assert rows.grad is not None
    return whole.detach(), rows.grad


def test_batch_norm_over_two_processes_is_that_of_the_whole_batch() -> None:
    x, layer = batch_norm_case()
    layer(x).square().mean().backward()
    for found in run_on_ranks(2, normalised):
        for ours, theirs in zip(found, (layer.weight.grad, layer.running_mean, layer.running_var), strict=True):
            assert theirs is not None and torch.allclose(ours, theirs, atol=1e-5)


def batch_norm_case() -> tuple[Tensor, BatchNorm2d]:
    torch.manual_seed(3)
    x, layer = torch.randn(7, 4, 3, 3) * 3 + 2, BatchNorm2d(4)
    nn.init.uniform_(layer.weight)
    return x, layer.train()


def normalised() -> tuple[Tensor, ...]:
    own, (x, layer) = ranks.current(), batch_norm_case()
    positions = own.own(torch.arange(len(x)))
    whole = own.assemble(layer(x[positions]), positions, len(x))
    whole.square().mean().backward()
    own.total_gradients(list(layer.parameters()))
    assert layer.weight.grad is not None and layer.running_mean is not None and layer.running_var is not None
    return layer.weight.grad, layer.running_mean, layer.running_var


def test_augmentation_draws_for_the_whole_batch() -> None:
    settings = AugmentSettings(shift=0.2, rotate_deg=20, contrast=0.3, brightness=0.2, noise=0.1, flip="both")
    torch.manual_seed(5)
    x = torch.rand(9, 1, 6, 6)
    torch.manual_seed(6)
    whole = augment(x, settings)
    for found in run_on_ranks(2, augmented, x, settings):
        assert torch.allclose(found, whole, atol=1e-5)


def augmented(x: Tensor, settings: AugmentSettings) -> Tensor:
    own = ranks.current()
    positions = own.own(torch.arange(len(x)))
    torch.manual_seed(6)
    return own.assemble(augment(x[positions], settings, positions, len(x)), positions, len(x))


def test_a_parameter_that_nobody_moved_has_no_gradient_and_a_flag_reaches_all() -> None:
    assert run_on_ranks(2, totals) == [(3.0, True, True)] * 2


def totals() -> tuple[float, bool, bool]:
    own = ranks.current()
    moved, still = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    moved.grad = torch.tensor([1.0 + own.index])
    flag = own.total_gradients([moved, still], flag=own.index == 1)
    assert moved.grad is not None
    return float(moved.grad), still.grad is None, flag


def test_alone_nothing_is_put_together() -> None:
    own = ranks.current()
    x = torch.ones(2)
    assert (own.count, own.is_first, own.are_many) == (1, True, False)
    assert own.assemble(x, torch.arange(2), 2) is x and own.total(x) is x and own.same(lambda: 7) == 7
    assert replace(own, index=1, count=4).part(10) == slice(2, 5)
