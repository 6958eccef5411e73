from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from configs import load_text
from edge_dkm.contract import Cluster
from edge_dkm.errors import FrameError
from edge_dkm.frames import novel_frames
from edge_dkm.frames import ring as frame_ring
from edge_dkm.frames.embeddings import embeddings_path, read_embeddings
from edge_dkm.frames.index import FrameRow, frame_name, read_index
from edge_dkm.frames.novel_frames import Chooser, NovelFrames, kind_of
from edge_dkm.frames.ring import FrameRing, ModelSpace, RingLimits
from edge_dkm.inspector import Inspection
from edge_dkm.message import Part, TriggerInfo, new_result_id
from edge_dkm.pipeline import Outcome
from edge_dkm.recorder import COLUMNS
from edge_dkm.results import Case
from edge_dkm.settings import FramesSettings, LineSettings
from tests.faults import small_disk

ROOT = Path(__file__).parents[2]
SHA, DIMS = "ab12" * 16, 4
NOON_S = 1_763_726_400.0  # 2025-11-21T12:00:00Z
RNG = np.random.default_rng(0)


def line(**frames: object) -> LineSettings:
    settings = load_text(LineSettings, "station: s\nmodel: m\ncameras: {top: {source: 'usb:0'}}", "line.yaml")
    return settings.model_copy(update={"frames": FramesSettings.model_validate({"per_hour": 1e6, **frames})})


def outcome(n: int, score: float = 2.0, **changes: object) -> Outcome:
    """The part of trigger n at 12:00:n; its picture is grey level n % 200 and noise."""
    ts = f"2025-11-21T12:{n // 60 % 60:02d}:{n % 60:02d}.000000Z"
    case = Case(new_result_id(), "s", "top", TriggerInfo(kind="free", id=n), ts, 0.0, 0.0)
    embedding = np.full(DIMS, n, np.float32)
    inspection = Inspection(
        Cluster(0, "disc", None, 9, 1.0, 1.0, 2.0), 1.0, None, score, 1.0, 0.01, score > 1, "review", "novel", embedding
    )
    values = {"case": case, "inspection": inspection, "error": None, "timings": None, **changes}
    image = np.clip(RNG.normal(n % 200 + 20, 4, (32, 32, 3)), 0, 255).astype(np.uint8)
    return Outcome(**{"image": image, **values})  # type: ignore[arg-type]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., NovelFrames]]:
    """Followers on `tmp_path/frames`, with a clock that stands at noon; closed at the end."""
    monkeypatch.setattr(novel_frames, "wall_s", lambda: NOON_S)
    monkeypatch.setattr(novel_frames, "RESERVE_BYTES", 0)
    opened: list[NovelFrames] = []

    def make(settings: LineSettings | None = None) -> NovelFrames:
        spaces = {"top": ModelSpace(SHA, DIMS)}
        opened.append(NovelFrames(settings or line(), tmp_path / "frames", spaces, lambda _: (640, 480)))
        return opened[-1]

    yield make
    for follower in opened:
        follower.close()


def show(follower: NovelFrames, *outcomes: Outcome) -> None:
    """As edge_dkm/afterwards.py does."""
    for one in outcomes:
        follower.follow(one if follower.wants_image(one) else replace(one, image=None))


@contextlib.contextmanager
def ring(tmp_path: Path, max_rows: int = 100, sha: str = SHA) -> Iterator[FrameRing]:
    opened = FrameRing(tmp_path / "frames/top", RingLimits(1e9, 1e9, max_rows), ModelSpace(sha, DIMS))
    yield opened
    opened.close()


def read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(cv2.imread(str(path)), np.uint8)


def png_of(one: Outcome) -> bytes:
    return bytes(np.asarray(cv2.imencode(".png", np.asarray(one.image), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]).tobytes())


def fill(opened: FrameRing, count: int) -> list[FrameRow]:
    rows = []
    for n in range(count):
        one = outcome(n)
        key = one.case.result_id
        row = FrameRow(frame_name("top", one.case.ts, key), "top", one.case.ts, str(n), key, "", "2", "", "", "")
        opened.add(row, png_of(one), np.full(DIMS, n, np.float32))
        rows.append(row)
    return rows


def check(folder: Path) -> list[str]:
    """Index, pictures and embeddings agree; the groups in order."""
    rows = read_index(folder / "index.csv")
    assert {row.file for row in rows} == {path.name for path in folder.glob("*.png")}
    assert all(cv2.imread(str(folder / row.file)) is not None for row in rows)
    assert set(read_embeddings(embeddings_path(folder, SHA))) <= {row.result_id for row in rows}
    return [row.group for row in rows]


