from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import load_text
from exporters.errors import ExportError
from exporters.export import export_run
from tests.trainer.learning import KINDS, blob_learner, write_blobs
from tests.trainer.test_fitting import StopAfter
from trainer import FitOptions, Run, fit, load_run
from trainer.clustering.soft_labels import SoftLabels
from trainer.errors import CollapseError, DataError
from trainer.loop import InterruptedTraining
from trainer.methods.deepcluster_mixture import Count, DeepClusterMixture, DeepClusterMixtureSettings
from trainer.settings import TrainSettings


def method(per_kind: int = 40, **settings: Any) -> DeepClusterMixture:
    options = {"n_clusters": 15, "spread": 0.1, **settings}
    return DeepClusterMixture(DeepClusterMixtureSettings(**options), blob_learner(per_kind), 40)


def relabelled(one: DeepClusterMixture, epoch: int = 0) -> torch.optim.Optimizer:
    optimizer = one.settings.optimizer.build(one.parameters(), one.renewed())
    one.before_epoch(epoch, optimizer)
    return optimizer


def settings_of(data: Path, **method: Any) -> TrainSettings:
    options = {
        "name": "deepcluster_mixture",
        "n_clusters": 20,
        "epochs": 4,
        "relabel_every_epochs": 1,
        "spread": 0.1,
        **method,
    }
    inner = ", ".join(f"{key}: {value}" for key, value in options.items())
    text = f"""
data: {{path: {data}}}
preprocess: {{resize: none, color: gray}}
encoder: {{name: mlp, hidden: [32], dim: 8}}
pretrain: {{epochs: 5}}
method: {{{inner}}}
novelty: none
train: {{batch_size: 50, device: cpu}}
"""
    return load_text(TrainSettings, text, "mixture.yaml")


@pytest.fixture(scope="module")
def blobs_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", per_kind=40)


