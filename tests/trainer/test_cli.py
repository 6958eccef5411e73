from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exporters.cli import main as export_main
from tests.waiting import wait_until
from trainer import cli, images
from trainer.cli import main


def test_fit_evaluate_predict_and_report_work_from_the_command_line(
    tiny_settings_text: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_settings_text)
    assert main(["fit", str(config), "--out", str(tmp_path / "run"), "--set", "train.seed=3"]) == 0
    out = capsys.readouterr().out
    assert "report.html" in out and "WARNING: 18 groups cannot promise" not in out
    assert main(["evaluate", str(tmp_path / "run"), str(image_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clustering"]["acc"] > 0.9
    assert main(["predict", str(tmp_path / "run"), str(image_folder), "--json"]) == 0
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 60
    assert main(["report", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "model.json").read_text())["train"]["seed"] == 3


def test_too_few_groups_for_the_target_are_said_loudly(
    tiny_settings_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_settings_text)
    assert main(["fit", str(config), "--out", str(tmp_path / "run"), "--set", "novelty.target_frr=0.01"]) == 0
    assert (
        "WARNING: 18 groups cannot promise the target of 1.00% (that needs 99); at most 5.26% of good parts"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["fit", "no-such-settings"], 2, "no such settings file"),
        (["fit", "x_sdd_ae_kmeans", "--set", "data.path=/nowhere"], 2, "/nowhere, which does not exist"),
        (["fit", "x_sdd_ae_kmeans", "--set", "method.n_cluster=3"], 2, "did you mean 'n_clusters'"),
        (["scan", "/nowhere"], 2, "does not exist"),
        (["evaluate", "/nowhere", "/nowhere"], 3, "no such run folder"),
        (["predict", "/nowhere", "/nowhere"], 3, "no such run folder"),
        (["report", "/nowhere"], 3, "no such run folder"),
        (["label", "x"], 2, "label is not built yet"),
        (["select-k", "demo", "--k", "1..3"], 2, "--k is 1..3, expected whole numbers of at least 2"),
        (["select-k", "demo", "--k", "2..3", "--set", "data.path=/nowhere"], 2, "/nowhere, which does not exist"),
        (["sweep", "demo", "--methods", "dec,nope"], 2, "nope is no method"),
        (["pilot", "/nowhere"], 2, "does not exist"),
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
    try:
        assert main(arguments) == code
    except SystemExit as exit_:
        assert exit_.code == code
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("dkm-train: ")]
    assert len(lines) == 1 and text in lines[0] and "Traceback" not in error


@pytest.mark.parametrize("arguments", [["sweep", "demo"], ["report", "run"], ["scan", "images"]])
def test_torchrun_is_for_the_commands_that_spread(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    assert f"start {arguments[0]} once, as dkm-train {arguments[0]}" in capsys.readouterr().err


def test_export_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main([str(tmp_path), "-o", str(tmp_path / "a.onnx"), "--int8"]) == 3
    assert export_main([str(tmp_path / "nope"), "-o", str(tmp_path / "a.onnx")]) == 3
    assert capsys.readouterr().err.count("\n") == 2


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    from trainer.methods import METHODS

    assert main(["methods", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(METHODS)


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_settings_text: str, tmp_path: Path) -> None:
    config = tmp_path / "long.yaml"
    config.write_text(tiny_settings_text.replace("epochs: 3", "epochs: 100000"))
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "fit", str(config), "--out", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, timeout_s=60)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: dkm-train fit {config} --out {tmp_path / 'run'} --resume" in error and "Traceback" not in error
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").is_file()


def test_help_names_the_places_that_data_come_from() -> None:
    assert cli.PLACES == images.PLACES
