from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainer.test_kmeans import blobs
from trainer.clustering.kmeans import kmeans
from trainer.clustering.mini_batch import SEEDING_SAMPLE, MiniBatchOptions, MiniBatchStream, mini_batch_kmeans, updated
from trainer.distance import nearest
from trainer.errors import DataError
from trainer.feature_store import FeatureStore


def test_one_update_by_hand() -> None:
    mu = torch.tensor([[0.0], [10.0], [5.0]], dtype=torch.float64)
    counts = torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64)
    moved, total = updated(mu, counts, torch.tensor([[3.0], [12.0], [14.0]]), torch.tensor([0, 1, 1]))
    assert moved.flatten().tolist() == [1.0, 13.0, 5.0]  # eta 1/3 of the way to 3; the mean of 12 and 14; untouched
    assert total.tolist() == [3.0, 2.0, 3.0]


def test_it_comes_close_to_full_k_means() -> None:
    z = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    full, batches = kmeans(z, 10, 0), mini_batch_kmeans(z, 10, 0, MiniBatchOptions(batch_size=256))
    assert full.inertia <= batches.inertia * (1 + 1e-6) and batches.inertia < 1.05 * full.inertia
    worse = mini_batch_kmeans(z, 10, 0, MiniBatchOptions(batch_size=256, epochs=1), init=torch.randn(10, 8) * 5)
    assert worse.inertia > batches.inertia  # control: one pass from a poor start is not enough


def test_labels_are_those_of_nearest_and_equal_seeds_give_equal_arrays() -> None:
    z, _ = blobs(5, 200)
    first, second = (mini_batch_kmeans(z, 5, 7, MiniBatchOptions(batch_size=64)) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.labels, nearest(z, first.centroids)[0])


def test_a_starved_centroid_starts_again_where_points_are() -> None:
    z, _ = blobs(4, 100)
    start = torch.cat([z[[0, 100, 200]], torch.full((1, 5), 1e3)])
    result = mini_batch_kmeans(z, 4, 0, MiniBatchOptions(batch_size=100), init=start)
    assert (torch.bincount(result.labels, minlength=4) == 100).all()


def test_one_cluster_is_the_mean() -> None:
    z, _ = blobs()
    assert torch.allclose(mini_batch_kmeans(z, 1, 0).centroids[0], z.mean(0), atol=1e-4)


def test_too_few_distinct_points_name_the_setting() -> None:
    with pytest.raises(DataError, match=r"method\.n_clusters is 3, but the 10 images have only 2"):
        mini_batch_kmeans(torch.tensor([[0.0], [1.0]]).repeat(5, 1), 3, 0)


def test_a_stream_gives_the_same_centroids_however_its_rows_are_cut() -> None:
    z = torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))
    whole = MiniBatchStream(6, 1, batch_size=64).partial_fit(z).finish().centroids
    for size in (1, 50, 700):
        stream = MiniBatchStream(6, 1, batch_size=64)
        for part in z.split(size):
            stream.partial_fit(part)
        assert torch.equal(stream.finish().centroids, whole)


def test_one_pass_over_features_on_disk_comes_close_to_full_k_means(tmp_path: Path) -> None:
    z, _ = blobs(5, 2000)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    store = FeatureStore(len(z), z.shape[1], tmp_path / "z.f32")
    store.write(torch.arange(len(z)), z[order])
    stream = MiniBatchStream(5, 0, batch_size=256)
    for part in store.whole().split(1000):
        stream.partial_fit(part)
    found = float(nearest(z, stream.finish().centroids)[1].sum())
    assert found < 1.02 * kmeans(z, 5, 0).inertia
    in_blocks = MiniBatchStream(5, 0, batch_size=256).partial_fit(z).finish()  # control: one blob after the other
    assert float(nearest(z, in_blocks.centroids)[1].sum()) > 2 * found


def test_a_stream_holds_no_more_than_the_sample_it_begins_with() -> None:
    stream = MiniBatchStream(3, 0, batch_size=16)
    rows = torch.randn(16 * SEEDING_SAMPLE + 5, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="40 embeddings came, too few to begin with"):
        _ = stream.partial_fit(rows[:40]).centroids
    stream.partial_fit(rows[40:])
    for _ in range(100):
        assert sum(map(len, stream._waiting)) < 16 and stream._waiting[0].untyped_storage().nbytes() < 16 * 2 * 4
        stream.partial_fit(rows)
    with pytest.raises(DataError, match="ended before the first embedding"):
        MiniBatchStream(3, 0).finish()
    with pytest.raises(DataError, match=r"have only 1 different embeddings"):
        MiniBatchStream(3, 0).partial_fit(rows[:1].repeat(50, 1)).finish()
