"""The head in numpy against the exported graph's own, and against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from edge_dkm import Inspector
from edge_dkm.codebook import write_codebook
from edge_dkm.contract import CODEBOOK
from edge_dkm.errors import UsageError
from edge_dkm.golden import load_golden, verify_golden
from edge_dkm.head import compute_head, is_whole, to_cluster_space
from edge_dkm.model_file import golden_path
from exporters.graph import FusedModel
from exporters.trace import trace
from tests.images import draw
from trainer.encoders.mlp import MLPEncoder, MLPSettings
from trainer.model import ClusterModel
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.projection import Projection, ProjectionSettings

SIDE, DIM = 8, 8
Codebook = dict[str, np.ndarray]

# Two clusters on the axes; radius 2 of the second.
BY_HAND: Codebook = {
    "centroids": np.array([[1, 0], [0, 1]], np.float32),
    "cluster_mean": np.array([[3, 0], [0, 4]], np.float32),
    "cluster_radius": np.array([1, 2], np.float32),
    "novelty_scale": np.array([0.5], np.float32),
    "calibration": np.array([0.25, 1, 2], np.float32),
    "calibration_weight": np.array([1, 0.5, 0.5], np.float32),
}


def test_the_formulas_by_hand_without_l2() -> None:
    out = compute_head(np.array([[0, 2]], np.float32), BY_HAND, 1.9, l2=False)
    assert out["distances"].tolist() == [[np.float32(5**0.5), 1.0]] and out["distance"].tolist() == [1.0]
    # |(0, 2) - (0, 4)| = 2, in radii 1, over a scale of .5
    assert out["cluster_id"].tolist() == [1] and out["novelty_score"].tolist() == [2.0]
    assert out["p_value"].tolist() == pytest.approx(
        [(1 + 1.0) / (1 + 2)]
    )  # the scores 1 and 2, half a weight each, are at least 1
    assert out["is_novel"].tolist() == [True]
    assert compute_head(np.array([[0, 2]], np.float32), BY_HAND, 2.0, l2=False)["is_novel"].tolist() == [False]


def test_the_novelty_distance_is_taken_before_the_l2() -> None:
    out = compute_head(np.array([[0, 2]], np.float32), BY_HAND, 1.0, l2=True)
    assert out["distance"].tolist() == [0.0] and out["novelty_score"].tolist() == [2.0]


def test_a_patch_score_joins_by_a_maximum_and_changes_nothing_else() -> None:
    embedding = np.array([[0, 2], [0, 2]], np.float32)
    plain = compute_head(embedding, BY_HAND, 1.0, l2=False)
    out = compute_head(embedding, BY_HAND, 1.0, False, np.array([0.5, 1.5], np.float32))
    # In radii the embedding is at 1: the first patch score is below it, the second one above; the scale is .5.
    assert out["novelty_score"].tolist() == [2.0, 3.0]
    assert out["p_value"].tolist() == pytest.approx([2 / 3, (1 + 0.5) / 3])  # of the scores only 2 is at least 1.5
    for name in ("cluster_id", "distance", "distances", "embedding"):
        assert np.array_equal(out[name], plain[name])
    assert plain["novelty_score"].tolist() == [2.0, 2.0]


def test_ties_go_to_the_lowest_id_and_an_embedding_of_zeros_stays_finite() -> None:
    zeros = compute_head(np.zeros((1, 2), np.float32), BY_HAND, 1.0, l2=True)
    assert zeros["cluster_id"].tolist() == [0] and zeros["distances"].tolist() == [[1.0, 1.0]]
    assert to_cluster_space(np.array([[3, 4]], np.float32), True).tolist() == [[np.float32(0.6), np.float32(0.8)]]


def test_a_part_of_a_codebook_is_refused() -> None:
    assert is_whole(BY_HAND) and not is_whole({"novelty_threshold": np.ones(1, np.float32)})
    with pytest.raises(UsageError, match="replaced as a whole, but cluster_mean, .* of it is missing"):
        is_whole({"centroids": BY_HAND["centroids"]})


@cache
def traced(n_clusters: int, l2: bool) -> tuple[bytes, Codebook]:
    """An exported graph with a random encoder, and its codebook."""
    torch.manual_seed(n_clusters)
    preprocess = Preprocess(PreprocessSettings(resize="none"), SIDE, SIDE)
    encoder = MLPEncoder(MLPSettings(hidden=(16,), dim=DIM), (3, SIDE, SIDE))
    model = ClusterModel(preprocess, encoder, Projection(ProjectionSettings(l2=l2), DIM, 100), n_clusters)
    model.preprocess.std.fill_(64.0)
    images = torch.from_numpy(noise(200, 99))
    with torch.no_grad():
        embeddings = model.embed_pixels(model.preprocess.geometry(images))
        means = embeddings[torch.randint(200, (n_clusters,))] + 0.1 * torch.randn(n_clusters, DIM)
        model.set_centroids(model.projection.to_cluster_space(means))
        model.cluster_mean.copy_(means)
        model.cluster_radius.copy_(0.1 + torch.rand(n_clusters))
        model.novelty_scale.fill_(1.7)
        model.calibration = torch.rand(20).mul(3).sort().values
        model.calibration_weight = torch.rand(20)
    codebook = {spec.name: getattr(model, spec.name).detach().numpy().copy() for spec in CODEBOOK}
    return trace(FusedModel(model.eval()), (SIDE, SIDE)).SerializeToString(), codebook


def noise(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def compared(data: bytes, codebook: Codebook, feed: Codebook, l2: bool) -> int:
    """How many frames were decisive; on those both give the same answers."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    graph = dict(zip(names, session.run(names, {"image": noise(40, 1), **feed}), strict=True))
    ours = compute_head(graph["embedding"], codebook, 1.0, l2=l2)
    assert set(ours) == set(graph)
    assert {name: (value.dtype, value.shape) for name, value in ours.items()} == {
        name: (value.dtype, value.shape) for name, value in graph.items()
    }
    ordered = np.sort(graph["distances"], 1)
    decisive = np.ones(40, bool) if ordered.shape[1] == 1 else ordered[:, 1] - ordered[:, 0] > 1e-4
    assert np.array_equal(ours["cluster_id"][decisive], graph["cluster_id"][decisive])
    for name in ("distance", "distances", "novelty_score"):
        gap = np.abs(ours[name] - graph[name]) / np.maximum(1, np.abs(graph[name]))
        assert gap[decisive].max() < 1e-5, name
    clear = decisive & (np.abs(graph["novelty_score"] - 1) > 1e-4)
    assert np.array_equal(ours["is_novel"][clear], graph["is_novel"][clear])
    assert np.allclose(ours["p_value"][decisive], graph["p_value"][decisive], atol=1e-5)
    return int(decisive.sum())


