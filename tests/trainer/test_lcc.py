from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import load_text
from tests.trainer.learning import KINDS, blob_learner, warped_blobs, write_blobs
from tests.trainer.test_fitting import StopAfter
from trainer import FitOptions, Run, fit
from trainer.errors import DataError
from trainer.learner import Supervision
from trainer.loop import InterruptedTraining
from trainer.methods import METHODS
from trainer.methods.ae_kmeans import AEKMeansSettings
from trainer.methods.lcc import LCC, LCCSettings, shipped_communities
from trainer.projection import ProjectionSettings
from trainer.settings import TrainSettings

CLASSES = tuple("abcde")


def labelled_learner(labels: torch.Tensor | None = None, per_kind: int = 40) -> Any:
    learner = blob_learner(per_kind)
    kinds = torch.from_numpy(warped_blobs(per_kind)[1])
    learner.supervision = Supervision(kinds if labels is None else labels, CLASSES)
    return learner


def method(labels: torch.Tensor | None = None, **settings: Any) -> LCC:
    return LCC(LCCSettings(**{"warmup_epochs": 0, **settings}), labelled_learner(labels), 40)


def started(one: LCC, epoch: int = 0) -> LCC:
    one.before_epoch(epoch, one.settings.optimizer.build(one.parameters()))
    return one


def fit_blobs(data: Path, out: Path, **settings: Any) -> Run:
    options = {"name": "lcc", "epochs": 10, "optimizer": "{kind: adam, lr: 0.005}", **settings}
    inner = ", ".join(f"{key}: {value}" for key, value in options.items())
    text = f"""
data: {{path: {data}}}
preprocess: {{resize: none, color: gray}}
encoder: {{name: mlp, hidden: [32], dim: 8}}
pretrain: {{kind: none}}
method: {{{inner}}}
novelty: none
train: {{batch_size: 50, device: cpu}}
"""
    return fit(load_text(TrainSettings, text, "lcc.yaml"), FitOptions(out=out))


def test_clusters_are_named_by_the_class_that_owns_them_and_predict_it(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "blobs.npz")
    run = fit_blobs(data, tmp_path / "run")
    owners = [row["name"].split("-")[0] for row in run.info["clusters"]]
    assert set(owners) == {str(k) for k in range(KINDS)}
    fresh, truth = warped_blobs(per_kind=80)
    ids = run.model.predict(fresh[..., None])
    assert np.mean([owners[k] == str(kind) for k, kind in zip(ids, truth, strict=True)]) > 0.95


def test_planted_mislabels_come_first_in_the_list_for_review(tmp_path: Path) -> None:
    images, kinds = warped_blobs(60)
    planted = [3, 70, 130, 200]
    swapped = kinds.copy()
    swapped[planted] = (kinds[planted] + 1) % KINDS
    np.savez(tmp_path / "blobs.npz", X=images, y=swapped)
    fit_blobs(tmp_path / "blobs.npz", tmp_path / "run", epochs=4)
    with (tmp_path / "run" / "review.csv").open() as file:
        rows = list(csv.DictReader(file))
    listed = [int(row["file"].split("[")[1].rstrip("]")) for row in rows]
    assert set(planted) <= set(listed) and len(listed) < 12
    assert f"labelled {swapped[3]}, lies among {kinds[3]}" in [row["reason"] for row in rows]


def test_the_log_of_communities_tells_the_share_of_well_placed_images_of_each_class(tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "blobs.npz")
    fit_blobs(data, tmp_path / "run", epochs=3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "communities.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]  # one epoch of warm-up
    classes = rows[-1]["layers"][0]["classes"]
    assert list(classes) == [str(k) for k in range(KINDS)]
    assert all(entry["n"] == 80 and 0 <= entry["well_placed"] <= 1 for entry in classes.values())


def test_before_the_warm_up_is_over_the_loss_is_the_cross_entropy_alone() -> None:
    one = started(method(warmup_epochs=2), epoch=1)
    index = torch.arange(30)
    expected = torch.nn.functional.cross_entropy(one.head(one.learner.features(index)), one.y[index])
    assert not one.banks and one.loss(index).item() == pytest.approx(expected.item())
    assert started(one, epoch=2).banks


def test_the_pull_is_added_with_its_weight_and_held_below_its_limit() -> None:
    swapped = torch.from_numpy(warped_blobs(40)[1])
    swapped[:6] = 1
    free, held = (started(method(swapped, weight=100.0, max_pull=limit)) for limit in (1e9, 0.5))
    index = torch.arange(40)
    cross_entropy = torch.nn.functional.cross_entropy(free.head(free.learner.features(index)), free.y[index]).item()
    assert free.loss(index).item() > cross_entropy + 1.0
    assert cross_entropy < held.loss(index).item() < free.loss(index).item() / 2


@pytest.mark.parametrize("arm", ["cross_entropy", "same_class", "lcc"])
def test_the_arms_differ_in_what_they_pull(arm: str) -> None:
    one = started(method(arm=arm))
    pulled = int(one.banks[0].pulled.sum()) if one.banks else 0
    assert {"cross_entropy": pulled == 0, "same_class": pulled == 200, "lcc": pulled < 100}[arm]


def test_images_without_a_class_count_in_neither_loss() -> None:
    labels = torch.from_numpy(warped_blobs(40)[1])
    labels[::2] = -1
    one = method(labels)
    assert one.loss(torch.arange(0, 40, 2)).item() == 0.0
    assert one.loss(torch.arange(1, 41, 2)).item() > 0.5
    started(one)
    assert bool(torch.isfinite(one.loss(torch.arange(40))))


def test_several_layers_have_a_bank_each() -> None:
    one = started(method(layers=("layers.0", "features")))
    assert [bank.classes[0].z.shape[1] for bank in one.banks] == [16, 6]
    one.loss(torch.arange(40)).backward()
    assert one.learner.model.encoder.layers[0].weight.grad is not None


@pytest.mark.parametrize("labels", [torch.full((200,), -1), torch.zeros(200, dtype=torch.int64)])
def test_without_two_classes_the_setting_is_named(labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"method.name is lcc.*data.path has [01] of them"):
        method(labels)


def test_a_folder_without_classes_is_refused_by_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "blobs.npz", X=warped_blobs()[0])
    with pytest.raises(DataError, match="one folder per class"):
        fit_blobs(tmp_path / "blobs.npz", tmp_path / "run")


