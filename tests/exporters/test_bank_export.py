"""A model with a bank as one graph: the same answers as PyTorch, the same head, and nothing of it in a graph without one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from configs import load_text
from edge_dkm import Inspector
from edge_dkm.bench.nodes import Node, place_nodes, read_nodes
from edge_dkm.contract import CODEBOOK, MAP, OUTPUTS, OVERRIDABLE, PATCH_OUTPUTS
from edge_dkm.errors import ContractError, ParityError
from edge_dkm.golden import load_golden, verify_golden
from edge_dkm.head import compute_head
from edge_dkm.model_file import golden_path
from exporters import gate, own_images
from exporters.errors import ExportError
from exporters.export import ExportOptions, export_run
from exporters.graph import FusedModel
from exporters.quantize import maps_of, quantize_encoder
from exporters.trace import trace
from exporters.verify import check_parity
from tests.conftest import with_bank
from tests.exporters.graphs import operators, output_of, own
from tests.images import KINDS, draw
from trainer import FitOptions, Run, fit, load_run
from trainer.settings import TrainSettings

NAMES = [spec.name for spec in OUTPUTS + PATCH_OUTPUTS]


def frames(per_kind: int = 3, side_px: int = 32, seed: int = 11) -> np.ndarray:
    """Good parts, noise, black and white."""
    rng = np.random.default_rng(seed)
    good = [draw(kind, rng, side_px) for kind in KINDS for _ in range(per_kind)]
    noise = rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    return np.stack([*good, noise, np.zeros_like(noise), np.full_like(noise, 255)])


def session(model: str | bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def asked(model: str | bytes, images: np.ndarray, **feed: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(NAMES, session(model).run(NAMES, {"image": images, **feed}), strict=True))


def in_pytorch(run: Run, images: np.ndarray) -> dict[str, np.ndarray]:
    fused = FusedModel(run.model.eval())
    with torch.inference_mode():
        values = fused(torch.from_numpy(images), *fused.overridable().values())
    return {name: value.numpy() for name, value in zip(NAMES, values, strict=True)}


def gap(actual: np.ndarray, expected: np.ndarray) -> float:
    return float((np.abs(actual - expected) / np.maximum(1, np.abs(expected))).max())


KINDS_OF_BANKS = {
    "image": "{layers: [conv2], cells: image, dim: 8, size: 8, learn: sample, neighbours: 3, local: true, max_cost: 10}",
    "gaussian": "{layers: [conv1, conv3], learn: gaussian, dim: 6, smooth: 1, reduce: top, max_cost: 10}",
    "per_cluster": "{layers: [conv2, conv3], per_cluster: true, learn: coreset, size: 32, dim: 8, reduce: mean, max_cost: 10}",
    "local": "{layers: [conv1], local: true, neighbours: 2, learn: coreset, size: 64, dim: 8, stride: 2, max_cost: 10}",
}


def agree(run: Run, data: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    """The answers of the graph, which are those of PyTorch."""
    actual, expected = asked(data, images), in_pytorch(run, images)
    for name in NAMES:
        assert actual[name].shape == expected[name].shape and actual[name].dtype == expected[name].dtype, name
    for name in ("distances", "embedding", "novelty_score", "patch_score", "novelty_map"):
        assert np.isfinite(actual[name]).all() and gap(actual[name], expected[name]) < 1e-4, name
    assert np.array_equal(actual["cluster_id"][:-3], expected["cluster_id"][:-3])
    return actual


@pytest.mark.parametrize("kind", KINDS_OF_BANKS)
def test_every_kind_of_bank_is_exported_with_pytorch_and_onnxruntime_in_agreement(
    kind: str, tiny_settings_text: str, tmp_path: Path
) -> None:
    text = with_bank(tiny_settings_text, f"{{target_frr: 0.1, bank: {KINDS_OF_BANKS[kind]}}}")
    run = fit(load_text(TrainSettings, text, "bank.yaml"), FitOptions(out=tmp_path / "run"))
    # Among what is compared are training images, whose cells lie on points of the bank.
    assert export_run(load_run(tmp_path / "run"), tmp_path / "part.onnx").parity.max_score_difference < 1e-4
    base = agree(run, (tmp_path / "part.onnx").read_bytes(), frames())
    # A bank per cluster too goes by the model's own clusters: a head outside the graph has no other patch_score to go by.
    turned = {**codebook(run), "centroids": codebook(run)["centroids"][::-1].copy()}
    out = asked((tmp_path / "part.onnx").read_bytes(), frames(), **turned)
    assert np.array_equal(out["cluster_id"], 2 - base["cluster_id"])
    assert all(np.array_equal(out[name], base[name]) for name in ("patch_score", "novelty_map"))


def gap_in_twos(data: bytes, images: np.ndarray, whole: dict[str, np.ndarray]) -> float:
    """The largest difference between batches of two and a batch of all."""
    gaps = [0.0]
    for n in range(0, len(images), 2):
        two = asked(data, images[n : n + 2])
        gaps += [float(gap(two[name], whole[name][n : n + 2])) for name in ("novelty_map", "patch_score")]
    return max(gaps)


@pytest.mark.parametrize("side_px", [32, 41, 23])
def test_a_graph_of_any_size_agrees_in_batches_too(bank_model_path: Path, bank_run_folder: Path, side_px: int) -> None:
    images, data = frames(side_px=side_px), bank_model_path.read_bytes()
    whole = agree(load_run(bank_run_folder), data, images)
    assert whole["novelty_map"].shape == (len(images), 12, 12)
    assert gap_in_twos(data, images, whole) < 1e-5


def test_a_graph_of_a_fixed_size_agrees_in_batches_too(bank_run_folder: Path) -> None:
    run, images = load_run(bank_run_folder), frames(side_px=48)
    data = trace(FusedModel(run.model.eval()), (48, 48)).SerializeToString()
    assert gap_in_twos(data, images, agree(run, data, images)) < 1e-5


def test_the_raw_score_of_the_graph_is_the_maximum_of_both(bank_model_path: Path, bank_run_folder: Path) -> None:
    run = load_run(bank_run_folder)
    out = asked(str(bank_model_path), frames())
    model = run.model
    ids = out["cluster_id"]
    apart = np.linalg.norm(out["embedding"] - model.cluster_mean.numpy()[ids], axis=1)
    s = np.maximum(apart / model.cluster_radius.numpy()[ids], out["patch_score"])
    assert out["novelty_score"] == pytest.approx(s / float(model.novelty_scale), rel=1e-4)
    # A codebook whose radii are immense leaves the patches to decide; one whose radii are tiny, the embedding.
    book = codebook(run)
    patches = asked(str(bank_model_path), frames(), **{**book, "cluster_radius": book["cluster_radius"] * 1e6})
    scale = book["novelty_scale"][0]
    assert patches["novelty_score"] == pytest.approx(out["patch_score"] / scale, rel=1e-5)
    embedded = asked(str(bank_model_path), frames(), **{**book, "cluster_radius": book["cluster_radius"] * 1e-6})
    assert (embedded["novelty_score"] > 100 * patches["novelty_score"]).all()


def codebook(run: Run) -> dict[str, np.ndarray]:
    values = FusedModel(run.model).overridable()
    return {spec.name: values[spec.name].detach().numpy().copy() for spec in CODEBOOK}


def moved(run: Run) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    book = codebook(run)
    book["centroids"] += rng.normal(0, 0.3, book["centroids"].shape).astype(np.float32)
    book["cluster_mean"] += rng.normal(0, 0.3, book["cluster_mean"].shape).astype(np.float32)
    book["cluster_radius"] *= np.float32(50)
    book["novelty_scale"] *= np.float32(0.8)
    book["calibration"] = np.sort(rng.uniform(0.1, 4, 9)).astype(np.float32)
    book["calibration_weight"] = rng.uniform(0.5, 1, 9).astype(np.float32)
    return book


def test_the_head_in_numpy_gives_the_graphs_answers_with_a_replaced_codebook(
    bank_model_path: Path, bank_run_folder: Path
) -> None:
    own = moved(load_run(bank_run_folder))
    out = asked(str(bank_model_path), frames(), **own)
    ours = compute_head(out["embedding"], own, 1.0, False, out["patch_score"])
    assert np.array_equal(ours["cluster_id"], out["cluster_id"]) and np.array_equal(ours["is_novel"], out["is_novel"])
    for name in ("distances", "novelty_score", "p_value"):
        assert ours[name] == pytest.approx(out[name], rel=1e-4), name
    # Control: without the patches some scores are lower.
    without = compute_head(out["embedding"], own, 1.0, False)["novelty_score"]
    assert (without <= out["novelty_score"] * 1.0001).all() and not np.allclose(without, out["novelty_score"], rtol=0.1)
    # No codebook moves the bank.
    base = asked(str(bank_model_path), frames())
    assert np.array_equal(base["patch_score"], out["patch_score"])
    assert np.array_equal(base["novelty_map"], out["novelty_map"])


def test_the_golden_images_prove_a_graph_with_a_bank_and_find_one_whose_bank_is_another(
    bank_model_path: Path, bank_run_folder: Path
) -> None:
    with Inspector(bank_model_path) as inspector:
        assert inspector.metadata.has_patches and inspector.metadata.outputs == OUTPUTS + PATCH_OUTPUTS
        golden = load_golden(golden_path(bank_model_path), inspector.metadata.golden_sha256)
        assert verify_golden(inspector, golden).max_score_difference < 1e-6
        inspector.ran = replace(inspector.ran, head="runtime")
        assert verify_golden(inspector, golden).ids_compared > 0
    # Black and white are strange to the bank alone or not at all, so its centres are moved far.
    model = onnx.load(bank_model_path)
    radius = float(load_run(bank_run_folder).model.bank.patch_radius)  # type: ignore[union-attr]
    found = [t for t in model.graph.initializer if np.allclose(onnx.numpy_helper.to_array(t), radius)]
    assert len(found) == 1
    found[0].CopyFrom(onnx.numpy_helper.from_array(np.array(radius / 1e3, np.float32), found[0].name))
    with Inspector(model.SerializeToString()) as damaged, pytest.raises(ParityError, match="novelty_score"):
        verify_golden(damaged, golden)


def test_a_graph_whose_map_differs_from_pytorchs_is_refused(bank_model_path: Path, bank_run_folder: Path) -> None:
    """The negative control of the comparison of maps: one row of the bank's linear map nudged."""
    other = load_run(bank_run_folder)
    with torch.no_grad():
        other.model.bank.cells.bias[0] += 0.05  # type: ignore[union-attr]
    with Inspector(bank_model_path) as inspector, pytest.raises(ExportError, match="novelty_map of image 0 differs by"):
        check_parity(inspector, FusedModel(other.model.eval()), [frames()[0]])


