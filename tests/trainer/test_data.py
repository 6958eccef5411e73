from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.images import draw, write_png
from trainer.data import Dataset, load_dataset
from trainer.errors import DataError
from trainer.images import DataSettings, open_images
from trainer.preprocess import PreprocessSettings


def load(path: Path, **settings: Any) -> Dataset:
    preprocess = settings.pop("preprocess", PreprocessSettings(height_px=16, width_px=16))
    source = DataSettings(path=str(path), **settings)
    return load_dataset(open_images(source), source, preprocess)[0]


def picture(seed: int, side_px: int = 32) -> np.ndarray:
    return draw("disc", np.random.default_rng(seed), side_px)


def test_class_folders_are_labels_and_every_image_is_its_own_group(image_folder: Path) -> None:
    data = load(image_folder)
    assert data.classes == ["bars", "disc", "square"]
    assert data.labels is not None
    assert np.bincount(data.labels).tolist() == [20, 20, 20]
    assert len(set(data.groups.tolist())) == 60
    assert tuple(data.pixels.shape) == (60, 16, 16, 3)
    assert data.frame == (32, 32)


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(1))
    data = load(tmp_path)
    assert data.labels is None and data.classes == [] and data.good.all()


@pytest.mark.parametrize("name", ["부품 1.png", "部品 い.png", "Teil ä€.png", "a b'c.PNG"])
def test_any_file_name_in_any_language_is_read(tmp_path: Path, name: str) -> None:
    write_png(tmp_path / name, picture(1))
    assert load(tmp_path).names == [name]


def test_unreadable_files_are_listed_with_the_reason_and_skipped(tmp_path: Path) -> None:
    write_png(tmp_path / "good.png", picture(1))
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    deep = cv2.imencode(".png", np.full((8, 8), 40_000, np.uint16))[1]
    (tmp_path / "deep.png").write_bytes(deep.tobytes())
    data = load(tmp_path)
    assert data.names == ["good.png"]
    reasons = {skipped.name: skipped.reason for skipped in data.skipped}
    assert set(reasons) == {"empty.png", "text.jpg", "cut.png", "deep.png"}
    assert "0 bytes" in reasons["empty.png"] and "uint16" in reasons["deep.png"]


def test_a_set_without_a_readable_image_says_what_is_wrong_with_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"none of the 1 images .* a\.png: is empty"):
        load(tmp_path)


