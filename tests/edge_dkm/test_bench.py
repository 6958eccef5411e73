from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from devices.ring import MAX_SLOTS
from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm import Inspector
from edge_dkm.bench import BenchOptions, BenchReport, arithmetic, bench
from edge_dkm.bench.arithmetic import arithmetic_limit
from edge_dkm.bench.nodes import PLACES, Node, place_nodes, place_of, read_nodes
from edge_dkm.bench.profile import Cost, by_run, count_cost, part_times, profile_graph
from edge_dkm.bench.stages import CAMERA, TOPIC, Ring, Scene, open_outbox, scene_of
from edge_dkm.cli import main as run
from edge_dkm.errors import ModelError
from edge_dkm.mqtt.embedded_broker import find_mosquitto
from edge_dkm.pipeline import Pipeline
from tests.waiting import wait_until

FRAME = np.zeros((32, 32, 3), np.uint8)
LAYERS = (
    24 * 24 * 3 * 32 + 32 * 8
)  # multiply-adds by hand: pixels -> 32 -> 8; the three centroids are compared without a product
CALIBRATION = 18  # good parts, each with its weight, in the p-value


@pytest.fixture(scope="module")
def inspector(tiny_model_path: Path) -> Inspector:
    return Inspector(tiny_model_path)


@pytest.fixture(scope="module")
def report(inspector: Inspector) -> BenchReport:
    return bench(inspector, BenchOptions(frames=12))


def test_every_stage_between_camera_and_broker_has_its_percentiles(report: BenchReport) -> None:
    stages = ["capture", "pre-process", "encoder", "head", "decision", "commit", "publish"]
    assert list(report.stages) == stages and report.size == (32, 32) == report.frame
    measured = {name: value for name, value in report.stages.items() if value is not None}
    assert set(stages) - set(measured) <= ({"publish"} if find_mosquitto() is None else set())
    for value in [*measured.values(), report.graph, report.frame_to_commit]:
        assert 0 < value.p50_ms <= value.p99_ms
    assert report.graph.p50_ms <= report.p50_ms <= report.frame_to_commit.p50_ms * 10
    assert report.frames_per_s > 0 and report.rss_mb is not None and report.rss_mb > 10


def test_the_report_is_json_and_text(report: BenchReport) -> None:
    plain = json.loads(json.dumps(report.plain(), allow_nan=False))
    assert plain["stages"]["encoder"]["p50_ms"] == report.stages["encoder"].p50_ms  # type: ignore[union-attr]
    assert plain["commit_over_encoder"] > 1 and plain["limit"]["macs"] == LAYERS + CALIBRATION
    for word in ("capture", "encoder", "publish", "to commit", "frames/s", "MB", "GFLOP/s", "the encoder alone"):
        assert word in report.text()


