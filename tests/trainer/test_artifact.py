from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs import ConfigError
from trainer import load_run
from trainer.artifact import save_run
from trainer.errors import ArtifactError


def test_names_and_verdicts_of_labels_yaml_reach_the_cluster_table(copied_run: Path) -> None:
    (copied_run / "labels.yaml").write_text(
        "clusters:\n  0: {name: 왼쪽 긁힘, verdict: reject}\n  2: {verdict: review}\n", encoding="utf-8"
    )
    rows = load_run(copied_run).clusters
    assert [(row["name"], row.get("verdict")) for row in rows] == [
        ("왼쪽 긁힘", "reject"),
        ("cluster-1", None),
        ("cluster-2", "review"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clusters: {7: {name: x}}", r"labels\.yaml clusters\.7: there is no such cluster, expected 0 to 2"),
        ("clusters:\n  0: {name: a}\n  1: {name: a}", "gives the name 'a' to two clusters"),
        (
            "clusters:\n  0: {verdict: ok}",
            r"labels\.yaml:2 clusters\.0\.verdict is ok, expected 'pass', 'review' or 'reject'",
        ),
        ("cluster: {}", r"cluster is not a known setting, did you mean 'clusters'\?"),
    ],
)
def test_a_wrong_labels_file_is_one_line(copied_run: Path, text: str, message: str) -> None:
    (copied_run / "labels.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        _ = load_run(copied_run).clusters


def test_a_name_that_another_cluster_has_by_default_is_refused(copied_run: Path) -> None:
    (copied_run / "labels.yaml").write_text("clusters: {0: {name: cluster-1}}")
    with pytest.raises(ConfigError, match="gives the name 'cluster-1' to two clusters"):
        _ = load_run(copied_run).clusters


def test_a_run_without_labels_file_has_plain_names(copied_run: Path) -> None:
    (copied_run / "labels.yaml").unlink()
    assert [row["name"] for row in load_run(copied_run).clusters] == ["cluster-0", "cluster-1", "cluster-2"]


def test_the_template_lists_every_cluster(tiny_run_folder: Path) -> None:
    text = (tiny_run_folder / "labels.yaml").read_text()
    assert "0: {name: cluster-0}" in text and "2: {name: cluster-2}" in text


def test_what_is_no_run_or_a_damaged_one_is_named(copied_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such run folder"):
        load_run(tmp_path / "nope")
    with pytest.raises(ArtifactError, match="is no run folder"):
        load_run(tmp_path)
    (copied_run / "encoder.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ArtifactError, match="damaged run"):
        load_run(copied_run)


def test_another_schema_is_refused(copied_run: Path) -> None:
    info = json.loads((copied_run / "model.json").read_text())
    (copied_run / "model.json").write_text(json.dumps({**info, "schema": "dkm.run/9"}))
    with pytest.raises(ArtifactError, match=r"schema dkm\.run/9, expected dkm\.run/1"):
        load_run(copied_run)


def test_nothing_in_a_run_is_pickled(tiny_run_folder: Path) -> None:
    for path in (p for p in tiny_run_folder.rglob("*") if p.is_file()):
        assert path.read_bytes()[:2] not in {b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"}, path


@pytest.mark.parametrize("name", ["0", "no", "1e3", "a, b", "{x}", "dent: deep", "Kratzer ü", "null", "#5", "-"])
def test_a_class_may_have_any_name_and_the_template_reads_back(name: str, copied_run: Path) -> None:
    run = load_run(copied_run)
    run.info["clusters"][0]["name"] = name
    (copied_run / "labels.yaml").unlink()
    save_run(run, copied_run, [])
    assert load_run(copied_run).clusters[0]["name"] == name
