"""`edge-dkm verify --all` and `warmup`: a table over device profiles, and the exit code when one of them gives another answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.profile import DeviceProfile, shipped_profiles
from devices.providers import is_installed
from edge_dkm import checks, verification
from edge_dkm.cli import main
from edge_dkm.errors import ModelError
from edge_dkm.settings import LineSettings
from edge_dkm.verification import prove, prove_all, warm
from tests.broker import Mosquitto
from tests.edge_dkm.test_golden import edited


def test_every_profile_that_this_machine_has_is_a_row_and_the_others_are_named(
    tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny_model_path), "--all", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    here = [name for name, profile in shipped_profiles().items() if is_installed(profile)]
    assert [row["device"] for row in done["profiles"]] == here and set(here) >= {"cpu", "raspberry_pi"}
    assert set(done["not_installed"]) == set(shipped_profiles()) - set(here)
    by_name = {row["device"]: row for row in done["profiles"]}
    assert (by_name["cpu"]["run_here"], by_name["raspberry_pi"]["run_here"]) == (True, False)
    assert by_name["cpu"]["precision"] == "fp32" and by_name["cpu"]["images"] >= 5


def test_the_table_marks_what_was_never_run_here(tiny_model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_model_path), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("(cpu, fp32)" in line for line in lines)
    assert any("(raspberry_pi, fp32, a profile never run by this project)" in line for line in lines)
    assert lines[-1].startswith("not here  ")


def test_one_that_disagrees_ends_with_3_and_names_the_first_image_and_both_answers(
    copied_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edited(copied_model, "novelty_scale", 1.5)
    assert main(["verify", str(copied_model), "--all"]) == 3
    assert "FAIL      cpu: part.onnx: golden image 0 (part) has novelty_score" in capsys.readouterr().out
    assert main(["verify", str(copied_model)]) == 3
    said = capsys.readouterr().err
    assert "golden image 0 (part) has novelty_score" in said and ", expected " in said


def test_a_profile_that_does_not_suit_the_model_is_a_row_and_no_disagreement(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "engine.yaml").write_text("title: an engine\nfixed_frame: true")
    profiles = {"cpu": shipped_profiles()["cpu"], str(tmp_path / "engine.yaml"): DeviceProfile(title="an engine")}
    monkeypatch.setattr(verification, "shipped_profiles", lambda: profiles)
    rows = list(prove_all(str(tiny_model_path)))
    assert [(row.disagrees, row.report is None) for row in rows] == [(False, False), (False, True)]
    assert rows[1].text().startswith("cannot    ") and "export it with --frame" in rows[1].text()


def test_no_model_at_all_is_one_error_and_not_one_per_profile(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model"):
        list(prove_all(str(tmp_path / "nope.onnx")))


def test_a_users_own_profile_is_proven_by_its_path(tiny_model_path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("title: two threads\nthreads: 2\nwarm_up: 1")
    proof = prove(str(tiny_model_path), str(tmp_path / "mine.yaml"))
    assert proof.title == "two threads" and not proof.run_here and proof.report is not None


def test_the_warning_that_a_profile_was_never_run_is_given_to_whoever_uses_it(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prove(str(tiny_model_path), "raspberry_pi")
    assert "device raspberry_pi: Raspberry Pi 4 / 5, onnxruntime CPU (never run by this project)" in caplog.text
    caplog.clear()
    prove(str(tiny_model_path), "cpu")
    assert "never run" not in caplog.text


def test_warming_up_a_line_proves_each_of_its_models_once(
    make_line: Callable[..., LineSettings], part_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cameras = f"{{top: {{source: '{part_folder}'}}, side: {{source: '{part_folder}'}}}}"
    path = tmp_path / "line.yaml"
    path.write_text(json.dumps(make_line(18830, cameras=cameras).model_dump(mode="json", exclude_none=True)))
    assert main(["warmup", str(path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["model"].endswith("part.onnx") and row["device"] == "cpu" and row["ok"] and row["cache"] is None
    assert main(["warmup", str(path), "--device", "cpu"]) == 2


def test_warming_up_a_model_that_fails_its_golden_images_is_an_error(copied_model: Path) -> None:
    from edge_dkm.models import runtime_of

    edited(copied_model, "novelty_scale", 1.5)
    with pytest.raises(ModelError, match="golden image 0"):
        list(warm([str(copied_model)], "cpu", runtime_of("cpu", strict=True)))


@pytest.mark.broker
def test_check_and_doctor_mark_a_profile_that_was_never_run(
    mosquitto: Mosquitto, make_line: Callable[..., LineSettings], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "line.yaml"
    settings = make_line(mosquitto.port, device="raspberry_pi")
    path.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    assert main(["check", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "ok device raspberry_pi: Raspberry Pi 4 / 5, onnxruntime CPU (never run by this project), fp32 on CPUEx" in said
    )
    main(["doctor"])
    assert "cpu, raspberry_pi (never run by this project)" in capsys.readouterr().out.replace(
        "openvino, openvino_bf16, ", ""
    )


def test_doctor_does_not_ask_for_a_second_build_beside_the_one_that_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "installed_builds", lambda: ["onnxruntime-openvino 1.24.1"])
    main(["doctor"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "onnxruntime" in line[:20]]
    assert len(lines) == 1 and lines[0].split() == ["ok", "onnxruntime", "onnxruntime-openvino", "1.24.1"]
