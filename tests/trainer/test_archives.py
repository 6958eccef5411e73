from __future__ import annotations

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.images import draw, write_png
from trainer.data import Dataset, load_dataset
from trainer.errors import DataError
from trainer.images import DataSettings, open_images
from trainer.npz_rows import open_rows
from trainer.preprocess import PreprocessSettings

NAMES = ("good/a.png", "good/b.png", "good/ä.png", "dent/c.png", "top.png")


def load(path: Path, **settings: Any) -> Dataset:
    source = DataSettings(path=str(path), **settings)
    return load_dataset(open_images(source), source, PreprocessSettings(height_px=16, width_px=16))[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n, name in enumerate(NAMES):
        write_png(tmp_path / "set" / name, draw("disc", np.random.default_rng(n)))
    (tmp_path / "set" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "good" / "._a.png").write_bytes(b"what macOS leaves")
    return tmp_path / "set"


def zipped(folder: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    path = folder.parent / "set.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("good")
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def tarred(folder: Path, name: str = "set.tar", mode: str = "w") -> Path:
    path = folder.parent / name
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        archive.add(folder, ".")
    return path


@pytest.mark.parametrize("kind", ["stored", "deflated", "tar"])
def test_an_archive_is_the_folder_that_was_packed(folder: Path, kind: str) -> None:
    methods = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
    path = tarred(folder) if kind == "tar" else zipped(folder, methods[kind])
    unpacked, packed = load(folder), load(path, workers=4)
    assert packed.names == unpacked.names == ["dent/c.png", "good/a.png", "good/b.png", "good/ä.png", "top.png"]
    assert packed.manifest_sha256 == unpacked.manifest_sha256
    assert torch.equal(packed.pixels[:], unpacked.pixels[:])
    assert packed.classes == ["dent", "good"] and packed.known.tolist() == [0, 1, 1, 1, -1]
    assert load(path, kind="archive", limit=2, classes=("good",)).names == ["good/a.png", "good/b.png"]


def test_a_damaged_member_is_skipped_with_the_reason(folder: Path) -> None:
    for method, reason in ((zipfile.ZIP_STORED, "its checksum is not that"), (zipfile.ZIP_DEFLATED, "")):
        path = zipped(folder, method)
        with zipfile.ZipFile(path) as archive:
            place = archive.getinfo("good/b.png").header_offset + 30 + len("good/b.png")
        data = bytearray(path.read_bytes())
        data[place + 40 : place + 60] = bytes(20)
        path.write_bytes(data)
        found = load(path)
        assert [skipped.name for skipped in found.skipped] == ["good/b.png"] and len(found) == 4
        assert reason in found.skipped[0].reason
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.png", b"")
        archive.writestr(zipfile.ZipInfo("y.png"), b"pixels", zipfile.ZIP_BZIP2)
        archive.writestr("z.png", (folder / "top.png").read_bytes())
    reasons = {skipped.name: skipped.reason for skipped in load(path).skipped}
    assert "0 bytes" in reasons["x.png"] and "zip method 12, expected stored (0) or deflated" in reasons["y.png"]
    assert "z.png" not in reasons


def test_an_encrypted_member_and_one_that_claims_to_be_huge_are_skipped(folder: Path) -> None:
    path = zipped(folder)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"top.png"))
    data[entry + 8] |= 1
    huge = data.rindex(b"PK\x01\x02", 0, data.rindex(b"dent/c.png"))
    data[huge + 24 : huge + 28] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(data)
    reasons = {skipped.name: skipped.reason for skipped in load(path).skipped}
    assert reasons.keys() == {"top.png", "dent/c.png"}
    assert "is encrypted" in reasons["top.png"] and "is 2147 MB, expected at most 537 MB" in reasons["dent/c.png"]


def test_a_name_that_comes_twice_is_the_last_one(folder: Path) -> None:
    path = tarred(folder)
    newer = draw("bars", np.random.default_rng(9))
    write_png(folder / "good" / "a.png", newer)
    with tarfile.open(path, "a") as archive:
        archive.add(folder / "good" / "a.png", "good/a.png")
        archive.addfile(tarfile.TarInfo("good/link.png"), io.BytesIO())
    found = load(path)
    assert torch.equal(found.pixels[1], load(folder).pixels[1])
    assert [skipped.name for skipped in found.skipped] == ["good/link.png"]  # of no bytes


