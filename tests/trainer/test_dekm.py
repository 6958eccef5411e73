from __future__ import annotations

import pytest
import torch

from tests.trainer.learning import KINDS, blob_learner
from trainer.methods.dekm import DEKM, DEKMSettings, within_class_rotation


def test_the_last_direction_is_where_clusters_scatter_most() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(200)
    mu = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])  # far apart along x, which must not count
    z = mu[labels] + torch.randn(400, 3, generator=generator) * torch.tensor([0.1, 3.0, 1.0])
    rotation = within_class_rotation(z, mu, labels)
    assert torch.allclose(rotation.T @ rotation, torch.eye(3), atol=1e-5)
    assert float(rotation[:, -1].abs()[1]) > 0.99 and float(rotation[:, 0].abs()[0]) > 0.99


def test_only_the_last_rotated_coordinate_has_somewhere_to_go() -> None:
    learner = blob_learner()
    method = DEKM(DEKMSettings(n_clusters=KINDS), learner, 16)
    method.convergence.begin(learner.all_latents())
    method.before_step(0)
    now = learner.all_latents() @ method.rotation
    assert torch.allclose(now[:, :-1], method.target[:, :-1], atol=1e-5)
    assert float((now[:, -1] - method.target[:, -1]).abs().mean()) > 1e-3
    # L is what is left: the within-class scatter along that direction, per element.
    expected = float((now[:, -1] - method.target[:, -1]).square().mean()) / 6
    assert method.loss(torch.arange(len(learner))).item() == pytest.approx(expected, rel=1e-4)


def test_targets_stay_between_refreshes() -> None:
    learner = blob_learner()
    method = DEKM(DEKMSettings(n_clusters=KINDS, refresh_steps=3), learner, 16)
    method.convergence.begin(learner.all_latents())
    method.before_step(0)
    kept = method.target
    with torch.no_grad():
        next(learner.model.encoder.parameters()).mul_(1.5)
    method.before_step(2)
    assert method.target is kept
    method.before_step(3)
    assert method.target is not kept


def test_the_last_kmeans_fits_the_embeddings_as_they_ended() -> None:
    learner = blob_learner()
    method = DEKM(DEKMSettings(n_clusters=KINDS), learner, 16)
    z = learner.all_latents()
    with torch.no_grad():
        learner.model.centroids += 0.02
    method.end()
    labels = torch.cdist(z, learner.model.centroids.detach()).argmin(1)
    for k in range(KINDS):
        assert torch.allclose(learner.model.centroids[k], z[labels == k].mean(0), atol=1e-4)
