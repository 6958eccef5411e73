from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from tests.trainer.learning import blob_learner
from tests.trainer.shapes import fit_shapes, write_shapes
from trainer import FitOptions, fit
from trainer.errors import CollapseError, DataError
from trainer.feature_store import FeatureStore
from trainer.loop import InterruptedTraining
from trainer.methods.deepcluster import DeepCluster, DeepClusterSettings, merged, whitened
from trainer.methods.pseudo_label import LOG, check_distinct_features
from trainer.projection import ProjectionSettings

AUGMENT = "augment: {shift: 0.1, flip: horizontal, brightness: 0.3}"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "shapes.npz")


def traced(run_folder: Path, data: Path) -> list[float]:
    truth = np.load(data)["y"]
    files = sorted((run_folder / LOG).glob("*.npy"))
    return [float(normalized_mutual_info_score(truth, np.load(file))) for file in files]


def test_pseudo_labels_come_closer_to_the_truth_than_clusters_of_random_features(shapes: Path, tmp_path: Path) -> None:
    method = "{name: deepcluster, n_clusters: 3, n_init: 3, pseudo_clusters: 30, pca_dim: 16, epochs: 10}"
    run = fit_shapes(shapes, tmp_path / "run", method, AUGMENT)
    nmi = traced(tmp_path / "run", shapes)
    assert len(nmi) == 10 and nmi[-1] > nmi[0] + 0.05
    control = fit_shapes(shapes, tmp_path / "control", "{name: ae_kmeans, n_clusters: 3, n_init: 3}")
    assert run.metrics["nmi"] > control.metrics["nmi"] + 0.05


def test_with_a_learning_rate_of_nearly_nothing_nothing_is_gained(shapes: Path, tmp_path: Path) -> None:
    method = "{name: deepcluster, n_clusters: 3, n_init: 3, pseudo_clusters: 30, pca_dim: 16, epochs: 4, optimizer: {kind: sgd, lr: 1.0e-9}}"
    fit_shapes(shapes, tmp_path / "run", method, AUGMENT)
    nmi = traced(tmp_path / "run", shapes)
    assert max(nmi[1:]) < nmi[0] + 0.04


def learner_method(**settings: object) -> DeepCluster:
    learner = blob_learner()
    return DeepCluster(
        DeepClusterSettings(n_clusters=5, **{"pseudo_clusters": 8, "n_init": 2, **settings}), learner, 20
    )  # type: ignore[arg-type]


def test_a_new_clustering_starts_the_head_and_its_optimizer_anew() -> None:
    method = learner_method()
    optimizer = method.settings.optimizer.build(method.parameters(), method.renewed())
    method.before_epoch(0, optimizer)
    first = method.head.linear.weight.detach().clone()
    method.loss(torch.arange(20)).backward()
    optimizer.step()
    assert not torch.equal(method.head.linear.weight, first)
    encoder_momentum = [
        value["momentum_buffer"].clone()
        for value in optimizer.state.values()
        if value.get("momentum_buffer") is not None
    ]
    method.before_epoch(1, optimizer)
    assert method.head.linear.weight.abs().max().item() < 0.06 and not method.head.linear.bias.any()
    kept = [value["momentum_buffer"] for value in optimizer.state.values() if value.get("momentum_buffer") is not None]
    assert kept and all(torch.equal(a, b) for a, b in zip(encoder_momentum, kept, strict=True))


def test_between_two_clusterings_labels_and_head_stay() -> None:
    method = learner_method(relabel_every_epochs=3, stop_relabel_epoch=5)
    assert [epoch for epoch in range(12) if method.is_due(epoch)] == [0, 3]
    optimizer = method.settings.optimizer.build(method.parameters(), method.renewed())
    method.before_epoch(0, optimizer)
    labels, head = method.ids, method.head.linear.weight.detach().clone()
    method.before_epoch(1, optimizer)
    assert method.ids is labels and torch.equal(method.head.linear.weight, head)


def test_members_of_a_small_cluster_join_the_nearest_that_is_large_enough() -> None:
    mu = torch.tensor([[0.0], [1.0], [1.4], [9.0]])
    labels = torch.tensor([0] * 5 + [1] + [2] + [3] * 5)
    # Cluster 2 is nearest to cluster 1, which is too small itself: both go to cluster 0.
    assert merged(labels, mu, smallest=3).tolist() == [0] * 7 + [3] * 5
    assert merged(labels, mu, smallest=1).tolist() == labels.tolist()
    assert merged(labels, mu, smallest=100).tolist() == labels.tolist()