def test_links_in_a_tar_are_the_images_that_they_lead_to(folder: Path) -> None:
    (folder / "sorted").mkdir()
    (folder / "sorted" / "hard.png").hardlink_to(folder / "good" / "a.png")  # as predict --sort-into makes them
    (folder / "sorted" / "soft.png").symlink_to("../dent/c.png")
    unpacked, packed = load(folder), load(tarred(folder))
    assert packed.names == unpacked.names and {"sorted/hard.png", "sorted/soft.png"} <= set(packed.names)
    assert packed.manifest_sha256 == unpacked.manifest_sha256
    (folder / "sorted" / "soft.png").unlink()
    (folder / "sorted" / "soft.png").symlink_to(folder.parent / "elsewhere.png")
    assert "sorted/soft.png" not in load(tarred(folder)).names


def test_a_size_that_no_file_has_is_refused(folder: Path) -> None:
    path = folder.parent / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "top.png", "./top.png")
    assert load(path).names == ["top.png"]
    data = path.read_bytes()
    entry, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    record, tail = bytearray(data[entry:end]), bytearray(data[end:])
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)  # zip64: the unpacked size
    record[24:28], record[30:32] = b"\xff" * 4, struct.pack("<H", len(extra))
    tail[12:16] = struct.pack("<I", len(record) + len(extra))
    path.write_bytes(data[:entry] + record + extra + tail)
    with pytest.raises(DataError, match="no readable zip archive"):
        load(path)


def test_an_archive_that_was_cut_or_is_none_is_refused(folder: Path) -> None:
    for path in (zipped(folder), tarred(folder)):
        os.truncate(path, path.stat().st_size * 2 // 3 // 512 * 512 - 700)
        with pytest.raises(DataError, match=f"{path.name}, which is no readable {path.suffix[1:]} archive"):
            load(path)
        path.write_bytes(b"something else" * 100)
        with pytest.raises(DataError, match="is no readable"):
            load(path)


def test_an_archive_that_is_cut_while_it_is_used_loses_the_images_behind(folder: Path) -> None:
    path = tarred(folder)
    source = DataSettings(path=str(path))
    images = open_images(source)
    os.truncate(path, 1024)
    with pytest.raises(DataError, match=r"none of the 5 images .* beyond the end of set\.tar, which has been cut"):
        load_dataset(images, source, PreprocessSettings(height_px=16, width_px=16))


@pytest.mark.parametrize("name", ["set.tar.gz", "set.tgz"])
def test_a_compressed_tar_is_refused_with_what_to_do(folder: Path, name: str) -> None:
    path = tarred(folder, name, "w:gz")
    with pytest.raises(DataError, match=r"compressed tar, .* into a \.zip or an uncompressed \.tar"):
        load(path)


@pytest.mark.parametrize("shape", [(6, 16, 16), (6, 16, 16, 3), (6, 16, 16, 1)])
def test_an_array_file_is_read_by_rows_where_it_was_not_compressed(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plain, packed, columns = (tmp_path / name for name in ("plain.npz", "packed.npz", "columns.npz"))
    np.savez(plain, y=np.arange(6), X=x)
    np.savez_compressed(packed, y=np.arange(6), X=x)
    np.savez(columns, y=np.arange(6), X=np.asfortranarray(x))
    rows = open_rows(plain, "X")
    assert rows is not None and open_rows(packed, "X") is None and open_rows(columns, "X") is None
    assert rows.shape == shape and np.array_equal(rows[4], x[4])
    sets = [load(path) for path in (plain, packed, columns)]
    assert torch.equal(sets[0].pixels[:].expand(-1, -1, -1, 3), torch.from_numpy(x.reshape(6, 16, 16, -1)).expand(-1, -1, -1, 3))  # fmt: skip
    for other in sets[1:]:
        assert torch.equal(sets[0].pixels[:], other.pixels[:]) and other.classes == list("012345")


def test_an_array_file_that_is_cut_while_it_is_used_says_so(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, X=np.zeros((6, 16, 16), np.uint8))
    source = DataSettings(path=str(path))
    images = open_images(source)
    os.truncate(path, 1000)
    data, _ = load_dataset(images, source, PreprocessSettings(resize="none"))
    assert len(data) < 6 and "beyond the end of set.npz" in data.skipped[0].reason
