from __future__ import annotations

import csv
import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.images import draw, write_png
from trainer.cli import main
from trainer.data import load_dataset
from trainer.errors import DataError
from trainer.images import DataSettings, open_images
from trainer.ingest import Wanted, ingest
from trainer.preprocess import PreprocessSettings
from trainer.recordings import COLUMNS, parse_time

RNG = np.random.default_rng(0)


def recording(folder: Path, count: int = 6, camera: str = "top", side_px: int = 32) -> Path:
    """Part n at 10:0n, cluster c<n % 2>, novelty n / 2, review above 1."""
    folder.mkdir(parents=True)
    rows = []
    for n in range(count):
        write_png(folder / f"{camera}-{n}.png", draw("disc", RNG, side_px))
        verdict = "review" if n > 2 else "pass"
        time = f"2026-11-20T10:{n:02d}:00.000000Z"
        rows.append([f"{camera}-{n}.png", camera, time, n, f"id{n}", f"c{n % 2}", n / 2, verdict, "1 2 32 32", "64x48"])
    write_index(folder, rows)
    return folder


def write_index(folder: Path, rows: Sequence[Sequence[object]]) -> None:
    with (folder / "index.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_trainer_reads_what_was_gathered(tmp_path: Path) -> None:
    done = ingest([recording(tmp_path / "rec")], tmp_path / "out")
    assert (done.kept, done.linked, done.groups, done.size, done.left_out) == (6, 6, 6, (32, 32), {})
    source = DataSettings(path=str(tmp_path / "out"))
    data, _ = load_dataset(open_images(source), source, PreprocessSettings(height_px=16, width_px=16))
    assert (len(data), data.roi, data.frame, len(set(data.groups.tolist()))) == (6, (1, 2, 32, 32), (64, 48), 6)
    assert list(rows_of(tmp_path / "out")[0]) == list(COLUMNS)


@pytest.mark.parametrize(
    ("wanted", "kept", "why"),
    [
        (Wanted(since=parse_time("2026-11-20T10:02:00Z")), [2, 3, 4, 5], "time"),
        (Wanted(until=parse_time("2026-11-20T10:02:00")), [0, 1], "time"),
        (Wanted(verdicts=["review"]), [3, 4, 5], "verdict"),
        (Wanted(clusters=["c0"]), [0, 2, 4], "cluster"),
        (Wanted(novelty=(1.0, 2.0)), [2, 3, 4], "novelty"),
        (Wanted(limit=3), [0, 2, 4], "limit"),
        (Wanted(cameras=["top"]), [0, 1, 2, 3, 4, 5], None),
    ],
)
def test_a_filter_keeps_what_it_names_and_counts_the_rest(
    tmp_path: Path, wanted: Wanted, kept: list[int], why: str | None
) -> None:
    done = ingest([recording(tmp_path / "rec")], tmp_path / "out", wanted)
    assert [int(row["group"]) for row in rows_of(tmp_path / "out")] == kept
    assert done.left_out == ({why: 6 - len(kept)} if why else {})


def test_a_state_folder_stands_for_the_rings_of_its_cameras(tmp_path: Path) -> None:
    recording(tmp_path / "state/frames/top", 3)
    recording(tmp_path / "state/frames/side", 2, "side")
    for source in (tmp_path / "state", tmp_path / "state/frames"):
        done = ingest([source], tmp_path / f"out-{source.name}")
        assert done.kept == 5 and done.groups == 5


def test_parts_of_one_number_from_two_sources_stay_two_groups(tmp_path: Path) -> None:
    sources = [recording(tmp_path / "a", 2), recording(tmp_path / "b", 2)]
    done = ingest(sources, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert {row["group"] for row in rows} == {"1:0", "1:1", "2:0", "2:1"} and done.groups == 4
    assert len({row["file"] for row in rows}) == 4 and all((tmp_path / "out" / row["file"]).exists() for row in rows)
    assert done.by_source == {str(source): 2 for source in sources}


def test_the_same_picture_comes_once(tmp_path: Path) -> None:
    first = recording(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    done = ingest([first, tmp_path / "b"], tmp_path / "out")
    assert done.kept == 6 and done.left_out == {"duplicate": 6}


def test_bad_input_costs_its_own_frame_and_is_counted(tmp_path: Path) -> None:
    folder = recording(tmp_path / "rec", 8)
    (folder / "top-0.png").unlink()
    (folder / "top-1.png").write_bytes((folder / "top-1.png").read_bytes()[:-30])
    (folder / "top-2.png").write_bytes(b"")
    write_png(folder / "top-3.png", draw("disc", RNG, 48))
    index = folder / "index.csv"
    text = index.read_text().replace("top-4.png", "../top-4.png")
    index.write_bytes((text[: text.rindex("review")] + '"open').encode())
    done = ingest([folder], tmp_path / "out")
    assert [row["file"] for row in rows_of(tmp_path / "out")] == ["top-5.png", "top-6.png"]
    assert done.left_out == {"missing file": 1, "unreadable": 2, "other size": 1, "bad row": 2}


def test_a_group_may_hold_what_unicode_calls_an_end_of_line(tmp_path: Path) -> None:
    folder, groups = recording(tmp_path / "rec", 3), ["SN\u20281", "SN\x852", "SN\x0b3"]
    write_index(folder, [[f"top-{n}.png", "top", "", group, "", "", "", "", "", ""] for n, group in enumerate(groups)])
    done = ingest([folder], tmp_path / "out")
    assert done.left_out == {} and [row["group"] for row in rows_of(tmp_path / "out")] == groups


def test_a_frame_that_was_recorded_without_a_model_fails_only_filters_on_its_answer(tmp_path: Path) -> None:
    folder = recording(tmp_path / "rec", 2)
    write_index(folder, [[f"top-{n}.png", "top", "", n, "", "", "", "", "", ""] for n in range(2)])
    assert ingest([folder], tmp_path / "out").kept == 2
    for wanted in (Wanted(novelty=(0.0, None)), Wanted(since=parse_time("2020-01-01"))):
        with pytest.raises(DataError, match=r"no frame of .*rec is left \((novelty|time) 2\)"):
            ingest([folder], tmp_path / "other", wanted)


def test_gathered_frames_outlive_the_ring_that_they_came_from(tmp_path: Path) -> None:
    folder = recording(tmp_path / "ring", 1)
    picture = np.asarray(cv2.imread(str(folder / "top-0.png")))
    ingest([folder], tmp_path / "out")
    (folder / "top-0.png").unlink()
    assert np.array_equal(np.asarray(cv2.imread(str(tmp_path / "out/top-0.png"))), picture)


def test_a_frame_that_the_ring_lets_go_of_meanwhile_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link = recording(tmp_path / "ring", 3), Path.hardlink_to

    def trimmed_before_the_second(self: Path, target: Path) -> None:
        if target.name == "top-1.png":
            target.unlink()
        link(self, target)

    monkeypatch.setattr(Path, "hardlink_to", trimmed_before_the_second)
    done = ingest([folder], tmp_path / "out")
    assert (done.kept, done.groups, done.left_out) == (2, 2, {"missing file": 1})
    assert [row["file"] for row in rows_of(tmp_path / "out")] == ["top-0.png", "top-2.png"]
    monkeypatch.setattr(Path, "hardlink_to", lambda self, target: target.unlink() or link(self, target))
    with pytest.raises(DataError, match=r"is left \(missing file 3\)"):
        ingest([folder], tmp_path / "none")
    assert not (tmp_path / "none/index.csv").exists()


def test_where_links_are_impossible_frames_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")  # as between two disks

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    done = ingest([recording(tmp_path / "rec", 2)], tmp_path / "out")
    assert (done.linked, done.copied) == (0, 2) and (tmp_path / "out/top-1.png").stat().st_nlink == 1


def test_sources_and_places_that_cannot_be_are_refused(tmp_path: Path) -> None:
    folder = recording(tmp_path / "rec")
    for sources, out, text in (
        ([tmp_path / "nope"], "out", "does not exist; expected a folder of `edge-dkm record`"),
        ([tmp_path / "empty"], "out", "holds no index.csv"),
        ([folder, folder], "out", "named twice"),
        ([folder], "rec", "already holds a recording"),
        ([folder], "rec/inside", "lies in the source"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=text):
            ingest(sources, tmp_path / out)
    (folder / "index.csv").write_bytes(b"\0" * 40)
    with pytest.raises(DataError, match="has the columns none, expected file, camera"):
        ingest([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_regions_and_parts_in_doubt_are_said(tmp_path: Path) -> None:
    folder = recording(tmp_path / "rec", 4)
    index = folder / "index.csv"
    index.write_text(index.read_text().replace("1 2 32 32", "9 9 32 32", 1))
    several, doubted = ingest([folder], tmp_path / "out").notes
    assert "several ROIs (top 1 2 32 32; top 9 9 32 32)" in several and "1 of 4 frames were judged review" in doubted


def test_the_command_says_how_many_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recording(tmp_path / "rec")
    options = ["--verdict", "review", "--min-novelty", "2", "--since", "2026-11-20", "--json"]
    assert main(["ingest", str(folder), "--out", str(tmp_path / "out"), *options]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kept"], said["left_out"], said["folder"]) == (2, {"verdict": 3, "novelty": 1}, str(tmp_path / "out"))
    assert main(["ingest", str(folder), "--out", str(tmp_path / "two")]) == 0
    assert "ingested  6 frames of 6 groups" in capsys.readouterr().out
    assert main(["ingest", str(folder), "--out", str(tmp_path / "out")]) == 2
    with pytest.raises(SystemExit):
        main(["ingest", str(folder), "--out", str(tmp_path / "three"), "--since", "yesterday"])
    assert "expected a date or time" in capsys.readouterr().err
