from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.ranks import run_on_ranks
from tests.trainer.test_kmeans import blobs
from trainer import ranks
from trainer.clustering import engine as engines
from trainer.clustering import kmeans as module
from trainer.clustering.engine import Assign, Engine, exact_products
from trainer.clustering.kmeans import KMeansOptions, KMeansResult, distinct_rows, kmeans, member_sums, seeding_points
from trainer.clustering.mini_batch import MiniBatchOptions, mini_batch_kmeans
from trainer.errors import DataError

SMALL_CHUNKS = {"SUM_CHUNK_CPU": 1 << 12, "KEPT_WIDE": 0}


def points(n: int, dim: int, kinds: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, dim, generator=generator)
        + 4 * torch.randn(kinds, dim, generator=generator)[torch.arange(n) % kinds]
    )


def equal(a: KMeansResult, b: KMeansResult) -> bool:
    return torch.equal(a.centroids, b.centroids) and torch.equal(a.labels, b.labels) and a.inertia == b.inertia


@pytest.mark.parametrize("spherical", [False, True])
def test_sums_in_chunks_are_the_sums_of_the_whole_to_the_last_digit(
    spherical: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, options = points(5000, 7, 9), KMeansOptions(n_init=2, spherical=spherical)
    whole = kmeans(z, 9, 0, options)
    for name, value in SMALL_CHUNKS.items():
        monkeypatch.setattr(module, name, value)
    assert equal(kmeans(z, 9, 0, options), whole)


def test_sums_and_numbers_of_members_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUM_CHUNK_CPU", 2)  # a row at a time
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sums, counts = member_sums(z, torch.tensor([2, 0, 2]), 3)
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8]] and counts.tolist() == [1, 0, 2]