def test_whitened_features_have_unit_length_and_equal_variance_in_all_directions() -> None:
    torch.manual_seed(0)
    features = torch.randn(4000, 6) * torch.tensor([10.0, 5.0, 1.0, 0.5, 0.1, 0.0]) + 3
    store = FeatureStore(4000, 6)
    store.write(torch.arange(4000), features)
    z = whitened(store, 5)
    assert z.shape == (4000, 5) and torch.allclose(z.norm(dim=1), torch.ones(4000), atol=1e-5)
    assert torch.allclose(z.var(0), torch.full((5,), 0.2), atol=0.02)
    assert bool(whitened(store, 6).isfinite().all())  # a direction without variance is not divided by nothing


def test_more_pseudo_clusters_than_half_the_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"method.pseudo_clusters is 80, but there are 100 training images"):
        learner_method(pseudo_clusters=80)


def test_labels_that_have_merged_stop_the_run() -> None:
    method = learner_method()
    with pytest.raises(CollapseError, match=r"guard filled.*pseudo-clusters of epoch 1 are as good as 1.0"):
        method.note(torch.zeros(100, dtype=torch.int64), 8, 0, {})
    method.note(torch.arange(100) % 8, 8, 0, {})  # evenly filled: no word


def test_the_log_says_how_much_the_labels_still_move() -> None:
    method = learner_method()
    method.note(torch.arange(100) % 8, 8, 0, {})
    assert "nmi_previous" not in method.after_epoch(0).figures
    method.note((torch.arange(100) + 1) % 8, 8, 1, {})
    assert method.after_epoch(1).figures["nmi_previous"] == pytest.approx(1.0)  # the same groups under other numbers
    method.note(torch.arange(100) // 13, 8, 2, {})
    assert method.after_epoch(2).figures["nmi_previous"] < 0.5


@pytest.mark.parametrize("where", ["relabel", "loss"])
def test_ctrl_c_in_the_middle_of_an_epoch_loses_nothing(
    where: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "{name: deepcluster, n_clusters: 3, n_init: 1, pseudo_clusters: 12, pca_dim: 8, epochs: 3}"
    whole = fit_shapes(shapes, tmp_path / "whole", method, AUGMENT)
    calls, original = [0], getattr(DeepCluster, where)

    def pressing(self: DeepCluster, *arguments: object) -> object:
        calls[0] += 1
        if calls[0] == {"relabel": 2, "loss": 14}[where]:  # ten steps per epoch: the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(DeepCluster, where, pressing)
        with pytest.raises(InterruptedTraining, match="stage deepcluster, epoch 2"):
            fit_shapes(shapes, tmp_path / "cut", method, AUGMENT)
    resumed = fit(whole.settings, FitOptions(out=tmp_path / "cut", resume=True))
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert traced(tmp_path / "whole", shapes) == traced(tmp_path / "cut", shapes)


def test_features_that_collapse_stop_the_run_and_blame_the_training() -> None:
    method = learner_method()
    optimizer = method.settings.optimizer.build(method.parameters(), method.renewed())
    method.before_epoch(0, optimizer)
    with torch.no_grad():
        method.learner.model.encoder.layers[-1].weight.mul_(1e-4)  # type: ignore[union-attr, operator, index]
    with pytest.raises(CollapseError, match="guard spread"):
        method.before_epoch(1, optimizer)


@pytest.mark.parametrize(("epoch", "error"), [(0, DataError), (3, CollapseError)])
def test_fewer_different_features_than_pseudo_clusters_name_the_setting(epoch: int, error: type[Exception]) -> None:
    z = torch.arange(6.0).repeat(10)[:, None]
    check_distinct_features(z, 6, epoch)
    with pytest.raises(error, match=r"only 6 different features"):
        check_distinct_features(z, 7, epoch)


def test_a_frozen_encoder_and_a_projection_that_would_learn_are_refused() -> None:
    learner = blob_learner()
    learner.model.encoder.is_trainable = False
    with pytest.raises(DataError, match="encoder mlp is frozen; expected a trainable encoder"):
        DeepCluster(DeepClusterSettings(n_clusters=5, pseudo_clusters=8), learner, 20)
    learner = blob_learner()
    learner.model.projection.settings = ProjectionSettings(kind="pca", dim=4, learn=True)
    with pytest.raises(DataError, match="projection.learn is true"):
        DeepCluster(DeepClusterSettings(n_clusters=5, pseudo_clusters=8), learner, 20)