@pytest.fixture(scope="module")
def run(blobs_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(settings_of(blobs_path), FitOptions(out=tmp_path_factory.mktemp("run") / "run"))


def test_surplus_components_die_and_the_model_has_as_many_clusters_as_are_left(run: Run) -> None:
    assert KINDS <= run.model.n_clusters < 20
    assert (
        run.metrics["components"]
        == run.model.n_clusters
        == len(run.info["clusters"])
        == len(run.info["reference"]["shares"])
    )
    assert run.metrics["purity"] > 0.9


def test_a_run_that_found_its_number_loads_and_exports(run: Run, tmp_path: Path) -> None:
    loaded = load_run(run.path or "")
    assert torch.equal(loaded.model.centroids, run.model.centroids)
    assert export_run(loaded, tmp_path / "part.onnx").path.is_file()


def test_a_run_whose_centroids_answer_otherwise_than_the_mixture_is_not_exported(run: Run, tmp_path: Path) -> None:
    loaded = load_run(run.path or "")
    loaded.info["train"]["refusal"] = "the nearest centroid is that of ..."
    with pytest.raises(ExportError, match="must not be exported: the nearest centroid"):
        export_run(loaded, tmp_path / "part.onnx")
    assert not (tmp_path / "part.onnx").exists()


@pytest.mark.parametrize("agreement", [0.94, 0.96])
def test_the_export_is_refused_below_95_percent(agreement: float) -> None:
    one = method()
    one._result = {"agreement": agreement}
    assert (one.refusal() is not None) == (agreement < 0.95)
    assert bool(one.warnings()) == (agreement < 0.95)


def test_labels_are_soft_as_asked_and_balanced() -> None:
    one = method(perplexity=1.8)
    relabelled(one)
    entropy = torch.special.entr(one.label_weights.double()).sum(1)
    assert float(entropy.exp().mean()) == pytest.approx(1.8, rel=0.02)
    assert torch.allclose(one.label_weights.sum(1), torch.ones(len(one.label_weights)), atol=1e-5)
    assert float(one.balance_weights.mean()) == pytest.approx(1.0, abs=0.2)


def test_the_loss_is_the_weighted_cross_entropy_over_live_components() -> None:
    one = method()
    relabelled(one)
    index = torch.arange(12)
    with torch.no_grad():
        logits = one.head(one.learner.features(index))[:, one.head_rows]
    dense = SoftLabels(one.label_ids, one.label_weights, 1.0, 1.0).dense(len(one.head_rows))[index]
    expected = -(one.balance_weights[index, None] * dense * logits.log_softmax(1)).sum(1).mean()
    assert one.loss(index).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_warm_start_keeps_components_their_rows_of_the_head_and_the_head() -> None:
    one = method(fresh_every=100)
    optimizer = relabelled(one)
    rows, ids, head = one.head_rows.clone(), one.ids.clone(), one.head.linear.weight.detach().clone()
    one.before_epoch(3, optimizer)
    assert one.after_epoch(3).figures["fresh"] == 0.0
    assert set(one.head_rows.tolist()) <= set(rows.tolist())
    assert torch.equal(one.head.linear.weight, head)  # nothing moved, so nothing starts anew
    same = (one.head_rows[one.ids] == rows[ids]).double().mean()
    assert float(same) > 0.95


def test_a_fresh_start_hands_rows_down_to_the_components_that_hold_the_same_images() -> None:
    one = method(warm="fresh")
    optimizer = relabelled(one)
    rows, ids, head = one.head_rows.clone(), one.ids.clone(), one.head.linear.weight.detach().clone()
    one.before_epoch(3, optimizer)
    assert one.after_epoch(3).figures["fresh"] == 1.0
    kept = [row for row in one.head_rows.tolist() if torch.equal(one.head.linear.weight[row], head[row])]
    assert len(kept) >= KINDS
    for row in kept:
        before, now = ids == int((rows == row).nonzero()), one.ids == int((one.head_rows == row).nonzero())
        assert float((before & now).sum()) >= 0.3 * float(now.sum())


def test_a_number_of_components_that_is_hit_is_doubled_next_time() -> None:
    one = method(n_clusters=3)
    optimizer = relabelled(one)
    assert one.after_epoch(0).figures["components"] == 3 and int(one.counters[Count.SIZE]) == 6
    one.before_epoch(3, optimizer)
    assert one.after_epoch(3).figures["components"] > 3 and one.after_epoch(3).figures["fresh"] == 1.0
    roomy = method(n_clusters=15)
    relabelled(roomy)
    assert int(roomy.counters[Count.SIZE]) == 15


def test_a_mixture_of_one_component_says_nothing_and_stops_a_run_without_labels() -> None:
    with pytest.raises(CollapseError, match=r"guard components.*lower method.spread"):
        relabelled(method(spread=1e4))


def test_a_mixture_that_says_nothing_later_leaves_the_labels_and_gets_tighter() -> None:
    one = method()
    optimizer = relabelled(one)
    labels = one.label_ids
    with torch.no_grad():
        for p in one.learner.model.encoder.parameters():
            p.mul_(0.0)
        one.learner.model.encoder.layers[-1].bias.normal_()
    with pytest.raises((CollapseError, DataError)):
        for epoch in (3, 6, 9, 12):
            one.before_epoch(epoch, optimizer)
    assert one.label_ids is labels


def test_the_sphere_is_refused(blobs_path: Path) -> None:
    settings = settings_of(blobs_path).model_copy(update={})
    plain = settings.plain()
    plain["projection"] = {"kind": "pca", "dim": 4, "l2": True}
    with pytest.raises(DataError, match="projection.l2 is true, but method deepcluster_mixture fits Gaussians"):
        fit(TrainSettings.model_validate(plain), FitOptions(out=blobs_path.parent / "sphere"))


@pytest.mark.parametrize("warm", ["posterior", "fresh"])
def test_the_other_warm_starts_resume_as_if_nothing_had_happened(warm: str, blobs_path: Path, tmp_path: Path) -> None:
    settings = settings_of(blobs_path, warm=warm)
    whole = fit(settings, FitOptions(out=tmp_path / "whole"))
    with pytest.raises(InterruptedTraining):
        fit(settings, FitOptions(out=tmp_path / "cut", progress=StopAfter("deepcluster_mixture", 1)))
    resumed = fit(settings, FitOptions(out=tmp_path / "cut", resume=True))
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert np.array_equal(a.numpy(), b.numpy())


def test_images_of_components_too_small_to_keep_are_listed_for_review(tmp_path: Path) -> None:
    one = method()
    one._residual = [3, 17]
    assert one.review() == [
        (3, "in a component of too few images to be a cluster"),
        (17, "in a component of too few images to be a cluster"),
    ]


def planted(one: DeepClusterMixture, sizes: list[int]) -> torch.Tensor:
    """Takes the place of the features: blobs of these sizes, far apart."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    z = 30 * torch.randn(len(sizes), 6, generator=generator)[kinds] + torch.randn(len(kinds), 6, generator=generator)
    one._project = lambda epoch: z  # type: ignore[method-assign]
    return kinds


def test_a_rare_kind_survives_warm_relabelling_after_warm_relabelling() -> None:
    one = method(per_kind=400, n_clusters=20, fresh_every=100)
    kinds = planted(one, [500, 490, 480, 500, 30])
    optimizer = relabelled(one)
    for epoch in (3, 6, 9):
        one.before_epoch(epoch, optimizer)
        assert one.after_epoch(epoch).figures["fresh"] == 0.0
    one.end()
    rare = one.ids[kinds == 4]
    assert len(torch.unique(rare)) == 1 and not bool(torch.isin(one.ids[kinds != 4], rare).any())
    assert one.learner.model.n_clusters == 5


def test_mostly_good_parts_are_no_collapse() -> None:
    one = method(per_kind=200, n_clusters=15, spread=0.01)
    planted(one, [850, *[15] * 10])
    relabelled(one)
    assert one.after_epoch(0).figures["filled"] < 0.2 and one.after_epoch(0).figures["components"] >= 11


@pytest.mark.parametrize("warm", ["responsibilities", "posterior"])
def test_after_an_alarm_the_next_clustering_starts_from_the_labels_that_stayed(warm: str) -> None:
    one = method(warm=warm, fresh_every=100)
    planted(one, [40] * 5)
    optimizer = relabelled(one)
    ids = one.ids
    tight = one._project(0)
    one._project = lambda epoch: 1e-3 * torch.randn(200, 6) + (torch.arange(200) == 0)[:, None]  # type: ignore[method-assign]
    one.before_epoch(3, optimizer)
    if one.after_epoch(3).figures.get("alarm"):
        assert one.ids is ids
    one._project = lambda epoch: tight  # type: ignore[method-assign]
    one.before_epoch(6, optimizer)
    assert one.after_epoch(6).figures["components"] >= 2


def test_a_mixture_that_says_nothing_at_the_end_ships_nothing() -> None:
    one = method(per_kind=40)
    planted(one, [40] * 5)
    relabelled(one)
    planted(one, [200])
    one.counters[Count.GROW] = 1  # afresh
    with pytest.raises(CollapseError, match="guard components.*kept 1 component"):
        one.end()


def test_labels_flatter_than_they_can_be_are_refused() -> None:
    with pytest.raises(ValueError, match="perplexity is 4 with labels_per_image 5, expected at most 3"):
        DeepClusterMixtureSettings(n_clusters=5, perplexity=4)