def test_the_layout_is_that_of_a_recording_and_the_trainer_reads_it(
    start: Callable[..., NovelFrames], tmp_path: Path
) -> None:
    from trainer.data import load_dataset
    from trainer.images import DataSettings, open_images
    from trainer.preprocess import PreprocessSettings

    part = outcome(
        7, case=Case(new_result_id(), "s", "top", TriggerInfo(kind="mqtt", id=7), "t", 0, 0, Part(id="SN 1"))
    )
    show(start(), outcome(1), outcome(2), part)
    folder = tmp_path / "frames/top"
    assert (folder / "index.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    row = read_index(folder / "index.csv")[0]
    assert (row.camera, row.cluster, row.novelty_score, row.verdict) == ("top", "disc", "2", "review")
    assert (row.roi, row.frame, row.ts) == ("0 0 32 32", "32x32", "2025-11-21T12:00:01.000000Z")
    source = DataSettings(path=str(folder))
    found = open_images(source)
    data, _ = load_dataset(found, source, PreprocessSettings(height_px=32, width_px=32))
    assert (len(data), data.roi, data.frame, data.skipped) == (3, (0, 0, 32, 32), (32, 32), [])
    assert len({item.group for item in found.items}) == 3 and found.items[2].group == "top/SN 1"


def test_a_kept_picture_is_what_was_inspected_to_the_pixel(start: Callable[..., NovelFrames], tmp_path: Path) -> None:
    one = outcome(3)
    show(start(), one)
    (path,) = (tmp_path / "frames/top").glob("*.png")
    assert one.image is not None and np.array_equal(read(path), one.image)


def test_embeddings_lie_beside_the_frames_in_half_precision(start: Callable[..., NovelFrames], tmp_path: Path) -> None:
    one = outcome(3)
    show(start(), one)
    path = embeddings_path(tmp_path / "frames/top", SHA)
    found = read_embeddings(path)
    assert list(found) == [one.case.result_id] and found[one.case.result_id].tolist() == [3.0] * DIMS
    assert path.stat().st_size == 12 + 16 + 2 * DIMS


@pytest.mark.parametrize(
    ("settings", "score", "kind"),
    [
        ({}, 1.2, "novel"),
        ({}, 0.9, "borderline"),
        ({"ordinary": 0}, 0.5, None),
        ({"ordinary": 1}, 0.5, "ordinary"),
        ({"keep": "novel", "ordinary": 0}, 0.9, None),
        ({"keep": "novel"}, 1.2, "novel"),
        ({"keep": "never", "ordinary": 1}, 1.2, None),
        ({"borderline": (0.2, 0.6), "ordinary": 0}, 0.5, "borderline"),
    ],
)
def test_what_is_kept_follows_the_score_over_the_threshold(
    settings: dict[str, object], score: float, kind: str | None
) -> None:
    chosen, part = FramesSettings.model_validate(settings), outcome(1, score)
    assert Chooser(chosen).chooses(part) == (kind is not None)
    assert part.inspection is not None and kind in (None, kind_of(part.inspection, chosen))


def test_a_part_without_an_answer_or_without_a_picture_is_not_kept() -> None:
    chooser = Chooser(FramesSettings(ordinary=1))
    assert not chooser.chooses(outcome(1, inspection=None, error=FrameError("F-DARK", "dark")))
    assert not chooser.chooses(outcome(1, image=None))


def test_ordinary_parts_are_kept_at_their_share() -> None:
    chooser = Chooser(FramesSettings(ordinary=0.1, per_hour=1e6), random.Random(1).random)
    kept = sum(chooser.chooses(outcome(n, 0.3)) for n in range(2000))
    assert 150 < kept < 250


def test_a_flood_of_one_kind_is_thinned_and_leaves_room_for_the_others() -> None:
    chooser = Chooser(FramesSettings(per_hour=120))
    assert sum(chooser.chooses(outcome(n)) for n in range(500)) == 10  # five minutes' worth
    assert chooser.chooses(outcome(1, 0.9))


def test_above_its_megabytes_the_oldest_go_first(start: Callable[..., NovelFrames], tmp_path: Path) -> None:
    size = len(png_of(outcome(1)))
    follower = start(line(max_mb=10.5 * size / 1e6))
    show(follower, *(outcome(n) for n in range(40)))
    groups = [int(group.split("-")[1]) for group in check(tmp_path / "frames/top")]
    assert groups == list(range(40 - len(groups), 40)) and 5 < len(groups) <= 10
    assert sum(p.stat().st_size for p in (tmp_path / "frames/top").iterdir()) <= 10.5 * size


def test_what_is_too_old_goes_at_the_next_part_also_of_a_camera_that_is_gone(
    start: Callable[..., NovelFrames], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(line(max_age_h=1))
    show(first, outcome(1), outcome(2))
    first.close()
    shutil.copytree(tmp_path / "frames/top", tmp_path / "frames/gone")
    assert len(check(tmp_path / "frames/gone")) == 2
    monkeypatch.setattr(novel_frames, "wall_s", lambda: NOON_S + 2 * 3600)
    show(start(line(max_age_h=1, keep="never")), outcome(5))
    assert check(tmp_path / "frames/gone") == [] and check(tmp_path / "frames/top") == []


def test_control_what_is_young_enough_stays(start: Callable[..., NovelFrames], tmp_path: Path) -> None:
    first = start(line(max_age_h=3))
    show(first, outcome(1), outcome(2))
    first.close()
    show(start(line(max_age_h=3, keep="never")), outcome(5))
    assert len(check(tmp_path / "frames/top")) == 2


@pytest.mark.parametrize(("synced", "left"), [(False, 2), (None, 0), (True, 0)])
def test_a_clock_that_was_not_set_takes_no_frame_for_one_of_the_future(
    start: Callable[..., NovelFrames], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: bool | None, left: int
) -> None:
    show(start(), outcome(1), outcome(2))
    monkeypatch.setattr(novel_frames, "wall_s", lambda: 0.0)  # a board without a battery, before it has found its time
    monkeypatch.setattr(novel_frames, "is_synced", lambda: synced)
    show(start(line(keep="never")), outcome(5))
    assert len(check(tmp_path / "frames/top")) == left


def test_the_number_of_small_frames_is_bounded_too(tmp_path: Path) -> None:
    with ring(tmp_path, max_rows=10) as opened:
        rows = fill(opened, 11)
        opened.trim(NOON_S)
        assert opened.rows == rows[-9:] and check(tmp_path / "frames/top") == [str(n) for n in range(2, 11)]


def test_a_frame_without_a_row_gets_one_and_a_row_without_a_frame_goes(tmp_path: Path) -> None:
    with ring(tmp_path) as opened:
        rows = fill(opened, 4)
    folder = tmp_path / "frames/top"
    lines = (folder / "index.csv").read_text().splitlines(keepends=True)
    (folder / "index.csv").write_text("".join(lines[:-1]))  # 3 has no row
    (folder / rows[1].file).unlink()
    (folder / rows[2].file).write_bytes((folder / rows[2].file).read_bytes()[:-20])
    (folder / ".x.png.tmp").write_bytes(b"half")
    (folder / "notes.txt").write_text("the user's own")
    with ring(tmp_path) as again:
        assert [row.file for row in again.rows] == [rows[0].file, rows[3].file]
        assert again.rows[1].group == again.rows[1].result_id == rows[3].result_id and again.rows[1].ts == rows[3].ts
    check(folder)
    assert (folder / "notes.txt").exists() and not list(folder.glob(".*"))


@pytest.mark.parametrize("cut", [1, 30])
def test_a_row_that_was_cut_off_costs_nothing_but_its_text(tmp_path: Path, cut: int) -> None:
    with ring(tmp_path) as opened:
        rows = fill(opened, 3)
    index = tmp_path / "frames/top/index.csv"
    index.write_bytes(index.read_bytes()[:-cut])
    with ring(tmp_path) as again:
        assert [row.file for row in again.rows] == [row.file for row in rows]
        fill(again, 1)
    check(tmp_path / "frames/top")


def test_an_index_that_is_none_is_set_aside_and_the_frames_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ring(tmp_path) as opened:
        fill(opened, 3)
    (tmp_path / "frames/top/index.csv").write_bytes(b"\0\0\0\0")
    with ring(tmp_path) as again:
        assert len(again.rows) == 3
    assert "S-CORRUPT" in caplog.text and (tmp_path / "frames/top/index.csv.corrupt-1").exists()
    check(tmp_path / "frames/top")


@pytest.mark.parametrize("damage", ["", "garbage that is no header", None])
def test_damaged_embeddings_begin_anew_or_lose_their_last_record(tmp_path: Path, damage: str | None) -> None:
    with ring(tmp_path) as opened:
        rows = fill(opened, 3)
    path = embeddings_path(tmp_path / "frames/top", SHA)
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage.encode())
    with ring(tmp_path) as again:
        new = fill(again, 1)
    kept = [row.result_id for row in rows[:2]] if damage is None else []
    assert list(read_embeddings(path)) == [*kept, new[0].result_id]


def test_a_new_model_has_embeddings_of_its_own_and_the_old_ones_go_with_their_frames(tmp_path: Path) -> None:
    with ring(tmp_path) as opened:
        fill(opened, 3)
    folder, other = tmp_path / "frames/top", "cd" * 32
    with ring(tmp_path, 4, other) as second:
        assert len(read_embeddings(embeddings_path(folder, SHA))) == 3
        fill(second, 4)
        second.trim(NOON_S)
    assert not embeddings_path(folder, SHA).exists() and len(read_embeddings(embeddings_path(folder, other))) == 3


KILLED = """
import sys, numpy as np
from dataclasses import replace
from pathlib import Path
from tests.edge_dkm import test_novel_frames as t
with t.ring(Path(sys.argv[1]), max_rows=12) as ring:
    print("ready", flush=True)
    while True:
        t.fill(ring, 3)
        ring.trim(t.NOON_S)
"""


def test_killed_at_any_moment_the_folder_is_readable_and_mended_at_the_next_start(tmp_path: Path) -> None:
    rng = random.Random(3)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.01, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        read_index(tmp_path / "frames/top/index.csv")  # as it was left
        with ring(tmp_path, max_rows=12) as opened:
            assert 0 < len(opened.rows) <= 15
        check(tmp_path / "frames/top")


def test_on_a_full_disk_nothing_is_kept_and_it_is_said_once(
    start: Callable[..., NovelFrames], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    follower = start()
    show(follower, outcome(1))
    monkeypatch.setattr(novel_frames, "RESERVE_BYTES", 10**18)  # more than any disk has
    show(follower, *(outcome(n) for n in range(2, 6)))
    assert caplog.text.count("S-FULL") == 1 and len(check(tmp_path / "frames/top")) == 1
    monkeypatch.setattr(novel_frames, "RESERVE_BYTES", 0)
    show(follower, outcome(9))
    assert "frames are kept again" in caplog.text and len(check(tmp_path / "frames/top")) == 2


def test_a_disk_that_really_fills_up_leaves_whole_frames_and_oldest_go_for_new_ones(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if not small_disk.is_permitted(disk):
        pytest.skip("this machine does not let a user mount a tmpfs")
    program = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.edge_dkm import test_novel_frames as t
from edge_dkm.frames import novel_frames
novel_frames.RESERVE_BYTES, novel_frames.RETRY_S, novel_frames.wall_s = 0, 0.0, lambda: t.NOON_S
follower = novel_frames.NovelFrames(t.line(), Path(sys.argv[1]) / "frames", {"top": t.ModelSpace(t.SHA, t.DIMS)}, lambda _: None)
t.show(follower, *(t.outcome(n) for n in range(400)))
follower.close()
print(len(t.check(Path(sys.argv[1]) / "frames/top")), follower.kept["novel"])
"""
    mount = 'mount -t tmpfs -o size=600k tmpfs "$0" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, str(disk), sys.executable, "-c", program, str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    whole, kept = map(int, done.stdout.split())
    assert 50 < whole == kept < 400 and done.stderr.count("S-IO") == 1 and "No space left on device" in done.stderr


def test_a_folder_that_cannot_be_made_stops_nothing(
    start: Callable[..., NovelFrames], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "frames").write_text("a file")
    show(start(), *(outcome(n) for n in range(3)))
    assert caplog.text.count("S-IO") == 1


def test_control_a_mend_that_is_left_out_is_noticed(tmp_path: Path) -> None:
    with ring(tmp_path) as opened:
        rows = fill(opened, 2)
    (tmp_path / "frames/top" / rows[0].file).unlink()
    with pytest.raises(AssertionError):
        check(tmp_path / "frames/top")


def test_settings_refuse_a_range_that_is_none() -> None:
    with pytest.raises(ValueError, match="the smaller one first"):
        FramesSettings(borderline=(1.0, 0.5))


def test_the_rings_columns_are_those_of_a_recording() -> None:
    from edge_dkm.frames.index import COLUMNS as RING_COLUMNS

    assert RING_COLUMNS == COLUMNS and frame_ring.MAX_ROWS <= 20_000