def test_a_class_of_one_image_owns_nothing_and_is_said_to(tmp_path: Path) -> None:
    images, kinds = warped_blobs(40)
    kinds[0] = KINDS
    np.savez(tmp_path / "blobs.npz", X=images, y=kinds)
    run = fit_blobs(tmp_path / "blobs.npz", tmp_path / "run", epochs=2)
    assert any("1 of 6 classes own no community" in text and "5" in text for text in run.info["train"]["warnings"])


def test_an_unsupervised_method_never_sees_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}
    for name in ("ae_kmeans", "lcc"):
        original = METHODS[name].init_centroids

        def spy(self: Any, original: Any = original) -> None:
            seen[self.settings.name] = self.learner.supervision is not None
            original(self)

        monkeypatch.setattr(METHODS[name], "init_centroids", spy)
    data = write_blobs(tmp_path / "blobs.npz")
    settings = fit_blobs(data, tmp_path / "lcc", epochs=1).settings
    control = AEKMeansSettings(n_clusters=KINDS, n_init=1)
    fit(settings.model_copy(update={"method": control}), FitOptions(out=tmp_path / "control"))
    assert seen == {"lcc": True, "ae_kmeans": False}


def test_every_class_ships_its_largest_community_before_any_ships_a_second() -> None:
    counts, owners = torch.tensor([50, 40, 4, 0, 30, 3]), torch.tensor([0, 0, 1, -1, 2, 2])
    assert shipped_communities(counts, owners, most=10, min_correct=5).tolist() == [0, 4, 2, 1]
    assert shipped_communities(counts, owners, most=3, min_correct=5).tolist() == [0, 4, 2]
    assert shipped_communities(counts, owners, most=2, min_correct=5).tolist() == [0, 4]


def test_fewer_clusters_than_classes_are_said_to_leave_some_out(tmp_path: Path) -> None:
    run = fit_blobs(write_blobs(tmp_path / "blobs.npz"), tmp_path / "run", epochs=2, n_clusters=3)
    (text,) = [text for text in run.info["train"]["warnings"] if "method.n_clusters" in text]
    assert run.model.n_clusters == 3 and "method.n_clusters is 3, fewer than there are classes" in text


def test_a_few_images_are_enough_whatever_the_limit_of_clusters_is(tmp_path: Path) -> None:
    run = fit_blobs(write_blobs(tmp_path / "blobs.npz", per_kind=8), tmp_path / "run", epochs=8)
    assert run.settings.method.n_clusters == 100 and KINDS <= run.model.n_clusters <= 40


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_resumed_run_ends_as_an_uninterrupted_one_and_logs_every_clustering_once(epoch: int, tmp_path: Path) -> None:
    data = write_blobs(tmp_path / "blobs.npz")
    options: dict[str, Any] = {"epochs": 5, "every_epochs": 2, "weight": 1.0}
    whole = fit_blobs(data, tmp_path / "whole", **options)
    with pytest.raises(InterruptedTraining):
        fit(whole.settings, FitOptions(out=tmp_path / "cut", progress=StopAfter("lcc", epoch)))
    # As after kill -9: the log is further than the checkpoint.
    log = tmp_path / "cut" / "communities.jsonl"
    ahead = (tmp_path / "whole" / "communities.jsonl").read_text()
    log.write_text(ahead)
    resumed = fit(whole.settings, FitOptions(out=tmp_path / "cut", resume=True))
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert log.read_text() == ahead


def test_a_projection_that_would_learn_is_refused() -> None:
    learner = labelled_learner()
    learner.model.projection.settings = ProjectionSettings(kind="pca", dim=4, learn=True)
    with pytest.raises(DataError, match="projection.learn is true, but method lcc"):
        LCC(LCCSettings(), learner, 40)


def test_settings_that_cannot_be_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        LCCSettings(resolution=-1.0)
    with pytest.raises(DataError, match="method.layers names 'layers'"):
        method(layers=("layers",))


@pytest.mark.parametrize("fits", [True, False])
def test_communities_that_fit_no_class_are_said_to_be_worth_little(fits: bool) -> None:
    one = method()
    one.owners, one._fits = list(range(KINDS)), fits
    assert bool(one.warnings()) is not fits
