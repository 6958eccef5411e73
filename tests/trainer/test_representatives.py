from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from trainer.clustering import representatives as module
from trainer.clustering.communities import CommunityOptions, find_communities, neighbour_edges
from trainer.clustering.neighbours import neighbours_within
from trainer.clustering.ownership import Ownership, OwnershipOptions, decide_owners
from trainer.clustering.representatives import (
    Bank,
    MisclusteredRounds,
    RepresentativeOptions,
    build_bank,
    build_same_class_bank,
    suspected_mislabels,
)
from trainer.errors import DataError

ALL_ACT = OwnershipOptions(min_correct=1)
KINDS = pytest.mark.parametrize("target", ["random", "nearest"])


def nearest(k: int) -> RepresentativeOptions:
    return RepresentativeOptions("nearest", k=k)


def six_points() -> tuple[Tensor, Ownership]:
    """Class 0 owns community 0 (samples 0, 1) and community 1 (2, 3); sample 4, of class 0 too, lies with class 1 in community 2."""
    z = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 8.0], [0.0, 10.0], [3.0, 4.0], [5.0, 5.0]])
    y = torch.tensor([0, 0, 0, 0, 0, 1])
    return z, decide_owners(y, torch.tensor([0, 0, 1, 1, 2, 2]), ALL_ACT)


