from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.bank.centres import NEAREST, RADIUS_FLOOR, Centres
from trainer.bank.settings import BankSettings
from trainer.distance import DIRECT_LIMIT
from trainer.errors import DataError

POINTS = [[0.0, 0.0], [3.0, 0.0], [0.0, 10.0]]
NO_CLUSTER = torch.zeros(1, dtype=torch.int64)
LEARNERS = ("kmeans", "stochastic_quantization", "coreset", "sample")


def centres_at(points: list[list[float]], **changes: Any) -> Centres:
    found = Centres(BankSettings(**changes), 2)
    found.centres = torch.tensor(points)
    found.radius = torch.ones(len(points))
    return found


def cell(x: float, y: float) -> Tensor:
    """One image of one cell."""
    return torch.tensor([x, y]).view(1, 2, 1, 1)


def distance(found: Centres, x: float, y: float, cluster: int = 0) -> float:
    return float(found(cell(x, y), torch.tensor([cluster])))


def test_a_cell_is_as_strange_as_its_nearest_centre_is_far() -> None:
    found = centres_at(POINTS)
    assert distance(found, 0, 4) == 4.0 and distance(found, 3, 4) == 4.0 and distance(found, 0, 10) == 0.0
    assert distance(found, 1, 0) == 1.0
    # Control: not the mean over all of them, not the farthest.
    assert distance(found, 1, 0) != pytest.approx((1 + 2 + 101**0.5) / 3)


def test_a_grid_of_cells_gives_what_each_of_them_gives_alone() -> None:
    """One is computed by a convolution, the other one directly."""
    x = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = centres_at(POINTS)
    whole = found(x, NO_CLUSTER.expand(2))
    assert whole.shape == (2, 3, 4)
    for row in range(3):
        for column in range(4):
            alone = found(x[:, :, row : row + 1, column : column + 1], NO_CLUSTER.expand(2))
            assert torch.allclose(whole[:, row : row + 1, column : column + 1], alone, atol=1e-5)


