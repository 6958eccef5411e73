"""One contract for every method: fit tiny, predict, export, the same ids in onnxruntime. New methods are found here by themselves."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import load_text
from edge_dkm import Inspector
from exporters.export import export_run
from tests.conftest import TINY
from tests.trainer.test_autoencoder import stages
from tests.trainer.test_fitting import StopAfter
from trainer import FitOptions, Run, fit, load_run
from trainer.loop import InterruptedTraining
from trainer.methods import METHODS
from trainer.settings import TrainSettings

EXTRA = {
    "dec": "{name: dec, n_clusters: 3, n_init: 3, epochs: 2, optimizer: {kind: adam, lr: 0.001}}",
    "idec": "{name: idec, n_clusters: 3, n_init: 3, epochs: 2}",
    "dcn": "{name: dcn, n_clusters: 3, n_init: 3, epochs: 2, kmeans_every_epochs: 2}",
    "centering": "{name: centering, n_clusters: 3, n_init: 3, epochs: 2, restarts: 1}",
    "dekm": "{name: dekm, n_clusters: 3, n_init: 3, epochs: 2, refresh_steps: 2}",
    "deepcluster": "{name: deepcluster, n_clusters: 3, n_init: 3, epochs: 2, pseudo_clusters: 8}",
    "deepcluster_v2": "{name: deepcluster_v2, n_clusters: 3, n_init: 3, epochs: 2, pseudo_clusters: 8, projector: [16, 8]}",
    "deepcluster_mixture": "{name: deepcluster_mixture, n_clusters: 6, epochs: 3, relabel_every_epochs: 1, spread: 0.1}",
    "lcc": "{name: lcc, n_clusters: 3, epochs: 3, neighbours: 3, optimizer: {kind: adam, lr: 0.01}}",
    "stochastic_quantization": "{name: stochastic_quantization, n_clusters: 3, triplet: {epochs: 2, classes_per_batch: 3}}",
    "dkm": "{name: dkm, n_clusters: 3, n_init: 3, rounds: 2, epochs_per_alpha: 1}",
}


def images_of(folder: Path) -> list[np.ndarray]:
    return [image for path in sorted(folder.rglob("*.png")) if (image := cv2.imread(str(path))) is not None]


def fitted(name: str, image_folder: Path, out: Path, pretrain: str = "pretrain: {epochs: 3}") -> Run:
    text = TINY.format(path=image_folder).replace(
        "{name: ae_kmeans, n_clusters: 3, n_init: 3}", EXTRA.get(name, f"{{name: {name}, n_clusters: 3}}")
    )
    text = text.replace("pretrain: {epochs: 3}", pretrain)
    return fit(load_text(TrainSettings, text, f"{name}.yaml", None), FitOptions(out=out))


@pytest.mark.parametrize("name", list(METHODS))
def test_ids_of_the_exported_graph_equal_predict(name: str, image_folder: Path, tmp_path: Path) -> None:
    run = fitted(name, image_folder, tmp_path / "run")
    assert run.settings.method.name == name
    images = images_of(image_folder)
    ids = run.model.predict(images)
    assert len(set(ids.tolist())) == 3
    path = tmp_path / "part.onnx"
    export_run(load_run(tmp_path / "run"), path)
    with Inspector(path) as inspector:
        answers = [inspector.inspect(image) for image in images]
    assert [a.cluster.id for a in answers] == ids.tolist()
    assert np.allclose(
        [a.distance for a in answers],
        run.model.assign(run.model.embed_dataset(_pixels(run, images)))[1].numpy(),
        rtol=1e-4,
        atol=1e-4,
    )


def _pixels(run: Run, images: list[np.ndarray]):  # type: ignore[no-untyped-def]
    import torch

    return torch.cat([run.model.preprocess.geometry(torch.from_numpy(image)[None]) for image in images])


@pytest.mark.parametrize("name", list(METHODS))
def test_the_same_seed_gives_equal_arrays(name: str, image_folder: Path, tmp_path: Path) -> None:
    first, second = (fitted(name, image_folder, tmp_path / side) for side in "ab")
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {"ae_kmeans", "smoothed_kmeans"}])
def test_a_run_that_was_interrupted_in_its_method_ends_as_an_uninterrupted_one(
    name: str, image_folder: Path, tmp_path: Path
) -> None:
    whole = fitted(name, image_folder, tmp_path / "whole")
    settings = whole.settings
    with pytest.raises(InterruptedTraining, match=f"stage {name}"):
        fit(settings, FitOptions(out=tmp_path / "cut", progress=StopAfter(name, 0)))
    resumed = fit(settings, FitOptions(out=tmp_path / "cut", resume=True))
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


@pytest.mark.parametrize("name", [name for name in METHODS if name not in {"ae_kmeans", "smoothed_kmeans"}])
def test_what_comes_before_the_method_does_not_change_it(name: str, image_folder: Path, tmp_path: Path) -> None:
    cache = f"pretrain: {{epochs: 3, cache: {tmp_path / 'cache'}}}\naugment: {{noise: 0.3}}"
    first, second = (fitted(name, image_folder, tmp_path / side, cache) for side in "ab")
    assert {*stages(first)} - {*stages(second)} == {"reconstruct"}  # the second took what the first had learned
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(METHODS))
def test_a_run_of_a_gpu_gives_the_same_ids_on_a_cpu(name: str, image_folder: Path, tmp_path: Path) -> None:
    text = (
        TINY.format(path=image_folder)
        .replace("device: cpu", "device: cuda")
        .replace("{name: ae_kmeans, n_clusters: 3, n_init: 3}", EXTRA.get(name, f"{{name: {name}, n_clusters: 3}}"))
    )
    run = fit(load_text(TrainSettings, text, f"{name}.yaml"), FitOptions(out=tmp_path / "run"))
    images = images_of(image_folder)
    ids = run.model.predict(images)
    export_run(load_run(tmp_path / "run"), tmp_path / "part.onnx")
    with Inspector(tmp_path / "part.onnx") as inspector:
        assert [inspector.inspect(image).cluster.id for image in images] == ids.tolist()
