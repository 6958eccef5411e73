from __future__ import annotations

import math

import pytest
import torch

from tests.trainer.learning import KINDS, blob_learner
from trainer.distance import squared_distances
from trainer.methods.dkm import DKM, DKMSettings, annealed_alphas, soft_assignment, soft_kmeans_loss


def test_the_annealing_is_the_papers() -> None:
    alphas = annealed_alphas()
    assert len(alphas) == 40
    assert alphas[:6] == pytest.approx([0.1, 0.423, 0.752, 1.078, 1.409, 1.748], abs=1e-3)
    assert alphas[-1] == pytest.approx(28.13, abs=0.01)


def test_a_sharp_assignment_is_the_nearest_centroid_and_a_flat_one_the_mean_distance() -> None:
    d2 = torch.tensor([[1.0, 3.0, 8.0], [5.0, 2.0, 2.5]])
    assert float(soft_kmeans_loss(d2, 1000.0)) == pytest.approx((1.0 + 2.0) / 2)
    assert float(soft_kmeans_loss(d2, 0.0)) == pytest.approx((12 / 3 + 9.5 / 3) / 2)


def test_the_assignment_itself_is_one_hot_at_the_papers_alpha_and_uniform_at_none() -> None:
    d2 = torch.tensor([[1.0, 3.0, 8.0], [5.0, 2.0, 2.5]])
    assert soft_assignment(d2, 1000.0).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert soft_assignment(d2, 0.0).tolist() == [pytest.approx([1 / 3] * 3)] * 2


def test_soft_assignment_by_hand() -> None:
    # d = (0, ln 2), alpha 1: G = (2/3, 1/3); the loss is ln 2 / 3.
    assert float(soft_kmeans_loss(torch.tensor([[0.0, math.log(2)]]), 1.0)) == pytest.approx(math.log(2) / 3)


def test_huge_distances_stay_finite() -> None:
    assert math.isfinite(float(soft_kmeans_loss(torch.tensor([[1e6, 2e6]]), 1000.0)))


def test_the_gradient_equals_the_papers_equation() -> None:
    # dF_i/dz_i = 2 sum_k G_ik [1 - alpha (d_ik - F_i)] (z_i - r_k)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    r = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    alpha = 0.7
    (soft_kmeans_loss(squared_distances(z, r), alpha) * len(z)).backward()
    with torch.no_grad():
        d2 = squared_distances(z, r)
        g = torch.softmax(-alpha * d2, 1)
        f = (g * d2).sum(1, keepdim=True)
        expected = 2 * ((g * (1 - alpha * (d2 - f)))[..., None] * (z[:, None] - r[None])).sum(1)
    assert torch.allclose(z.grad, expected, atol=1e-9)  # type: ignore[arg-type]


def test_alpha_rises_every_epochs_per_alpha_and_scales_with_the_embedding_if_asked() -> None:
    learner = blob_learner()
    method = DKM(DKMSettings(n_clusters=KINDS, alpha="annealed", epochs_per_alpha=2), learner, 25)
    method.begin()
    seen = []
    for epoch in range(5):
        method.before_step(epoch * method.steps_per_epoch)
        seen.append(method.alpha)
    assert seen == pytest.approx([0.1, 0.1, annealed_alphas()[1], annealed_alphas()[1], annealed_alphas()[2]])
    scaled = DKM(DKMSettings(n_clusters=KINDS, alpha=2.0, scale_alpha=True), learner, 25)
    scaled.begin()
    d2 = squared_distances(learner.all_latents(), learner.model.centroids.detach()).min(1).values
    assert scaled.alpha == pytest.approx(2.0 / float(d2.median()))


def test_uniform_centroids_lie_in_the_unit_cube_and_depend_on_the_seed() -> None:
    learner = blob_learner()
    method = DKM(DKMSettings(n_clusters=KINDS, alpha="annealed", init="uniform"), learner, 25)
    method.init_centroids()
    mu = learner.model.centroids.detach().clone()
    assert float(mu.abs().max()) <= 1.0 and float(mu.std()) > 0.3
    learner.seed = 1
    method.init_centroids()
    assert not torch.equal(mu, learner.model.centroids)