@pytest.mark.parametrize(("n_clusters", "l2"), [(5, False), (5, True), (1, True), (10_000, False)])
def test_numpy_and_graph_agree(n_clusters: int, l2: bool) -> None:
    data, codebook = traced(n_clusters, l2)
    assert compared(data, codebook, {}, l2) >= 30


@pytest.mark.parametrize("n_calibration", [1, 3, 500])
def test_they_agree_with_a_station_codebook_of_another_number_of_calibration_parts(n_calibration: int) -> None:
    data, codebook = traced(5, True)
    rng = np.random.default_rng(n_calibration)
    own = {
        **{name: value * np.float32(1.1) for name, value in codebook.items()},
        "calibration": np.sort(rng.random(n_calibration).astype(np.float32) * 3),
        "calibration_weight": rng.random(n_calibration).astype(np.float32),
    }
    assert compared(data, own, own, True) >= 30


def test_control_another_codebook_is_another_answer() -> None:
    data, codebook = traced(5, True)
    moved = {**codebook, "novelty_scale": codebook["novelty_scale"] * np.float32(1.001)}
    with pytest.raises(AssertionError, match="novelty_score"):
        compared(data, moved, {}, True)


def in_runtime(inspector: Inspector) -> Inspector:
    """As if the provider ignored overridden inputs."""
    inspector.ran = replace(inspector.ran, head="runtime")
    return inspector


def test_an_inspector_whose_provider_cannot_override_gives_the_same_inspections(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    with Inspector(tiny_model_path) as plain:
        golden = load_golden(golden_path(tiny_model_path), plain.metadata.golden_sha256)
        tensors = {name: tensor * np.float32(1.2) for name, tensor in golden.codebook.items()}
        path = write_codebook(tmp_path, tensors, {"model_sha256": plain.file.sha256})
    frames = [draw(kind, np.random.default_rng(seed)) for seed in range(4) for kind in ("disc", "square", "bars")]
    for codebook, threshold in ((None, None), (None, 0.4), (path, None), (path, 0.4)):
        graph = Inspector(tiny_model_path, codebook, novelty_threshold=threshold)
        ours = in_runtime(Inspector(tiny_model_path, codebook, novelty_threshold=threshold))
        for frame in frames:
            expected, got = graph.inspect(frame), ours.inspect(frame)
            assert (got.cluster, got.is_novel, got.verdict) == (expected.cluster, expected.is_novel, expected.verdict)
            assert got.novelty_score == pytest.approx(expected.novelty_score, rel=1e-5)
            assert got.p_value == pytest.approx(expected.p_value, rel=1e-5)
        batch = [one.novelty_score for one in ours.inspect_batch(frames)]
        assert batch == pytest.approx([graph.inspect(frame).novelty_score for frame in frames], rel=1e-4)
    assert verify_golden(in_runtime(Inspector(tiny_model_path)), golden).ids_compared > 0


def test_so_does_one_of_a_model_with_a_bank(bank_model_path: Path, tmp_path: Path) -> None:
    with Inspector(bank_model_path) as plain:
        golden = load_golden(golden_path(bank_model_path), plain.metadata.golden_sha256)
        # Radii so large that the patches decide.
        tensors = {**golden.codebook, "cluster_radius": golden.codebook["cluster_radius"] * np.float32(100)}
        path = write_codebook(tmp_path, tensors, {"model_sha256": plain.file.sha256})
    frames = [draw(kind, np.random.default_rng(seed)) for seed in range(3) for kind in ("disc", "square", "bars")]
    for codebook, threshold in ((None, None), (None, 0.4), (path, None), (path, 0.4)):
        graph = Inspector(bank_model_path, codebook, novelty_threshold=threshold)
        ours = in_runtime(Inspector(bank_model_path, codebook, novelty_threshold=threshold))
        for expected, got in zip(graph.inspect_batch(frames), ours.inspect_batch(frames), strict=True):
            assert (got.cluster, got.is_novel, got.patch_score) == (
                expected.cluster,
                expected.is_novel,
                expected.patch_score,
            )
            assert got.novelty_score == pytest.approx(expected.novelty_score, rel=1e-5)
            assert got.p_value == pytest.approx(expected.p_value, rel=1e-5)
            if codebook is not None:
                scale = float(golden.codebook["novelty_scale"][0])
                assert got.novelty_score == pytest.approx((got.patch_score or 0) / scale, rel=1e-5)
