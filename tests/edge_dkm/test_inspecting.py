from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from devices.frame import Frame
from devices.settings import CameraSettings
from devices.triggers import Shot
from edge_dkm import Inspector, batching
from edge_dkm.batching import Batching, measure_limits, measure_ratios
from edge_dkm.errors import FrameError, InspectionError
from edge_dkm.inspecting import Answer, Inspecting
from edge_dkm.inspector import Inspection
from edge_dkm.message import TriggerInfo
from edge_dkm.results import Case
from edge_dkm.runtime import CPU, TENSORRT
from edge_dkm.shot_buffer import ShotBuffer, Tally
from tests.images import draw

CAMERAS = ("a", "b", "c")


def part(n: int, side_px: int = 32) -> np.ndarray:
    return draw(("disc", "square", "bars")[n % 3], np.random.default_rng(n), side_px)


class Rig:
    """Three cameras that share a model, a buffer, and a decision to put up to three frames in one run."""

    def __init__(self, model: Path, limit: int = 3, **camera: Any) -> None:
        self.cameras = {name: CameraSettings.model_validate({"source": "x", **camera}) for name in CAMERAS}
        self.inspectors = {name: Inspector(model)} if (name := "a") else {}
        self.inspectors |= {name: self.inspectors["a"].twin() for name in CAMERAS[1:]}
        self.alive = 0
        self.inspecting = Inspecting(self.cameras, self.inspectors, self._on_alive)
        self.inspecting.batching.allow({(name, (32, 32, 3)): limit for name in CAMERAS})
        self.buffer = ShotBuffer(dict.fromkeys(CAMERAS, "every"), {name: Tally() for name in CAMERAS})
        self.runs: list[int] = []
        for inspector in self.inspectors.values():
            self._count(inspector)

    def _on_alive(self) -> None:
        self.alive += 1

    def _count(self, inspector: Inspector) -> None:
        run = inspector.run

        def counted(image: np.ndarray, *rest: Any) -> Any:
            self.runs.append(len(image))
            return run(image, *rest)

        inspector.run = counted  # type: ignore[assignment, method-assign]

    def put(self, camera: str, n: int, image: np.ndarray, fired_s: float | None = None) -> None:
        now_s = time.monotonic()
        case = Case(
            f"{camera}{n}",
            "st1",
            camera,
            TriggerInfo(kind="free", id=n),
            "ts",
            now_s,
            now_s if fired_s is None else fired_s,
        )
        self.buffer.put(case, Shot(Frame.now(image, n), "free", n), is_part=True)

    def all(self) -> list[Answer]:
        self.buffer.close()
        answers = []
        while (batch := self.inspecting.next_answers(self.buffer)) is not None:
            answers += list(batch)
        return answers


@pytest.fixture
def rig(tiny_model_path: Path) -> Callable[..., Rig]:
    return lambda **camera: Rig(tiny_model_path, **camera)


def inspections(answers: Sequence[Answer]) -> list[Inspection]:
    return [answer.inspection for answer in answers if answer.inspection is not None]


def test_what_waits_goes_in_one_run_and_gets_the_answers_that_it_would_get_alone(rig: Callable[..., Rig]) -> None:
    together, alone = rig(), rig(limit=1)
    for each in (together, alone):
        for n in range(3):
            for camera in CAMERAS:
                each.put(camera, n, part(n + ord(camera)))
    first, second = together.all(), alone.all()
    assert together.runs == [3, 3, 3] and alone.runs == [1] * 9
    by_id = {answer.case.result_id: answer.inspection for answer in second}
    for answer in first:
        expected = by_id[answer.case.result_id]
        assert answer.inspection is not None and expected is not None
        assert (answer.inspection.cluster, answer.inspection.verdict) == (expected.cluster, expected.verdict)
        assert answer.inspection.novelty_score == pytest.approx(expected.novelty_score, abs=1e-4)


def test_the_order_of_each_camera_is_kept(rig: Callable[..., Rig]) -> None:
    line = rig()
    for camera, count in (("a", 5), ("b", 2), ("c", 4)):
        for n in range(count):
            line.put(camera, n, part(n))
    seen = [(answer.case.camera, answer.case.trigger.id) for answer in line.all()]
    assert {name: [n for camera, n in seen if camera == name] for name in CAMERAS} == {
        "a": [0, 1, 2, 3, 4],
        "b": [0, 1],
        "c": [0, 1, 2, 3],
    }


def test_a_single_shot_is_inspected_at_once_and_nothing_is_waited_for(rig: Callable[..., Rig]) -> None:
    line = rig()
    line.put("b", 1, part(1))
    batch = line.inspecting.next_answers(line.buffer)
    assert batch is not None and len(list(batch)) == 1 and line.runs == [1]


