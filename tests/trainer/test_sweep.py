from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import ConfigError, load_text
from tests.waiting import wait_until
from trainer import FitOptions, fit, load_run
from trainer.cli import main
from trainer.encoders.resnet import ResNetSettings
from trainer.progress import Silent
from trainer.settings import TrainSettings
from trainer.sweep import CONTROL_NAME, SweepOptions, ranks_with_ties, sweep
from trainer.trials import fit_or_reuse
from trainer.variants import Range, expand, parse_grid, with_method

DEC = "{name: dec, n_clusters: 3, n_init: 3, epochs: 2, optimizer: {kind: adam, lr: 0.001}}"
BAD = "{name: dec, n_clusters: 3, n_init: 3, epochs: 2, optimizer: {kind: sgd, lr: 1.0e+30}}"


def settings(text: str, method: str = DEC) -> TrainSettings:
    lines = [line if not line.startswith("method:") else f"method: {method}" for line in text.splitlines()]
    return load_text(TrainSettings, "\n".join(lines), "tiny.yaml")


def test_rows_are_ranked_without_labels_control_first_and_a_failed_one_says_why(
    tiny_settings_text: str, tmp_path: Path
) -> None:
    configs = [settings(tiny_settings_text), settings(tiny_settings_text, BAD)]
    result = sweep(configs, SweepOptions(seeds=2, out=tmp_path / "sweep"))
    control, *others = result.rows
    assert control.name == CONTROL_NAME and control.beats_control is None and control.acc is not None
    assert [row.name for row in others] == ["dec #1", "dec #2"]
    assert others[0].failed is None and others[0].mean_rank is not None and others[0].agreement is not None
    assert others[1].failed is not None and others[1].failed.startswith("guard nan") and others[1].mean_rank is None
    assert "failed: guard nan" in result.text() and "labels, not used for ranking" in result.text()
    assert load_run(others[0].runs[1]).info["train"]["seed"] == 1
    assert (
        len(list((tmp_path / "sweep" / "pretrained").glob("*.safetensors"))) == 2
    )  # one for each seed, not for each row
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert "guard nan" in page and "http" not in page


def test_finished_runs_are_reused_and_labels_change_no_rank(
    image_folder: Path, tiny_settings_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_settings_text)
    command = [
        "sweep",
        str(config),
        "--methods",
        "dec",
        "--grid",
        "method.epochs=1",
        "--out",
        str(tmp_path / "s"),
        "--json",
    ]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err.count("reusing") == 2 * 3 and json.loads(captured.out) == first
    assert [row["name"] for row in first["rows"]] == [CONTROL_NAME, "dec, epochs=1"]
    assert first["rows"][1]["acc"] is not None and first["rows"][1]["labels_used_for_ranking"] is False
    for table in (tmp_path / "s").rglob("assignments.csv"):  # every label wrong
        table.write_text(table.read_text().replace(",disc,", ",x,").replace(",bars,", ",disc,"))
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["mean_rank"] for row in again["rows"]] == [row["mean_rank"] for row in first["rows"]]


def test_a_method_gets_what_features_as_they_come_need(tiny_settings_text: str) -> None:
    base = load_text(TrainSettings, tiny_settings_text, "tiny.yaml")
    assert with_method(base, "dec").method.model_dump()["length_scale"] == "auto"
    assert with_method(base, "ae_kmeans") == base and not with_method(base, "dec").projection.learn
    frozen = "encoder: {name: pretrained, weights: w.safetensors}\nprojection: {kind: pca}"
    lines = [frozen if line.startswith("encoder") else line for line in tiny_settings_text.splitlines()]
    on_features = load_text(TrainSettings, "\n".join(lines), "tiny.yaml")
    assert with_method(on_features, "dec").projection.learn
    assert not with_method(on_features, "smoothed_kmeans").projection.learn  # nothing in it trains


def test_the_control_of_a_method_from_scratch_is_pre_trained(tiny_settings_text: str) -> None:
    scratch = "pretrain: {kind: none}"
    lines = [scratch if line.startswith("pretrain") else line for line in tiny_settings_text.splitlines()]
    base = settings("\n".join(lines))
    assert base.pretrain.kind == "none"
    assert with_method(base, "ae_kmeans").pretrain.kind == "end_to_end"  # k-means on random weights controls nothing
    assert with_method(base, "deepcluster").pretrain.kind == "none"
    trained = base.model_copy(update={"encoder": ResNetSettings(weights="w.safetensors")})
    assert with_method(trained, "ae_kmeans").pretrain.kind == "none"  # which is no random one


def test_ranks_share_a_place_within_the_margin_on_either_side_of_a_round_number() -> None:
    values = np.array([[0.8124, 1.0], [0.8126, 0.5], [0.9, 0.5], [0.2, 0.0]])
    assert ranks_with_ties(values).tolist() == [[2.5, 1.0], [2.5, 2.5], [1.0, 2.5], [4.0, 4.0]]


