"""Sets that break clustering code: every method gets through, or says which setting to change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs import ConfigError, load_text
from tests.trainer.learning import warped_blobs
from tests.trainer.test_methods import EXTRA
from trainer import FitOptions, Run, fit
from trainer.encoders.pretrained import SqueezeNet
from trainer.errors import CollapseError, DataError
from trainer.methods import METHODS
from trainer.settings import TrainSettings

TEXT = """
data: {{path: {path}}}
preprocess: {{resize: none, color: gray}}
encoder: {{name: mlp, hidden: [16], dim: 6}}
pretrain: {{epochs: 3}}
method: {method}
novelty: none
train: {{batch_size: 32, device: cpu}}
"""


def method(name: str, n_clusters: int) -> str:
    text = EXTRA.get(name, f"{{name: {name}, n_clusters: 3}}")
    return re.sub(r"n_clusters: \d+", f"n_clusters: {n_clusters}", text)


def fitted(images: np.ndarray, name: str, n_clusters: int, folder: Path) -> Run:
    # Classes that have nothing to do with the images: the worst that a supervised method can be given.
    np.savez(folder / "set.npz", X=images, **({"y": np.arange(len(images)) % 2} if METHODS[name].is_supervised else {}))
    text = TEXT.format(path=folder / "set.npz", method=method(name, n_clusters))
    return fit(load_text(TrainSettings, text, "set.yaml"), FitOptions(out=folder / "run"))


def is_finite(run: Run) -> bool:
    return all(np.isfinite(value.numpy()).all() for value in run.model.state_dict().values())


@pytest.mark.parametrize("name", METHODS)
def test_whole_batches_a_class_of_copies_and_a_constant_column(name: str, tmp_path: Path) -> None:
    images, kinds = warped_blobs(per_kind=32)  # 64 of them: two whole batches
    images = images[kinds < 2].copy()
    images[:32] = images[0]
    images[:, :, 3] = 200
    assert is_finite(fitted(images, name, 2, tmp_path))


@pytest.mark.parametrize("name", METHODS)
def test_fewer_images_than_a_batch(name: str, tmp_path: Path) -> None:
    assert is_finite(fitted(warped_blobs(per_kind=5)[0], name, 5, tmp_path))


FINDS_CLUSTERS = [name for name in METHODS if METHODS[name].finds_clusters]


@pytest.mark.parametrize("name", FINDS_CLUSTERS)
def test_a_limit_of_clusters_may_be_more_than_there_are_images_and_they_may_be_all_alike(
    name: str, tmp_path: Path
) -> None:
    images = warped_blobs(per_kind=1)[0]
    assert is_finite(fitted(np.repeat(images[:1], 50, 0), name, 60, tmp_path))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FINDS_CLUSTERS])
def test_more_clusters_than_images_or_than_different_images_names_the_setting(name: str, tmp_path: Path) -> None:
    images = warped_blobs(per_kind=1)[0]
    with pytest.raises(DataError, match=r"method\.n_clusters is 6, but there are 5 training images"):
        fitted(images, name, 6, tmp_path)
    with pytest.raises(DataError, match=r"method\.n_clusters is 3, but the 50 images have only 1 different"):
        fitted(np.repeat(images[:1], 50, 0), name, 3, tmp_path)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FINDS_CLUSTERS])
def test_one_cluster_is_for_the_control(name: str) -> None:
    text = TEXT.format(path="x.npz", method=method(name, 1))
    if name == "ae_kmeans":
        assert load_text(TrainSettings, text, "one.yaml").method.n_clusters == 1
    else:
        with pytest.raises(
            ConfigError, match=r"one\.yaml:6 method\.n_clusters is 1, expected greater than or equal to 2"
        ):
            load_text(TrainSettings, text, "one.yaml")


WILD = {
    "dec": "epochs: 30, optimizer: {kind: sgd, lr: 1000}",
    "idec": "epochs: 30, optimizer: {kind: sgd, lr: 10000}",
    "dcn": "epochs: 30, optimizer: {kind: sgd, lr: 10000}",
    "dkm": "rounds: 6, optimizer: {kind: sgd, lr: 10000}",
    "centering": "epochs: 30, optimizer: {kind: sgd, lr: 10000}",
    "dekm": "epochs: 30, refresh_steps: 3, optimizer: {kind: sgd, lr: 10000}",
    "deepcluster": "epochs: 30, pseudo_clusters: 20, optimizer: {kind: sgd, lr: 1.0e+9}",
    "deepcluster_v2": "epochs: 30, pseudo_clusters: 20, optimizer: {kind: sgd, lr: 1.0e+12}",
    "deepcluster_mixture": "epochs: 30, relabel_every_epochs: 1, optimizer: {kind: sgd, lr: 1.0e+9}",
    "lcc": "epochs: 30, optimizer: {kind: sgd, lr: 1.0e+12}",
    "stochastic_quantization": "triplet: {epochs: 30}, optimizer: {kind: sgd, lr: 1.0e+12}",
}


def test_identical_images_that_embed_in_batches_of_different_size_are_still_one(tmp_path: Path) -> None:
    # 257 of them: the last batch of one goes another way through the matrix product and differs in the last digit.
    with pytest.raises(DataError, match=r"method\.n_clusters is 2, but the 257 images have only 1 different"):
        fitted(np.repeat(warped_blobs(per_kind=1)[0][:1], 257, 0), "ae_kmeans", 2, tmp_path)


def on_pretrained_features(folder: Path, name: str, trainable: bool) -> Run:
    """A SqueezeNet of random weights, cut short."""
    torch.manual_seed(0)
    np.savez(folder / "set.npz", X=warped_blobs(per_kind=4)[0])
    save_file(SqueezeNet(1, ("fire9",)).state_dict(), folder / "weights.safetensors")
    encoder = (
        f"{{name: pretrained, weights: {folder / 'weights.safetensors'}, layers: [fire2], trainable: {trainable}}}"
    )
    text = TEXT.format(path=folder / "set.npz", method=f"{{name: {name}, n_clusters: 3, epochs: 2}}")
    text = text.replace("{name: mlp, hidden: [16], dim: 6}", encoder).replace(
        "pretrain: {epochs: 3}", "pretrain: {kind: none}"
    )
    text = text.replace("{resize: none, color: gray}", "{height_px: 32, width_px: 32, color: gray}")
    return fit(load_text(TrainSettings, text, "features.yaml"), FitOptions(out=folder / "run"))


def test_a_method_that_has_nothing_to_move_says_which_setting_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"method\.name is dekm, .* expected a trainable encoder, or projection\.learn: true"
    ):
        on_pretrained_features(tmp_path, "dekm", trainable=False)


def test_dec_on_frozen_features_says_that_it_moved_only_centroids(tmp_path: Path) -> None:
    run = on_pretrained_features(tmp_path, "dec", trainable=False)
    assert ["method dec moved only the centroids" in text for text in run.info["train"]["warnings"]] == [True]


@pytest.mark.parametrize("name", ["dec", "dekm"])
def test_pretrained_features_are_fine_tuned(name: str, tmp_path: Path) -> None:
    run = on_pretrained_features(tmp_path, name, trainable=True)
    before, after = load_file(tmp_path / "weights.safetensors"), run.model.encoder.state_dict()
    assert not run.info["train"]["warnings"]
    assert not torch.equal(after["trunk.features.0.weight"], before["features.0.weight"])
    assert torch.equal(
        after["trunk.features.12.squeeze.bias"], before["features.12.squeeze.bias"]
    )  # behind the layer that is used


ONE_STEP = {
    "dec": "epochs: 1",
    "idec": "epochs: 1",
    "dcn": "epochs: 1",
    "dkm": "rounds: 1, epochs_per_alpha: 1",
    "centering": "epochs: 1",
    "dekm": "epochs: 1",
}


def fit_blobs(text: str, folder: Path, is_resumed: bool = False) -> Run:
    images, kinds = warped_blobs(per_kind=32)
    np.savez(folder / "set.npz", X=images, y=kinds)
    settings = load_text(TrainSettings, text.replace("PATH", str(folder / "set.npz")), "wild.yaml")
    return fit(settings, FitOptions(out=folder / "run", resume=is_resumed))


def with_method(method: str, batch_size: int = 32) -> str:
    return TEXT.format(path="PATH", method=method).replace("batch_size: 32", f"batch_size: {batch_size}")


@pytest.mark.parametrize("lr", ["1.0e+12", "1.0e+30"])  # of the first, embeddings are finite and their squares are not
@pytest.mark.parametrize("name", ONE_STEP)
def test_a_last_step_that_explodes_is_stopped_though_its_loss_was_finite(name: str, lr: str, tmp_path: Path) -> None:
    method = f"{{name: {name}, n_clusters: 5, {ONE_STEP[name]}, optimizer: {{kind: sgd, lr: {lr}}}}}"
    with pytest.raises(
        CollapseError, match=r"guard nan: .* not finite.*lower the learning rate \(.*method\.optimizer\.lr"
    ):
        fit_blobs(with_method(method, batch_size=160), tmp_path)


@pytest.mark.parametrize("lr", ["1.0e+12", "1.0e+30"])
@pytest.mark.parametrize("name", ["ae_kmeans", "smoothed_kmeans", "dec"])
def test_a_pre_training_whose_last_step_explodes_is_not_blamed_on_the_images(
    name: str, lr: str, tmp_path: Path
) -> None:
    text = with_method(f"{{name: {name}, n_clusters: 5}}", batch_size=160)
    text = text.replace("{epochs: 3}", f"{{epochs: 1, optimizer: {{kind: sgd, lr: {lr}}}}}")
    with pytest.raises(CollapseError, match=r"guard nan: .*pretrain\.optimizer\.lr"):
        fit_blobs(text, tmp_path)


def test_what_collapses_after_the_last_refresh_is_seen_as_well(tmp_path: Path) -> None:
    method = "{name: dec, n_clusters: 5, epochs: 1, refresh_steps: 100, optimizer: {kind: sgd, lr: 30}}"
    with pytest.raises(CollapseError, match=r"guard n_eff: .* of 5 clusters"):
        fit_blobs(with_method(method, batch_size=16), tmp_path)
    assert not (tmp_path / "run" / "model.json").exists()


def test_after_a_collapse_the_checkpoint_that_stays_is_one_that_a_guard_found_sound_however_often_it_is_resumed(
    tmp_path: Path,
) -> None:
    method = "{name: dkm, n_clusters: 5, rounds: 6, clustering_weight: 1.0e+6, optimizer: {kind: adam, lr: 0.05}}"
    text = with_method(method, batch_size=16).replace("device: cpu", "device: cpu, checkpoint_every_s: 0")
    for is_resumed in (False, True, True):
        with pytest.raises(CollapseError, match="guard spread"):
            fit_blobs(text, tmp_path, is_resumed)
        with safe_open(tmp_path / "run" / "checkpoints" / "last.safetensors", "pt") as file:
            place = json.loads(file.metadata()["position"])
        assert (place["name"], place["step"]) == ("dkm", 0)  # its first look, five epochs on, found the collapse


def nearly_all_alike(folder: Path, name: str, seed: int = 0, copies: int = 98) -> Run:
    """All images but two are one, with three clusters for three different pictures."""
    images = warped_blobs(per_kind=1)[0]
    np.savez(folder / "set.npz", X=np.concatenate([np.repeat(images[:1], copies, 0), images[1:3]]))
    extra = {"dkm": ", rounds: 2, epochs_per_alpha: 1", "smoothed_kmeans": "", "ae_kmeans": ""}.get(name, ", epochs: 2")
    text = TEXT.format(path=folder / "set.npz", method=f"{{name: {name}, n_clusters: 3{extra}}}")
    text = text.replace("device: cpu", f"device: cpu, seed: {seed}")
    return fit(load_text(TrainSettings, text, "alike.yaml"), FitOptions(out=folder / "run"))


@pytest.mark.parametrize("copies", [98, 500])
@pytest.mark.parametrize("name", ["ae_kmeans", *ONE_STEP])
def test_a_set_of_mostly_one_kind_is_no_collapse(name: str, copies: int, tmp_path: Path) -> None:
    run = nearly_all_alike(tmp_path, name, copies=copies)
    assert sorted(cluster["n"] for cluster in run.clusters) == [1, 1, copies]


def test_parts_too_alike_to_hold_some_out_leave_the_agreement_unknown_and_the_run_whole(tmp_path: Path) -> None:
    run = nearly_all_alike(tmp_path, "smoothed_kmeans", seed=4)  # which holds one of the two others out
    assert "agreement" not in run.metrics and "held no parts out" in run.info["train"]["warnings"][0]


@pytest.mark.parametrize("name", WILD)
def test_a_rate_that_throws_everything_together_is_stopped_by_a_guard(name: str, tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match="guard"):
        fit_blobs(with_method(f"{{name: {name}, n_clusters: 5, {WILD[name]}}}"), tmp_path)
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").is_file()
    assert not (tmp_path / "run" / "model.json").exists()
