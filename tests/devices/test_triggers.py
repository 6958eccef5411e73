from __future__ import annotations

import numpy as np
import pytest

from devices.errors import CameraError
from devices.frame import Frame
from devices.sources.synthetic import Conveyor, ConveyorOptions
from devices.triggers import Shot
from devices.triggers.free import FreeSettings, FreeTrigger
from devices.triggers.mqtt import MqttSettings, MqttTrigger
from devices.triggers.part_present import PartPresentSettings, PartPresentTrigger
from devices.triggers.timer import TimerSettings, TimerTrigger

ROI = (160, 55, 160, 160)
REGION = (225, 55, 30, 160)


def frame(image: np.ndarray, index: int, mono_s: float = 0.0) -> Frame:
    return Frame(image, index, mono_s)


def belt(
    x: float | None, *, level: int = 50, part: int = 200, side_px: int = 60, noise: np.random.Generator | None = None
) -> np.ndarray:
    """A belt of 200x100 with a square part centred at x (None: empty)."""
    image = np.full((100, 200, 3), level, np.float32)
    if x is not None:
        left, right = max(0, round(x - side_px / 2)), min(200, round(x + side_px / 2))
        image[20:80, left : max(left, right)] = part
    if noise is not None:
        image += noise.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def watch(images: list[np.ndarray], **settings: object) -> tuple[list[Shot], PartPresentTrigger]:
    trigger = PartPresentTrigger(PartPresentSettings(**{"region": (90, 0, 20, 100), **settings}), None)  # type: ignore[arg-type]
    shots = [shot for n, image in enumerate(images) if (shot := trigger.update(frame(image, n))) is not None]
    return shots, trigger


def passing(start: int = 260, stop: int = -60, step: int = -10, **looks: object) -> list[np.ndarray]:
    """A part that crosses the belt from right to left."""
    return [belt(float(x), **looks) for x in range(start, stop, step)]  # type: ignore[arg-type]


def test_one_part_is_one_shot_of_the_frame_nearest_the_regions_centre() -> None:
    images = [belt(None)] * 5 + passing()
    shots, _ = watch(images)
    assert [shot.trigger_id for shot in shots] == [1]
    assert shots[0].frame.index == 5 + (260 - 100) // 10


def test_parts_in_a_row_are_counted_one_by_one() -> None:
    shots, _ = watch(([belt(None)] * 5 + passing()) * 3)
    assert [shot.trigger_id for shot in shots] == [1, 2, 3]


def test_a_part_whose_leaving_is_not_seen_gives_no_shot() -> None:
    images = [belt(None)] * 5 + passing(stop=100)
    shots, trigger = watch(images)
    assert shots == [] and trigger.present_id == 1


def test_a_part_that_stands_still_in_the_region_stays_one_part() -> None:
    images = [belt(None)] * 5 + passing(stop=100) + [belt(105.0)] * 200 + passing(start=100)
    shots, _ = watch(images)
    assert len(shots) == 1


def test_a_part_in_view_at_the_start_leaves_no_ghost_behind() -> None:
    images = passing(start=100) + [belt(None)] * 10 + passing()
    shots, _ = watch(images)
    assert len(shots) == 1 and abs(shots[0].frame.index - (len(images) - len(passing()) + 16)) <= 1


