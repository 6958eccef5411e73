"""Which codebook judges: chosen on disk, switched between two frames, named by every result, and never one that is damaged or foreign."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_dkm.codebook import write_codebook
from edge_dkm.codebook_record import KEPT, CodebookRecord, Current
from edge_dkm.errors import ModelError, StorageError, UsageError
from edge_dkm.golden import load_golden
from edge_dkm.inspector import Inspector
from edge_dkm.model_file import golden_path
from edge_dkm.results import model_info
from edge_dkm.station_codebooks import StationCodebooks
from tests.images import draw

FRAME = draw("disc", np.random.default_rng(3))


@pytest.fixture
def inspector(tiny_model_path: Path) -> Iterator[Inspector]:
    with Inspector(tiny_model_path) as inspector:
        yield inspector


def made(inspector: Inspector, folder: Path, scale: float, parent: str = "base") -> str:
    """A codebook under which scores are `scale` times those of the base one."""
    path = inspector.file.path
    assert path is not None
    book = dict(load_golden(golden_path(path), inspector.metadata.golden_sha256).codebook)
    book["novelty_scale"] = (book["novelty_scale"] / scale).astype(np.float32)
    return write_codebook(folder, book, {"model_sha256": inspector.file.sha256, "parent": parent}).stem


def record_of(state: Path) -> CodebookRecord:
    return CodebookRecord(state)


def started(state: Path, inspector: Inspector) -> StationCodebooks:
    station = StationCodebooks(state, {"top": inspector})
    station.load()
    return station


def test_a_new_station_judges_by_the_base_codebook(tmp_path: Path, inspector: Inspector) -> None:
    station = started(tmp_path, inspector)
    assert station.plain()["top"]["codebook"] == "base" and inspector.inspect(FRAME).codebook == "base"
    assert list(tmp_path.iterdir()) == []


def test_a_switch_holds_from_the_next_frame_on_and_after_a_restart(tmp_path: Path, inspector: Inspector) -> None:
    station = started(tmp_path, inspector)
    before = inspector.inspect(FRAME)
    name = made(inspector, tmp_path / "codebooks", 2.0)
    station.switch("top", name, "recentre")
    after = inspector.inspect(FRAME)
    assert after.codebook == name and after.novelty_score == pytest.approx(2 * before.novelty_score, rel=1e-5)
    inspector.set_codebook(None)
    assert started(tmp_path, inspector).plain()["top"]["parent"] == "base"
    assert inspector.inspect(FRAME).novelty_score == after.novelty_score


def test_the_threshold_stays_when_the_codebook_changes_and_the_other_way_round(
    tmp_path: Path, inspector: Inspector
) -> None:
    name = made(inspector, tmp_path, 2.0)
    inspector.set_novelty_threshold(0.01)
    inspector.set_codebook(inspector.read_codebook(tmp_path / f"{name}.safetensors"))
    assert inspector.novelty_threshold == 0.01 and inspector.inspect(FRAME).is_novel
    inspector.set_novelty_threshold(1000.0)
    assert inspector.inspect(FRAME).codebook == name and not inspector.inspect(FRAME).is_novel


def test_every_answer_is_that_of_the_codebook_that_it_names_while_codebooks_are_switched(
    tmp_path: Path, inspector: Inspector
) -> None:
    scores = {"base": inspector.inspect(FRAME).novelty_score}
    books = [None]
    for scale in (2.0, 3.0):
        name = made(inspector, tmp_path, scale)
        books.append(inspector.read_codebook(tmp_path / f"{name}.safetensors"))  # type: ignore[arg-type]
        scores[name] = scores["base"] * scale
    is_over = threading.Event()

    def switch() -> None:
        n = 0
        while not is_over.is_set():
            n += 1
            inspector.set_codebook(books[n % 3])
            inspector.set_novelty_threshold(1.0 + n % 2)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        seen = [inspector.inspect(FRAME) for _ in range(300)]
        while len({one.codebook for one in seen}) < 3 and len(seen) < 30_000:  # a busy machine runs one thread for long
            seen.append(inspector.inspect(FRAME))
    finally:
        is_over.set()
        thread.join(10)
    assert len({one.codebook for one in seen}) == 3
    assert all(one.novelty_score == pytest.approx(scores[one.codebook], rel=1e-4) for one in seen)
    assert all(one.is_novel == (one.novelty_score > one.novelty_threshold) for one in seen)


def test_cameras_of_one_model_share_runs_only_while_they_share_a_codebook(tmp_path: Path, inspector: Inspector) -> None:
    other = inspector.twin()
    name = made(inspector, tmp_path, 2.0)
    base = inspector.inspect(FRAME)
    other.set_codebook(other.read_codebook(tmp_path / f"{name}.safetensors"))
    assert not inspector.shares_runs_with(other)
    # Switched after the frames were put together: each is still judged by its own.
    first, second = inspector.inspect_for([inspector, other], [FRAME, FRAME])
    assert not isinstance(first, Exception) and not isinstance(second, Exception)
    assert (first.codebook, second.codebook) == ("base", name)
    assert second.novelty_score == pytest.approx(2 * base.novelty_score, rel=1e-4)
    inspector.set_codebook(inspector.read_codebook(tmp_path / f"{name}.safetensors"))
    assert inspector.shares_runs_with(other)
    assert all(getattr(a, "codebook", None) == name for a in inspector.inspect_for([inspector, other], [FRAME] * 2))


def test_a_result_names_the_codebook_that_judged_it_not_the_one_that_came_since(
    tmp_path: Path, inspector: Inspector
) -> None:
    inspection = inspector.inspect(FRAME)
    name = made(inspector, tmp_path, 2.0)
    inspector.set_codebook(inspector.read_codebook(tmp_path / f"{name}.safetensors"))
    assert model_info(inspector, inspection).codebook == "base" and model_info(inspector).codebook == name


@pytest.mark.parametrize("damage", ["half written", "changed", "gone", "of another model"])
def test_a_codebook_that_is_no_use_is_refused_and_its_parent_runs(
    tmp_path: Path, inspector: Inspector, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "codebooks"
    parent = made(inspector, folder, 2.0)
    child = made(inspector, folder, 3.0, parent)
    station = started(tmp_path, inspector)
    for name in (parent, child):
        station.switch("top", name, "recentre")
    path = folder / f"{child}.safetensors"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "half written":
        path.write_bytes(data[:100])
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        path.write_bytes(data.replace(inspector.file.sha256.encode(), b"e" * 64))
    inspector.set_codebook(None)
    found = started(tmp_path, inspector).plain()["top"]
    assert found["codebook"] == parent and inspector.inspect(FRAME).codebook == parent
    assert found["problem"]["code"] == "S-CODEBOOK" and "S-CODEBOOK camera top" in caplog.text
    (folder / f"{parent}.safetensors").write_bytes(b"")
    assert started(tmp_path, inspector).plain()["top"]["codebook"] == "base"


def test_what_cannot_be_used_is_not_switched_to(tmp_path: Path, inspector: Inspector) -> None:
    station = started(tmp_path, inspector)
    name = made(inspector, tmp_path / "codebooks", 2.0)
    station.switch("top", name, "recentre")
    with pytest.raises(ModelError, match="cannot be read"):
        station.switch("top", "0" * 12, "rollback")
    with pytest.raises(UsageError, match="no camera side"):
        station.switch("side", name, "recentre")
    (tmp_path / "codebooks" / ".current.json.tmp").mkdir()  # the disk refuses
    with pytest.raises(StorageError, match="goes on"):
        station.switch("top", "base", "rollback")
    assert inspector.inspect(FRAME).codebook == name and station.plain()["top"]["codebook"] == name


def test_the_chain_leads_back_step_by_step(tmp_path: Path) -> None:
    record, model = record_of(tmp_path), "a" * 64
    for name in ("1" * 12, "2" * 12, "3" * 12):
        record.switch("top", model, name, "recentre")
    assert record.current("top", model).chain == ("2" * 12, "1" * 12, "base")
    back = record.switch("top", model, "2" * 12, "rollback")
    assert (back.codebook, back.chain, back.how) == ("2" * 12, ("1" * 12, "base"), "rollback")
    assert record.switch("top", model, "base", "rollback").chain == ()
    assert record.switch("top", model, "7" * 12, "rollback").chain == ("base",)
    assert record.current("side", model) == record.current("top", "b" * 64) == Current()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"schema": "dkm.codebooks/2", "cameras": {}}',
        b'{"schema": "dkm.codebooks/1", "cameras": {"top": {"MODEL": {"codebook": "../../etc", "chain": []}}}}',
        b"[]",
        b"\xff" * 10,
    ],
)
def test_a_damaged_record_is_set_aside_and_base_runs(
    tmp_path: Path, inspector: Inspector, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "codebooks").mkdir()
    (tmp_path / "codebooks" / "current.json").write_bytes(text.replace(b"MODEL", inspector.file.sha256.encode()))
    assert started(tmp_path, inspector).plain()["top"]["codebook"] == "base"
    assert "S-CORRUPT" in caplog.text and (tmp_path / "codebooks" / "current.json.corrupt-1").exists()


def test_old_codebooks_go_and_those_of_the_chain_stay(tmp_path: Path, inspector: Inspector) -> None:
    record, folder = record_of(tmp_path), tmp_path / "codebooks"
    names = [made(inspector, folder, 1 + n / 100, str(n)) for n in range(KEPT + 20)]
    record.switch("top", inspector.file.sha256, names[0], "recentre")
    record.switch("top", inspector.file.sha256, names[-1], "recentre")
    left = {path.stem for path in folder.glob("*.safetensors")}
    assert {names[0], names[-1]} <= left and len(left) <= KEPT + 2
    assert json.loads((folder / "current.json").read_text())["schema"] == "dkm.codebooks/1"
