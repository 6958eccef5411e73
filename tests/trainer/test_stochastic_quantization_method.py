from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import ConfigError, load_text
from tests.images import write_png
from tests.trainer.learning import KINDS, warped_blobs, write_blobs
from tests.trainer.test_lcc import labelled_learner
from trainer import FitOptions, Run, fit
from trainer.errors import CollapseError, DataError
from trainer.methods.stochastic_quantization import StochasticQuantization, StochasticQuantizationSettings
from trainer.projection import ProjectionSettings
from trainer.settings import TrainSettings


def method(labels: torch.Tensor | None = None, **settings: Any) -> StochasticQuantization:
    options = {"n_clusters": KINDS, "triplet": {"epochs": 3, "classes_per_batch": 5}, **settings}
    return StochasticQuantization(StochasticQuantizationSettings(**options), labelled_learner(labels), 40)


def settings_of(data: Path, method: str) -> TrainSettings:
    text = f"""
data: {{path: {data}}}
preprocess: {{resize: none, color: gray}}
encoder: {{name: mlp, hidden: [32], dim: 8}}
pretrain: {{kind: none}}
method: {method}
novelty: none
train: {{batch_size: 50, device: cpu}}
"""
    return load_text(TrainSettings, text, "quantization.yaml")


def fitted(data: Path, out: Path, method: str) -> Run:
    return fit(settings_of(data, method), FitOptions(out=out))


def test_clusters_of_labelled_blobs_are_their_classes(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "blobs.npz")
    run = fitted(
        data, tmp_path / "run", "{name: stochastic_quantization, n_clusters: 5, init: classes, triplet: {epochs: 10}}"
    )
    assert [row["name"] for row in run.info["clusters"]] == [str(k) for k in range(KINDS)]
    assert run.metrics["acc"] > 0.95


def test_a_tenth_of_the_labels_takes_as_many_steps_as_all_of_them(tmp_path: Path) -> None:
    all_of_them, a_tenth = method(), method(triplet={"epochs": 3, "classes_per_batch": 5, "labelled_share": 0.1})
    assert int((a_tenth.labels >= 0).sum()) == 20 and int((all_of_them.labels >= 0).sum()) == 200
    orders = [one.order(torch.Generator().manual_seed(0)) for one in (all_of_them, a_tenth)]
    assert len(orders[0]) == len(orders[1]) == 200
    assert bool((a_tenth.labels[orders[1]] >= 0).all())


def test_every_class_that_has_two_images_keeps_two_labels() -> None:
    one = method(triplet={"epochs": 1, "labelled_share": 0.001})
    assert torch.bincount(one.labels[one.labels >= 0]).tolist() == [2] * KINDS


def test_without_triplet_no_label_is_needed(tmp_path: Path) -> None:
    np.savez(tmp_path / "blobs.npz", X=warped_blobs()[0])
    run = fitted(
        tmp_path / "blobs.npz", tmp_path / "run", "{name: stochastic_quantization, n_clusters: 5, triplet: none}"
    )
    assert [row["name"] for row in run.info["clusters"]] == [f"cluster-{k}" for k in range(5)]
    with pytest.raises(DataError, match=r"data.path has 0 of them among the training images.*method.triplet: none"):
        fitted(tmp_path / "blobs.npz", tmp_path / "other", "{name: stochastic_quantization, n_clusters: 5}")


def test_without_triplet_it_is_near_k_means_on_the_same_embedding(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "blobs.npz")
    quantized = fitted(data, tmp_path / "a", "{name: stochastic_quantization, n_clusters: 5, triplet: none, passes: 5}")
    control = fitted(data, tmp_path / "b", "{name: ae_kmeans, n_clusters: 5}")
    images = warped_blobs()[0][..., None]

    def objective(run: Run) -> float:
        z = torch.from_numpy(run.model.transform(images))
        return float(run.model.assign(z)[1].square().mean())

    assert objective(quantized) < 1.1 * objective(control)