def test_an_image_of_one_cell_and_very_many_centres_is_measured_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(DIRECT_LIMIT // 2, 2, generator=generator)
    direct, product = Centres(BankSettings(), 2), Centres(BankSettings(), 2)
    direct.centres, product.centres = few, torch.cat([few, few[:8]])
    assert direct.centres.numel() == DIRECT_LIMIT < product.centres.numel()
    x = 6 + torch.randn(3, 2, 1, 1, generator=generator)
    assert torch.allclose(direct(x, NO_CLUSTER.expand(3)), product(x, NO_CLUSTER.expand(3)), atol=1e-3)


def test_a_cell_of_a_grid_that_lies_on_a_centre_is_as_near_as_can_be_told_and_not_the_root_of_rounding() -> None:
    points = 3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    found = Centres(BankSettings(), 64)
    found.centres = points
    on = points.T.reshape(1, 64, 5, 10).clone()
    assert torch.equal(found(on, NO_CLUSTER), torch.full((1, 5, 10), NEAREST))
    # Control: half a unit away in one direction is told from that.
    on[:, 7] += 0.5
    assert torch.allclose(found(on, NO_CLUSTER), torch.full((1, 5, 10), 0.5), atol=1e-3)


def test_local_counts_in_radii_of_the_own_centre() -> None:
    found = centres_at(POINTS, local=True)
    found.radius = torch.tensor([1.0, 2.0, 0.5])
    # (1, 0): 1 / 1 from the first, 2 / 2 from the second; (3, 4): 5 / 1, 4 / 2, sqrt(45) / .5.
    assert distance(found, 1, 0) == 1.0 and distance(found, 3, 4) == pytest.approx(2.0)
    # (1.8, 0): nearer to the second centre by distance, to the same one by radii: 1.2 / 2.
    assert distance(found, 1.8, 0) == pytest.approx(0.6)
    plain = centres_at(POINTS, local=False)
    plain.radius = found.radius
    assert distance(plain, 3, 4) == 4.0


def test_several_neighbours_are_averaged_and_so_are_their_radii() -> None:
    found = centres_at(POINTS, neighbours=2)
    assert distance(found, 1, 0) == pytest.approx((1 + 2) / 2)
    found = centres_at(POINTS, neighbours=2, local=True)
    found.radius = torch.tensor([1.0, 2.0, 100.0])
    assert distance(found, 1, 0) == pytest.approx((1 + 2) / 2 / ((1 + 2) / 2))
    assert distance(centres_at(POINTS, neighbours=9), 0, 0) == pytest.approx(13 / 3)  # there are three


def test_per_cluster_only_the_own_clusters_centres_count() -> None:
    found = centres_at(POINTS, per_cluster=True)
    found.cluster = torch.tensor([0, 0, 1])
    assert distance(found, 1, 0, cluster=0) == 1.0
    assert distance(found, 1, 0, cluster=1) == pytest.approx(101**0.5)
    found.cluster = torch.zeros(0, dtype=torch.int64)  # control: without clusters it is at home in both
    assert distance(found, 1, 0, cluster=1) == 1.0


def test_each_image_of_a_batch_is_compared_with_its_own_cluster() -> None:
    found = centres_at(POINTS, per_cluster=True)
    found.cluster = torch.tensor([0, 0, 1])
    both = torch.cat([cell(1, 0), cell(1, 0)])
    assert found(both, torch.tensor([0, 1])).flatten().tolist() == pytest.approx([1.0, 101**0.5])


def blobs(per_blob: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Cells around six places in 8 dimensions, their groups (ten, each of them in all places) and clusters (two)."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(6).repeat_interleave(per_blob)
    means = 6 * torch.randn(6, 8, generator=torch.Generator().manual_seed(99))
    z = means[place] + 0.3 * torch.randn(len(place), 8, generator=generator)
    return z, torch.arange(len(place)) % 10, (place >= 3).long()


def learned(z: Tensor, groups: Tensor, clusters: Tensor, seed: int = 0, **changes: Any) -> Centres:
    found = Centres(BankSettings(**{"size": 24, **changes}), z.shape[1])
    found.fit(z, groups, clusters, seed)
    return found


def distances(found: Centres, z: Tensor, clusters: Tensor) -> Tensor:
    return found(z[:, :, None, None], clusters).flatten()


@pytest.mark.parametrize("learn", LEARNERS)
def test_every_learner_leaves_good_cells_near_and_strange_ones_far(learn: str) -> None:
    found = learned(*blobs(), learn=learn)
    assert found.centres.shape == (24, 8) and (found.radius > 0).all() and found.centres.dtype == torch.float32
    new, _, clusters = blobs(seed=5)
    good = distances(found, new, clusters)
    strange = distances(found, new + 3, clusters)
    assert float(good.quantile(0.99)) < 2.5 < float(strange.min())


@pytest.mark.parametrize("learn", LEARNERS)
def test_control_one_centre_alone_knows_one_place_alone(learn: str) -> None:
    found = learned(*blobs(), learn=learn, size=1)
    new, _, clusters = blobs(seed=5)
    assert float(distances(found, new, clusters).mean()) > 5


@pytest.mark.parametrize("learn", LEARNERS)
def test_equal_seeds_learn_equal_centres_and_others_do_not(learn: str) -> None:
    first, again, other = (learned(*blobs(), seed, learn=learn) for seed in (3, 3, 4))
    assert torch.equal(first.centres, again.centres) and torch.equal(first.radius, again.radius)
    assert not torch.equal(first.centres, other.centres)


@pytest.mark.parametrize("learn", ["coreset", "sample"])
def test_points_are_cells_and_means_are_not(learn: str) -> None:
    z, groups, clusters = blobs()
    for kind in (learn, "kmeans"):
        found = learned(z, groups, clusters, learn=kind)
        known = (found.centres[:, None] == z[None]).all(2).any(1)
        assert bool(known.all()) == (kind == learn)


def test_a_sample_is_as_dense_as_the_cells_and_a_coreset_is_not() -> None:
    z, groups, clusters = blobs()
    z = torch.cat([z[:60].repeat(6, 1) + 0.01 * torch.randn(360, 8, generator=torch.Generator().manual_seed(0)), z])
    groups, clusters = torch.arange(len(z)) % 10, torch.zeros(len(z), dtype=torch.int64)
    place = blobs()[0][:60].mean(0)
    share = {
        learn: float(((learned(z, groups, clusters, learn=learn).centres - place).norm(dim=1) < 2).float().mean())
        for learn in ("sample", "coreset")
    }
    assert share["sample"] > 0.4 > 0.35 > share["coreset"]  # 7 of 12 cells lie there, in one of six places


def planted(learn: str, min_groups: int) -> float:
    """How strange a defect is that group 3 alone has among its good parts."""
    z, groups, clusters = blobs()
    defect = torch.full((8,), 9.0)
    among = defect + 0.05 * torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    z, groups = torch.cat([z, among]), torch.cat([groups, torch.full((30,), 3)])
    clusters = torch.cat([clusters, torch.zeros(30, dtype=torch.int64)])
    found = learned(z, groups, clusters, learn=learn, size=12, min_groups=min_groups)
    good = distances(found, *(blobs(seed=5)[n] for n in (0, 2)))
    assert float(good.quantile(0.9)) < 2.5
    return float(distances(found, defect[None], NO_CLUSTER))


@pytest.mark.parametrize("learn", ["kmeans", "coreset"])
def test_a_defect_that_one_group_alone_brought_makes_no_centre(learn: str) -> None:
    assert planted(learn, min_groups=2) > 5
    assert planted(learn, min_groups=1) < 1  # control: then it is known


def test_more_groups_than_there_are_are_refused() -> None:
    with pytest.raises(DataError, match=r"min_groups is 11, but no centre is known from so many groups; lower it"):
        learned(*blobs(), min_groups=11)


def test_per_cluster_each_cluster_learns_its_own_share() -> None:
    z, groups, clusters = blobs()
    found = learned(z, groups, clusters, per_cluster=True, size=24)
    assert found.cluster.bincount().tolist() == [12, 12]
    own, other = (distances(found, z, c) for c in (clusters, 1 - clusters))
    assert float(own.max()) < 2 < float(other.min())


def test_a_small_cluster_keeps_a_few_centres() -> None:
    z, groups, _ = blobs()
    clusters = (torch.arange(len(z)) >= len(z) - 20).long()
    found = learned(z, groups, clusters, per_cluster=True, size=24)
    assert found.cluster.bincount().tolist()[1] == 8


@pytest.mark.parametrize("local", [True, False])
def test_more_neighbours_than_a_small_cluster_has_centres_take_none_of_another(local: bool) -> None:
    z, groups, _ = blobs()
    clusters = (torch.arange(len(z)) >= len(z) - 3).long()  # three cells: no more than three centres
    found = learned(z, groups, clusters, per_cluster=True, neighbours=12, learn="coreset", local=local)
    known = distances(found, z[-3:], clusters[-3:])
    assert float(known.max()) < 20


def test_a_radius_of_a_mean_is_that_of_its_members() -> None:
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [50.0, 0.0], [50.0, 6.0]])
    groups, clusters = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    found = learned(z, groups, clusters, size=2)
    by_place = sorted(zip(found.centres[:, 0].tolist(), found.radius.tolist(), strict=True))
    assert by_place == [(1.0, pytest.approx(1.0)), (50.0, pytest.approx(3.0))]


def test_a_radius_of_a_point_is_the_mean_distance_to_the_nearest_others() -> None:
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    found = learned(z, torch.arange(3), torch.zeros(3, dtype=torch.int64), learn="coreset", size=3, neighbours=2)
    by_place = dict(zip(found.centres[:, 0].tolist(), found.radius.tolist(), strict=True))
    assert by_place == {0.0: pytest.approx(2.5), 1.0: pytest.approx(2.0), 4.0: pytest.approx(3.5)}


def test_copies_of_one_cell_do_not_give_a_radius_of_zero() -> None:
    z = blobs()[0]
    copies = torch.cat([z, torch.full((50, 8), 40.0)])
    found = learned(
        copies, torch.arange(len(copies)) % 10, torch.zeros(len(copies), dtype=torch.int64), learn="kmeans", local=True
    )
    assert float(found.radius.min()) >= RADIUS_FLOOR * 0.05
    assert torch.isfinite(distances(found, copies, torch.zeros(len(copies), dtype=torch.int64))).all()