def test_centroids_that_lost_their_samples_or_met_another_move_to_different_far_samples_before_the_guards_look() -> (
    None
):
    learner = blob_learner()
    method = DKM(DKMSettings(n_clusters=KINDS, epochs_per_alpha=1), learner, 25)
    method.begin()
    mu = learner.model.centroids
    for epoch, lost in enumerate(
        (0, 1, 2, 3)
    ):  # another one in each round: the guard of empty clusters must not add them up
        with torch.no_grad():
            mu[lost] = 1e3
            mu[4] = mu[(lost + 1) % 4]
        assert method.after_epoch(epoch).figures["moved"] == 2.0
        assert float(mu.detach().abs().max()) < 100 and float(torch.pdist(mu.detach()).min()) > 1e-2


def test_the_optimizer_forgets_a_centroid_that_was_moved_and_no_other() -> None:
    learner = blob_learner()
    method = DKM(DKMSettings(n_clusters=KINDS, epochs_per_alpha=1), learner, 25)
    method.begin()
    mu = learner.model.centroids
    optimizer = method.settings.optimizer.build(method.parameters())
    method.loss(torch.arange(25)).backward()
    optimizer.step()
    with torch.no_grad():
        mu[2] = 1e3
    method.after_epoch(0)
    before = {key: value.clone() for key, value in optimizer.state[mu].items()}
    method.before_epoch(1, optimizer)
    for key in ("exp_avg", "exp_avg_sq"):
        kept = torch.tensor([0, 1, 3, 4])
        assert float(before[key][2].abs().max()) > 0 and float(optimizer.state[mu][key][2].abs().max()) == 0
        assert torch.equal(optimizer.state[mu][key][kept], before[key][kept])
    optimizer.state[mu]["exp_avg"][2] = 1
    method.before_epoch(2, optimizer)
    assert float(optimizer.state[mu]["exp_avg"][2].max()) == 1  # once


def test_a_healthy_round_and_the_last_one_move_nothing() -> None:
    learner = blob_learner()
    method = DKM(DKMSettings(n_clusters=KINDS, epochs_per_alpha=1, rounds=2), learner, 25)
    method.begin()
    assert method.after_epoch(0).figures["moved"] == 0.0
    with torch.no_grad():
        learner.model.centroids[2] += 50
    before = learner.model.centroids.detach().clone()
    method.after_epoch(1)
    assert torch.equal(learner.model.centroids, before)


def test_assignments_that_are_still_soft_when_annealing_ends_are_said_and_what_to_lower() -> None:
    learner = blob_learner()
    method = DKM(DKMSettings(n_clusters=KINDS, alpha="annealed", epochs_per_alpha=1), learner, 25)
    method.begin()
    median = float(squared_distances(learner.all_latents(), learner.model.centroids.detach()).min(1).values.median())
    seen = []
    for unit in (1.0, median):  # the second one: as if the embeddings were wide
        method.unit = torch.tensor(unit)
        method.before_step(39 * method.steps_per_epoch)
        expected = annealed_alphas()[-1] * median / unit
        assert method.after_epoch(39).figures["sharpness"] == pytest.approx(expected, rel=1e-4)
        seen.append(method.warnings())
    assert len(seen[0]) == 1 and "lower method.clustering_weight (1)" in seen[0][0]
    assert seen[1] == []  # control


def test_a_fixed_alpha_is_soft_because_somebody_wants_it() -> None:
    method = DKM(DKMSettings(n_clusters=KINDS, alpha=1e-6, epochs_per_alpha=1), blob_learner(), 25)
    method.begin()
    method.after_epoch(0)
    assert method.sharpness < 1 and method.warnings() == []
