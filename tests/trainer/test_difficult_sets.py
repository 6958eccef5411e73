"""Sets that break clustering code: every method gets through, or says which setting to change."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

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


def test_a_method_that_has_nothing_to_move_says_which_setting_is_missing(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", X=warped_blobs(per_kind=4)[0])
    save_file(SqueezeNet(1, ("fire9",)).state_dict(), tmp_path / "weights.safetensors")
    encoder = f"{{name: pretrained, weights: {tmp_path / 'weights.safetensors'}, layers: [fire2]}}"
    text = TEXT.format(path=tmp_path / "set.npz", method=method("dekm", 3)).replace(
        "{name: mlp, hidden: [16], dim: 6}", encoder
    )
    text = text.replace("{resize: none, color: gray}", "{height_px: 32, width_px: 32, color: gray}")
    with pytest.raises(
        DataError, match=r"method\.name is dekm, .* expected a trainable encoder, or projection\.learn: true"
    ):
        fit(load_text(TrainSettings, text, "frozen.yaml"), FitOptions(out=tmp_path / "run"))


@pytest.mark.parametrize("name", WILD)
def test_a_rate_that_throws_everything_together_is_stopped_by_a_guard(name: str, tmp_path: Path) -> None:
    images, kinds = warped_blobs(per_kind=32)
    np.savez(tmp_path / "set.npz", X=images, y=kinds)
    text = TEXT.format(path=tmp_path / "set.npz", method=f"{{name: {name}, n_clusters: 5, {WILD[name]}}}")
    with pytest.raises(CollapseError, match="guard"):
        fit(load_text(TrainSettings, text, "wild.yaml"), FitOptions(out=tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").is_file()
    assert not (tmp_path / "run" / "model.json").exists()
