from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from configs import load_text
from devices.profile import DeviceProfile
from edge_dkm import Inspector
from edge_dkm.contract import CODEBOOK, IR_VERSION, METADATA, OPSET, OUTPUTS, OVERRIDABLE
from exporters.errors import ExportError
from exporters.export import ExportOptions, export_run
from exporters.graph import FusedModel
from exporters.trace import trace
from exporters.verify import check_parity
from tests.conftest import TINY
from tests.images import draw
from trainer import FitOptions, Run, fit, load_run
from trainer.distance import DIRECT_LIMIT
from trainer.settings import TrainSettings


def frame(kind: str = "disc", seed: int = 5, side_px: int = 32) -> np.ndarray:
    return draw(kind, np.random.default_rng(seed), side_px)


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fitted(image_folder: Path, out: Path, **changes: str) -> Run:
    text = TINY.format(path=image_folder)
    for old, new in changes.items():
        text = "\n".join(new if line.startswith(f"{old}:") else line for line in text.splitlines())
    return fit(load_text(TrainSettings, text, "tiny.yaml"), FitOptions(out=out))


def test_the_file_speaks_contract_1(tiny_model_path: Path) -> None:
    model = onnx.load(tiny_model_path)
    assert model.ir_version == IR_VERSION == 8
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert [o.name for o in model.graph.output] == [spec.name for spec in OUTPUTS]
    assert {p.key for p in model.metadata_props} == set(METADATA)
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    assert all(node.domain == "" for node in model.graph.node) and not model.functions
    loaded = session(tiny_model_path)
    assert [i.name for i in loaded.get_inputs()] == ["image"]
    assert [i.name for i in loaded.get_overridable_initializers()] == [spec.name for spec in OVERRIDABLE]


def test_metadata_is_readable_and_complete(tiny_model_path: Path) -> None:
    props = session(tiny_model_path).get_modelmeta().custom_metadata_map
    values = {key: json.loads(props[key]) for key, is_json in METADATA.items() if is_json}
    assert values["dkm.input"] == {
        "layout": "NHWC",
        "dtype": "uint8",
        "color": "bgr",
        "h": None,
        "w": None,
        "fit": "stretch",
        "roi": None,
        "frame": [32, 32],
    }
    assert [c["id"] for c in values["dkm.clusters"]] == [0, 1, 2] and values["dkm.novelty"]["target_frr"] == 0.1
    assert (
        props["dkm.golden_sha256"]
        == hashlib.sha256(tiny_model_path.with_name("part.onnx.golden.npz").read_bytes()).hexdigest()
    )
    assert values["dkm.parity"]["max_abs"] < 1e-4 and sum(values["dkm.reference_hist"]["shares"]) == pytest.approx(1.0)


def test_the_twelve_lines_of_the_readme_work(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / "part.png"), frame())
    s = session(tiny_model_path)
    meta = s.get_modelmeta().custom_metadata_map
    names = {c["id"]: c["name"] for c in json.loads(meta["dkm.clusters"])}
    image = cv2.imread(str(tmp_path / "part.png"))
    assert image is not None
    cid, score, novel = s.run(["cluster_id", "novelty_score", "is_novel"], {"image": image[None]})
    assert (
        names[int(cid[0])].startswith("cluster-") and float(score[0]) > 0 and bool(novel[0]) == (float(score[0]) > 1.0)
    )
    stricter = s.run(
        ["is_novel"], {"image": image[None], "novelty_threshold": np.array([float(score[0]) / 2], np.float32)}
    )[0]
    laxer = s.run(
        ["is_novel"], {"image": image[None], "novelty_threshold": np.array([float(score[0]) * 2], np.float32)}
    )[0]
    assert (bool(stricter[0]), bool(laxer[0])) == (True, False)


def test_a_dynamic_graph_takes_any_size_and_batch(tiny_model_path: Path) -> None:
    s = session(tiny_model_path)
    for shape in ((1, 32, 32, 3), (3, 7, 90, 3), (2, 300, 41, 3), (1, 1, 1, 3)):
        out = s.run(["cluster_id", "distances"], {"image": np.zeros(shape, np.uint8)})
        assert out[0].shape == (shape[0],) and out[1].shape == (shape[0], 3)


def test_outputs_agree_with_each_other(tiny_model_path: Path) -> None:
    s = session(tiny_model_path)
    images = np.stack([frame(kind, seed) for seed in range(4) for kind in ("disc", "square", "bars")])
    out = dict(
        zip([spec.name for spec in OUTPUTS], s.run([spec.name for spec in OUTPUTS], {"image": images}), strict=True)
    )
    assert np.array_equal(out["cluster_id"], out["distances"].argmin(1)) and np.allclose(
        out["distance"], out["distances"].min(1)
    )
    assert np.array_equal(out["is_novel"], out["novelty_score"] > 1.0)
    assert ((out["p_value"] > 0) & (out["p_value"] <= 1)).all()