def test_the_metadata_says_what_bank_it_is(bank_model_path: Path) -> None:
    props = session(str(bank_model_path)).get_modelmeta().custom_metadata_map
    bank = json.loads(props["dkm.novelty"])["bank"]
    assert (bank["settings"]["layers"], bank["settings"]["size"]) == (["conv1", "conv2"], 32)
    assert bank["patch_radius"] > 0


def test_a_file_that_says_it_has_a_bank_and_gives_no_map_is_refused(bank_model_path: Path) -> None:
    model = onnx.load(bank_model_path)
    del model.graph.output[-1]
    with pytest.raises(ContractError, match="has no output 'novelty_map'"):
        Inspector(model.SerializeToString())


@pytest.fixture(scope="module")
def without(bank_run_folder: Path) -> onnx.ModelProto:
    """The graph of the same model without its bank."""
    run = load_run(bank_run_folder)
    run.model.bank = None
    return trace(FusedModel(run.model.eval()), None)


def test_a_graph_without_a_bank_has_nothing_of_it(
    without: onnx.ModelProto, bank_model_path: Path, tiny_model_path: Path
) -> None:
    with_it = onnx.load(bank_model_path)
    assert [o.name for o in without.graph.output] == [spec.name for spec in OUTPUTS]
    assert [i.name for i in without.graph.input] == ["image", *(spec.name for spec in OVERRIDABLE)]
    assert not maps_of(without.graph) and maps_of(with_it.graph)
    # The bank is its own nodes and one maximum: what is left of the operators without those is the graph without it.
    left = list(operators(with_it))
    for kind in operators(without):
        left.remove(kind)
    assert "AveragePool" in left and "AveragePool" not in operators(without)
    with Inspector(tiny_model_path) as inspector:
        assert not inspector.metadata.has_patches and inspector.metadata.outputs == OUTPUTS


