from __future__ import annotations

import pytest
import torch

from trainer.convergence import Convergence
from trainer.errors import CollapseError
from trainer.guards import ClusterGuard, check_finite, effective_number


def healthy() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mu = torch.eye(4) * 3
    z = mu.repeat(10, 1) + 0.1 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    return torch.softmax(-torch.cdist(z, mu), 1), z, mu


def test_a_healthy_clustering_passes_and_reports_its_figures() -> None:
    q, z, mu = healthy()
    figures = ClusterGuard(4, float(z.var(0, unbiased=False).sum()), 4).figures(q, z, mu)
    assert figures["n_eff"] == pytest.approx(4.0, abs=0.1) and figures["smallest"] == 10
    assert figures["closest"] == pytest.approx(3 * 2**0.5)


def test_effective_number_is_one_when_everything_is_in_one_cluster() -> None:
    assert float(effective_number(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))) == pytest.approx(1.0)


def assert_stopped_by(
    guard: str, q: torch.Tensor, z: torch.Tensor, mu: torch.Tensor, spread: float = 1.0, times: int = 1
) -> None:
    watch = ClusterGuard(len(mu), spread, len(mu))
    for _ in range(times - 1):
        watch.figures(q, z, mu)
    with pytest.raises(CollapseError, match=guard):
        watch.figures(q, z, mu)


def test_each_guard_speaks_for_its_own_collapse() -> None:
    q, z, mu = healthy()
    one = torch.full_like(q, 0.01)
    one[:, 0] = 0.97
    assert_stopped_by("guard n_eff", one, z, mu)
    assert_stopped_by("guard spread", q, z, mu, spread=1e4)
    assert_stopped_by("guard nan", q * float("nan"), z, mu)
    same = mu.clone()
    same[1] = same[0] + 1e-5
    assert_stopped_by("guard centres", q, z, same)


def test_an_empty_cluster_is_tolerated_twice_and_not_a_third_time() -> None:
    q, z, mu = healthy()
    q = torch.cat([q[:, :3] + 0.01, torch.full((40, 1), 0.005)], 1)
    q[:, 3] = q[:, :3].max(1).values - 1e-3  # used on average, nearest to nobody
    assert_stopped_by("guard empty", q / q.sum(1, keepdim=True), z, mu, times=3)


def test_a_set_of_mostly_one_kind_is_measured_by_what_it_filled_at_the_start() -> None:
    z = torch.cat(
        [0.1 * torch.randn(97, 2, generator=torch.Generator().manual_seed(0)), 5 * torch.eye(2), -5 * torch.eye(2)[:1]]
    )
    mu = torch.cat([torch.zeros(1, 2), z[97:]])
    labels = torch.cat([torch.zeros(97, dtype=torch.int64), torch.arange(1, 4)])
    watch = Convergence(100, 4, 0.0, 1)
    watch.begin(z, mu)
    watch.look(labels, z, mu, 0)
    with pytest.raises(CollapseError, match=r"guard n_eff: .* 1\.00 of 4 clusters, expected at least 1\.05"):
        watch.look(torch.zeros(100, dtype=torch.int64), z, mu, 1)
    nearly_one = Convergence(100, 2, 0.0, 1)
    nearly_one.begin(z, mu[[0, 1]])  # 98 : 2 is 1.10 of 2, of which 99 : 1 is more than half the way from one
    nearly_one.look((torch.arange(100) == 0).long(), z, mu[[0, 1]], 0)
    unknown = Convergence(100, 4, 0.0, 1)
    unknown.begin(z)  # centroids that were not found in the data say nothing of its kinds
    with pytest.raises(CollapseError, match=r"guard n_eff: .* expected at least 2\.00"):
        unknown.look(labels, z, mu, 0)


def test_a_loss_that_is_not_finite_names_stage_and_epoch() -> None:
    with pytest.raises(CollapseError, match="guard nan: the loss of stage dec is nan in epoch 7"):
        check_finite(float("nan"), "dec", 7)