def peak_bytes(z: Tensor) -> int:
    """What k-means takes at most beside z, by the allocator's own book."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kmeans(z, 2, 0, KMeansOptions(max_iterations=2, engine="torch"), z[:2].clone())
    taken = most = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        most = max(most, taken)
    return most


def test_memory_is_one_copy_of_the_points_and_a_few_values_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL_CHUNKS.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(engines, "SQUARE_ROWS", 1 << 10)
    dim, few, many = 128, 15_000, 45_000
    z = points(many, dim, 2)
    small, large = peak_bytes(z[:few]), peak_bytes(z)
    per_point = (large - small) / (many - few)
    assert 4 * dim <= per_point <= 4 * dim + 48
    # 10 M x 128 on a GPU: the points, this, and a chunk each of products and of what is summed.
    chunks = 4 * engines.CHUNK_PRODUCTS_GPU + 8 * module.SUM_CHUNK_GPU
    assert 10**7 * (4 * 128 + per_point) + chunks < 13e9
    wide = z.double()  # control: one more copy is seen
    assert (peak_bytes(wide) - peak_bytes(wide[:few])) / (many - few) >= 8 * dim


@pytest.mark.parametrize(
    ("n", "dim", "k", "expected"),
    [
        (70_000, 10, 10, 70_000),
        (1_000_000, 128, 1000, 1_000_000),
        (10_000_000, 128, 10_000, 107_374),  # 2^30 / K
        (10_000_000, 128, 100_000, 800_000),  # 8 a cluster
        (10_000_000, 128, 10, 1_048_576),  # 2^27 / D
        (1_000_000, 8, 500_000, 1_000_000),  # never more than there are
    ],
)
def test_how_many_points_the_seeding_looks_at_by_hand(n: int, dim: int, k: int, expected: int) -> None:
    assert seeding_points(n, dim, k) == expected


def test_seeds_of_a_sample_are_points_and_end_as_well_as_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    z, options = points(4000, 6, 12), KMeansOptions(n_init=3)
    whole = kmeans(z, 12, 0, options)
    monkeypatch.setattr(module, "SEEDING_PRODUCTS", 1000)
    assert seeding_points(len(z), 6, 12) == 96
    sampled = kmeans(z, 12, 0, options)
    assert not torch.equal(sampled.centroids, whole.centroids) and sampled.inertia < 1.02 * whole.inertia
    assert kmeans(z, 12, 0, KMeansOptions(n_init=1, init="random")).inertia > 1.02 * whole.inertia  # control
    seeds = module.seeding(z, 12, torch.Generator().manual_seed(1), "++")
    assert all((z == seed).all(1).any() for seed in seeds)


def test_distinct_rows_are_looked_for_beyond_the_first_ones() -> None:
    z = torch.cat([torch.zeros(5000, 2), torch.arange(20_000.0)[:, None].repeat(1, 2)])
    assert distinct_rows(z, 1500) >= 1500 and distinct_rows(z, 30_000) == 20_000


def test_products_are_exact_whatever_the_program_has_set() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def shared(n: int, k: int, options: KMeansOptions, far: bool = False) -> tuple[KMeansResult, int]:
    """On every rank: k-means over all of them, and how many points this one held."""
    module.SHARED_FROM = 0
    z = points(n, 16, 12)
    held: list[int] = []
    build = module.build_assign

    def counted(part: Tensor, n_clusters: int, engine: Engine) -> Assign:
        held.append(len(part))
        return build(part, n_clusters, engine)

    module.build_assign = counted
    try:
        start = torch.cat([z[: k - 3], torch.full((3, 16), 1e3)]) if far else None
        return kmeans(z, k, 0, options, start), held[0]
    finally:
        module.build_assign, module.SHARED_FROM = build, 10**8


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize("n", [3001, 5])
def test_two_processes_share_the_points_and_find_what_one_finds(n: int, engine: Engine) -> None:
    options = KMeansOptions(n_init=1, engine=engine)
    k = min(12, n - 1)
    one = kmeans(points(n, 16, 12), k, 0, options)
    (first, held), (second, held_too) = run_on_ranks(2, shared, n, k, options)
    assert equal(first, second) and sorted([held, held_too]) == [n // 2, n - n // 2]
    assert torch.allclose(first.centroids, one.centroids, atol=1e-5) and torch.equal(first.labels, one.labels)
    assert first.inertia == pytest.approx(one.inertia, rel=1e-6) and first.iterations == one.iterations


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize("options", [KMeansOptions(), KMeansOptions(spherical=True), KMeansOptions(max_iterations=1)])
def test_centroids_without_members_and_unit_lengths_are_shared_alike(options: KMeansOptions) -> None:
    z = points(2000, 16, 12)
    one = kmeans(z, 12, 0, options, torch.cat([z[:9], torch.full((3, 16), 1e3)]))
    (first, _), (second, _) = run_on_ranks(2, shared, 2000, 12, options, True)
    assert equal(first, second) and torch.allclose(first.centroids, one.centroids, atol=1e-5)


def small(n: int) -> tuple[KMeansResult, KMeansResult]:
    z, _ = blobs(4, n)
    return kmeans(z, 4, 0), mini_batch_kmeans(z, 4, 0, MiniBatchOptions(batch_size=16))


@pytest.mark.slow  # starts processes
def test_few_points_and_mini_batches_are_the_first_ones_work_and_exactly_its_result() -> None:
    expected = small(30)
    for found in run_on_ranks(2, small, 30):
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


def too_few() -> str:
    try:
        kmeans(torch.zeros(10, 2), 3, ranks.current().index)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.slow  # starts processes
def test_what_is_wrong_with_the_points_is_every_processs_error() -> None:
    assert all("have only 1 different embeddings" in text for text in run_on_ranks(2, too_few))


@pytest.mark.gpu
def test_on_a_gpu_memory_is_what_the_page_says_and_the_result_that_of_a_cpu() -> None:
    n, dim = 1_000_000, 128
    z = points(n, dim, 50)
    start, options = z[:50].clone(), KMeansOptions(max_iterations=5)
    there = z.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = kmeans(there, 50, 0, options, start)
    taken = torch.cuda.max_memory_allocated() - before
    assert n * 4 * dim <= taken <= n * (4 * dim + 48) + 4 * engines.CHUNK_PRODUCTS_GPU + 8 * module.SUM_CHUNK_GPU
    assert torch.allclose(found.centroids.cpu(), kmeans(z, 50, 0, options, start).centroids, atol=1e-4)