def test_missing_and_empty_places_say_where_they_looked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist \(looked in"):
        load(tmp_path / "nope")
    with pytest.raises(DataError, match="holds no images"):
        load(tmp_path)
    (tmp_path / "notes.docx").touch()
    with pytest.raises(DataError, match="expected a folder, an .npz, a list"):
        load(tmp_path / "notes.docx")


def test_grey_images_are_kept_in_one_channel_unless_others_are_coloured(tmp_path: Path) -> None:
    write_png(tmp_path / "grey.png", np.full((20, 20, 3), 90, np.uint8))
    assert load(tmp_path).pixels.shape[-1] == 1
    write_png(tmp_path / "colour.png", picture(1))
    assert load(tmp_path).pixels.shape[-1] == 3


def test_byte_identical_images_share_a_group(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_png(tmp_path / f"{name}.png", picture(1 if name != "c" else 2))
    assert load(tmp_path).groups.tolist() == [0, 0, 1]


def test_groups_come_from_a_csv_also_when_its_paths_begin_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("a", "b", "c"):
        write_png(folder / f"{name}.png", picture(ord(name)))
    groups = tmp_path / "groups.csv"
    groups.write_text("path,lot\nset/a.png,1\nset/b.png,1\nset/c.png,2\n")
    assert load(folder, groups=str(groups), group_column="lot").groups.tolist() == [0, 0, 1]
    with pytest.raises(DataError, match="expected path .* and batch"):
        load(folder, groups=str(groups), group_column="batch")
    groups.write_text("path,lot\nset/a.png,1\n")
    with pytest.raises(DataError, match=r"no group for b\.png \(2 of 3"):
        load(folder, groups=str(groups), group_column="lot")


def test_the_good_folder_is_told_from_the_others(tmp_path: Path) -> None:
    for name in ("Good/a", "Good/b", "scratch/a"):
        write_png(tmp_path / f"{name}.png", picture(len(name) + ord(name[-1])))
    assert load(tmp_path).good.tolist() == [True, True, False]
    assert load(tmp_path, classes=("Good",)).names == ["Good/a.png", "Good/b.png"]
    with pytest.raises(DataError, match="names 'dent', which .* it has Good, scratch"):
        load(tmp_path, classes=("dent",))


def test_a_list_file_names_images_labels_and_groups(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_png(tmp_path / "images" / f"{name}.png", picture(ord(name)))
    listing = tmp_path / "list.csv"
    listing.write_text("label,file,group\nok,images/a.png,7\nbad,images/b.png,7\n")
    data = load(listing)
    assert (
        data.names == ["images/a.png", "images/b.png"]
        and data.classes == ["bad", "ok"]
        and data.groups.tolist() == [0, 0]
    )
    listing = tmp_path / "list.txt"
    listing.write_text("# a comment\nimages/a.png\nimages/b.png\n")
    assert load(listing).labels is None


def test_an_npz_holds_images_labels_and_a_split(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    x = np.random.default_rng(0).integers(0, 256, (6, 16, 16), dtype=np.uint8)
    np.savez(path, X=x, y=np.array([0, 1, 2, 0, 1, 2]), split=np.array([0, 0, 0, 1, 1, 1]))
    data = load(path, split="test", preprocess=PreprocessSettings(resize="none"))
    assert data.classes == ["0", "1", "2"] and np.array_equal(data.pixels[..., 0].numpy(), x[3:])
    np.savez(path, X=x.astype(np.float32))
    with pytest.raises(DataError, match="X of float32"):
        load(path)
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match="no readable .npz"):
        load(path)


def test_frames_of_a_film_are_images_and_a_second_of_it_is_a_group(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30, (64, 48))
    for n in range(40):
        writer.write(np.full((48, 64, 3), 5 * n, np.uint8))
    writer.release()
    data = load(path, every=5)
    assert data.names == [f"film.mp4#{n}" for n in range(0, 40, 5)]
    assert data.groups.tolist() == [0] * 6 + [1] * 2
    level = data.pixels.float().mean((1, 2, 3))
    assert float((level - torch_range(0, 40, 5) * 5).abs().max()) < 4


def torch_range(start: int, stop: int, step: int):  # type: ignore[no-untyped-def]
    import torch

    return torch.arange(start, stop, step).float()


def test_a_record_folder_brings_roi_frame_size_and_groups(tmp_path: Path) -> None:
    for n in range(3):
        write_png(tmp_path / f"{n}.png", picture(n))
    (tmp_path / "index.csv").write_text(
        "file,camera,ts,group,result_id,cluster,novelty_score,verdict,roi,frame\n"
        "0.png,top,t,1,,,,,10 20 32 32,640x480\n1.png,top,t,1,,,,,10 20 32 32,640x480\n2.png,top,t,2,,,,,10 20 32 32,640x480\n"
    )
    data = load(tmp_path)
    assert (data.roi, data.frame) == ((10, 20, 32, 32), (640, 480))
    assert data.groups.tolist() == [0, 0, 1]


def test_a_limit_takes_images_evenly_over_the_set(image_folder: Path) -> None:
    data = load(image_folder, limit=6)
    assert data.labels is not None and np.bincount(data.labels).tolist() == [2, 2, 2]


def test_an_aliasing_step_is_refused_with_the_image_that_needs_it(tmp_path: Path) -> None:
    write_png(tmp_path / "large.png", picture(1, 64))
    with pytest.raises(DataError, match=r"large\.png: frames of 64x64 are scaled down by 4\.00"):
        load(tmp_path, preprocess=PreprocessSettings(height_px=16, width_px=16, antialias=False))


def test_the_manifest_digest_changes_with_content_and_not_otherwise(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(1))
    first = load(tmp_path).manifest_sha256
    assert load(tmp_path).manifest_sha256 == first
    write_png(tmp_path / "a.png", picture(2))
    assert load(tmp_path).manifest_sha256 != first


def test_groups_of_two_folders_that_end_alike_are_not_mixed_up(tmp_path: Path) -> None:
    write_png(tmp_path / "d" / "good" / "0.png", picture(1))
    groups = tmp_path / "groups.csv"
    groups.write_text("path,group\ntrain/good/0.png,A\ntest/good/0.png,Z\n")
    with pytest.raises(DataError, match=r"gives good/0\.png the groups A, Z"):
        load(tmp_path / "d", groups=str(groups))
    groups.write_text("path,group\nother/1.png,A\n0.png,B\n")
    write_png(tmp_path / "d" / "good" / "1.png", picture(2))
    with pytest.raises(DataError, match=r"names no group for good/1\.png"):  # other/1.png is another file
        load(tmp_path / "d", groups=str(groups))


def test_a_file_name_in_another_encoding_and_a_list_in_another_encoding(tmp_path: Path) -> None:
    write_png(tmp_path / "d" / "a.png", picture(1))
    (tmp_path / "d" / "a.png").rename(os.fsdecode(os.fsencode(tmp_path / "d") + b"/\xe4hre.png"))
    assert [item.name for item in load(tmp_path / "d").items] == ["\ufffdhre.png"]
    (tmp_path / "list.txt").write_bytes(b"\xe4hre.png\n")
    with pytest.raises(DataError, match="is not UTF-8; save it as UTF-8"):
        load(tmp_path / "list.txt")


def test_a_list_may_name_files_with_commas_and_hashes(tmp_path: Path) -> None:
    for name in ("a,b.png", "#1.png"):
        write_png(tmp_path / name, picture(1))
    (tmp_path / "list.txt").write_text("a,b.png\n#1.png\n# a comment\n")
    assert [item.name for item in load(tmp_path / "list.txt").items] == ["a,b.png", "#1.png"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"split": np.zeros(3, np.int64)}, r"split of \(3,\), expected \(4,\)"),
        ({"y": np.zeros((4, 2), np.int64)}, r"y of \(4, 2\), expected \(4,\)"),
        ({"y": np.array([0, 1, 2, 9]), "classes": np.array(["a", "b", "c"])}, "labels y of 0 to 9, but 3 classes"),
    ],
)
def test_arrays_that_do_not_fit_together_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "set.npz", X=np.zeros((4, 8, 8), np.uint8), **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "set.npz")


def test_an_array_file_with_the_wrong_suffix_and_a_damaged_index_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"no readable \.npz"):
        load(tmp_path / "x.npz")
    write_png(tmp_path / "rec" / "a.png", picture(1))
    (tmp_path / "rec" / "index.csv").write_text("file,camera,group,roi\na.png,top,1,0 0 x 4\n")
    with pytest.raises(DataError, match="has '0 0 x 4', expected 4 whole numbers"):
        load(tmp_path / "rec")


@pytest.mark.parametrize("settings", [{"split": "train"}, {"every": 5}])
def test_a_setting_for_another_kind_of_data_is_refused(image_folder: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"data.{next(iter(settings))} is .* only, but data.path .* is a folder"):
        load(image_folder, **settings)
