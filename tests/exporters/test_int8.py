from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from configs import load_text
from edge_dkm import Inspector
from edge_dkm.models import verify_model
from exporters import gate, int8, own_images
from exporters.cli import main
from exporters.export import ExportOptions, export_run
from tests.conftest import TINY
from trainer import FitOptions, fit, load_run
from trainer.settings import TrainSettings


@pytest.fixture
def small_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixty images and a network on which int8 gains nothing: the limits on counts and speed are moved, the others hold."""
    monkeypatch.setattr(own_images, "MIN_RANGES", 10)
    monkeypatch.setattr(own_images, "MIN_HELD_OUT", 20)
    monkeypatch.setattr(gate, "speed_problem", lambda int8_s, fp32_s: None)
    monkeypatch.setattr(gate, "MIN_SPEARMAN", 0.9)


def test_a_quantised_model_is_a_model_of_its_own_that_a_device_proves(
    tiny_conv_run: Path, tmp_path: Path, small_set: None
) -> None:
    run = load_run(tiny_conv_run)
    plain = export_run(run, tmp_path / "fp32.onnx")
    exported = export_run(run, tmp_path / "int8.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.reasons == []
    assert exported.sha256 != plain.sha256
    with Inspector(exported.path) as inspector:
        assert inspector.metadata.precision == "int8"
        written = json.loads(inspector.metadata.raw["dkm.quantization"])
        assert written["kept"] == "int8" and written["id_agreement"] >= 0.995 and written["frames"] == 24
        proof = json.loads(inspector.metadata.raw["dkm.parity"])
        assert proof["max_abs"] == pytest.approx(written["score_gap"], abs=1e-4) and proof["max_abs"] > 1e-4
        assert verify_model(inspector).images >= 3
        inspector.set_novelty_threshold(0.5)  # overridable as before
    operators = {node.op_type for node in onnx.load(exported.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    with Inspector(plain.path) as inspector:
        assert inspector.metadata.precision == "fp32" and inspector.metadata.raw["dkm.quantization"] == "{}"


def test_a_quantised_model_that_is_not_faster_is_not_written_and_the_reason_is(
    tiny_conv_run: Path,
    tmp_path: Path,
    small_set: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gate, "speed_problem", lambda int8_s, fp32_s: "it takes 1.10 times as long as fp32 here")
    out = tmp_path / "part.onnx"
    assert main([str(tiny_conv_run), "-o", str(out), "--int8"]) == 0
    assert "fp32; int8 is not kept: it takes 1.10 times as long" in capsys.readouterr().out
    with Inspector(out) as inspector:
        assert inspector.metadata.precision == "fp32"
        assert json.loads(inspector.metadata.raw["dkm.quantization"])["kept"] == "fp32"
        verify_model(inspector)


def test_a_graph_that_lost_agreement_is_not_written(
    tiny_conv_run: Path, tmp_path: Path, small_set: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the gate: weights rounded to nothing."""
    real = int8.quantize_encoder

    def coarse(proto: onnx.ModelProto, images: list[own_images.OwnImage]) -> onnx.ModelProto:
        model = real(proto, images)
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
                value = onnx.numpy_helper.to_array(tensor) // 100 * 100
                tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype("int8"), tensor.name))
        return model

    monkeypatch.setattr(int8, "quantize_encoder", coarse)
    exported = export_run(load_run(tiny_conv_run), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.accepted is None
    assert any("ids agree" in reason or "correlate" in reason for reason in exported.int8.reasons)


def test_too_few_images_to_judge_by_keep_fp32(tiny_conv_run: Path, tmp_path: Path) -> None:
    exported = export_run(load_run(tiny_conv_run), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.reasons == [
        "int8 needs 100 training images to be judged, the run has 36"
    ]


def test_an_error_of_the_quantiser_loses_nothing_but_int8(
    tiny_conv_run: Path, tmp_path: Path, small_set: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(int8, "quantize_encoder", broken)
    exported = export_run(load_run(tiny_conv_run), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.reasons == ["no kernel for this"]
    with Inspector(exported.path) as inspector:
        verify_model(inspector)


def test_golden_images_that_are_not_decisive_in_int8_keep_fp32(
    tiny_conv_run: Path, tmp_path: Path, small_set: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "MIN_TOLERANCE", 1e3)
    exported = export_run(load_run(tiny_conv_run), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and "lies clearly nearer" in exported.int8.reasons[0]


@pytest.mark.parametrize("left", [0, 40], ids=["moved", "partly deleted"])
def test_a_run_whose_images_have_gone_is_exported_in_fp32_with_the_reason(
    left: int, tiny_conv_run: Path, tmp_path: Path, image_folder: Path, small_set: None
) -> None:
    run_folder = Path(shutil.copytree(tiny_conv_run, tmp_path / "run"))
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    for path in sorted(images.rglob("*.png"))[left:]:
        path.unlink()
    config = run_folder / "config.yaml"
    config.write_text(config.read_text().replace(str(image_folder), str(images)))
    exported = export_run(load_run(run_folder), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.accepted is None
    assert "images of the run" in exported.int8.reasons[0] and str(images) in exported.int8.reasons[0]


def test_without_a_calibration_half_of_the_images_judge_and_no_rate_is_compared(
    image_folder: Path, tmp_path: Path, small_set: None
) -> None:
    text = TINY.format(path=image_folder).replace("novelty: {target_frr: 0.1}", "novelty: none")
    run = fit(load_text(TrainSettings, text, "none.yaml"), FitOptions(out=tmp_path / "run"))
    found = own_images.find_own_images(run, None)
    assert (len(found.ranges), len(found.held_out)) == (30, 30)
    assert not {image.item.name for image in found.ranges} & {image.item.name for image in found.held_out}
    report = export_run(load_run(tmp_path / "run"), tmp_path / "part.onnx", ExportOptions(int8=True)).int8
    assert report is not None and report.report is not None and report.report.rates is None


@pytest.mark.parametrize("changes", [{"frame": (32, 32)}, {"frame": None}], ids=["fixed frame", "any size"])
def test_every_kind_of_frame_can_be_quantised(
    changes: dict[str, tuple[int, int] | None], tiny_conv_run: Path, tmp_path: Path, small_set: None
) -> None:
    exported = export_run(load_run(tiny_conv_run), tmp_path / "part.onnx", ExportOptions(int8=True, **changes))
    assert exported.int8 is not None and exported.int8.report is not None


def test_an_encoder_of_linear_layers_is_quantised_too(tiny_run_folder: Path, tmp_path: Path, small_set: None) -> None:
    exported = export_run(load_run(tiny_run_folder), tmp_path / "part.onnx", ExportOptions(int8=True))
    assert exported.int8 is not None and exported.int8.report is not None
