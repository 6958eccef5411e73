from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import load_text
from tests.trainer.learning import KINDS, blob_learner, write_blobs
from trainer import FitOptions, fit
from trainer.distance import squared_distances
from trainer.methods.centering import Centering, CenteringSettings
from trainer.methods.dkm import soft_kmeans_loss
from trainer.settings import TrainSettings

INDEX = torch.arange(12)


def centering(**changes: Any) -> Centering:
    return Centering(CenteringSettings(n_clusters=KINDS, **changes), blob_learner(), 16)


def test_both_readings_of_alpha_by_hand() -> None:
    soft, hard = centering(alpha=5.0, ct_weight=2.0), centering(assignment="hard", ct_weight=4.0)
    z, error = soft.learner.reconstruct(INDEX)
    d2 = squared_distances(z, soft.learner.model.centroids.detach())
    assert soft.loss(INDEX).item() == pytest.approx((error.mean() + 2 * soft_kmeans_loss(d2, 5.0)).item(), rel=1e-5)
    centring = (hard.learner.reconstruct(INDEX)[1].mean() + 4 * d2.min(1).values.mean()).item()
    assert hard.loss(INDEX).item() == pytest.approx(centring, rel=1e-5)


def test_centroids_stand_still_within_an_epoch() -> None:
    method = centering()
    method.loss(INDEX).backward()
    assert method.learner.model.centroids.grad is None
    assert all(p is not method.learner.model.centroids for p in method.stages()[0].parameters)


@pytest.mark.parametrize("algorithm", ["kmeans", "mini_batch"])
def test_an_epochs_end_finds_the_centroids_anew_and_keeps_their_ids(algorithm: str) -> None:
    method = centering(algorithm=algorithm)
    mu = method.learner.model.centroids
    good = mu.detach().clone()
    with torch.no_grad():
        mu += 0.05 * torch.randn(mu.shape, generator=torch.Generator().manual_seed(0))
    method.stages()[0].begin()
    method.after_epoch(0)
    assert torch.equal(squared_distances(mu.detach(), good).argmin(1), torch.arange(KINDS))


def test_it_learns_from_scratch_as_well(tmp_path: Path) -> None:
    text = (
        f"data: {{path: {write_blobs(tmp_path / 'blobs.npz')}}}\n"
        "preprocess: {resize: none, color: gray}\nencoder: {name: mlp, hidden: [64], dim: 6}\npretrain: {kind: none}\nnovelty: none\n"
        "method: {name: centering, n_clusters: 5, epochs: 30, init: random, optimizer: {kind: adam, lr: 0.001}}\n"
        "train: {batch_size: 64, device: cpu}\n"
    )
    run = fit(load_text(TrainSettings, text, "scratch.yaml"), FitOptions(out=tmp_path / "run"))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert losses[-1] < 0.85 * losses[0] and run.metrics["acc"] > 0.9


def test_random_centroids_are_samples() -> None:
    method = centering(init="random")
    method.init_centroids()
    z, mu = method.learner.all_latents(), method.learner.model.centroids.detach()
    assert torch.equal(squared_distances(mu, z).min(1).values, torch.zeros(KINDS))
    assert len(torch.unique(mu, dim=0)) == KINDS
