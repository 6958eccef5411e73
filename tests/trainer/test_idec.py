from __future__ import annotations

import pytest
import torch

from tests.trainer.learning import KINDS, blob_learner
from trainer.methods import METHODS
from trainer.methods.dec import DEC, DECSettings
from trainer.methods.idec import IDEC, IDECSettings
from trainer.methods.trained import TrainedMethod

INDEX = torch.arange(12)


def test_gamma_weighs_the_clustering_term_against_an_error_per_element() -> None:
    learner = blob_learner()
    methods = [IDEC(IDECSettings(n_clusters=KINDS, gamma=gamma), learner, 16) for gamma in (0.1, 10.0)]
    for method in methods:
        method.begin()
        method.before_step(0)
    low, high = (method.loss(INDEX).item() for method in methods)
    z, error = learner.reconstruct(INDEX)
    divergence = methods[0].divergence(z, INDEX).item()
    assert low == pytest.approx(error.mean().item() / 64 + 0.1 * divergence, rel=1e-5)
    assert high - low == pytest.approx(9.9 * divergence, rel=1e-4)


@pytest.mark.parametrize("name", ["idec", "dcn", "dkm", "centering", "dec", "dekm"])
def test_the_log_holds_the_reconstruction_of_an_epoch_apart_from_the_loss(name: str) -> None:
    learner = blob_learner()
    settings = METHODS[name].Settings.model_validate({"name": name, "n_clusters": KINDS})
    method = METHODS[name](settings, learner, 16)
    assert isinstance(method, TrainedMethod)
    method.begin()
    method.before_step(0)
    optimizer = torch.optim.SGD(method.parameters())
    for _ in range(2):  # the second epoch counts nothing of the first
        method.before_epoch(0, optimizer)
        for index in (INDEX[:8], INDEX[8:]):
            method.loss(index)
    logged = method.after_epoch(0).figures
    if name in {"dec", "dekm"}:  # they let the decoder go
        assert "reconstruction" not in logged
    else:
        assert logged["reconstruction"] == pytest.approx(learner.reconstruct(INDEX)[1].mean().item() / 64, rel=1e-6)


def test_tiling_the_input_leaves_the_balance_of_the_two_terms_as_it_is() -> None:
    # The reduction belongs to gamma: an error summed over elements would grow with the image.
    small, large = blob_learner(), blob_learner(tiles=2)
    for learner in (small, large):
        learner.need_decoder("this test")
    own, tiled = small.model.encoder.state_dict(), large.model.encoder.state_dict()
    first = own["layers.0.weight"].unflatten(1, (8, 8))
    tiled |= own | {"layers.0.weight": first.repeat(1, 2, 2).flatten(1) / 4}  # the same embedding of four equal tiles
    large.model.encoder.load_state_dict(tiled)
    assert small.decoder is not None and large.decoder is not None
    state = small.decoder.state_dict()
    last = f"layers.{len(state) // 2 - 1}"
    state[f"{last}.weight"] = state[f"{last}.weight"].unflatten(0, (8, 8)).repeat(2, 2, 1).flatten(0, 1)
    state[f"{last}.bias"] = state[f"{last}.bias"].unflatten(0, (8, 8)).repeat(2, 2).flatten()
    large.decoder.load_state_dict(state)
    large.model.centroids.data.copy_(small.model.centroids.data)
    losses = []
    for learner in (small, large):
        method = IDEC(IDECSettings(n_clusters=KINDS), learner, 16)
        method.begin()
        method.before_step(0)
        losses.append(method.loss(INDEX).item())
    errors = [learner.reconstruct(INDEX)[1].sum().item() for learner in (small, large)]
    assert errors[1] == pytest.approx(4 * errors[0], rel=1e-4) and losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_centroids_feel_the_clustering_term_alone_and_the_decoder_the_reconstruction_alone() -> None:
    learner = blob_learner()
    idec = IDEC(IDECSettings(n_clusters=KINDS, gamma=0.5), learner, 16)
    dec = DEC(DECSettings(n_clusters=KINDS), learner, 16)
    for method in (idec, dec):
        method.begin()
        method.before_step(0)
    gradients = []
    for method in (idec, dec):
        learner.model.zero_grad()
        method.loss(INDEX).backward()
        assert learner.model.centroids.grad is not None
        gradients.append(learner.model.centroids.grad.clone())
    assert torch.allclose(gradients[0], 0.5 * gradients[1], atol=1e-6)
    assert learner.decoder is not None
    learner.decoder.zero_grad()
    learner.reconstruct(INDEX)[1].mean().backward()
    assert all(p.grad is not None for p in learner.decoder.parameters())


def test_a_shuffled_epoch_gives_the_loss_of_an_ordered_one() -> None:
    # Index integrity: p is gathered by sample number, so the order of batches cannot matter while nothing learns.
    learner = blob_learner()
    method = IDEC(IDECSettings(n_clusters=KINDS), learner, 20)
    method.begin()
    method.before_step(0)
    n = len(learner)
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    ordered, mixed = (
        sum(method.loss(part).item() for part in order.split(20)) for order in (torch.arange(n), shuffled)
    )
    assert mixed == pytest.approx(ordered, rel=1e-5)
    wrong = method.p
    method.p = wrong[shuffled]
    assert sum(method.loss(part).item() for part in torch.arange(n).split(20)) != pytest.approx(ordered, rel=1e-3)


def test_dec_with_a_frozen_encoder_moves_only_the_centroids() -> None:
    learner = blob_learner()
    (stage,) = DEC(DECSettings(n_clusters=KINDS, freeze_encoder=True), learner, 16).stages()
    assert stage.parameters == [learner.model.centroids] and stage.modules == []
    (free,) = DEC(DECSettings(n_clusters=KINDS), learner, 16).stages()
    assert len(free.parameters) > 1
