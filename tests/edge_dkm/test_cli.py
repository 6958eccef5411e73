from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from edge_dkm.cli import main
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, free_port
from tests.images import draw, write_png


def write_line(path: Path, settings: LineSettings) -> str:
    path.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    return str(path)


def run(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as exit_:
        return int(exit_.code or 0)


def test_score_prints_one_json_line_per_image(
    tiny_model_path: Path, part_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted(str(path) for path in part_folder.glob("*.png"))
    assert run(["score", str(tiny_model_path), *images]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == images and len({row["cluster"]["name"] for row in rows}) == 3
    assert set(rows[0]) == {"file", "cluster", "verdict", "reason", "distance", "novelty_score", "p_value", "is_novel"}


def test_score_cuts_the_roi_first_and_declares_what_it_cannot_read(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = draw("disc", np.random.default_rng(1))
    wide = np.zeros((50, 70, 3), np.uint8)
    wide[8:40, 20:52] = image
    plain, cut = write_png(tmp_path / "a.png", image), write_png(tmp_path / "b.png", wide)
    assert run(["score", str(tiny_model_path), str(plain)]) == 0
    assert run(["score", str(tiny_model_path), str(cut), "--roi", "20,8,32,32"]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert {**first, "file": ""} == {**second, "file": ""}
    assert run(["score", str(tiny_model_path), str(tmp_path / "none.png"), str(plain)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (
        rows[0]["verdict"] == "error"
        and rows[0]["error"]["code"] == "F-DECODE"
        and "cluster" not in rows[0]
        and rows[1]["cluster"]
    )


def test_verify_says_what_was_compared(tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(tiny_model_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] >= 5 and report["providers"] == ["CPUExecutionProvider"]


def test_bench_reports_percentiles_and_memory(tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tiny_model_path), "--frames", "20", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size"] == [32, 32] and 0 < report["p50_ms"] <= report["p99_ms"] and report["rss_mb"] > 10


@pytest.mark.broker
def test_check_looks_at_settings_model_camera_and_broker(
    mosquitto: Mosquitto, make_line: Callable[..., LineSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", write_line(tmp_path / "line.yaml", make_line(mosquitto.port))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line[:4] for line in lines} == {"ok  "} and len(lines) > 4 and "MQTT 5" in lines[4]
    assert lines[2].split() == ["ok", "device", "cpu:", "CPU,", "onnxruntime,", "fp32", "on", "CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({}, 5, "FAIL broker"),
        ({"model": "/nowhere.onnx"}, 3, "FAIL model"),
        ({"cameras": "{top: {source: 'usb:77'}}"}, 4, "FAIL camera top  C-NODEV usb:77 is not there"),
        (
            {"cameras": "{top: {source: PARTS, roi: [0, 0, 16, 16]}}"},
            2,
            "shows the model 16x16, but it was trained on images of 32x32",
        ),
        (
            {"cameras": "{top: {source: PARTS, roi: [0, 0, 160, 160]}}"},
            4,
            "C-ROI roi 0,0,160,160 does not lie inside its frames of 32x32",
        ),
        ({"verdicts": "{clusters: {scratch: reject}}"}, 2, "names 'scratch'"),
        ({"device": "tensorrt"}, 2, "TensorrtExecutionProvider, which is not installed"),
    ],
)
def test_check_names_what_fails_and_exits_with_its_code(
    change: dict[str, str],
    code: int,
    text: str,
    make_line: Callable[..., LineSettings],
    part_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = {key: value.replace("PARTS", f"'{part_folder}'") for key, value in change.items()}
    assert run(["check", write_line(tmp_path / "line.yaml", make_line(free_port(), **change))]) == code
    assert text.replace("  ", " ") in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["run", "nope"], 2, "no such settings file, and no shipped line settings of that name"),
        (["run", "demo", "--set", "station=a b"], 2, "station is a b, expected"),
        (["run", "demo", "--max-parts", "0"], 2, "expected a whole number of at least 1"),
        (
            ["run", "demo", "--set", "model=/nowhere.onnx", "--set", "state=STATE", "--set", "mqtt.host=127.0.0.1"],
            3,
            "/nowhere.onnx: no such model",
        ),
        (
            ["run", "demo", "--set", "mqtt={host: h, tls: {ca: /nowhere.pem}}", "--set", "state=STATE"],
            2,
            "mqtt.tls: /nowhere.pem cannot be used",
        ),
        (["record", "demo", "--set", "cameras.belt.source=usb:77", "--out", "STATE"], 4, "C-NODEV usb:77 is not there"),
        (["score", "/nowhere.onnx", "a.png"], 3, "no such model"),
        (["score", "m.onnx", "a.png", "--roi", "1,2,3"], 2, "expected X,Y,WIDTH,HEIGHT"),
        (["verify", "/nowhere.onnx"], 3, "no such model"),
        (["bench", "/nowhere.onnx", "--size", "5"], 2, "expected WIDTHxHEIGHT"),
        (["watch", "demo", "--set", "mqtt.port=1", "--wait", "0"], 5, "cannot be reached"),
        (["recentre", "demo", "--set", "state=/nowhere"], 7, "has this line ever run?"),
        (["recentre", "demo", "--dry-run", "--list"], 2, "not allowed with argument"),
        (["model", "list", "demo"], 2, "model is not built yet"),
        (["schema", "asyncapi"], 2, "invalid choice: 'asyncapi'"),
        (["verify", "m.onnx", "--device", "gpu"], 2, "no shipped device settings of that name"),
    ],
)
def test_each_mistake_is_one_line_and_its_exit_code(
    arguments: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([argument.replace("STATE", str(tmp_path / "state")) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith(("edge-dkm: ", "edge-dkm "))]) == 1


def test_a_state_folder_that_cannot_be_made_is_a_storage_error(
    tmp_path: Path, make_line: Callable[..., LineSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert (
        run(["run", write_line(tmp_path / "line.yaml", make_line(free_port(), state=str(tmp_path / "file" / "state")))])
        == 7
    )
    assert "cannot be used" in capsys.readouterr().err


def test_schemas_are_json_schemas(capsys: pytest.CaptureFixture[str]) -> None:
    from edge_dkm.cli import SCHEMAS
    from edge_dkm.message import MESSAGES

    assert {f"dkm.{name}/1" for name in SCHEMAS} == {*MESSAGES, "dkm.config/1"}
    for name in SCHEMAS:
        assert run(["schema", name]) == 0
        jsonschema.Draft202012Validator.check_schema(json.loads(capsys.readouterr().out))


def test_doctor_reports_and_finds_this_machine_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    rows = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["opencv"]["ok"] and rows["onnxruntime"]["ok"] and "CPUExecutionProvider" in rows["providers"]["detail"]


def test_help_needs_no_heavy_module() -> None:
    program = (
        "import sys; from edge_dkm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'cv2', 'onnxruntime', 'pydantic', 'paho', 'torch', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.stderr.strip() == "[]" and "record" in done.stdout
