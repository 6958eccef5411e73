from __future__ import annotations

import itertools
import sys
from typing import Literal

import networkx as nx
import pytest
import torch
from torch import Tensor

from trainer.clustering.communities import (
    MAX_TRIALS,
    CommunityOptions,
    Trial,
    TuningAim,
    _closeness,
    find_communities,
    neighbour_edges,
    tune_resolution,
)
from trainer.clustering.neighbours import neighbours_within
from trainer.clustering.ownership import OwnershipOptions
from trainer.errors import DataError

Algorithm = Literal["leiden", "louvain"]
ALGORITHMS = pytest.mark.parametrize("algorithm", ["leiden", "louvain"])


def blobs(k: int, each: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    truth = torch.arange(k).repeat_interleave(each)
    noise = torch.randn(k * each, 6, generator=torch.Generator().manual_seed(seed))
    return 20 * torch.eye(k, 6)[truth] + noise, truth


def cliques(n: int, size: int) -> Tensor:
    """Complete graphs in a ring, neighbours joined by one edge."""
    inside = [(c * size + a, c * size + b) for c in range(n) for a, b in itertools.combinations(range(size), 2)]
    between = [(c * size + size - 1, (c + 1) % n * size) for c in range(n)]
    return torch.tensor(inside + between)


def random_edges(n: int, edges: int, seed: int) -> Tensor:
    return torch.tensor(list(nx.gnm_random_graph(n, edges, seed=seed).edges))


def pieces(edges: Tensor, labels: Tensor) -> int:
    """Connected parts that the communities consist of."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(labels)))
    graph.add_edges_from((a, b) for a, b in edges.tolist() if labels[a] == labels[b])
    return nx.number_connected_components(graph)


def test_edges_are_undirected_unique_and_without_loops() -> None:
    ids = torch.tensor([[1, 2], [0, 1], [1, 3], [2, 0]])
    assert neighbour_edges(ids).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [2, 3]]
    assert neighbour_edges(torch.zeros(3, 0, dtype=torch.int64)).shape == (0, 2)


@pytest.mark.parametrize("stray", [-1, 3])
def test_neighbour_ids_that_are_none_are_refused(stray: int) -> None:
    with pytest.raises(ValueError, match=r"expected 0 to 2"):
        neighbour_edges(torch.tensor([[1], [stray], [0]]))


@ALGORITHMS
def test_cliques_are_the_communities_and_are_numbered_by_their_lowest_member(algorithm: Algorithm) -> None:
    found = find_communities(cliques(6, 5), 30, CommunityOptions(algorithm))
    assert torch.equal(found, torch.arange(6).repeat_interleave(5))


@ALGORITHMS
def test_isolated_nodes_are_communities_of_their_own(algorithm: Algorithm) -> None:
    edges = torch.tensor([[1, 2], [2, 3], [1, 3]])
    assert find_communities(edges, 6, CommunityOptions(algorithm)).tolist() == [0, 1, 1, 1, 2, 3]
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert find_communities(none, 3, CommunityOptions(algorithm)).tolist() == [0, 1, 2]


@ALGORITHMS
def test_equal_seeds_give_equal_communities_whatever_the_order_of_the_edges(algorithm: Algorithm) -> None:
    edges = random_edges(300, 500, seed=3)
    first = find_communities(edges, 300, CommunityOptions(algorithm, seed=7))
    mixed = edges[torch.randperm(500, generator=torch.Generator().manual_seed(0))].flip(1)
    assert torch.equal(find_communities(mixed, 300, CommunityOptions(algorithm, seed=7)), first)
    others = [find_communities(edges, 300, CommunityOptions(algorithm, seed=seed)) for seed in range(4)]
    assert any(not torch.equal(other, first) for other in others)  # control: the graph has several answers


@ALGORITHMS
def test_separate_groups_stay_the_same_when_points_are_stored_in_another_order(algorithm: Algorithm) -> None:
    z, truth = blobs(4, 30)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    options = CommunityOptions(algorithm, resolution=0.1)
    stored = find_communities(neighbour_edges(neighbours_within(z, 8).ids), 120, options)
    shuffled = find_communities(neighbour_edges(neighbours_within(z[order], 8).ids), 120, options)
    assert torch.equal(stored, truth)
    assert torch.equal(shuffled[:, None] == shuffled, (stored[:, None] == stored)[order][:, order])
    firsts = [int(torch.nonzero(shuffled == c)[0]) for c in range(4)]
    assert firsts == sorted(firsts)


def test_leiden_communities_are_connected_where_single_moves_could_leave_them_apart() -> None:
    # Two triangles that only node 0 joins, and a clique that holds it: once 0 has left, no single node of the triangles gains by a move.
    triangles = [(1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6), (0, 1), (0, 4)]
    clique = [(0, node) for node in range(7, 12)] + list(itertools.combinations(range(7, 12), 2))
    edges = torch.cat([torch.tensor(triangles + clique), cliques(20, 6) + 12])
    n = 12 + 120
    graph = nx.Graph(edges.tolist())

    def quality(labels: list[int]) -> float:
        parts = [{node for node in range(n) if labels[node] == label} for label in set(labels)]
        return float(nx.community.modularity(graph, parts))

    apart = [2, 1, 1, 1, 1, 1, 1, *[2] * 5, *(3 + node // 6 for node in range(120))]
    assert pieces(edges, torch.tensor(apart)) == len(set(apart)) + 1
    moves = ([*apart[:node], to, *apart[node + 1 :]] for node in range(1, 7) for to in (0, 2, 3))
    assert max(map(quality, moves)) < quality(apart)  # control: a state that single moves do not leave
    found = find_communities(edges, n)
    assert pieces(edges, found) == int(found.max()) + 1
    assert quality(found.tolist()) > quality(apart)


@pytest.mark.parametrize("resolution", [0.3, 1.0, 3.0])
def test_leiden_communities_are_connected_on_random_graphs(resolution: float) -> None:
    for seed in range(15):
        edges = random_edges(150, 220, seed)
        found = find_communities(edges, 150, CommunityOptions(resolution=resolution, seed=seed))
        assert pieces(edges, found) == int(found.max()) + 1


@ALGORITHMS
def test_a_higher_resolution_gives_more_communities(algorithm: Algorithm) -> None:
    edges = random_edges(200, 500, seed=0)
    counts = [int(find_communities(edges, 200, CommunityOptions(algorithm, gamma)).max()) for gamma in (0.2, 1.0, 5.0)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("resolution", [0.0, -1.0, float("nan"), float("inf")])
def test_a_resolution_that_is_not_a_positive_number_is_refused(resolution: float) -> None:
    with pytest.raises(ValueError, match=r"the resolution is .*, expected a number > 0"):
        find_communities(torch.tensor([[0, 1]]), 2, CommunityOptions(resolution=resolution))


def test_the_resolution_rises_until_every_class_owns_a_community() -> None:
    y = torch.arange(40).repeat_interleave(4)  # modularity joins neighbours in a ring of many small cliques
    edges = cliques(40, 4)
    tuned = tune_resolution(edges, y)
    assert [trial.resolution for trial in tuned.tried] == [2.0**step for step in range(len(tuned.tried))]
    assert len(tuned.tried) > 1 and tuned.tried[0].communities < 40
    assert tuned.fit and tuned.resolution == tuned.tried[-1].resolution and tuned.tried[-1].owning >= 0.95
    assert torch.equal(tuned.communities, find_communities(edges, 160, CommunityOptions(resolution=tuned.resolution)))


def test_the_resolution_falls_while_there_are_too_many_communities() -> None:
    y = torch.arange(2).repeat_interleave(80)
    tuned = tune_resolution(cliques(40, 4), y, CommunityOptions(resolution=4.0))
    assert tuned.tried[0].communities > 20 and tuned.resolution < 4.0
    assert tuned.fit and 2 <= tuned.tried[-1].communities <= 20


def test_an_aim_out_of_reach_ends_with_the_nearest_trial_and_says_so() -> None:
    y = torch.arange(2).repeat(20)  # both classes in every clique, and equally: class 0 owns all
    tuned = tune_resolution(cliques(10, 4), y, aim=TuningAim(most_per_class=3))
    assert not tuned.fit and 1 <= len(tuned.tried) <= MAX_TRIALS
    assert max(trial.owning for trial in tuned.tried) == next(
        trial.owning for trial in tuned.tried if trial.resolution == tuned.resolution
    )


def test_the_vote_decides_which_classes_own_one() -> None:
    y = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1])  # three cliques; the last has two of a rare class
    edges = cliques(3, 5)
    assert tune_resolution(edges, y, vote=OwnershipOptions("normalised", min_correct=1)).tried[0].owning == 1.0
    assert tune_resolution(edges, y, vote=OwnershipOptions("majority", min_correct=1)).tried[0].owning == 0.5


def test_a_class_of_two_images_does_not_shatter_the_graph() -> None:
    y = torch.tensor(
        [0] * 20 + [1] * 20 + [2] * 2
    )  # two cliques of twenty and twenty-two; the rare class sits in the second
    edges = torch.cat([cliques(1, 20), cliques(1, 22) + 20])
    tuned = tune_resolution(edges, y)
    assert tuned.fit and len(torch.unique(tuned.communities)) == 2


def test_a_shattered_graph_is_never_preferred_to_a_number_in_range() -> None:
    in_range, shattered, too_few = Trial(1.0, 40, 0.5), Trial(64.0, 400, 1.0), Trial(0.25, 3, 0.6)
    ranked = sorted((in_range, shattered, too_few), key=lambda trial: _closeness(trial, TuningAim(), 10))
    assert ranked[0] is shattered and ranked[-1] is too_few


def test_tuning_without_labels_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"data\.path"):
        tune_resolution(cliques(3, 4), torch.full((12,), -1))


def test_without_the_library_of_leiden_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "graspologic_native", None)
    with pytest.raises(DataError, match="method.communities is leiden.*or use louvain"):
        find_communities(cliques(3, 4), 12)
    assert len(torch.unique(find_communities(cliques(3, 4), 12, CommunityOptions("louvain")))) == 3
