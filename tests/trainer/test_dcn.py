from __future__ import annotations

import pytest
import torch

from tests.trainer.learning import KINDS, blob_learner
from trainer.clustering.mini_batch import updated
from trainer.encoders.conv import ConvSettings
from trainer.methods.dcn import DCN, DCNSettings


def test_a_batch_of_running_means_equals_one_sample_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    mu, z = torch.randn(4, 3, generator=generator), torch.randn(50, 3, generator=generator)
    labels = torch.randint(0, 3, (50,), generator=generator)  # cluster 3 gets nobody
    counts = torch.tensor([100.0, 5.0, 1.0, 7.0])
    sequential, c = mu.clone(), counts.clone()
    for row, label in zip(z, labels, strict=True):
        c[label] += 1
        sequential[label] -= (sequential[label] - row) / c[label]
    batch, total = (value.float() for value in updated(mu.double(), counts.double(), z, labels))
    assert torch.allclose(batch, sequential, atol=1e-5) and torch.equal(total, c)
    assert torch.equal(batch[3], mu[3])


def test_the_pass_that_labels_a_batch_leaves_batch_norm_to_the_training_pass() -> None:
    learner = blob_learner(encoder_settings=ConvSettings(dim=6, channels=(2, 2, 2), batch_norm=True))
    encoder = learner.model.encoder.train()
    learner.latents(torch.arange(16))  # the step's own pass
    seen = [int(buffer) for name, buffer in encoder.named_buffers() if "num_batches" in name]
    as_they_ship = learner.all_latents()[:16]
    assert torch.allclose(learner.clean_latents(torch.arange(16)), as_they_ship, atol=1e-5) and encoder.training
    assert [int(buffer) for name, buffer in encoder.named_buffers() if "num_batches" in name] == seen == [1, 1, 1]


def test_the_loss_is_the_papers_by_hand() -> None:
    learner = blob_learner()
    method = DCN(DCNSettings(n_clusters=KINDS, clustering_weight=3.0), learner, 16)
    method.begin()
    index = torch.arange(7)
    z, error = learner.reconstruct(index)
    mu = learner.model.centroids.detach()
    pull = sum(float((z[n].detach() - mu[method.labels[n]]).square().sum()) for n in range(7)) / 7
    assert method.loss(index).item() == pytest.approx(error.mean().item() + 1.5 * pull, rel=1e-5)


def test_centroids_get_no_gradient_and_follow_the_batch() -> None:
    learner = blob_learner()
    method = DCN(DCNSettings(n_clusters=KINDS), learner, 16)
    method.begin()
    method.loss(torch.arange(7)).backward()
    assert learner.model.centroids.grad is None
    before = learner.model.centroids.detach().clone()
    method.after_step(torch.arange(20))  # the first kind's samples
    moved = (learner.model.centroids.detach() - before).abs().sum(1) > 0
    assert moved.any() and not moved.all()


def test_a_cluster_that_lost_its_last_sample_is_found_again_before_kmeans_is_due() -> None:
    learner = blob_learner()
    method = DCN(DCNSettings(n_clusters=KINDS, kmeans_every_epochs=50), learner, 16)
    method.begin()
    with torch.no_grad():
        learner.model.centroids[1] = 1e3
    assert method.after_epoch(0).figures["smallest"] > 0


def test_kmeans_replaces_the_running_means_when_it_is_due() -> None:
    learner = blob_learner()
    method = DCN(DCNSettings(n_clusters=KINDS, kmeans_every_epochs=2), learner, 16)
    method.begin()
    with torch.no_grad():
        learner.model.centroids += 0.01
    displaced = learner.model.centroids.detach().clone()
    method.after_epoch(0)
    assert torch.equal(learner.model.centroids, displaced)
    method.after_epoch(1)
    assert not torch.equal(learner.model.centroids, displaced) and float(method.counts[0]) == 100.0