def test_a_bank_changes_nothing_of_cluster_and_embedding(without: onnx.ModelProto, bank_model_path: Path) -> None:
    names = ["cluster_id", "distances", "embedding"]
    alone = session(without.SerializeToString()).run(names, {"image": frames()})
    with_it = asked(str(bank_model_path), frames())
    assert all(np.allclose(with_it[name], value, atol=1e-6) for name, value in zip(names, alone, strict=True))


def test_the_bank_belongs_to_the_head_and_its_maps_to_the_encoder(bank_model_path: Path) -> None:
    proto = onnx.load(bank_model_path)
    nodes = read_nodes(proto.SerializeToString())
    places = place_nodes(nodes)
    assert maps_of(proto.graph) == [f"{MAP}conv1", f"{MAP}conv2"]
    assert {places[tensor] for tensor in (f"{MAP}conv1", f"{MAP}conv2", "features")} == {"encoder"}
    assert {places[name] for name in ("patch_score", "novelty_map")} == {"head"}
    placed = [places[node.name] for node in nodes if node.op_type == "Conv"]
    # Two projections of maps and one product with the centres.
    assert placed.count("encoder") == 3 and placed.count("head") == 3


def test_layers_deeper_than_the_features_belong_to_the_encoder() -> None:
    """A bank may look at deeper maps than the embedding: what gives them is the encoder's work all the same."""
    nodes = [
        Node("cast", "Cast", ("image",), ("pixels",)),
        Node("first", "Conv", ("pixels", "w1"), ("middle",)),
        Node("pool", "ReduceMean", ("middle",), ("features",)),
        Node("deep", "Conv", ("middle", "w2"), ("map_deep",)),
        Node("project", "Conv", ("map_deep", "w3"), ("cells",)),
        Node("head", "MatMul", ("features", "w4"), ("embedding",)),
    ]
    places = place_nodes(nodes)
    assert {name: places[name] for name in ("first", "pool", "deep", "project", "head")} == {
        "first": "encoder",
        "pool": "encoder",
        "deep": "encoder",
        "project": "head",
        "head": "head",
    }
    control = [replace(node, outputs=("other",)) if node.name == "deep" else node for node in nodes]
    assert place_nodes(control)["deep"] == "head"


