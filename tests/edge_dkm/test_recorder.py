from __future__ import annotations

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import load_text
from devices.sources.synthetic import Conveyor, ConveyorOptions
from edge_dkm.errors import UsageError
from edge_dkm.recorder import COLUMNS, RecordOptions, record
from edge_dkm.settings import LineSettings
from tests.images import draw, write_png
from trainer.data import load_dataset
from trainer.images import DataSettings, open_images
from trainer.preprocess import PreprocessSettings

LINE = """
station: st1
model: not-needed.onnx
cameras:
  belt: {source: 'synthetic:seed=5,parts=6,speed_px=12', pace: max, roi: [160, 55, 160, 160], trigger: {kind: part_present, region: [225, 55, 30, 160]}}
"""


def line(text: str = LINE) -> LineSettings:
    return load_text(LineSettings, text, "line.yaml")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_frame_per_part_is_written_with_its_group_roi_and_frame_size(tmp_path: Path) -> None:
    done = record(line(), RecordOptions(tmp_path / "rec"))
    assert (done.parts, done.frames, done.faulty) == (6, 6, 0)
    index = rows(tmp_path / "rec")
    assert tuple(index[0]) == COLUMNS
    assert [row["group"] for row in index] == ["1", "2", "3", "4", "5", "6"]
    assert {(row["camera"], row["roi"], row["frame"]) for row in index} == {("belt", "160 55 160 160", "480x270")}


def test_recorded_pixels_are_the_cameras_own(tmp_path: Path) -> None:
    record(line(), RecordOptions(tmp_path / "rec"))
    row = rows(tmp_path / "rec")[2]
    number = int(row["file"].removesuffix(".png").rsplit("-", 1)[1])
    drawn = Conveyor(ConveyorOptions(seed=5, parts=6, speed_px=12)).render(number)[55:215, 160:320]
    written = cv2.imread(str(tmp_path / "rec" / row["file"]))
    assert written is not None and (written == drawn).all()


def test_all_frames_with_a_part_in_view_share_its_group(tmp_path: Path) -> None:
    done = record(line(), RecordOptions(tmp_path / "rec", frames="all"))
    groups = [row["group"] for row in rows(tmp_path / "rec")]
    assert done.parts == 6 and done.frames > 3 * 6
    assert set(groups) == {"1", "2", "3", "4", "5", "6"} and groups == sorted(groups, key=int)


def test_recording_stops_after_the_wanted_number_of_parts(tmp_path: Path) -> None:
    done = record(line(), RecordOptions(tmp_path / "rec", parts=2, frames="all"))
    assert done.parts == 2 and {row["group"] for row in rows(tmp_path / "rec")} <= {"1", "2", "3"}


def test_the_trainer_reads_a_recording_with_its_groups_and_framing(tmp_path: Path) -> None:
    record(line(), RecordOptions(tmp_path / "rec", frames="all"))
    source = DataSettings(path=str(tmp_path / "rec"))
    data, _ = load_dataset(open_images(source), source, PreprocessSettings(height_px=32, width_px=32))
    assert (data.roi, data.frame, len(set(data.groups.tolist()))) == ((160, 55, 160, 160), (480, 270), 6)


def test_images_that_cannot_be_read_are_counted_and_left_out(tmp_path: Path, part_folder: Path) -> None:
    (part_folder / "003.png").write_bytes(b"nothing")
    done = record(
        line(f"station: s\nmodel: m\ncameras: {{top: {{source: '{part_folder}', pace: max}}}}"),
        RecordOptions(tmp_path / "rec"),
    )
    assert (done.parts, done.frames, done.faulty) == (11, 11, 1)


def test_a_recording_is_never_overwritten(tmp_path: Path) -> None:
    record(line(), RecordOptions(tmp_path / "rec", parts=1))
    with pytest.raises(UsageError, match="already holds a recording"):
        record(line(), RecordOptions(tmp_path / "rec"))


def test_of_several_cameras_one_must_be_named(tmp_path: Path) -> None:
    write_png(tmp_path / "a" / "0.png", draw("disc", np.random.default_rng(0)))
    text = f"station: s\nmodel: m\ncameras: {{a: {{source: '{tmp_path / 'a'}', pace: max}}, b: {{source: 'usb:0'}}}}"
    with pytest.raises(UsageError, match="cameras a, b; name one with --camera"):
        record(line(text), RecordOptions(tmp_path / "rec"))
    with pytest.raises(UsageError, match="--camera is c, expected one of a, b"):
        record(line(text), RecordOptions(tmp_path / "rec", camera="c"))
    assert record(line(text), RecordOptions(tmp_path / "rec", camera="a")).frames == 1
