from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_dkm import Inspector
from edge_dkm.codebook import read_codebook, write_codebook
from edge_dkm.errors import ContractError, ModelError
from tests.images import draw

SHA = "a" * 64


def tensors(k: int = 3, d: int = 2, m: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "centroids": rng.normal(size=(k, d)).astype(np.float32),
        "cluster_mean": rng.normal(size=(k, d)).astype(np.float32),
        "cluster_radius": np.ones(k, np.float32),
        "novelty_scale": np.ones(1, np.float32),
        "calibration": np.sort(rng.random(m)).astype(np.float32),
        "calibration_weight": np.ones(m, np.float32),
    }


def read(path: Path, **changes: Any) -> Any:
    return read_codebook(path, **{"model_sha256": SHA, "n_clusters": 3, "embed_dim": 2, **changes})


def test_what_is_written_is_read_back_and_is_safetensors(tmp_path: Path) -> None:
    values = tensors()
    path = write_codebook(tmp_path, values, {"model_sha256": SHA, "alpha": "0.01"})
    book = read(path)
    assert all(np.array_equal(book.tensors[name], values[name]) for name in values)
    assert (
        book.metadata["alpha"] == "0.01"
        and path.stem == book.sha12 == hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    )
    assert all(np.array_equal(load_file(path)[name], values[name]) for name in values)  # the reference reader agrees
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file is left


def test_the_codebook_of_another_model_is_refused(tmp_path: Path) -> None:
    path = write_codebook(tmp_path, tensors(), {"model_sha256": "b" * 64})
    with pytest.raises(ContractError, match="made for the model bbbbbbbbbbbb, not for aaaaaaaaaaaa"):
        read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"centroids": np.zeros((4, 2), np.float32)}, r"'centroids' is float32 \(4, 2\), expected float32 \(3, 2\)"),
        ({"cluster_radius": np.zeros(3, np.float32)}, "must be greater than 0"),
        ({"calibration": np.array([2, 1, 3, 4], np.float32)}, "is not sorted"),
        ({"cluster_mean": np.full((3, 2), np.nan, np.float32)}, "not finite"),
        (
            {"calibration_weight": np.ones(3, np.float32)},
            r"'calibration_weight' is float32 \(3,\), expected float32 \(4,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    path = write_codebook(tmp_path, {**tensors(), **change}, {"model_sha256": SHA})
    with pytest.raises(ContractError, match=message):
        read(path)


@pytest.mark.parametrize("cut", [0, 5, 9, 60, 200, -1])
def test_a_half_written_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = write_codebook(tmp_path, tensors(), {"model_sha256": SHA})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ModelError):
        read(path)


def test_a_header_that_points_outside_the_file_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"centroids": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 10**9]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 24)
    with pytest.raises(ModelError, match="half written"):
        read(path)


def test_a_header_that_nests_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((50_000).to_bytes(8, "little") + b"[" * 50_000)
    with pytest.raises(ModelError, match="no safetensors file"):
        read(path)


def test_a_stations_codebook_changes_the_answer_and_the_base_one_does_not(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    from edge_dkm.golden import load_golden
    from edge_dkm.model_file import golden_path

    frame = draw("disc", np.random.default_rng(3))
    with Inspector(tiny_model_path) as base:
        before = base.inspect(frame)
        book = dict(load_golden(golden_path(tiny_model_path), base.metadata.golden_sha256).codebook)
        sha = base.file.sha256
    same = write_codebook(tmp_path, book, {"model_sha256": sha})
    book["novelty_scale"] = book["novelty_scale"] * 2
    halved = write_codebook(tmp_path, book, {"model_sha256": sha})
    with Inspector(tiny_model_path, same) as inspector:
        assert inspector.inspect(frame).novelty_score == before.novelty_score
    with Inspector(tiny_model_path, codebook=halved) as inspector:
        assert inspector.inspect(frame).novelty_score == pytest.approx(before.novelty_score / 2, rel=1e-5)
        assert inspector.inspect(frame).cluster.id == before.cluster.id
