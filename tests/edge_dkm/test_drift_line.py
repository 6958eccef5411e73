"""A running line says that its camera drifts: a real model, a film that gets brighter, a real broker, the retained message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from edge_dkm.drift.follower import DriftFollower
from edge_dkm.inspector import Inspector
from edge_dkm.message import TriggerInfo
from edge_dkm.message_schema import json_schema
from edge_dkm.pipeline import Outcome
from edge_dkm.results import Case
from edge_dkm.settings import DriftSettings, LineSettings
from tests.broker import Mosquitto, Subscriber
from tests.images import KINDS, draw, write_png
from tests.stations import RunningLine
from tests.waiting import wait_until

Make = Callable[..., LineSettings]
Subscribe = Callable[..., Subscriber]
PARTS = 240
EVERY_PART = "{max_parts_per_s: 100000}"


def parts(folder: Path, brighter: int) -> Path:
    rng = np.random.default_rng(21)
    for n in range(PARTS):
        image = np.clip(draw(KINDS[n % 3], rng).astype(np.int64) + brighter, 0, 255).astype(np.uint8)
        write_png(folder / f"{n:03d}.png", image)
    return folder


def cameras(folder: Path) -> str:
    return f"{{top: {{source: '{folder}', pace: max, policy: every}}}}"


def last_drift(subscriber: Subscriber) -> dict[str, Any]:
    found = [(topic, m) for topic, m, _ in list(subscriber.messages) if m.get("schema") == "dkm.drift/1"]
    assert {topic for topic, _ in found} == {"dkm/v1/st1/top/drift"}
    for _, message in found:
        jsonschema.Draft202012Validator(json_schema("dkm.drift/1")).validate(message)
    return found[-1][1]


@pytest.mark.broker
@pytest.mark.parametrize(
    ("brighter", "moved", "recommended"), [(0, [], "none"), (90, ["light"], "camera")], ids=["as it was", "brighter"]
)
def test_a_film_that_gets_brighter_ends_in_a_retained_word_about_the_camera(
    brighter: int,
    moved: list[str],
    recommended: str,
    mosquitto: Mosquitto,
    subscribe: Subscribe,
    make_line: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = parts(tmp_path / "film", brighter)
    subscribe(mosquitto.port)  # results wait for a consumer
    line = RunningLine(make_line(mosquitto.port, cameras=cameras(folder), drift=EVERY_PART), monkeypatch)
    assert line.has_ended(60) and line.error is None
    late = subscribe(mosquitto.port)  # who comes after it gets what was retained
    wait_until(lambda: bool(late.of("dkm.drift/1")))
    message = last_drift(late)
    followed = PARTS - line.line.afterwards.left_out
    assert (message["moved"], message["recommended"], message["n"]) == (moved, recommended, followed)
    assert len(late.of("dkm.result/1")) == 0 and sum(message["shares"].values()) == pytest.approx(1, abs=0.01)


@pytest.mark.broker
def test_the_alarm_names_camera_and_cause_and_is_no_fault_of_the_line(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriber = subscribe(mosquitto.port)
    source = f"{{top: {{source: '{parts(tmp_path / 'film', 90)}', pace: max, policy: every, loop: true}}}}"
    line = RunningLine(make_line(mosquitto.port, cameras=source, drift=EVERY_PART), monkeypatch)
    wait_until(lambda: bool(subscriber.of("dkm.alarm/1")), 40)
    assert line.end() and line.error is None
    (alarm,) = [m for m in subscriber.of("dkm.alarm/1") if m["active"]]
    assert (alarm["code"], alarm["camera"]) == ("DRIFT-top", "top")
    assert alarm["detail"].startswith("D-CAMERA moved: light") and "recommended: camera" in alarm["detail"]
    assert "degraded" not in [m["state"] for m in subscriber.of("dkm.state/1")]
    assert line.line.vitals.snapshot().drift["top"].recommended == "camera"


@pytest.mark.broker
def test_drift_that_is_switched_off_costs_and_says_nothing(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriber = subscribe(mosquitto.port)
    line = RunningLine(make_line(mosquitto.port, drift="{enabled: false}"), monkeypatch)
    assert line.has_ended(60) and line.error is None
    assert len(subscriber.results()) == 12
    assert subscriber.of("dkm.drift/1") == [] and line.line.drift.reports == {}


def followed(follower: DriftFollower, inspector: Inspector, image: np.ndarray, codebook: str) -> None:
    case = Case("r1", "st1", "top", TriggerInfo(kind="free", id=1), "ts", 0.0, 0.0)
    inspection = inspector.inspect(image)
    object.__setattr__(inspection, "codebook", codebook)
    follower.follow(Outcome(case, inspection, None, None, image))


def test_another_codebook_begins_anew(tiny_model_path: Path) -> None:
    rng, said = np.random.default_rng(3), []
    with Inspector(tiny_model_path) as inspector:
        follower = DriftFollower(DriftSettings(), {"top": inspector}, said.append)
        for n in range(200):
            image = cv2.add(draw(KINDS[n % 3], rng), (90, 90, 90, 0))
            followed(follower, inspector, np.asarray(image, np.uint8), "base")
        before = follower.reports["top"]
        followed(follower, inspector, np.asarray(image, np.uint8), "0123456789ab")
        after = follower.reports["top"]
    assert before.codebook == "base" and "light" in before.state.moved
    assert (after.codebook, after.state.n, after.state.moved) == ("0123456789ab", 1, ()) and "younger" in after.missing
    assert said[0] == "top" and len(said) <= 5  # the first, and changes: not every part


@pytest.mark.parametrize(("frames_per_s", "seen"), [(5, 50), (10, 100), (30, 100), (24, 100)])
def test_of_a_fast_camera_so_many_parts_a_second_are_looked_at(
    tiny_model_path: Path, frames_per_s: int, seen: int
) -> None:
    with Inspector(tiny_model_path) as inspector:
        follower = DriftFollower(DriftSettings(max_parts_per_s=10), {"top": inspector}, lambda _: None)
        inspection = inspector.inspect(draw(KINDS[0], np.random.default_rng(1)))
        wanted = 0
        for n in range(10 * frames_per_s):
            case = Case(f"r{n}", "st1", "top", TriggerInfo(kind="free", id=n), "ts", 100 + n / frames_per_s, 0.0)
            image = np.zeros((8, 8, 3), np.uint8)
            is_wanted = follower.wants_image(Outcome(case, inspection, None, None, image))
            follower.follow(Outcome(case, inspection, None, None, image if is_wanted else None))
            wanted += is_wanted
        follower.close()
    assert wanted == follower.reports["top"].state.n
    assert wanted == pytest.approx(seen, abs=1)  # the clock's last digit may decide over one


def test_a_part_without_an_answer_is_no_sighting(tiny_model_path: Path) -> None:
    case = Case("r1", "st1", "top", TriggerInfo(kind="free", id=1), "ts", 0.0, 0.0)
    with Inspector(tiny_model_path) as inspector:
        follower = DriftFollower(DriftSettings(), {"top": inspector}, lambda _: None)
        failed = Outcome(case, None, None, None, np.zeros((4, 4, 3), np.uint8))
        assert not follower.wants_image(failed)
        follower.follow(failed)
        follower.close()
    assert follower.reports == {} and json.dumps(follower.reports) == "{}"
