from __future__ import annotations

import torch

from trainer.distance import nearest, squared_distances, squared_distances_matmul


def test_squared_distances_by_hand() -> None:
    z, mu = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert squared_distances(z, mu).tolist() == [[0.0, 9.0], [25.0, 16.0]]


def test_the_matmul_form_agrees_with_the_direct_one_and_never_goes_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, 64, generator=generator) * 100 + 1000
    direct, matmul = squared_distances(z, z), squared_distances_matmul(z, z, z.mean(0))
    assert float(matmul.min()) >= 0.0 and torch.isfinite(matmul.sqrt()).all()
    assert float((direct - matmul).abs().max() / direct.max()) < 1e-4
    uncentred = z.square().sum(1, keepdim=True) - 2 * z @ z.T + z.square().sum(1)
    assert float(uncentred.diagonal().min()) < 0.0  # what the clamp and the centring are for


def test_ties_go_to_the_lowest_index() -> None:
    ids, d2 = nearest(torch.tensor([[0.0]]), torch.tensor([[1.0], [-1.0], [1.0]]))
    assert (ids.tolist(), d2.tolist()) == ([0], [1.0])


def test_nearest_in_chunks_equals_nearest_in_one() -> None:
    z, mu = torch.randn(100, 5), torch.randn(7, 5)
    assert torch.equal(nearest(z, mu, chunk=9)[0], squared_distances(z, mu).argmin(1))