def test_clusters_that_no_class_dominates_are_called_unsure() -> None:
    one = method()
    mixed = torch.arange(200) % 4  # ids that have nothing to do with the classes
    assert one._majorities(mixed) == [-1] * KINDS
    one.owners = one._majorities(mixed)
    assert one.cluster_names()[0] == "unsure-1"  # type: ignore[index]
    assert "5 of 5 clusters have no class" in one.warnings()[0]
    by_class = one._majorities(one.labels)
    assert by_class == list(range(KINDS))


@pytest.mark.parametrize("labels", [torch.full((200,), -1), torch.zeros(200, dtype=torch.int64)])
def test_fewer_than_two_classes_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="expected at least 2"):
        method(labels)


def test_one_centroid_per_class_needs_as_many_clusters() -> None:
    with pytest.raises(DataError, match=r"method.n_clusters is 7 and the training images have 5 classes"):
        method(n_clusters=7, init="classes")
    with pytest.raises(ConfigError, match="init is classes with triplet none"):
        settings_of(Path("x.npz"), "{name: stochastic_quantization, n_clusters: 5, triplet: none, init: classes}")


def test_an_encoder_that_maps_all_to_one_point_stops_the_run() -> None:
    one = method()
    one.begin()
    one.after_epoch(0)
    with torch.no_grad():
        for p in one.learner.model.encoder.parameters():
            p.mul_(1e-4)
    with pytest.raises(CollapseError, match=r"guard spread.*method.triplet.margin"):
        one.after_epoch(1)


def test_images_outside_of_class_folders_are_quantized_but_teach_nothing(tmp_path: Path) -> None:
    images, kinds = warped_blobs(30)
    rows = []
    for n, (image, kind) in enumerate(zip(images, kinds, strict=True)):
        name = write_png(tmp_path / f"{n:03}.png", image).name
        rows.append(f"{name},{kind if n % 3 == 0 else ''}")
    (tmp_path / "parts.csv").write_text("file,label\n" + "\n".join(rows) + "\n")
    run = fitted(
        tmp_path / "parts.csv",
        tmp_path / "run",
        "{name: stochastic_quantization, n_clusters: 5, init: classes, triplet: {epochs: 10}}",
    )
    names = [row["name"] for row in run.info["clusters"]]
    assert names == [str(k) for k in range(KINDS)] and sum(row["n"] for row in run.info["clusters"]) == 150
    ids = run.model.predict(images[..., None])
    assert np.mean(ids == kinds) > 0.95
    with (tmp_path / "run" / "assignments.csv").open() as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    assert labels[:4] == ["0", "", "", "0"]


def test_a_cluster_without_labelled_images_has_no_class_even_if_nothing_is_asked_of_it() -> None:
    one = method(min_purity=0.0)
    ids = one.labels.clamp(max=3)  # nobody is in cluster 4
    assert one._majorities(ids)[-1] == -1


def test_a_first_step_below_nothing_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="rho0"):
        settings_of(Path("x.npz"), "{name: stochastic_quantization, n_clusters: 5, rho0: -1}")


@pytest.mark.parametrize("learn", [True, False])
def test_a_projection_that_learns_is_kept_and_another_is_fitted_to_what_was_learned(
    learn: bool, tmp_path: Path
) -> None:
    data = write_blobs(tmp_path / "blobs.npz")
    settings = settings_of(data, "{name: stochastic_quantization, n_clusters: 5, triplet: {epochs: 2}}")
    projection = ProjectionSettings(kind="pca", dim=4, learn=learn)
    run = fit(settings.model_copy(update={"projection": projection}), FitOptions(out=tmp_path / "run"))
    z = torch.from_numpy(run.model.transform(warped_blobs()[0][..., None]))
    covariance = torch.cov(z.T)
    off_diagonal = float((covariance - covariance.diag().diag()).abs().max() / covariance.diag().max())
    assert (off_diagonal < 1e-3) is not learn  # principal directions of the learned features have no correlation left