def test_each_camera_has_its_own_threshold_and_labels_in_a_shared_run(rig: Callable[..., Rig]) -> None:
    line = rig()
    line.inspectors["a"].set_novelty_threshold(1e-6)
    line.inspectors["b"].set_novelty_threshold(1e6)
    for camera in CAMERAS:
        line.put(camera, 1, part(1))
    found = {answer.case.camera: answer.inspection for answer in line.all()}
    assert line.runs == [3]
    assert found["a"] and found["a"].is_novel and found["a"].novelty_threshold == 1e-6 and found["a"].reason == "novel"
    assert found["b"] and not found["b"].is_novel and found["b"].novelty_threshold == 1e6
    assert found["c"] and found["c"].is_novel == (found["c"].novelty_score > 1)


def test_frames_of_other_sizes_or_other_models_are_never_in_one_run(
    rig: Callable[..., Rig], tiny_model_path: Path
) -> None:
    line = rig()
    for camera, side_px in zip(CAMERAS, (32, 40, 32), strict=True):
        line.put(camera, 1, part(1, side_px))
    assert len(inspections(line.all())) == 3 and sorted(line.runs) == [1, 2]
    other = Inspector(tiny_model_path)
    batching = Batching({**line.inspectors, "c": other})
    assert batching.shares("a", "b") and not batching.shares("a", "c")


@pytest.mark.parametrize("bad", [np.zeros((32, 32, 3), np.float32), np.zeros((32, 32), np.uint8)])
def test_a_bad_frame_does_not_fail_its_neighbours(rig: Callable[..., Rig], bad: np.ndarray) -> None:
    line = rig()
    line.put("a", 1, part(1))
    line.put("b", 1, bad)
    line.put("c", 1, part(2))
    answers = {answer.case.camera: answer for answer in line.all()}
    assert answers["a"].inspection and answers["c"].inspection
    error = answers["b"].error
    assert error is not None and error.code in {"F-DTYPE", "F-SHAPE"}


def test_a_run_that_fails_is_done_again_one_by_one_and_from_then_on(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    line = rig()

    def fails(*_: object) -> list[Inspection | InspectionError]:
        raise InspectionError("R-RUNTIME", "this provider takes one frame")

    for inspector in line.inspectors.values():
        inspector.inspect_for = fails  # type: ignore[assignment, method-assign]
    for n in range(2):
        for camera in CAMERAS:
            line.put(camera, n, part(n))
    with caplog.at_level(logging.WARNING):
        answers = line.all()
    assert len(inspections(answers)) == 6 and line.runs == [1] * 6
    assert line.alive == 1 and caplog.text.count("this provider takes one frame") == 1


def test_an_answer_that_is_not_finite_is_one_parts_failure(rig: Callable[..., Rig]) -> None:
    line = rig()
    run = line.inspectors["a"].run

    def poisoned(image: np.ndarray, *rest: Any) -> Any:
        outputs = run(image, *rest)
        outputs["novelty_score"] = np.array([1.0, np.nan, 0.5], np.float32)[: len(image)]
        return outputs

    for inspector in line.inspectors.values():
        inspector.run = poisoned  # type: ignore[assignment, method-assign]
    for camera in CAMERAS:
        line.put(camera, 1, part(1))
    errors = [answer.error.code if answer.error else None for answer in line.all()]
    assert errors == [None, "R-NONFINITE", None]


def test_an_answer_that_is_not_finite_holds_no_picture(rig: Callable[..., Rig]) -> None:
    """It would keep a slot of the camera's ring lent until the garbage collector comes."""
    line = rig()
    run = line.inspectors["a"].run

    def poisoned(image: np.ndarray, *rest: Any) -> Any:
        outputs = run(image, *rest)
        outputs["novelty_score"] = np.full(len(image), np.nan, np.float32)
        return outputs

    line.inspectors["a"].run = poisoned  # type: ignore[assignment, method-assign]
    errors = line.inspectors["a"].inspect_for(list(line.inspectors.values())[:2], [part(1), part(2)])
    assert [isinstance(error, InspectionError) and error.__traceback__ is None for error in errors] == [True, True]


def test_a_part_that_is_too_late_gets_no_place_in_a_run_and_its_declared_failure(rig: Callable[..., Rig]) -> None:
    line = rig(deadline_ms=5_000)
    line.put("a", 1, part(1))
    line.put("b", 1, part(1), fired_s=time.monotonic() - 6)
    line.put("c", 1, part(1))
    answers = {answer.case.camera: answer for answer in line.all()}
    assert line.runs == [2] and answers["a"].inspection and answers["c"].inspection
    late = answers["b"].error
    assert late is not None and late.code == "R-DEADLINE" and answers["b"].inspection is None


def test_a_slow_run_is_interrupted_with_all_its_frames(rig: Callable[..., Rig]) -> None:
    line, entered = rig(), threading.Event()
    interrupted = threading.Event()

    def slow(*_: object) -> list[Inspection | InspectionError]:
        entered.set()
        assert interrupted.wait(20)
        raise InspectionError("R-RUNTIME", "terminated")

    for inspector in line.inspectors.values():
        inspector.inspect_for = slow  # type: ignore[assignment, method-assign]
        inspector.interrupt = interrupted.set  # type: ignore[method-assign]
    for camera in CAMERAS:
        line.put(camera, 1, part(1))
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.extend(line.all()))
    thread.start()
    assert entered.wait(20)
    line.inspecting.interrupt_slow(0.0)
    thread.join(20)
    assert len(inspections(answers)) == 3 and line.alive == 1 and line.inspecting.since_s is None


