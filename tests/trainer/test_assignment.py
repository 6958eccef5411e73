from __future__ import annotations

import pytest
import torch

from trainer.assignment import log_student_t, target_distribution
from trainer.distance import squared_distances


def test_q_and_p_by_hand() -> None:
    # Kernels 1/(1+d2): rows (1, 1/2), (1/2, 1), (1/4, 1/4) -> q = (2/3, 1/3), (1/3, 2/3), (1/2, 1/2); f = (3/2, 3/2).
    q = log_student_t(torch.tensor([[0.0, 1.0], [1.0, 0.0], [3.0, 3.0]])).exp()
    assert q.flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3, 2 / 3, 1 / 2, 1 / 2])
    # p = (4/9, 1/9) / (5/9) and so on.
    assert target_distribution(q).flatten().tolist() == pytest.approx([0.8, 0.2, 0.2, 0.8, 0.5, 0.5])


def test_frequencies_weigh_crowded_clusters_down() -> None:
    q = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4]])
    p = target_distribution(q)
    assert float(p[2, 1]) > 0.4  # cluster 1 has f = .6 against 2.4


def test_rows_sum_to_one_and_argmax_q_is_the_nearest_centroid() -> None:
    generator = torch.Generator().manual_seed(0)
    d2 = squared_distances(torch.randn(40, 6, generator=generator), torch.randn(5, 6, generator=generator))
    q = log_student_t(d2, t_dof=2.5).exp()
    assert torch.allclose(q.sum(1), torch.ones(40)) and torch.allclose(target_distribution(q).sum(1), torch.ones(40))
    assert torch.equal(q.argmax(1), d2.argmin(1))


def test_log_q_is_finite_for_a_point_on_a_centroid_and_for_one_very_far() -> None:
    assert torch.isfinite(log_student_t(torch.tensor([[0.0, 1e6], [1e6, 1e6]]))).all()


def test_p_carries_no_gradient() -> None:
    q = torch.rand(4, 3, requires_grad=True).softmax(1)
    assert not target_distribution(q).requires_grad


@pytest.mark.parametrize("t_dof", [1.0, 2.5])
def test_gradient_equals_the_papers_equations(t_dof: float) -> None:
    # dL/dz_i = ((a+1)/a) sum_j (1 + d_ij/a)^-1 (p_ij - q_ij)(z_i - mu_j), and the negative sum over i for mu_j (eq. 4, 5).
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    mu = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    d2 = squared_distances(z, mu)
    log_q = log_student_t(d2, t_dof)
    p = target_distribution(log_q.exp())
    torch.nn.functional.kl_div(log_q, p, reduction="sum").backward()
    with torch.no_grad():
        pull = ((t_dof + 1) / t_dof) * (p - log_q.exp()) / (1 + d2 / t_dof)  # (B, K)
        difference = z[:, None] - mu[None]
        assert torch.allclose(z.grad, (pull[..., None] * difference).sum(1), atol=1e-9)  # type: ignore[arg-type]
        assert torch.allclose(mu.grad, -(pull[..., None] * difference).sum(0), atol=1e-9)  # type: ignore[arg-type]
