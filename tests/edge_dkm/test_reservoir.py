"""The reservoir keeps recent parts within its bound, and survives kills, full disks and other models."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_dkm.errors import StorageError
from edge_dkm.recentring.reservoir import HEADER_BYTES, Reservoir, Row, Rows, Spec, read_rows, room_for, row_type
from tests.waiting import wait_until

SHA, D = "a" * 64, 4
SPEC = Spec("top", SHA, D, 50)
SIZE = row_type(D).itemsize


def row(n: int) -> Row:
    return Row(
        embedding=np.full(D, n, np.float32),
        patch_score=None if n % 2 else 0.5,
        cluster=n % 3,
        novelty_score=n / 10,
        group=2**63 + n,
        is_novel=n % 5 == 0,
        is_rejected=n % 7 == 0,
        codebook="base" if n < 10 else "0123456789ab",
        minute=29_000_000 + n,
    )


def filled(path: Path, n: int, spec: Spec = SPEC) -> Rows:
    reservoir = Reservoir(path, spec, seed=0)
    for i in range(1, n + 1):
        assert reservoir.add(row(i))
    reservoir.close()
    return read_rows(path, SHA, D)


def test_every_value_of_a_row_comes_back(tmp_path: Path) -> None:
    rows = filled(tmp_path / "r.rows", 20)
    assert len(rows) == 20 and rows.seq.tolist() == list(range(1, 21))
    for i in (1, 10, 14):
        wanted = row(i)
        found = rows.where(rows.seq == i)
        assert found.embedding.tolist() == [[i] * D] and found.cluster[0] == wanted.cluster
        assert found.novelty_score[0] == np.float32(wanted.novelty_score) and found.group[0] == wanted.group
        assert (found.is_novel[0], found.is_rejected[0]) == (wanted.is_novel, wanted.is_rejected)
        assert found.codebook[0] == wanted.codebook and found.minute[0] == wanted.minute
        assert np.isnan(found.patch_score[0]) if i % 2 else found.patch_score[0] == 0.5


def test_it_is_bounded_and_prefers_recent_parts(tmp_path: Path) -> None:
    rows = filled(tmp_path / "r.rows", 1000)
    assert len(rows) == 50 and (tmp_path / "r.rows").stat().st_size == HEADER_BYTES + 50 * SIZE
    age = 1000 - rows.seq
    assert age.min() == 0 and 20 < age.mean() < 100  # geometric with mean 50; a uniform sample would have 500


def test_control_the_age_of_rows_is_that_of_a_biased_reservoir(tmp_path: Path) -> None:
    spec = replace(SPEC, capacity=400)
    age = 4000 - filled(tmp_path / "r.rows", 4000, spec).seq
    assert np.mean(age > 400) == pytest.approx(np.exp(-1), abs=0.08)


def test_the_default_fits_its_20_megabytes(tmp_path: Path) -> None:
    assert room_for(20_000, 20_000_000, 64) == 20_000 and 20_000 * row_type(64).itemsize < 4e6
    wide = room_for(20_000, 20_000_000, 1024)
    assert 9_000 < wide < 20_000 and HEADER_BYTES + wide * row_type(1024).itemsize <= 20_000_000
    assert room_for(20_000, 100, 64) == 0


def test_numbering_goes_on_after_a_restart(tmp_path: Path) -> None:
    filled(tmp_path / "r.rows", 30)
    assert filled(tmp_path / "r.rows", 3).seq.tolist() == list(range(1, 34))


def test_a_torn_row_is_left_out_and_written_over_first(tmp_path: Path) -> None:
    path = tmp_path / "r.rows"
    filled(path, 50)
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 7 * SIZE + SIZE // 2 : HEADER_BYTES + 8 * SIZE] = b"\0" * (SIZE - SIZE // 2)
    path.write_bytes(data)
    assert 8 not in read_rows(path, SHA, D).seq and len(read_rows(path, SHA, D)) == 49
    rows = filled(path, 1)
    assert len(rows) == 50 and 51 in rows.seq  # in the torn one's place, so none was lost


def test_a_row_cut_off_at_the_end_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "r.rows"
    filled(path, 10)
    os.truncate(path, HEADER_BYTES + 9 * SIZE + 5)
    assert len(read_rows(path, SHA, D)) == 9
    assert filled(path, 2).seq.tolist() == list(range(1, 12))


def test_rows_of_another_model_are_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "r.rows"
    filled(path, 10)
    reservoir = Reservoir(path, replace(SPEC, model_sha256="b" * 64))
    assert len(reservoir) == 0 and (tmp_path / "r.rows.corrupt-1").exists() and "S-CORRUPT" in caplog.text
    reservoir.close()
    with pytest.raises(StorageError, match="parts of the model bbbbbbbbbbbb"):
        read_rows(path, SHA, D)


@pytest.mark.parametrize("damage", [b"", b"garbage", b"\0" * 2000])
def test_a_damaged_header_is_set_aside(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "r.rows"
    filled(path, 10)
    path.write_bytes(damage)
    with pytest.raises(StorageError, match="damaged"):
        read_rows(path, SHA, D)
    assert len(filled(path, 2)) == 2 and (tmp_path / "r.rows.corrupt-1").read_bytes() == damage


def test_a_missing_file_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="the station writes it"):
        read_rows(tmp_path / "r.rows", SHA, D)


def test_another_capacity_keeps_the_newest_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.rows"
    filled(path, 50)
    reservoir = Reservoir(path, replace(SPEC, capacity=20))
    assert len(reservoir) == 20 and read_rows(path, SHA, D).seq.tolist() == list(range(31, 51))
    reservoir.close()


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    reservoir = Reservoir(tmp_path / "r.rows", SPEC)
    assert not reservoir.add(replace(row(1), embedding=np.full(D, 1e6, np.float32)))
    assert not reservoir.add(replace(row(1), novelty_score=float("nan")))
    assert reservoir.add(row(1)) and len(reservoir) == 1
    reservoir.close()


def test_a_row_that_the_disk_takes_half_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a disk fills up, `pwrite` may write a part and raise nothing."""
    path, write = tmp_path / "r.rows", os.pwrite
    opened = Reservoir(path, SPEC, seed=0)
    opened.add(row(1))
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[: SIZE // 2], at))
    with pytest.raises(OSError, match="No space left"):
        opened.add(row(2))
    monkeypatch.setattr(os, "pwrite", write)
    assert len(opened) == 1 and opened.add(row(3)) and len(opened) == 2
    opened.close()
    assert read_rows(path, SHA, D).seq.tolist() == [1, 2]


def test_after_a_kill_at_any_moment_all_rows_but_the_torn_one_are_there(tmp_path: Path) -> None:
    path = tmp_path / "r.rows"
    program = f"""
from pathlib import Path
from edge_dkm.recentring.reservoir import Reservoir, Spec
from tests.edge_dkm.test_reservoir import SPEC, row
reservoir = Reservoir(Path({str(path)!r}), SPEC)
n = 0
while True:
    n += 1
    reservoir.add(row(n))
"""
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": "."})
        before = read_rows(path, SHA, D).seq.max(initial=0) if path.exists() else 0
        wait_until(lambda before=before: path.exists() and read_rows(path, SHA, D).seq.max(initial=0) > before + 200)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        rows = read_rows(path, SHA, D)
        assert len(rows) >= 49 and len(np.unique(rows.seq)) == len(rows)
        assert path.stat().st_size <= HEADER_BYTES + 50 * SIZE
