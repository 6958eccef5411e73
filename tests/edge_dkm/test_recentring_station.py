"""`edge-dkm recentre` on a station that does not run: what it reads, writes and says; the running one is in test_recentre_station.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dkm import clock
from edge_dkm.cli import main
from edge_dkm.codebook_record import CodebookRecord
from edge_dkm.errors import ModelError, StorageError, UsageError
from edge_dkm.inspector import Inspector
from edge_dkm.message import TriggerInfo
from edge_dkm.pipeline import Outcome
from edge_dkm.recentring.reservoir_follower import ReservoirFollower
from edge_dkm.recentring.station import Done, Station, Wish, text
from edge_dkm.results import Case
from edge_dkm.settings import LineSettings, ReservoirSettings
from edge_dkm.state import StateFolder
from tests.images import draw

Make = Callable[..., LineSettings]
N = 200


def fill(settings: LineSettings, camera: str = "top", seed: int = 5) -> None:
    """As a line that has seen N good parts."""
    rng = np.random.default_rng(seed)
    with Inspector(settings.model or "") as inspector:
        follower = ReservoirFollower(settings.state, ReservoirSettings(), dict.fromkeys(settings.cameras, inspector))
        for n in range(N):
            case = Case(f"r{n}", "st1", camera, TriggerInfo(kind="part_present", id=n), "t", 0.0, 0.0)
            inspection = inspector.inspect(draw(("disc", "square", "bars")[n % 3], rng))
            follower.follow(Outcome(case, inspection, None, None, None))
        follower.close()


@pytest.fixture
def settings(make_line: Make) -> LineSettings:
    settings = make_line(1883)
    fill(settings)
    return settings


def recentred(settings: LineSettings, **wish: Any) -> Done:
    with Station(settings) as station:
        (done,) = station.recentre(Wish(camera="top", **wish))
    return done


def test_a_stopped_station_judges_by_the_new_codebook_from_its_next_start_on(settings: LineSettings) -> None:
    done = recentred(settings)
    assert done.refusal is None and done.switched == "at the next start" and done.codebook is not None
    record = CodebookRecord(settings.state)
    with Inspector(settings.model or "") as inspector:
        current = record.current("top", inspector.file.sha256)
        metadata = inspector.read_codebook(record.file_of(done.codebook)).metadata
    assert (current.codebook, current.chain) == (done.codebook, ("base",))
    assert metadata["parent"] == "base" and metadata["camera"] == "top" and metadata["alpha"] == "0.1"
    assert int(metadata["groups"]) <= int(metadata["n"]) <= N and metadata["created"].endswith("Z")
    words = text(done)
    assert f"codebook {done.codebook} instead of base (at the next start)" in words and "200 parts kept" in words


def test_the_next_one_has_it_as_its_parent_and_a_rollback_leads_back(settings: LineSettings) -> None:
    first = recentred(settings).codebook
    fill(settings, seed=6)
    second = recentred(settings)
    assert second.running == first
    with Station(settings) as station:
        (listed,) = station.listed("top")
        assert (
            listed["codebook"] == second.codebook and listed["parent"] == first and listed["chain"] == [first, "base"]
        )
        assert {book["codebook"] for book in listed["codebooks"]} == {first, second.codebook}
        (back,) = station.roll_back("top", None)
        assert back.codebook == first and "from codebook" in text(back)
        (back,) = station.roll_back("top", "base")
        with pytest.raises(UsageError, match="by codebook base already"):
            list(station.roll_back("top", None))
        with pytest.raises(ModelError, match="cannot be read"):
            list(station.roll_back("top", "0" * 12))


def test_a_dry_run_writes_nothing(settings: LineSettings) -> None:
    done = recentred(settings, dry_run=True)
    assert done.codebook is None and done.figures["rows"] == N and "nothing is written" in text(done)
    assert not (settings.state / "codebooks").exists()


def test_without_enough_parts_it_says_so_and_what_ran_goes_on(make_line: Make) -> None:
    settings = make_line(1883)
    settings.state.mkdir()
    done = recentred(settings)
    assert done.refusal is not None and done.refusal.code == "no_rows" and done.plain()["recommended"] == "wait"
    assert "the station writes it while it inspects parts" in text(done) and "codebook base goes on" in text(done)


def test_hours_leave_out_older_parts(settings: LineSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_dkm.recentring import station

    now_s = clock.wall_s()
    monkeypatch.setattr(station, "wall_s", lambda: now_s + 7200)
    assert recentred(settings, hours=3.0, dry_run=True).figures["rows"] == N
    done = recentred(settings, hours=1.0)
    assert done.refusal is not None and done.refusal.code == "no_rows"
    assert "none of the 200 parts that were kept is of the last 1 hours" in text(done)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"hours": 0.0}, "--hours is 0, expected more than 0"),
        ({"hours": float("nan")}, "--hours is nan, expected more than 0"),
        ({"target_frr": 5.0}, "--target-frr is 5, expected a share between 0 and 1"),
        ({"target_frr": float("nan")}, "--target-frr is nan, expected a share"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(settings: LineSettings, wish: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        recentred(settings, **wish)


def test_a_cluster_that_the_line_rejects_is_left_out(make_line: Make) -> None:
    settings = make_line(1883, verdicts="{clusters: {'1': reject}}")
    fill(settings)
    done = recentred(settings)
    assert done.refusal is not None and done.refusal.code == "too_many_novel"
    assert done.refusal.figures["rejected_share"] == pytest.approx(1 / 3, abs=0.05)


def test_the_rate_may_be_named(settings: LineSettings) -> None:
    done = recentred(settings, target_frr=0.2, dry_run=True)
    assert done.figures["target_frr"] == 0.2 and done.figures["excluded_limit"] == pytest.approx(0.6)
    assert "NOT" in text(recentred(settings, target_frr=0.015, dry_run=True))


def test_while_the_station_is_held_but_does_not_answer_nothing_changes(settings: LineSettings) -> None:
    with StateFolder(settings.state), pytest.raises(Exception, match="still starting"):
        recentred(settings)
    with Inspector(settings.model or "") as inspector:
        assert CodebookRecord(settings.state).current("top", inspector.file.sha256).codebook == "base"


def test_cameras_of_one_model_have_codebooks_of_their_own(make_line: Make, part_folder: Path) -> None:
    source = f"{{source: '{part_folder}', pace: max, policy: every}}"
    settings = make_line(1883, cameras=f"{{top: {source}, side: {source}}}")
    fill(settings, "top")
    with Station(settings) as station:
        done = {one.camera: one for one in station.recentre(Wish())}
        assert done["top"].codebook is not None and done["side"].refusal is not None
        with pytest.raises(UsageError, match="name it with --camera"):
            list(station.roll_back(None, done["top"].codebook))
        with pytest.raises(UsageError, match="expected one of top, side"):
            list(station.recentre(Wish(camera="lid")))


def test_a_codebook_of_another_camera_is_refused(make_line: Make, part_folder: Path) -> None:
    source = f"{{source: '{part_folder}', pace: max, policy: every}}"
    settings = make_line(1883, cameras=f"{{side: {source}, top: {source}}}")
    fill(settings, "top")
    codebook = recentred(settings).codebook
    with Station(settings) as station:
        with pytest.raises(ModelError, match=f"codebook {codebook} was made from parts of camera top, not of side"):
            list(station.roll_back("side", codebook))
        list(station.roll_back("top", None))
        (back,) = station.roll_back("top", codebook)  # control
        assert back.codebook == codebook


def test_a_rollback_without_a_camera_leaves_those_at_base_alone(make_line: Make, part_folder: Path) -> None:
    source = f"{{source: '{part_folder}', pace: max, policy: every}}"
    settings = make_line(1883, cameras=f"{{side: {source}, top: {source}}}")  # the one at base comes first
    fill(settings, "top")
    codebook = recentred(settings).codebook
    with Station(settings) as station:
        (back,) = station.roll_back(None, None)
        assert (back.camera, back.running, back.codebook) == ("top", codebook, "base")
        with pytest.raises(UsageError, match="cameras side, top judge by codebook base already"):
            list(station.roll_back(None, None))


def test_a_line_that_never_ran_is_named(make_line: Make) -> None:
    with Station(make_line(1883)) as station, pytest.raises(StorageError, match="has this line ever run"):
        list(station.recentre(Wish()))


def test_the_command_prints_one_answer_per_camera(
    settings: LineSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[int] = []
    monkeypatch.setattr(os, "nice", lowered.append)  # or all later tests would run at low priority
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "line.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    assert main(["recentre", str(path), "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert (
        lowered == [10]
        and answer["ok"]
        and answer["recommended"] == "none"
        and answer["switched"] == "at the next start"
    )
    assert main(["recentre", str(path), "--list"]) == 0
    assert f"{answer['codebook']} in force, before: base" in capsys.readouterr().out
    assert main(["recentre", str(path), "--rollback"]) == 0
    assert f"from codebook {answer['codebook']} to base" in capsys.readouterr().out
