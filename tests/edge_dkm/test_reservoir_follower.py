"""What a line keeps of its parts for recentre: bounded for all cameras together, grouped by part, and never at the line's cost."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_dkm.errors import FrameError
from edge_dkm.inspector import Inspection, Inspector
from edge_dkm.message import Part, TriggerInfo
from edge_dkm.pipeline import Outcome
from edge_dkm.recentring import reservoir_follower as module
from edge_dkm.recentring.reservoir import Rows, read_rows, reservoir_path, row_type
from edge_dkm.recentring.reservoir_follower import ReservoirFollower
from edge_dkm.results import Case
from edge_dkm.settings import ReservoirSettings
from tests.images import draw


@pytest.fixture(scope="module")
def inspector(tiny_model_path: Path) -> Iterator[Inspector]:
    with Inspector(tiny_model_path) as inspector:
        yield inspector


@pytest.fixture(scope="module")
def inspection(inspector: Inspector) -> Inspection:
    return inspector.inspect(draw("disc", np.random.default_rng(3)))


def outcome(inspection: Inspection | None, n: int = 1, part: str | None = None, camera: str = "top") -> Outcome:
    named = Part(id=part) if part else None
    case = Case(f"r{n}", "st1", camera, TriggerInfo(kind="part_present", id=n), "t", 0.0, 0.0, named)
    error = None if inspection else FrameError("F-DARK", "dark")
    return Outcome(case, inspection, error, None, None)


def rows_of(state: Path, inspector: Inspector, camera: str = "top") -> Rows:
    path = reservoir_path(state, camera, inspector.file.sha256)
    return read_rows(path, inspector.file.sha256, inspector.metadata.embed_dim)


def follower(state: Path, inspector: Inspector, **settings: float) -> ReservoirFollower:
    return ReservoirFollower(state, ReservoirSettings.model_validate(settings), {"top": inspector, "side": inspector})


def test_a_part_leaves_its_embedding_and_how_it_was_judged(
    tmp_path: Path, inspector: Inspector, inspection: Inspection
) -> None:
    kept = follower(tmp_path, inspector)
    assert not kept.wants_image(outcome(inspection))
    kept.follow(outcome(inspection))
    kept.follow(outcome(None, 2))  # without an answer
    kept.follow(outcome(replace(inspection, is_novel=True, verdict="reject", reason="novel"), 3))
    kept.follow(outcome(replace(inspection, verdict="reject", reason="cluster_verdict", codebook="0123456789ab"), 4))
    kept.close()
    rows = rows_of(tmp_path, inspector)
    assert np.allclose(rows.embedding[0], inspection.embedding, rtol=1e-3) and rows.cluster[0] == inspection.cluster.id
    assert rows.is_novel.tolist() == [False, True, False] and rows.is_rejected.tolist() == [False, False, True]
    assert rows.codebook.tolist() == ["base", "base", "0123456789ab"] and len(set(rows.group)) == 3
    assert rows.minute[0] > 29_000_000


def test_shots_of_one_part_are_one_group_and_trigger_numbers_of_another_start_are_others(
    tmp_path: Path, inspector: Inspector, inspection: Inspection
) -> None:
    for _ in range(2):
        kept = follower(tmp_path, inspector)
        kept.follow(outcome(inspection, 1, "SN1"))
        kept.follow(outcome(inspection, 2, "SN1"))
        kept.follow(outcome(inspection, 3))
        kept.close()
    groups = rows_of(tmp_path, inspector).group.tolist()
    assert groups[0] == groups[1] == groups[3] == groups[4] and len(set(groups)) == 3


def test_all_cameras_together_keep_to_the_limit_and_files_of_other_models_go_first(
    tmp_path: Path, inspector: Inspector, inspection: Inspection
) -> None:
    folder = tmp_path / "reservoir"
    folder.mkdir()
    others = "top.111111111111.rows", "top.222222222222.rows"
    for n, name in enumerate(others):
        (folder / name).write_bytes(b"x" * 4000)
        os.utime(folder / name, (n, n))
    kept = follower(tmp_path, inspector, max_mb=0.01)
    for n in range(200):
        kept.follow(outcome(inspection, n))
        kept.follow(outcome(inspection, n, camera="side"))
    kept.close()
    assert 20 < len(rows_of(tmp_path, inspector)) < 200
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 10_000
    assert not any((folder / name).exists() for name in others)


def test_the_rows_of_a_camera_that_is_gone_count_too(
    tmp_path: Path, inspector: Inspector, inspection: Inspection
) -> None:
    folder = tmp_path / "reservoir"
    folder.mkdir()
    (folder / "gone.111111111111.rows").write_bytes(b"x" * 6000)
    (folder / "old.111111111111.rows").write_bytes(b"x" * 2000)
    os.utime(folder / "gone.111111111111.rows", (1, 1))
    of_two_cameras = 2 * 50 * row_type(inspector.metadata.embed_dim).itemsize
    limit = of_two_cameras + 5000
    kept = follower(tmp_path, inspector, rows=50, max_mb=limit / 1e6)
    for n in range(200):
        kept.follow(outcome(inspection, n))
        kept.follow(outcome(inspection, n, camera="side"))
    kept.close()
    assert of_two_cameras < sum(path.stat().st_size for path in folder.iterdir()) <= limit
    assert (folder / "old.111111111111.rows").exists() and not (folder / "gone.111111111111.rows").exists()


def test_nothing_is_kept_where_none_are_wanted(tmp_path: Path, inspector: Inspector, inspection: Inspection) -> None:
    kept = follower(tmp_path, inspector, rows=0)
    kept.follow(outcome(inspection))
    kept.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_once_and_rows_come_again_when_there_is_room(
    tmp_path: Path,
    inspector: Inspector,
    inspection: Inspection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "RETRY_PARTS", 5)
    kept = follower(tmp_path, inspector)
    kept.follow(outcome(inspection, 1))
    write = os.pwrite

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for n in range(2, 40):
        kept.follow(outcome(inspection, n))
    assert caplog.text.count("S-IO") == 1
    monkeypatch.setattr(os, "pwrite", write)
    for n in range(40, 50):
        kept.follow(outcome(inspection, n))
    kept.close()
    assert 5 <= len(rows_of(tmp_path, inspector)) <= 11 and "written again" in caplog.text


def test_a_folder_that_cannot_be_made_costs_rows_alone(
    tmp_path: Path, inspector: Inspector, inspection: Inspection, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "reservoir").write_text("a file")
    kept = follower(tmp_path, inspector)
    kept.follow(outcome(inspection))
    kept.close()
    assert "S-IO" in caplog.text