def test_quantising_keeps_the_names_of_the_maps_and_nearly_their_values(bank_model_path: Path) -> None:
    model = onnx.load(bank_model_path)
    rng = np.random.default_rng(0)
    images = [draw(kind, rng) for _ in range(20) for kind in KINDS]
    quantized = quantize_encoder(model, own(images))
    assert set(maps_of(model.graph)) == {f"{MAP}conv1", f"{MAP}conv2"} <= set(maps_of(quantized.graph))
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators(quantized))
    for name in maps_of(model.graph):
        wanted, got = (np.concatenate([output_of(m, one[None], name) for one in images]) for m in (model, quantized))
        assert 0 < np.linalg.norm(got - wanted) < 0.05 * np.linalg.norm(wanted), name
    fp32, int8 = (asked(m.SerializeToString(), frames())["patch_score"] for m in (model, quantized))
    assert float(np.abs(int8[:-3] / fp32[:-3] - 1).max()) < 0.03
    # Noise, black and white lie beyond the ranges that good parts gave, and are cut there; strange they stay.
    assert min(int8[-3:].min(), fp32[-3:].min()) > 1.5 * max(int8[:-3].max(), fp32[:-3].max())
    # The bank itself stays fp32: what takes the maps takes its weights as they were.
    seams = maps_of(model.graph)
    for graph in (model.graph, quantized.graph):
        weights = {t.name for t in graph.initializer}
        taken = [node.input[1] for node in graph.node if node.op_type == "Conv" and node.input[0] in seams]
        bank = [name for name in taken if name in weights and "bank" in name]
        assert len(bank) == 2


def test_an_int8_file_with_a_bank_is_judged_and_proven_like_any(
    bank_run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_images, "MIN_RANGES", 10)
    monkeypatch.setattr(own_images, "MIN_HELD_OUT", 20)
    monkeypatch.setattr(gate, "speed_problem", lambda int8_s, fp32_s: None)
    monkeypatch.setattr(gate, "MIN_SPEARMAN", 0.9)
    exported = export_run(load_run(bank_run_folder), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.report is not None, exported.int8
    if exported.int8.accepted is None:  # of sixty drawn images, what the gate says may go either way; not that it ran
        assert exported.int8.reasons
    with Inspector(exported.path) as inspector:
        golden = load_golden(golden_path(exported.path), inspector.metadata.golden_sha256)
        verify_golden(inspector, golden)
        assert inspector.inspect(frames()[0]).patch_score is not None