def test_the_codebook_is_overridable_with_another_number_of_calibration_parts(
    tiny_model_path: Path, tiny_run_folder: Path
) -> None:
    s = session(tiny_model_path)
    model = load_run(tiny_run_folder).model
    values = {
        name: value.detach().numpy().copy()
        for name, value in FusedModel(model).overridable().items()
        if name != "novelty_threshold"
    }
    values["centroids"] = values["centroids"][::-1].copy()
    values["cluster_mean"], values["cluster_radius"] = (
        values["cluster_mean"][::-1].copy(),
        values["cluster_radius"][::-1].copy(),
    )
    values["calibration"], values["calibration_weight"] = np.array([0.5], np.float32), np.array([1.0], np.float32)
    image = frame()[None]
    base = s.run(["cluster_id", "novelty_score"], {"image": image})
    turned = s.run(["cluster_id", "novelty_score", "p_value"], {"image": image, **values})
    assert turned[0][0] == 2 - base[0][0] and turned[1][0] == pytest.approx(base[1][0], rel=1e-5)
    assert float(turned[2][0]) in {0.5, 1.0}
    assert set(values) == {spec.name for spec in CODEBOOK}


def test_ties_go_to_the_lowest_id_and_a_frame_on_a_centroid_has_distance_zero(
    tiny_model_path: Path, tiny_run_folder: Path
) -> None:
    s = session(tiny_model_path)
    model = load_run(tiny_run_folder).model
    values = {
        name: value.detach().numpy().copy()
        for name, value in FusedModel(model).overridable().items()
        if name != "novelty_threshold"
    }
    image = frame()[None]
    embedding = s.run(["embedding"], {"image": image})[0][0]
    for key in ("centroids", "cluster_mean"):
        values[key][1] = values[key][2] = embedding
    out = s.run(["cluster_id", "distance", "novelty_score"], {"image": image, **values})
    assert int(out[0][0]) == 1 and float(out[1][0]) == 0.0 and float(out[2][0]) == 0.0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pad", {"preprocess": "preprocess: {height_px: 24, width_px: 32, fit: pad}"}),
        ("crop", {"preprocess": "preprocess: {height_px: 16, width_px: 24, fit: crop, color: gray}"}),
        ("linear", {"preprocess": "preprocess: {height_px: 24, width_px: 24, antialias: false}"}),
        ("none", {"preprocess": "preprocess: {resize: none, normalise: rms}"}),
        ("matmul", {"preprocess": "preprocess: {height_px: 24, width_px: 24, resize: matmul}"}),
        (
            "conv_l2",
            {
                "encoder": "encoder: {name: conv, channels: [4, 8, 8], dim: 8}\nprojection: {kind: pca, dim: 4, sqrt: true, l2: true}"
            },
        ),
        (
            "resnet",
            {
                "encoder": "encoder: {name: resnet}\nprojection: {kind: within, dim: 6}",
                "pretrain": "pretrain: {kind: none}",
            },
        ),
        (
            "k1_d1",
            {
                "encoder": "encoder: {name: mlp, hidden: [8], dim: 1}",
                "method": "method: {name: ae_kmeans, n_clusters: 1}",
            },
        ),
    ],
)
def test_every_mode_is_exported_with_pytorch_and_onnxruntime_in_agreement(
    name: str, changes: dict[str, str], image_folder: Path, tmp_path: Path
) -> None:
    run = fitted(image_folder, tmp_path / "run", **changes)
    exported = export_run(load_run(tmp_path / "run"), tmp_path / "part.onnx")
    assert exported.parity.max_score_difference < 1e-4
    with Inspector(tmp_path / "part.onnx") as inspector:
        images = [frame(kind, seed) for seed in range(3) for kind in ("disc", "square", "bars")]
        assert [inspector.inspect(image).cluster.id for image in images] == run.model.predict(images).tolist()


def test_a_fixed_frame_size_is_written_into_the_graph(tiny_run_folder: Path, tmp_path: Path) -> None:
    export_run(load_run(tiny_run_folder), tmp_path / "part.onnx", ExportOptions(frame=(32, 32)))
    with Inspector(tmp_path / "part.onnx") as inspector:
        assert (inspector.metadata.input.h, inspector.metadata.input.w) == (32, 32)
    assert session(tmp_path / "part.onnx").get_inputs()[0].shape == ["N", 32, 32, 3]