def swapped(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Four blobs of 40, one class each, but the first 8 samples of blob 0 have class 3: z, y, ids of the swapped."""
    truth = torch.arange(4).repeat_interleave(40)
    z = 20 * torch.eye(4, 8)[truth] + torch.randn(160, 8, generator=torch.Generator().manual_seed(seed))
    y = truth.clone()
    y[:8] = 3
    return z, y, torch.arange(8)


def clustered(z: Tensor, y: Tensor, options: OwnershipOptions | None = None) -> Ownership:
    edges = neighbour_edges(neighbours_within(z, 8).ids)
    return decide_owners(y, find_communities(edges, len(z), CommunityOptions(resolution=0.1)), options)


def random_case(seed: int, options: OwnershipOptions = ALL_ACT) -> tuple[Tensor, Ownership]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(90, 5, generator=generator)
    y = torch.randint(-1, 4, (90,), generator=generator)
    return z, decide_owners(y, torch.randint(9, (90,), generator=generator), options)


def slow_loss(u: Tensor, ids: list[int], features: Tensor, owned: Ownership, k: int) -> float:
    """The definition, sample by sample, in float64."""
    lengths = []
    for row, sample in enumerate(ids):
        if not owned.misclustered[sample]:
            continue
        a, gaps = owned.y[sample], []
        for b in range(len(owned.owners)):
            members = torch.nonzero(owned.correct & (owned.communities == b) & (owned.y == a))[:, 0]
            if owned.owners[b] == a and len(members) and owned.active[a]:
                z = features[members].double()
                order = (z - u[row].double()).norm(dim=1).argsort()[:k]
                gaps.append(float((u[row].double() - z[order].mean(0)).norm()))
        lengths.append(min(gaps, default=0.0) / math.sqrt(u.shape[1]))
    return sum(lengths) / len(lengths) if lengths else 0.0


def test_loss_on_six_points_by_hand() -> None:
    z, owned = six_points()
    assert torch.nonzero(owned.misclustered)[:, 0].tolist() == [4]
    u = torch.tensor([[3.0, 4.0], [5.0, 5.0]], requires_grad=True)
    ids = torch.tensor([4, 5])
    # k = 2: community 0 gives (1, 0), |(2, 4)|^2 = 20; community 1 gives (0, 9), |(3, -5)|^2 = 34.
    loss = build_bank(z, owned, nearest(2)).loss(u, ids)
    assert loss.item() == pytest.approx(math.sqrt(20 / 2))
    loss.backward()
    expected = torch.tensor([2.0, 4.0]) / math.sqrt(20) / math.sqrt(2)
    assert u.grad is not None and torch.allclose(u.grad, torch.stack([expected, torch.zeros(2)]))
    # k = 1, and the nearest of all drawn: sample 1 at (2, 0), |(1, 4)|^2 = 17.
    assert float(build_bank(z, owned, nearest(1)).loss(u.detach(), ids)) == pytest.approx(math.sqrt(17 / 2))
    assert float(build_bank(z, owned).loss(u.detach(), ids)) == pytest.approx(math.sqrt(17 / 2))


@pytest.mark.parametrize("k", [1, 3, 50])
def test_loss_is_that_of_the_definition_sample_by_sample(k: int) -> None:
    for seed in range(6):
        z, owned = random_case(seed, OwnershipOptions(min_correct=4))
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(90, generator=generator)[:40]
        u = z[ids] + 0.3 * torch.randn(40, 5, generator=generator)
        loss = build_bank(z, owned, nearest(k)).loss(u, ids)
        assert float(loss) == pytest.approx(slow_loss(u, ids.tolist(), z, owned, k), rel=1e-5)


def test_batches_in_parts_give_the_loss_of_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    z, owned = random_case(0)
    bank, ids = build_bank(z, owned, nearest(3)), torch.arange(90)
    whole = float(bank.loss(z, ids))
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)
    assert float(bank.loss(z, ids)) == pytest.approx(whole)


def test_a_planted_swap_is_exactly_what_is_misclustered_and_is_pulled_home() -> None:
    z, y, planted = swapped()
    owned = clustered(z, y)
    assert torch.equal(torch.nonzero(owned.misclustered)[:, 0], planted)
    found = build_bank(z, owned, nearest(5)).targets(z, torch.arange(160))
    assert torch.equal(found.rows, planted) and found.asked == 8
    assert (found.points - 20 * torch.eye(4, 8)[3]).norm(dim=1).max() < 4


@pytest.mark.parametrize("options", [nearest(5), RepresentativeOptions(q=40)])
def test_targets_and_misclustered_samples_do_not_depend_on_the_order_of_storage(options: RepresentativeOptions) -> None:
    z, y, planted = swapped()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(3))
    stored, shuffled = clustered(z, y), clustered(z[order], y[order])
    assert torch.equal(order[shuffled.misclustered].sort().values, planted)
    u = z[planted] + 0.1
    place = order.argsort()[planted]  # where the planted samples went
    one = build_bank(z, stored, options).targets(u, planted)
    other = build_bank(z[order], shuffled, options).targets(u, place)
    assert torch.equal(one.rows, other.rows)
    torch.testing.assert_close(one.points, other.points, rtol=1e-6, atol=1e-6)


def test_any_order_of_storage_gives_the_loss_of_the_same_communities() -> None:
    for seed in range(5):
        z, owned = random_case(seed)
        order = torch.randperm(90, generator=torch.Generator().manual_seed(seed))
        moved = decide_owners(owned.y[order], owned.communities[order], ALL_ACT)
        one = build_bank(z, owned, nearest(3)).lengths(z, torch.arange(90))
        other = build_bank(z[order], moved, nearest(3)).lengths(z[order], torch.arange(90))
        torch.testing.assert_close(other, one[order], equal_nan=True)


@KINDS
def test_loss_is_exactly_0_and_in_the_graph_when_communities_are_the_classes(
    target: Literal["random", "nearest"],
) -> None:
    z, _, _ = swapped()
    y = torch.arange(4).repeat_interleave(40)
    u = z.clone().requires_grad_()
    loss = build_bank(z, decide_owners(y, y), RepresentativeOptions(target)).loss(u, torch.arange(160))
    assert loss.item() == 0.0
    loss.backward()
    assert u.grad is not None and (u.grad == 0).all()


def test_more_neighbours_than_samples_do_not_change_the_targets() -> None:
    z, owned = random_case(2)
    ids = torch.arange(90)
    largest = int(torch.bincount(owned.communities[owned.correct]).max())
    exact, beyond = (build_bank(z, owned, nearest(k)).targets(z, ids).points for k in (largest, 10 * largest))
    assert torch.equal(exact, beyond) and beyond.isfinite().all()
    members = {tuple(point) for point in z.tolist()}
    drawn = build_bank(z, owned, RepresentativeOptions(q=10_000)).targets(z, ids).points
    assert {tuple(point) for point in drawn.tolist()} <= members


def test_drawn_representatives_are_distinct_correctly_clustered_and_follow_the_seed() -> None:
    z, y, _ = swapped()
    owned = clustered(z, y)

    def drawn(seed: int) -> list[Tensor]:
        bank = build_bank(z, owned, RepresentativeOptions(q=10, seed=seed))
        return [bank.classes[a].ids for a in range(4)]

    for a, ids in enumerate(drawn(0)):
        assert len(ids) == len(set(ids.tolist())) == 10
        assert owned.correct[ids].all() and (y[ids] == a).all()
    assert all(map(torch.equal, drawn(0), drawn(0)))
    assert not all(map(torch.equal, drawn(0), drawn(1)))


def test_every_sample_is_drawn_equally_often() -> None:
    y = torch.zeros(12, dtype=torch.int64)
    owned = decide_owners(y, torch.arange(12) // 6)
    counts = torch.zeros(12)
    for seed in range(600):
        counts[build_bank(torch.zeros(12, 1), owned, RepresentativeOptions(q=2, seed=seed)).classes[0].ids] += 1
    assert counts.sum() == 600 * 4 and (counts / 600 - 1 / 3).abs().max() < 0.08


@KINDS
def test_gradient_reaches_the_batch_and_not_the_targets(target: Literal["random", "nearest"]) -> None:
    z, y, planted = swapped()
    features = z.clone().requires_grad_()
    u = (z[planted] + 0.5).requires_grad_()
    bank = build_bank(features, clustered(z, y), RepresentativeOptions(target))
    assert not bank.targets(u, planted).points.requires_grad
    bank.loss(u, planted).backward()
    assert features.grad is None and u.grad is not None
    away = u.detach() - bank.targets(u, planted).points
    cosine = torch.nn.functional.cosine_similarity(u.grad, away)
    assert torch.allclose(cosine, torch.ones(8))  # a step against it leads straight home


def test_a_sample_on_its_target_has_gradient_0_and_not_nan() -> None:
    z, owned = six_points()
    u = z[1:2].clone().requires_grad_()
    build_bank(z, owned, nearest(1)).loss(u, torch.tensor([4])).backward()
    assert u.grad is not None and u.grad.tolist() == [[0.0, 0.0]]


def test_a_bfloat16_batch_under_autocast_is_pulled_to_the_same_places() -> None:
    z, owned = random_case(1)
    bank, u = build_bank(z, owned, nearest(3)), z.bfloat16()
    plain = bank.targets(u.float(), torch.arange(90))
    with torch.autocast("cpu", torch.bfloat16):
        cast = bank.targets(u, torch.arange(90))
        assert bank.loss(u, torch.arange(90)).dtype == torch.float32
    assert torch.equal(plain.points, cast.points)


def test_a_nan_in_the_batch_shows_in_the_loss() -> None:
    z, owned = six_points()
    assert build_bank(z, owned, nearest(2)).loss(torch.full((1, 2), torch.nan), torch.tensor([4])).isnan()


def test_a_class_that_owns_nothing_counts_with_0() -> None:
    z = torch.tensor([[0.0], [1.0], [5.0], [6.0], [0.5], [5.5]])
    y = torch.tensor([0, 0, 1, 1, 2, 0])  # the one image of class 2 owns nothing; sample 5 lies with class 1
    bank = build_bank(z, decide_owners(y, torch.tensor([0, 0, 1, 1, 0, 1]), ALL_ACT), nearest(1))
    assert float(bank.loss(z[4:5], torch.tensor([4]))) == 0.0
    assert float(bank.loss(z[4:], torch.tensor([4, 5]))) == pytest.approx(4.5 / 2)
    assert bank.share().tolist() == [pytest.approx(2 / 3), 1.0, 0.0]


def test_a_class_with_few_correctly_clustered_samples_is_left_alone() -> None:
    y = torch.tensor([0] * 8 + [1] * 5)
    communities = torch.tensor([0] * 8 + [1] * 4 + [0])
    z = torch.arange(13.0)[:, None]
    last = torch.tensor([12])
    assert float(build_bank(z, decide_owners(y, communities)).loss(z[last], last)) == 0.0
    four = build_bank(z, decide_owners(y, communities, OwnershipOptions(min_correct=4)))
    assert float(four.loss(z[last], last)) == 1.0  # control: sample 11 is one away


def test_the_normalised_vote_pulls_towards_a_rare_class_and_the_plain_one_does_not() -> None:
    y = torch.tensor([0] * 60 + [1] * 7)
    communities = torch.tensor([0] * 50 + [1] * 10 + [1] * 6 + [0])
    z = torch.arange(67.0)[:, None]
    rare = torch.tensor([66])
    normalised = build_bank(z, decide_owners(y, communities, OwnershipOptions(vote="normalised")))
    assert float(normalised.loss(z[rare], rare)) == 1.0
    assert float(build_bank(z, decide_owners(y, communities)).loss(z[rare], rare)) == 0.0


def test_unlabelled_and_skipped_samples_are_not_pulled() -> None:
    z, y, planted = swapped()
    y[:4] = -1
    owned = clustered(z, y)
    skipped = torch.zeros(160, dtype=torch.bool)
    skipped[4:6] = True
    found = build_bank(z, owned, skipped=skipped).targets(z, torch.arange(160))
    assert found.rows.tolist() == [6, 7] and found.asked == 2
    assert build_bank(z, owned).targets(z[planted], planted).rows.tolist() == [4, 5, 6, 7]


def test_same_class_pull_by_hand() -> None:
    z = torch.tensor([[0.0], [1.0], [3.0], [7.0], [9.0], [4.0]])
    y = torch.tensor([0, 0, 0, 0, 1, -1])
    bank = build_same_class_bank(z, y, nearest(2))
    found = bank.targets(z, torch.arange(6))
    # The two nearest others of the class; the one image of class 1 has none, the unlabelled one is not asked.
    assert found.rows.tolist() == [0, 1, 2, 3] and found.points[:, 0].tolist() == [2.0, 1.5, 0.5, 2.0]
    assert found.asked == 5
    assert float(bank.loss(z, torch.arange(6))) == pytest.approx((2 + 0.5 + 2.5 + 5) / 5)


def test_same_class_pull_acts_where_communities_are_the_classes() -> None:
    z, _, _ = swapped()
    y = torch.arange(4).repeat_interleave(40)
    ids = torch.arange(160)
    assert float(build_same_class_bank(z, y, nearest(5)).loss(z, ids)) > 0
    assert float(build_bank(z, decide_owners(y, y), nearest(5)).loss(z, ids)) == 0


def test_share_of_representatives_per_class() -> None:
    z, y, _ = swapped()
    owned = clustered(z, y)
    assert build_bank(z, owned, nearest(5)).share().tolist() == [1.0, 1.0, 1.0, pytest.approx(40 / 48)]
    assert build_bank(z, owned, RepresentativeOptions(q=10)).share()[3] == pytest.approx(10 / 48)


def test_suspected_mislabels_are_listed_farthest_first_with_the_class_that_they_lie_with() -> None:
    z, y, planted = swapped()
    z[5] += 50
    y[80] = 4  # one image of a class that owns nothing
    owned = decide_owners(y, torch.arange(4).repeat_interleave(40))
    bank = build_bank(z, owned, nearest(5), skipped=owned.misclustered)
    found = suspected_mislabels(bank, owned, z)
    assert sorted(found.ids.tolist()) == [*planted.tolist(), 80] and found.ids[0] == 5 and found.ids[-1] == 80
    assert found.owner_classes.tolist() == [0] * 8 + [2] and found.classes.tolist() == [3] * 8 + [4]
    assert found.lengths[:-1].tolist() == sorted(found.lengths[:-1].tolist(), reverse=True)
    assert found.lengths[-1].isnan()


def test_a_sample_is_skipped_after_three_successive_rounds_if_the_model_is_sure_of_the_owner() -> None:
    wrong = decide_owners(torch.tensor([0, 0, 0, 1, 1]), torch.zeros(5, dtype=torch.int64))
    right = decide_owners(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1]))
    predicted, confidence = torch.zeros(5, dtype=torch.int64), torch.tensor([1.0, 1.0, 1.0, 0.95, 0.6])
    rounds = MisclusteredRounds(5)
    marks = [rounds.advance(owned, predicted, confidence).tolist() for owned in (wrong, wrong, wrong)]
    assert marks == [[False] * 5, [False] * 5, [False, False, False, True, False]]
    assert not rounds.advance(wrong, torch.ones(5, dtype=torch.int64), confidence).any()  # sure of its own class
    assert rounds.rounds.tolist() == [0, 0, 0, 4, 4]
    assert not rounds.advance(right, predicted, confidence).any() and rounds.rounds.sum() == 0
    assert not rounds.advance(wrong, predicted, confidence).any()  # counted afresh


def test_without_labels_the_setting_is_named() -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        build_same_class_bank(torch.zeros(3, 2), torch.full((3,), -1))


def test_what_does_not_fit_is_refused_with_the_values() -> None:
    z, owned = six_points()
    with pytest.raises(ValueError, match=r"features are \(5, 2\) for 6 samples"):
        build_bank(z[:5], owned)
    with pytest.raises(ValueError, match="k is 0 and q is 100"):
        build_bank(z, owned, nearest(0))


def test_a_bank_keeps_its_features_when_the_caller_changes_them() -> None:
    z, owned = six_points()
    bank: Bank = build_bank(z, owned, nearest(2))
    before = float(bank.loss(torch.tensor([[3.0, 4.0]]), torch.tensor([4])))
    z.zero_()
    assert float(bank.loss(torch.tensor([[3.0, 4.0]]), torch.tensor([4]))) == before


@pytest.mark.gpu
def test_the_gpu_gives_the_targets_of_the_cpu_for_ids_from_the_loader() -> None:
    z, owned = random_case(0)
    ids = torch.arange(90)
    moved = decide_owners(owned.y.cuda(), owned.communities.cuda(), ALL_ACT)
    for options in (nearest(3), RepresentativeOptions(q=4)):
        one, other = build_bank(z, owned, options), build_bank(z.cuda(), moved, options)
        assert torch.equal(one.targets(z, ids).rows, other.targets(z.cuda(), ids).rows.cpu())
        torch.testing.assert_close(one.targets(z, ids).points, other.targets(z.cuda(), ids).points.cpu())
        torch.testing.assert_close(one.loss(z, ids), other.loss(z.cuda(), ids).cpu())
