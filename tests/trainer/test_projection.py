from __future__ import annotations

import pytest
import torch

from trainer.clustering.kmeans import kmeans
from trainer.projection import Projection, ProjectionSettings


def fitted(features: torch.Tensor, n_clusters: int = 2, **settings: object) -> Projection:
    projection = Projection(ProjectionSettings(**settings), features.shape[1], len(features))  # type: ignore[arg-type]
    projection.fit(features, n_clusters, seed=0)
    return projection


def anisotropic() -> torch.Tensor:
    return torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 4.0, 1.0, 0.1]) + 7


@pytest.mark.parametrize(("whiten", "expected"), [(0.0, 10.0), (0.25, 10.0**0.5), (0.5, 1.0)])
def test_whitening_divides_by_variance_to_the_exponent(whiten: float, expected: float) -> None:
    z = fitted(anisotropic(), kind="pca", dim=3, whiten=whiten)(anisotropic())
    assert z.shape == (500, 3)
    assert float(z[:, 0].std()) == pytest.approx(expected, rel=0.1)
    assert float(z.mean(0).abs().max()) < 1e-4 * expected + 1e-4


def test_signed_square_root_is_by_hand() -> None:
    projection = Projection(ProjectionSettings(sqrt=True), 3, 10)
    assert projection(torch.tensor([[4.0, -9.0, 0.0]])).tolist() == [[2.0, -3.0, 0.0]]


def test_l2_serves_the_cluster_space_only() -> None:
    projection = Projection(ProjectionSettings(l2=True), 2, 10)
    z = torch.tensor([[3.0, 4.0]])
    assert projection(z).tolist() == [[3.0, 4.0]]
    assert projection.to_cluster_space(z).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_dimensions_are_bounded_by_features_and_samples() -> None:
    assert Projection(ProjectionSettings(kind="pca", dim=64), 10, 1000).out_dim == 10
    assert Projection(ProjectionSettings(kind="pca", dim=64), 100, 20).out_dim == 19
    assert Projection(ProjectionSettings(kind="pca", dim=64), 100, 1).out_dim == 1


def test_within_whitening_separates_what_full_whitening_mixes() -> None:
    # Two kinds that differ along the widest axis, beside 39 axes of scatter; full whitening makes all 40 alike.
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(400) % 2
    features = torch.randn(400, 40, generator=generator) * torch.linspace(2, 0.2, 40)
    features[:, 0] = torch.randn(400, generator=generator) * 0.3 + 6 * kind

    def agreement(projection: Projection) -> float:
        match = (kmeans(projection(features), 2, 0).labels == kind).float().mean()
        return float(torch.maximum(match, 1 - match))

    assert agreement(fitted(features, kind="pca", dim=40, whiten=0.5)) < 0.95
    assert agreement(fitted(features, kind="within", dim=40)) == 1.0
    z = fitted(features, kind="within", dim=40)(features)
    residual = torch.cat([z[kind == k] - z[kind == k].mean(0) for k in (0, 1)])
    spread = residual.std(0)  # alike but for the shrinkage, from 2 : 0.2 before
    assert float(spread.quantile(0.25)) > 0.8 and float(spread.max()) < 1.15


def test_the_same_features_give_the_same_map() -> None:
    first, second = (fitted(anisotropic(), kind="within", dim=3).weight for _ in range(2))
    assert torch.equal(first, second)


def test_constant_features_give_finite_embeddings() -> None:
    projection = fitted(torch.ones(20, 4), kind="pca", dim=3, whiten=0.5)
    assert torch.isfinite(projection(torch.ones(2, 4))).all()