def test_a_frame_size_that_no_training_image_has_cannot_be_proven_and_is_not_written(
    tiny_run_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match="has the size 64x48 of the graph"):
        export_run(load_run(tiny_run_folder), tmp_path / "part.onnx", ExportOptions(frame=(48, 64)))
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_cannot_run_the_resize_mode_is_refused(tiny_run_folder: Path, tmp_path: Path) -> None:
    profile = DeviceProfile(title="no antialias", resize=("none", "matmul"))
    with pytest.raises(ExportError, match="cannot run preprocess.resize: onnx, expected one of none, matmul"):
        export_run(load_run(tiny_run_folder), tmp_path / "part.onnx", ExportOptions(profile=profile))


def test_a_profile_that_needs_a_fixed_frame_gets_the_size_of_the_training_images(
    tiny_run_folder: Path, tmp_path: Path
) -> None:
    export_run(
        load_run(tiny_run_folder),
        tmp_path / "part.onnx",
        ExportOptions(profile=DeviceProfile(title="engine", fixed_frame=True)),
    )
    assert session(tmp_path / "part.onnx").get_inputs()[0].shape == ["N", 32, 32, 3]


def test_clusters_marked_reject_are_left_out_of_the_calibration(copied_run: Path, tmp_path: Path) -> None:
    before = export_run(load_run(copied_run), tmp_path / "a.onnx")
    (copied_run / "labels.yaml").write_text("clusters: {1: {name: scratch, verdict: reject}}")
    after = export_run(load_run(copied_run), tmp_path / "b.onnx")
    assert after.rejected == ["scratch"] and after.novelty["n_calib"] < before.novelty["n_calib"]
    with Inspector(tmp_path / "b.onnx") as inspector:
        assert (inspector.metadata.clusters[1].name, inspector.metadata.clusters[1].verdict) == ("scratch", "reject")
    (copied_run / "labels.yaml").write_text(
        "clusters: {0: {verdict: reject}, 1: {verdict: reject}, 2: {verdict: reject}}"
    )
    with pytest.raises(Exception, match="at least one cluster must be good"):
        export_run(load_run(copied_run), tmp_path / "c.onnx")


def test_a_graph_that_answers_differently_from_pytorch_is_refused(tiny_run_folder: Path, tmp_path: Path) -> None:
    """The negative control of the parity check: the exported graph of one run against the weights of another."""
    path = tmp_path / "part.onnx"
    export_run(load_run(tiny_run_folder), path)
    other = load_run(tiny_run_folder)
    with torch.no_grad():
        other.model.centroids.add_(0.01)
    with Inspector(path) as inspector, pytest.raises(ExportError, match="differ by"):
        check_parity(inspector, FusedModel(other.model.eval()), [frame()])


def test_nothing_is_written_where_the_golden_images_are_missing(copied_run: Path, tmp_path: Path) -> None:
    for path in (copied_run / "golden").glob("*.png"):
        path.unlink()
    with pytest.raises(ExportError, match=r"golden images \(none kept\)"):
        export_run(load_run(copied_run), tmp_path / "part.onnx")
    assert not list(tmp_path.glob("part*"))


@pytest.mark.parametrize(("offset", "moves"), [(100.0, 2), (0.0, 0)])
def test_many_centroids_use_the_matrix_product_and_stay_exact_and_are_moved_only_where_they_lie_far_from_the_origin(
    tiny_run_folder: Path, offset: float, moves: int
) -> None:
    run = load_run(tiny_run_folder)
    model = run.model
    d = model.projection.out_dim
    k = DIRECT_LIMIT // d + 8
    generator = torch.Generator().manual_seed(0)
    model.centroids = torch.nn.Parameter(offset + torch.randn(k, d, generator=generator))
    model.cluster_mean, model.cluster_radius = model.centroids.detach().clone(), torch.ones(k)
    fused = FusedModel(model.eval())
    proto = trace(fused, None)
    assert "MatMul" in {node.op_type for node in proto.graph.node}
    assert sum(node.op_type == "Sub" and "centre" in node.input[1] for node in proto.graph.node) == moves
    options = ort.SessionOptions()
    options.log_severity_level = 3
    s = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image: Any = frame()[None]
    distances, embedding = s.run(["distances", "embedding"], {"image": image})
    exact = np.linalg.norm(
        embedding[0].astype(np.float64) - model.centroids.detach().numpy().astype(np.float64), axis=1
    )
    assert np.isfinite(distances).all() and np.abs(distances[0] - exact).max() < 1e-3 * exact.max()