def test_the_decision_is_measured_per_model_and_size_and_said(
    tiny_model_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Rig(tiny_model_path, roi=[0, 0, 32, 32])
    told: list[tuple[str, str]] = []
    with caplog.at_level(logging.INFO):
        measure_limits(line.cameras, line.inspectors, lambda *step: told.append(step))
    assert "part.onnx, frames of 32x32 from several cameras: " in caplog.text and "3 frames " in caplog.text
    assert told == [("LOADING", "measuring runs of several frames of part.onnx")]
    for ratios, limit in (({2: 0.8, 3: 0.9}, 3), ({2: 0.9, 3: 0.97}, 2), ({2: 0.96, 3: 1.2}, 1), ({}, 1)):
        monkeypatch.setattr("edge_dkm.batching.measure_ratios", lambda *_, ratios=ratios: ratios)
        line.inspecting.batching.allow(measure_limits(line.cameras, line.inspectors))
        assert line.inspecting.batching.limit("b", (32, 32, 3)) == limit
        assert line.inspecting.batching.limit("b", (33, 32, 3)) == 1


class Counted:
    """An inspector whose runs are counted, and may be slow."""

    def __init__(self, model: Path, seconds: float = 0.0) -> None:
        self.inspector, self.batches = Inspector(model), list[int]()
        run = self.inspector.run

        def counted(image: np.ndarray, *rest: Any) -> Any:
            self.batches.append(len(image))
            threading.Event().wait(seconds * len(image))
            return run(image, *rest)

        self.inspector.run = counted  # type: ignore[assignment, method-assign]

    def limits(self, count: int, **options: Any) -> dict[tuple[str, tuple[int, ...]], int]:
        settings = CameraSettings.model_validate({"source": "x", "roi": [0, 0, 32, 32]})
        names = CAMERAS[:count]
        return dict(measure_limits(dict.fromkeys(names, settings), dict.fromkeys(names, self.inspector), **options))


def test_one_camera_alone_is_not_measured(tiny_model_path: Path) -> None:
    counted = Counted(tiny_model_path)
    assert counted.limits(1) == {} and counted.batches == []
    assert counted.limits(2) and set(counted.batches) == {1, 2}  # control


def test_nothing_is_measured_where_another_number_of_frames_means_another_compilation(tiny_model_path: Path) -> None:
    fixed, compiling = Counted(tiny_model_path), Counted(tiny_model_path)
    fixed.inspector.runtime = replace(fixed.inspector.runtime, fixed_frame=True)
    compiling.inspector.ran = replace(compiling.inspector.ran, actual=(TENSORRT, CPU))
    for counted in (fixed, compiling):
        assert counted.limits(3) == {} and counted.batches == []


def test_a_slow_model_costs_the_start_one_run_beyond_the_time_for_it(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batching, "MEASURE_S", 0.02)
    slow = Counted(tiny_model_path, seconds=0.03)
    with caplog.at_level(logging.INFO):
        assert set(slow.limits(3).values()) == {1}
    assert slow.batches == [2]
    assert "one by one (time of one run / of single runs: not measured within 0.02 s)" in caplog.text


def test_a_start_that_is_stopped_measures_no_further(tiny_model_path: Path) -> None:
    counted = Counted(tiny_model_path)
    counted.limits(3, is_stopped=lambda: len(counted.batches) >= 4)
    assert len(counted.batches) == 4
    assert counted.limits(3, is_stopped=lambda: True) == {} and len(counted.batches) == 4


def test_a_frame_that_is_none_does_not_end_the_sharing_of_runs(rig: Callable[..., Rig]) -> None:
    line = rig()
    line.inspecting.batching.stop("a", FrameError("F-SHAPE", "no picture"))
    assert line.inspecting.batching.limit("b", (32, 32, 3)) == 3
    line.inspecting.batching.stop("a", InspectionError("R-RUNTIME", "no kernel"))  # control
    assert line.inspecting.batching.limit("b", (32, 32, 3)) == 1


def test_a_model_that_takes_one_frame_at_a_time_is_left_at_that(tiny_model_path: Path) -> None:
    inspector = Inspector(tiny_model_path)
    run = inspector.run

    def single(image: np.ndarray, *rest: Any) -> Any:
        if len(image) > 1:
            raise InspectionError("R-RUNTIME", "batch of 1 expected")
        return run(image, *rest)

    inspector.run = single  # type: ignore[assignment, method-assign]
    assert measure_ratios(inspector, (32, 32, 3), 3) == {}
