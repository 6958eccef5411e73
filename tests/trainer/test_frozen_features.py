from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from configs import load_text
from trainer import FitOptions, Run, fit
from trainer.encoders.pretrained import SqueezeNet
from trainer.settings import TrainSettings

TEXT = """
data: {{path: {path}}}
preprocess: {{height_px: 32, width_px: 32, normalise: imagenet}}
encoder: {encoder}
projection: {{kind: pca, dim: 6, sqrt: true}}
pretrain: {{epochs: 2, cache: {cache}}}
method: {{name: ae_kmeans, n_clusters: 3, n_init: 3}}
novelty: none
train: {{batch_size: 16, device: cpu, seed: {seed}}}
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with torchvision's names."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(SqueezeNet(3, ("fire9",)).state_dict(), path)
    return path


def fitted(images: Path, weights: Path, folder: Path, seed: int = 0, layers: str = "[fire2, fire9]") -> Run:
    encoder = f"{{name: pretrained, weights: {weights}, layers: {layers}}}"
    text = TEXT.format(path=images, encoder=encoder, cache=folder.parent / "cache", seed=seed)
    return fit(load_text(TrainSettings, text, "frozen.yaml"), FitOptions(out=folder))


def test_the_cache_gives_the_same_run_and_is_looked_up_by_what_decides_the_features(
    image_folder: Path, weights: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    first = fitted(image_folder, weights, tmp_path / "a")
    assert len(list(cache.iterdir())) == 1
    stamp = next(cache.iterdir()).stat().st_mtime_ns
    again = fitted(image_folder, weights, tmp_path / "b")
    fitted(image_folder, weights, tmp_path / "c", seed=1)
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [stamp]  # nothing was computed again
    assert all(
        np.array_equal(x.numpy(), y.numpy())
        for x, y in zip(first.model.state_dict().values(), again.model.state_dict().values(), strict=True)
    )
    fitted(image_folder, weights, tmp_path / "d", layers="[fire2]")
    assert len(list(cache.iterdir())) == 2


def test_other_weights_under_the_same_name_are_other_features(
    image_folder: Path, weights: Path, tmp_path: Path
) -> None:
    import shutil

    own = Path(shutil.copy(weights, tmp_path / "own.safetensors"))
    first = fitted(image_folder, own, tmp_path / "a")
    torch.manual_seed(1)
    save_file(SqueezeNet(3, ("fire9",)).state_dict(), own)
    second = fitted(image_folder, own, tmp_path / "b")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not torch.equal(first.model.centroids, second.model.centroids)


def test_a_damaged_file_is_computed_again(image_folder: Path, weights: Path, tmp_path: Path) -> None:
    first = fitted(image_folder, weights, tmp_path / "a")
    path = next((tmp_path / "cache").iterdir())
    path.write_bytes(path.read_bytes()[:50])
    again = fitted(image_folder, weights, tmp_path / "b")
    assert torch.equal(first.model.centroids, again.model.centroids) and path.stat().st_size > 50


def test_the_run_answers_as_its_frozen_features_did(image_folder: Path, weights: Path, tmp_path: Path) -> None:
    import cv2

    run = fitted(image_folder, weights, tmp_path / "a")
    rows = [line.split(",") for line in (tmp_path / "a" / "assignments.csv").read_text().splitlines()[1:]]
    images = [cv2.imread(str(image_folder / row[0])) for row in rows]
    assert run.model.predict(images).tolist() == [int(row[3]) for row in rows]