def test_drifting_exposure_is_no_part() -> None:
    images = [belt(None, level=60 - n // 4) for n in range(160)]
    assert watch(images)[0] == []


def test_sensor_noise_is_no_part() -> None:
    rng = np.random.default_rng(0)
    assert watch([belt(None, noise=rng) for _ in range(300)])[0] == []


def test_a_part_darker_than_a_light_belt_is_seen_too() -> None:
    shots, _ = watch([belt(None, level=190)] * 5 + passing(level=190, part=60))
    assert len(shots) == 1


def test_a_speck_below_the_smallest_area_is_no_part() -> None:
    assert watch([belt(None)] * 5 + [belt(float(x), side_px=6) for x in range(260, -60, -10)], min_area=0.3)[0] == []


def test_one_frame_of_flicker_neither_starts_nor_ends_a_part() -> None:
    images = [belt(None)] * 5 + [np.full((100, 200, 3), 230, np.uint8)] + [belt(None)] * 5
    assert watch(images)[0] == []
    crossing = passing()
    images = [belt(None)] * 5 + crossing[:15] + [belt(None)] + crossing[15:]
    assert len(watch(images)[0]) == 1


def test_a_faulty_frame_is_passed_over() -> None:
    trigger = PartPresentTrigger(PartPresentSettings(), None)
    assert trigger.update(Frame.faulty("F-DECODE", "x", 0)) is None


def test_every_part_of_a_drawn_conveyor_is_seen_exactly_once() -> None:
    conveyor = Conveyor(ConveyorOptions(seed=11, parts=25, speed_px=12, scratch=0.2, stain=0.2, foreign=0.2))
    trigger = PartPresentTrigger(PartPresentSettings(region=REGION), ROI)
    x, y, w, h = ROI
    shots = []
    for n in range(conveyor.n_frames):
        shot = trigger.update(frame(np.ascontiguousarray(conveyor.render(n)[y : y + h, x : x + w]), n))
        if shot is not None:
            shots.append(shot)
    assert [shot.trigger_id for shot in shots] == list(range(1, 26))
    centred = [(480 + 64 + (n * 170) - 12 * shot.frame.index) - 240 for n, shot in enumerate(shots)]
    assert max(map(abs, centred)) <= 12  # within one step of the belt


def test_the_free_trigger_shoots_every_frame_and_a_timer_one_per_period() -> None:
    free = FreeTrigger(FreeSettings(), None)
    assert [free.update(frame(belt(None), n)).trigger_id for n in range(3)] == [1, 2, 3]  # type: ignore[union-attr]
    timer = TimerTrigger(TimerSettings(period_ms=100), None)
    times = [0.0, 0.03, 0.06, 0.101, 0.15, 0.33, 0.36, 0.401]
    assert [n for n, t in enumerate(times) if timer.update(frame(belt(None), n, t))] == [0, 3, 5, 7]


@pytest.mark.parametrize("kind", [FreeTrigger, TimerTrigger])
def test_only_a_part_trigger_stands_for_a_part(kind: type) -> None:
    assert not kind.stands_for_part and PartPresentTrigger.stands_for_part and MqttTrigger.stands_for_part


def test_a_region_outside_the_frame_is_an_error_and_no_line_that_waits_for_ever() -> None:
    trigger = PartPresentTrigger(PartPresentSettings(region=(60, 0, 20, 20)), None)
    with pytest.raises(CameraError, match=r"C-ROI trigger\.region 60,0,20,20 .* 64x48"):
        trigger.update(Frame.now(np.zeros((48, 64, 3), np.uint8), 0))


def test_a_command_takes_the_first_frame_captured_after_it_and_each_command_its_own() -> None:
    trigger = MqttTrigger(MqttSettings(), None)
    trigger.count_from(7)
    assert trigger.update(frame(belt(None), 0, 1.0)) is None
    for token, fired_s in (("a", 2.0), ("b", 2.1), ("late", 2.2)):
        trigger.fire(token, fired_s)
    trigger.withdraw("late")
    times = [1.9, 2.05, 2.06, 2.2, 2.3]  # the first was captured before the command, and read after it
    shots = [trigger.update(frame(belt(None), n, t)) for n, t in enumerate(times)]
    assert [shot and (shot.token, shot.trigger_id, shot.frame.mono_s) for shot in shots] == [
        None,
        ("a", 7, 2.05),
        None,
        ("b", 8, 2.2),
        None,
    ]


def test_a_command_is_not_forgotten_when_the_stream_is_interrupted_and_is_answered_by_a_faulty_frame_too() -> None:
    trigger = MqttTrigger(MqttSettings(), None)
    trigger.fire("a", 0.0)
    trigger.reset()
    shot = trigger.update(Frame.faulty("F-DECODE", "x", 0))
    assert shot is not None and shot.token == "a" and shot.frame.fault is not None


def test_a_trigger_that_takes_no_commands_says_so() -> None:
    with pytest.raises(ValueError, match="trigger kind is free, which takes no commands"):
        FreeTrigger(FreeSettings(), None).fire("a", 0.0)