def test_a_grid_gives_every_combination_and_a_search_the_same_draws_each_time(tiny_settings_text: str) -> None:
    base = settings(tiny_settings_text)
    grid = parse_grid(["method.epochs=1,2", "method.tol=0,0.1"])
    assert len(expand([base], ["dec"], grid, None)) == 4
    assert [v.name for v in expand([base], ["dec", "ae_kmeans"], parse_grid(["method.epochs=1"]), None)] == [
        "dec, epochs=1",
        "ae_kmeans",
    ]
    space = parse_grid(["method.optimizer.lr=0.0001..0.1", "method.epochs=1..9"])
    drawn = [v.name for v in expand([base], [], space, 3)]
    assert len(drawn) == 3 and drawn == [v.name for v in expand([base], [], space, 3)]
    assert len(expand([base], [], {}, 3)) == 3  # the built-in space


def test_a_wide_range_is_drawn_over_its_logarithm_and_a_narrow_one_evenly() -> None:
    rng = np.random.default_rng(0)
    wide = [Range(1e-4, 1.0, False).draw(rng) for _ in range(300)]
    narrow = [Range(1, 3, True).draw(rng) for _ in range(50)]
    assert 0.003 < np.median(wide) < 0.03 and set(narrow) == {1, 2, 3}


@pytest.mark.parametrize(
    ("methods", "grid", "search", "text"),
    [
        (["decc"], [], None, "did you mean dec?"),
        ([], ["method.epoch=1"], None, "no method of this sweep has such a setting"),
        ([], ["method.epochs"], None, "expected key.subkey=value"),
        ([], ["train.seed=1,2"], None, "same images, seeds and number of clusters"),
        ([], ["method.n_clusters=3,5"], None, "for that there is select-k"),
        ([], ["method.tol=0.1..0.2"], None, "expected --search N"),
        ([], ["method.tol=0.2..0.1"], 2, "0.2 is not below 0.1"),
        ([], ["method.epochs=-3"], None, "epochs"),
    ],
)
def test_each_mistake_is_named(
    tiny_settings_text: str, methods: list[str], grid: list[str], search: int | None, text: str
) -> None:
    with pytest.raises(ConfigError, match=text.replace("?", r"\?")):
        expand([settings(tiny_settings_text)], methods, parse_grid(grid), search)


def test_a_value_goes_to_the_methods_that_take_it(tiny_settings_text: str) -> None:
    base, methods = settings(tiny_settings_text), ["dec", "stochastic_quantization"]
    rows = expand([base], methods, parse_grid(["method.init=kmeans,random,classes"]), None)
    assert [row.name for row in rows] == [
        "dec, init=kmeans",
        "dec, init=random",
        "stochastic_quantization, init=random",
        "stochastic_quantization, init=classes",
    ]
    with pytest.raises(ConfigError, match="method.init is best"):  # none takes it
        expand([base], methods, parse_grid(["method.init=kmeans,best"]), None)


def test_one_seed_and_other_images_are_refused(
    tiny_settings_text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(tiny_settings_text)
    second.write_text(tiny_settings_text.replace("n_clusters: 3", "n_clusters: 4"))
    assert main(["sweep", str(first), "--seeds", "1", "--out", str(tmp_path / "s")]) == 2
    assert "expected at least 2 seeds" in capsys.readouterr().err
    assert main(["sweep", str(first), str(second), "--out", str(tmp_path / "s")]) == 2
    assert "figures of different images cannot be compared" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_ctrl_c_keeps_what_is_complete_and_the_same_command_goes_on(tiny_settings_text: str, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(tiny_settings_text)
    grid = ["--methods", "dec", "--grid", "method.epochs=100000", "--set", "method.n_init=2", "--seeds", "2"]
    command = [sys.executable, "-m", "trainer", "sweep", str(config), *grid, "--out", str(tmp_path / "s")]
    process = subprocess.Popen([*command, "--grid", "method.tol=0"], stderr=subprocess.PIPE, text=True)
    wait_until(
        lambda: any("dec" in p.read_text() for p in (tmp_path / "s").glob("dec*/seed-0/metrics.jsonl")), timeout_s=60
    )
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in error and "Traceback" not in error
    assert len(list((tmp_path / "s").glob("control*/seed-*/model.json"))) == 2
    assert len(list((tmp_path / "s").glob("dec*/seed-0/checkpoints/last.safetensors"))) == 1


def test_a_run_that_was_killed_right_after_it_was_complete_is_complete(tiny_settings_text: str, tmp_path: Path) -> None:
    settings = load_text(TrainSettings, tiny_settings_text, "tiny.yaml")
    fit(settings, FitOptions(out=tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "last.safetensors").write_bytes(b"")
    assert fit_or_reuse(settings, tmp_path / "run", Silent()).path == tmp_path / "run"
