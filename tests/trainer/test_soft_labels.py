from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.clustering.bayesian_mixture import Mixture, MixtureOptions, fit_mixture
from trainer.clustering.soft_labels import (
    DRIFTED,
    SoftLabels,
    balancing_weights,
    drift,
    perplexity,
    prune,
    temper,
)

KINDS = (
    {"covariance": "diag", "weights": "dirichlet"},
    {"covariance": "diag", "weights": "sticks"},
    {"covariance": "full", "weights": "dirichlet"},
)


def blobs(counts: tuple[int, ...] = (100,) * 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(len(counts), 4, generator=generator) * 6
    truth = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return centres[truth] + torch.randn(len(truth), 4, generator=generator), truth


def warm(x: Tensor, truth: Tensor, n_components: int) -> Mixture:
    r = torch.nn.functional.one_hot(truth, n_components).float()
    return fit_mixture(x, MixtureOptions(n_components), 0, responsibilities=r)


def log_rho(spread: float = 40.0, k: int = 12) -> Tensor:
    return spread * torch.randn(500, k, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# pruning


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("concentration", [None, 1.0])
def test_twenty_components_fall_to_the_four_that_are_there(kind: dict[str, str], concentration: float | None) -> None:
    x, truth = blobs()
    full = fit_mixture(x, MixtureOptions(20, concentration=concentration, **kind), 0)  # type: ignore[arg-type]
    found = prune(full, x)
    assert full.n_components == 20 and found.mixture.n_components == 4
    assert found.mixture.counts.tolist() == pytest.approx([100] * 4, abs=1)
    labels = found.mixture.log_rho(x).argmax(1)
    assert len(set(zip(labels.tolist(), truth.tolist(), strict=True))) == 4
    assert sorted([*found.kept.tolist(), *found.dropped.tolist()]) == list(range(20))


def test_components_that_hold_a_real_cluster_are_not_pruned() -> None:
    x, _ = blobs((100,) * 7)
    assert prune(fit_mixture(x, MixtureOptions(20), 0), x).mixture.n_components == 7


def test_the_members_of_a_pruned_component_are_named() -> None:
    x, truth = blobs((100, 3, 100))
    mixture = warm(x, truth, 4)
    found = prune(mixture, x)
    assert found.kept.tolist() == [0, 2] and found.dropped.tolist() == [1, 3]
    assert found.residual.tolist() == [100, 101, 102]
    assert float(found.mixture.counts.sum()) == pytest.approx(203)
    assert prune(mixture, x, fewest=2.0, share=0.01).residual.tolist() == []  # a lower limit spares them


def test_survivors_keep_their_order_and_prior() -> None:
    x, truth = blobs((100, 3, 100))
    mixture = warm(x, truth, 4)
    found = prune(mixture, x).mixture
    assert torch.equal(found.log_rho(x).argmax(1)[truth != 1], (truth[truth != 1] == 2).long())
    assert float(found.prior.weights.first[0]) == pytest.approx(1 / 4)
    assert found.elbo[1] >= found.elbo[0] - 1e-6 * abs(found.elbo[0])
    assert found.options == mixture.options


def test_nothing_is_pruned_where_all_are_large_enough() -> None:
    x, truth = blobs()
    mixture = warm(x, truth, 4)
    found = prune(mixture, x)
    assert found.mixture is mixture and found.kept.tolist() == [0, 1, 2, 3] and len(found.residual) == 0


def test_the_largest_component_always_stays() -> None:
    x = torch.tensor([[0.0], [1.0], [50.0]])
    found = prune(warm(x, torch.tensor([0, 0, 1]), 2), x)
    assert len(found.kept) == 1 and found.mixture.responsibilities(x).tolist() == [[1.0]] * 3


# drift


def test_a_warm_mixture_that_lost_its_features_has_drifted() -> None:
    x, _ = blobs()
    random = torch.rand(400, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    fresh = fit_mixture(x[::2], MixtureOptions(4), 0)
    stuck = fit_mixture(x, MixtureOptions(4, max_iterations=1), 0, responsibilities=random)
    assert drift(stuck, fresh, x[1::2]) > DRIFTED


def test_a_warm_mixture_that_kept_up_has_not() -> None:
    x, truth = blobs()
    assert drift(warm(x, truth, 4), fit_mixture(x[::2], MixtureOptions(4), 0), x[1::2]) < DRIFTED


# tempering


def test_tempered_labels_by_hand() -> None:
    # Odds 1 : 1/4 : 0 at tau = 1 turn to 1 : 1/2 at tau = 2: (2/3, 1/3), perplexity 3 / 2^(2/3).
    values = torch.tensor([[0.0, -4.0, -1e4]]).double() * torch.log(torch.tensor(2.0)).double() / 2
    found = temper(values, target_perplexity=3 / 2 ** (2 / 3))
    assert found.tau == pytest.approx(2, rel=0.01)
    assert found.ids.tolist() == [[0, 1, 2]]
    assert found.weights[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0], abs=0.005)


@pytest.mark.parametrize("target", [1.1, 2.0, 2.7])
@pytest.mark.parametrize("spread", [0.3, 40.0, 1e4])
def test_the_perplexity_meets_the_target(target: float, spread: float) -> None:
    found = temper(log_rho(spread), target)
    assert float(perplexity(found.weights).mean()) == pytest.approx(target, rel=0.02)
    assert found.perplexity == pytest.approx(target, rel=0.02)


def test_without_tempering_it_does_not() -> None:
    assert float(perplexity(log_rho().softmax(1)).mean()) < 1.2
    assert temper(log_rho()).tau > 2


def test_labels_that_are_too_flat_are_sharpened() -> None:
    assert temper(log_rho(0.3)).tau < 1


def test_a_target_out_of_reach_is_lowered_to_half_way() -> None:
    found = temper(log_rho(k=2), target_perplexity=2.0)
    assert found.perplexity == pytest.approx(1.5, rel=0.02)
    assert temper(log_rho(k=12), target_perplexity=9.0, top=3).perplexity == pytest.approx(2.0, rel=0.02)


def test_one_component_needs_no_temperature() -> None:
    found = temper(torch.zeros(4, 1))
    assert found.weights.tolist() == [[1.0]] * 4 and found.tau == 1 and found.perplexity == 1


def test_ties_cannot_be_sharpened() -> None:
    found = temper(torch.zeros(3, 4), target_perplexity=1.5)
    assert found.perplexity == pytest.approx(4) and found.weights.isfinite().all()


def test_a_target_of_one_is_one_hot() -> None:
    assert temper(log_rho(), target_perplexity=1.0).weights[:, 0].mean() > 0.999


def test_labels_are_sparse_sorted_and_sum_to_one() -> None:
    values = log_rho()
    found = temper(values, top=3)
    assert found.ids.shape == found.weights.shape == (500, 3)
    assert found.ids.dtype == torch.int32 and found.weights.dtype == torch.float32
    assert torch.allclose(found.weights.sum(1), torch.ones(500))
    assert torch.equal(found.ids.long(), values.topk(3).indices) and (found.weights.diff(dim=1) <= 0).all()


def test_dense_labels_are_the_tempered_softmax_of_the_largest() -> None:
    values = log_rho()
    found = temper(values, top=3)
    kept = values.masked_fill(values < values.topk(3).values[:, -1:], -torch.inf)
    assert torch.allclose(found.dense(12), (kept / found.tau).softmax(1).float(), atol=1e-6)


@pytest.mark.parametrize(("target", "top"), [(0.9, 5), (2.0, 0), (float("nan"), 5)])
def test_a_target_below_one_and_no_component_are_refused(target: float, top: int) -> None:
    with pytest.raises(ValueError, match=f"target_perplexity is {target} and top {top}, expected 1 or more"):
        temper(log_rho(), target, top)


def test_log_responsibilities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        temper(torch.tensor([[0.0, float("-inf")]]))


# balancing


def test_balancing_weights_by_hand() -> None:
    # Mass of component 0: 1 + 1 + .5, of 2: .5 + 1; 1 is dead. N = 4, two live.
    ids = torch.tensor([[0, 1], [0, 1], [0, 2], [2, 0]], dtype=torch.int32)
    labels = SoftLabels(ids, torch.tensor([[1.0, 0], [1, 0], [0.5, 0.5], [1, 0]]), 1.0, 1.0)
    expected = [2 / 2.5, 2 / 2.5, 2 * (0.5 / 2.5 + 0.5 / 1.5), 2 / 1.5]
    found = balancing_weights(labels, 3)
    assert found.tolist() == pytest.approx(expected) and float(found.mean()) == pytest.approx(1)


def test_balanced_components_carry_the_same_weight() -> None:
    truth = torch.tensor([0] * 90 + [1] * 30)
    labels = SoftLabels(truth[:, None].int(), torch.ones(120, 1), 1.0, 1.0)
    weights = balancing_weights(labels, 2)
    assert float(weights[truth == 0].sum()) == pytest.approx(float(weights[truth == 1].sum()))


def test_balancing_weights_are_clipped() -> None:
    truth = torch.tensor([0] * 999 + [1])
    weights = balancing_weights(SoftLabels(truth[:, None].int(), torch.ones(1000, 1), 1.0, 1.0), 2)
    assert float(weights.max()) == 10 and float(weights.min()) == pytest.approx(1000 / 2 / 999)