def test_without_a_broker_publishing_is_said_not_to_be_measured_and_the_rest_is(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_dkm.mqtt.embedded_broker.find_mosquitto", lambda: None)
    monkeypatch.setattr("edge_dkm.mqtt.embedded_broker.importlib.util.find_spec", lambda name: None)
    report = bench(inspector, BenchOptions(frames=3))
    assert report.stages["publish"] is None and report.stages["commit"] is not None
    assert "publish       not measured: no broker (" in report.text() and report.plain()["stages"]["publish"] is None


def test_results_are_committed_in_the_named_folder_and_nothing_stays_there(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("edge_dkm.bench.measure.open_outbox", lambda path: opened.append(path) or open_outbox(path))
    words = [
        "bench",
        str(tiny_model_path),
        "--frames",
        "3",
        "--size",
        "48x40",
        "--state",
        str(tmp_path / "state"),
        "--json",
    ]
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["size"] == [48, 40]
    assert tmp_path / "state" in opened[0].parents and list((tmp_path / "state").iterdir()) == []


def test_a_size_that_the_graph_does_not_take_is_said(
    tiny_run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from exporters.export import ExportOptions, export_run
    from trainer import load_run

    export_run(load_run(tiny_run_folder), tmp_path / "fixed.onnx", ExportOptions(frame=(32, 32)))
    assert run(["bench", str(tmp_path / "fixed.onnx"), "--size", "64x64"]) == 1
    assert "the frame is 64x64, fixed.onnx expects 32x32" in capsys.readouterr().err


def test_the_nodes_are_read_as_the_onnx_package_reads_them(tiny_model_path: Path) -> None:
    graph = onnx.load(tiny_model_path).graph
    expected = [Node(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in graph.node]
    assert read_nodes(tiny_model_path.read_bytes()) == expected and len(expected) > 20


@pytest.mark.parametrize("data", [b"\x3a\xff\xff\x03ab", b"\x3a\xff", b"\x3b", b"\x3a\x03\x0a\x05\x0a"])
def test_what_is_no_model_is_refused(data: bytes) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read_nodes(data)


def test_nodes_belong_to_what_they_compute() -> None:
    nodes = [
        Node("shrink", "QLinearConv", ("image", "w0"), ("pixels",)),
        Node("cast", "Cast", ("pixels",), ("x",)),
        Node("", "DequantizeLinear", ("w1",), ("w1_f",)),  # a weight's: no picture in it
        Node("conv", "Conv", ("x", "w1_f"), ("relu",)),
        Node("pool", "ReduceMean", ("relu",), ("features",)),
        Node("half", "Mul", ("centroids", "0.5"), ("halves",)),
        Node("project", "MatMul", ("features", "w2"), ("embedding",)),
    ]
    places = place_nodes(nodes)
    assert {
        name: places[name] for name in ("shrink", "cast", "DequantizeLinear_2", "conv", "pool", "half", "project")
    } == {
        "shrink": "pre-process",
        "cast": "pre-process",
        "DequantizeLinear_2": "encoder",
        "conv": "encoder",
        "pool": "encoder",
        "half": "head",
        "project": "head",
    }
    assert place_of("relu_nchwc", places) == "encoder" and place_of("embedding", places) == "head"
    assert place_of("ReorderOutput_token_3", places) is None
    assert place_nodes([node for node in nodes if "features" not in node.outputs + node.inputs]) == {}


def events(*nodes: tuple[str, int]) -> list[dict[str, Any]]:
    return [{"name": f"{name}_kernel_time", "cat": "Node", "dur": dur} for name, dur in nodes]


def test_kernel_times_are_summed_by_part_and_a_new_node_belongs_to_what_ran_before_it() -> None:
    places = {"cast": PLACES[0], "conv": PLACES[1], "project": PLACES[2]}
    group = events(("cast", 2), ("Reorder", 3), ("conv_nchwc", 50), ("Reorder_1", 5), ("project", 7))
    assert part_times(group, places) == {"pre-process": 5, "encoder": 55, "head": 7}
    assert part_times(events(("OpenVINO_0_subgraph", 60)), places) is None
    runs = by_run([{"name": "model_run"}, *group, {"name": "model_run"}, *group[:1]])
    assert [len(each) for each in runs] == [5, 1]


def test_a_file_without_the_encoders_ends_has_one_time_for_the_whole_graph(inspector: Inspector) -> None:
    assert profile_graph(inspector, [FRAME], 2).parts_ms is not None
    data = inspector.file.data.replace(b"features", b"faetures")
    profile = profile_graph(Inspector(data), [FRAME], 2)
    assert profile.parts_ms is None and profile.why == "the file does not name the encoder's ends; export it again"


def test_multiply_adds_are_those_of_the_layers(inspector: Inspector) -> None:
    assert count_cost(inspector, FRAME) == Cost(LAYERS + CALIBRATION, LAYERS)


def test_the_arithmetic_limit_is_the_multiply_adds_at_the_measured_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "PROGRAM", "import os; print(100.0 * int(os.environ['OPENBLAS_NUM_THREADS']))")
    limit = arithmetic_limit(2, Cost(1_000_000_000, None))
    assert limit is not None and (limit.gflops, limit.threads, limit.limit_ms) == (200, 2, 10.0)
    unknown = arithmetic_limit(1, None)
    assert unknown is not None and unknown.macs is None and unknown.limit_ms is None
    monkeypatch.setattr(arithmetic, "PROGRAM", "raise SystemExit(1)")
    assert arithmetic_limit(1, None) is None


def test_the_scene_is_the_trainings_frame_with_its_roi(inspector: Inspector) -> None:
    assert scene_of(inspector, (64, 48)).full_size == (64, 48)
    scene = Scene([np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)], (5, 2, 10, 8))
    assert scene.size == (10, 8) and scene.full_size == (30, 20)
    ring = Ring(scene)
    assert np.array_equal(ring.pass_on(0).image, scene.frames[0][2:10, 5:15])
    ring.close()


def test_a_line_that_waits_holds_no_picture_of_the_ring(inspector: Inspector, tmp_path: Path) -> None:
    """What is inspected, answered or failed, committed, and shown is let go: every slot is free again."""
    ring, outbox = Ring(scene_of(inspector, None)), open_outbox(tmp_path / "outbox.db")
    changed = threading.Event()
    settings = {CAMERA: CameraSettings(source="x", policy="every", deadline_ms=60_000)}
    pipeline = Pipeline("st", settings, {CAMERA: inspector}, outbox, lambda _: TOPIC, changed.set)
    pipeline.start()
    for n in range(1, 2 * MAX_SLOTS):
        pipeline.take(CAMERA, Shot(ring.pass_on(n), "free", n), False)
        wait_until(lambda n=n: pipeline.committed == n)  # type: ignore[misc]
    wait_until(lambda: ring._reader.lent == 0)
    assert pipeline.finish(20)
    outbox.close()
    ring.close()


def test_control_a_picture_that_is_kept_is_counted_as_lent(inspector: Inspector) -> None:
    ring = Ring(scene_of(inspector, None))
    kept = ring.pass_on(0)
    assert ring._reader.lent == 1 and kept.image.shape == (32, 32, 3)
    ring.close()


def test_bench_takes_what_the_command_line_gives_it(
    tiny_model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[BenchOptions] = []

    def note(inspector: Inspector, options: BenchOptions, real: Callable[..., BenchReport] = bench) -> BenchReport:
        seen.append(options)
        return real(inspector, BenchOptions(frames=2))

    monkeypatch.setattr("edge_dkm.bench.bench", note)
    assert run(["bench", str(tiny_model_path), "--frames", "7"]) == 0
    assert seen == [BenchOptions(None, 7, None)] and "encoder" in capsys.readouterr().out
