from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.learning import blob_learner
from tests.trainer.shapes import fit_shapes, write_shapes
from tests.trainer.test_deepcluster import AUGMENT, traced
from trainer.errors import CollapseError, DataError
from trainer.methods.deepcluster_v2 import DeepClusterV2, DeepClusterV2Settings


def method(**settings: object) -> DeepClusterV2:
    options = {"pseudo_clusters": 8, "heads": 3, "projector": (16, 6), **settings}
    return DeepClusterV2(DeepClusterV2Settings(n_clusters=5, **options), blob_learner(), 20)  # type: ignore[arg-type]


def test_pseudo_labels_come_closer_to_the_truth(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "shapes.npz")
    settings = "{name: deepcluster_v2, n_clusters: 3, n_init: 3, pseudo_clusters: 30, projector: [32, 16], epochs: 8}"
    fit_shapes(data, tmp_path / "run", settings, AUGMENT)
    nmi = traced(tmp_path / "run", data)
    assert nmi[-1] > nmi[0] + 0.05


def test_prototypes_are_the_centroids_of_their_head_and_bank() -> None:
    one = method()
    one.begin()
    optimizer = one.settings.optimizer.build(one.parameters())
    one.before_epoch(0, optimizer)
    for head in range(3):
        bank = one.banks[head % 2]
        assert torch.allclose(one.prototypes[head].norm(dim=1), torch.ones(8), atol=1e-5)
        assert torch.equal((bank @ one.prototypes[head].T).argmax(1), one.labels[head])
    assert not any(p is one.prototypes for p in one.parameters())


def test_the_loss_is_the_mean_cross_entropy_over_views_and_heads() -> None:
    one = method(temperature=0.5)
    one.begin()
    one.before_epoch(0, one.settings.optimizer.build(one.parameters()))
    index = torch.arange(10)
    for module in one.modules():
        module.eval()  # without changes and batch statistics all views are alike
    u = one.embed(index).detach()
    expected = sum(
        float(torch.nn.functional.cross_entropy(u @ one.prototypes[h].T / 0.5, one.labels[h, index])) for h in range(3)
    )
    assert one.loss(index).item() == pytest.approx(expected / 3, rel=1e-4)
    assert torch.allclose(one.banks[:, index], u.expand(2, -1, -1), atol=1e-6)


def test_only_the_rows_of_a_batch_change_in_the_banks() -> None:
    one = method()
    one.begin()
    one.before_epoch(0, one.settings.optimizer.build(one.parameters()))
    before = one.banks.clone()
    one.loss(torch.tensor([3, 5]))
    changed = (one.banks != before).any(2).any(0)
    assert set(torch.nonzero(changed)[:, 0].tolist()) <= {3, 5}


def test_batches_of_one_are_refused() -> None:
    with pytest.raises(DataError, match="train.batch_size is 1, which cuts 100 training images into batches of one"):
        DeepClusterV2(DeepClusterV2Settings(n_clusters=5, pseudo_clusters=8), blob_learner(), 1)


def test_one_head_that_collapses_is_enough_to_stop() -> None:
    one = method()
    one.begin()
    one.banks[1] = torch.eye(6)[0]
    one.banks[1][:8] = torch.nn.functional.normalize(torch.randn(8, 6), dim=1)
    with pytest.raises(CollapseError, match="guard filled"):
        one.before_epoch(0, one.settings.optimizer.build(one.parameters()))
