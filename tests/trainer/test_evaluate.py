from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.images import draw, write_png
from trainer import load_run
from trainer.errors import DataError
from trainer.evaluate import evaluate, predict, sort_into
from trainer.report import write_report
from trainer.scan import scan


def test_images_are_linked_into_a_folder_per_cluster(tiny_run_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    rows = predict(load_run(tiny_run_folder), str(image_folder))
    linked, copied = sort_into(rows, image_folder, tmp_path / "sorted")
    novel = sum(row.is_novel for row in rows)
    assert (linked, copied) == (60 + novel, 0)
    folders = {path.name: len(list(path.iterdir())) for path in (tmp_path / "sorted").iterdir()}
    assert sum(n for name, n in folders.items() if name != "novel") == 60 and folders.get("novel", 0) == novel
    one = next((tmp_path / "sorted" / rows[0].name).iterdir())
    assert one.stat().st_nlink >= 2


def test_images_are_copied_where_links_are_impossible(
    tiny_run_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = predict(load_run(tiny_run_folder), str(image_folder))[:3]

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    linked, copied = sort_into(rows, image_folder, tmp_path)
    assert linked == 0 and copied >= 3


def test_sorting_arrays_into_folders_is_refused(tiny_run_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, X=np.stack([draw("disc", np.random.default_rng(n)) for n in range(3)]))
    rows = predict(load_run(tiny_run_folder), str(path))
    with pytest.raises(DataError, match="--sort-into works on folders and lists"):
        sort_into(rows, path, tmp_path / "out")


def test_the_kinds_are_recovered_on_images_never_seen(tiny_run_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(77)
    for kind in ("disc", "square", "bars"):
        for n in range(8):
            write_png(tmp_path / kind / f"{n}.png", draw(kind, rng))
    result = evaluate(load_run(tiny_run_folder), str(tmp_path))
    assert result.clustering is not None and result.clustering.acc > 0.9 and result.auroc is None


def test_strange_images_are_flagged_and_good_ones_hardly(tiny_run_folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(78)
    for n in range(12):
        write_png(tmp_path / "good" / f"{n}.png", draw(("disc", "square", "bars")[n % 3], rng))
        write_png(tmp_path / "junk" / f"{n}.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    result = evaluate(load_run(tiny_run_folder), str(tmp_path))
    assert result.auroc is not None and result.auroc > 0.95
    assert result.flagged["junk"][0] >= 11 and result.flagged["good"][0] <= 4
    assert "AUROC" in result.text() and "junk: " in result.text()


def test_a_report_is_one_page_that_loads_nothing_from_elsewhere(copied_run: Path) -> None:
    page = (copied_run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 30
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert "cluster-2" in page and "1 = novel" in page


def test_a_report_can_be_written_again_when_the_images_are_gone(copied_run: Path) -> None:
    run = load_run(copied_run)
    run.settings = run.settings.model_copy(update={"data": run.settings.data.model_copy(update={"path": "/nowhere"})})
    write_report(run, None, copied_run / "report.html")
    page = (copied_run / "report.html").read_text()
    assert "data:image" not in page and "not there" in page


def test_names_are_escaped_in_the_report(copied_run: Path) -> None:
    (copied_run / "labels.yaml").write_text("clusters: {0: {name: '<script>alert(1)</script>'}}")
    write_report(load_run(copied_run), None, copied_run / "report.html")
    page = (copied_run / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_scan_tells_what_is_there_and_what_is_wrong(tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b/1"):
        write_png(tmp_path / f"{name}.png", draw("disc", np.random.default_rng(1 if name == "b/1" else ord(name[-1]))))
    write_png(tmp_path / "b" / "copy.png", draw("disc", np.random.default_rng(1)))
    write_png(tmp_path / "b" / "tiny.png", draw("disc", np.random.default_rng(3), 16))
    (tmp_path / "b" / "bad.png").touch()
    result = scan(str(tmp_path))
    assert (result.images, result.classes, len(result.unreadable)) == (5, {"a": 2, "b": 3}, 1)
    assert result.duplicates == [("b/copy.png", "b/1.png")] and result.tiny == ["b/tiny.png"]
    assert "bad.png: is empty" in result.text()


def test_sorting_a_folder_into_itself_deletes_nothing(tiny_run_folder: Path, tmp_path: Path) -> None:
    write_png(tmp_path / "st" / "x" / "a.png", draw("disc", np.random.default_rng(1)))
    run = load_run(tiny_run_folder)
    rows = predict(run, str(tmp_path / "st" / "x"))
    sort_into(rows, tmp_path / "st" / "x", tmp_path / "sorted")
    again = [replace(row, name="x") for row in rows]
    linked, copied = sort_into(again, tmp_path / "st" / "x", tmp_path / "st")
    assert (tmp_path / "st" / "x" / "a.png").is_file() and linked + copied == sum(row.is_novel for row in rows)


def test_clusters_whose_names_make_the_same_folder_stay_apart(tiny_run_folder: Path, tmp_path: Path) -> None:
    for n, kind in enumerate(("disc", "square", "bars")):
        write_png(tmp_path / "d" / f"{n}.png", draw(kind, np.random.default_rng(n)))
    rows = predict(load_run(tiny_run_folder), str(tmp_path / "d"))
    names = {row.cluster: name for row, name in zip(rows, ("a b", "a/b", "novel"), strict=True)}
    sort_into([replace(row, name=names[row.cluster], is_novel=False) for row in rows], tmp_path / "d", tmp_path / "out")
    assert sorted(len(list(folder.iterdir())) for folder in (tmp_path / "out").iterdir()) == [1, 1, 1]
    assert "novel" not in {folder.name for folder in (tmp_path / "out").iterdir()}


def test_a_run_that_learned_from_every_fifth_frame_of_a_film_is_applied_to_a_folder(
    tiny_run_folder: Path, image_folder: Path
) -> None:
    run = load_run(tiny_run_folder)
    run.settings = run.settings.model_copy(update={"data": run.settings.data.model_copy(update={"every": 5})})
    assert len(predict(run, str(image_folder))) == 60
