from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edge_dkm import Inspector
from edge_dkm.errors import ModelError, ParityError
from edge_dkm.golden import BLACK, PART, WHITE, Golden, load_golden, verify_golden
from edge_dkm.model_file import golden_path


def load(path: Path) -> tuple[Inspector, Golden]:
    inspector = Inspector(path)
    return inspector, load_golden(golden_path(path), inspector.metadata.golden_sha256)


def test_the_exported_model_passes_on_the_machine_that_exported_it(tiny_model_path: Path) -> None:
    inspector, golden = load(tiny_model_path)
    report = verify_golden(inspector, golden)
    assert report.images == len(golden.images) and report.max_score_difference < 1e-6
    assert golden.kinds.count(BLACK) == golden.kinds.count(WHITE) == 1
    assert all(golden.is_decisive(n, times=10) for n, kind in enumerate(golden.kinds) if kind == PART)


def test_every_cluster_has_a_golden_image(tiny_model_path: Path) -> None:
    _, golden = load(tiny_model_path)
    assert {int(golden.distances[n].argmin()) for n, kind in enumerate(golden.kinds) if kind == PART} == {0, 1, 2}


def test_golden_images_of_another_model_or_none_are_refused(copied_model: Path) -> None:
    inspector = Inspector(copied_model)
    path = golden_path(copied_model)
    data = path.read_bytes()
    path.write_bytes(data + b" ")
    with pytest.raises(ModelError, match="are not those of this model"):
        load_golden(path, inspector.metadata.golden_sha256)
    path.unlink()
    with pytest.raises(ModelError, match="copy them from where the model was exported"):
        load_golden(path, inspector.metadata.golden_sha256)


def edited(path: Path, name: str, factor: float) -> Path:
    """The model with one initialiser scaled, its digest file removed: an edit that onnxruntime cannot notice."""
    model = onnx.load(path)
    found = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    assert len(found) == 1, [tensor.name for tensor in model.graph.initializer]
    found[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found[0]) * np.float32(factor), found[0].name))
    onnx.save(model, path)
    path.with_name(path.name + ".sha256").unlink()
    return path


@pytest.mark.parametrize(
    ("name", "factor"), [("encoder.layers.0.weight", 1.05), ("novelty_scale", 1.01), ("cluster_radius", 0.99)]
)
def test_a_graph_edited_after_export_names_the_first_image_and_both_answers(
    copied_model: Path, name: str, factor: float
) -> None:
    inspector, golden = load(edited(copied_model, name, factor))
    with pytest.raises(ParityError, match=r"golden image 0 \(part\) (has novelty_score|is cluster).*expected"):
        verify_golden(inspector, golden)


def test_swapped_centroids_are_another_cluster(tiny_model_path: Path) -> None:
    inspector, golden = load(tiny_model_path)
    swapped = dataclasses.replace(golden, distances=np.ascontiguousarray(golden.distances[:, ::-1]))
    with pytest.raises(ParityError, match=r"is cluster \d on CPUExecutionProvider, expected"):
        verify_golden(inspector, swapped)


def test_ids_are_not_compared_where_two_centroids_are_equally_near(tiny_model_path: Path) -> None:
    _, golden = load(tiny_model_path)
    n = golden.kinds.index(BLACK)
    nearly = golden.distances.copy()
    order = np.argsort(nearly[n])
    nearly[n, order[1]] = nearly[n, order[0]] * (1 - 1e-6)  # the other one a hair nearer
    assert not dataclasses.replace(golden, distances=nearly).is_decisive(n)


def test_a_station_codebook_does_not_disturb_the_verification(tiny_model_path: Path, tmp_path: Path) -> None:
    from edge_dkm.codebook import write_codebook

    inspector, golden = load(tiny_model_path)
    moved = {name: tensor.copy() for name, tensor in golden.codebook.items()}
    moved["centroids"] += 1
    path = write_codebook(tmp_path, moved, {"model_sha256": inspector.file.sha256})
    with Inspector(tiny_model_path, path) as own:
        assert verify_golden(own, golden).ids_compared > 0
