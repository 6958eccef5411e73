from __future__ import annotations

import pytest
import torch

from trainer.triplet import triplet_loss


def test_a_hand_computed_batch() -> None:
    # On a line: a at 0 and 1, b at 3 and 10. Pairs: (0,1): d 1, negative at 3: 1-3+4=2. (1,0): negative at distance 2: 3.
    # (3,10): d 7, both a are nearer: the farther one, at 3, serves, 7-3+4=8. (10,3): d 7, closest beyond is 9: 7-9+4=2.
    z = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    found = triplet_loss(z, torch.tensor([0, 0, 1, 1]), margin=4.0)
    assert (found.pairs, found.active, found.fallbacks) == (4, 4, 1)
    assert float(found.loss) == pytest.approx((2 + 3 + 8 + 2) / 4)


def test_pairs_far_enough_from_all_others_cost_nothing_and_do_not_dilute_the_rest() -> None:
    z = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    found = triplet_loss(z, torch.tensor([0, 0, 1, 1]), margin=0.5)
    assert found.active == 1 and float(found.loss) == pytest.approx(7 - 3 + 0.5)


def test_a_negative_is_never_of_the_same_label() -> None:
    torch.manual_seed(0)
    z, labels = torch.randn(40, 3), torch.randint(4, (40,))
    d = torch.cdist(z, z)
    costs = []
    for a in range(40):
        for p in range(40):
            if a == p or labels[a] != labels[p]:
                continue
            others = d[a][labels != labels[a]]
            beyond = others[others > d[a, p]]
            negative = beyond.min() if len(beyond) else others.max()
            costs.append(float((d[a, p] - negative + 1).clamp_min(0)))
    expected = sum(costs) / sum(cost > 0 for cost in costs)
    assert float(triplet_loss(z, labels, 1.0).loss) == pytest.approx(expected, rel=1e-4)


def test_unlabelled_samples_are_in_no_triplet() -> None:
    z = torch.tensor([[0.0], [1.0], [0.5], [10.0], [11.0]])
    with_unknown = triplet_loss(z, torch.tensor([0, 0, -1, 1, 1]), 1.0)
    without = triplet_loss(z[[0, 1, 3, 4]], torch.tensor([0, 0, 1, 1]), 1.0)
    assert with_unknown.pairs == without.pairs and torch.equal(with_unknown.loss, without.loss)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [-1, -1, -1]])
def test_without_a_triplet_the_loss_is_zero_and_still_has_a_gradient(labels: list[int]) -> None:
    z = torch.randn(3, 2, requires_grad=True)
    found = triplet_loss(z, torch.tensor(labels), 1.0)
    found.loss.backward()
    assert found.loss.item() == 0.0 and found.pairs == 0
    assert z.grad is not None and not z.grad.any()


def test_equal_embeddings_give_a_finite_gradient() -> None:
    z = torch.zeros(4, 2, requires_grad=True)
    found = triplet_loss(z, torch.tensor([0, 0, 1, 1]), 1.0)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(1.0)
    assert z.grad is not None and bool(z.grad.isfinite().all())
