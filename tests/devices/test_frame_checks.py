from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import pytest

from devices.frame import Frame
from devices.frame_checks import CheckSettings, FrameChecks
from devices.privacy import PrivacyMask
from devices.sources.picture import decode_picture, filled_rows
from tests.faults.mjpeg_camera import damage_scan

HEIGHT, WIDTH = 96, 128
RNG = np.random.default_rng(5)
NOISE = RNG.normal(0, 2, (HEIGHT + 64, WIDTH + 64, 3))
SCENE = cv2.resize(RNG.uniform(30, 220, (6, 8, 3)), (WIDTH, HEIGHT))


def scene(n: int, gain: float = 1.0) -> np.ndarray:
    """A still scene, seen by a sensor with noise of two grey levels."""
    top, left = (n * 7) % 64, (n * 13 + n // 64) % 64
    return np.clip(gain * SCENE + NOISE[top : top + HEIGHT, left : left + WIDTH], 0, 255).astype(np.uint8)


def checks(
    live: bool = True, polygons: tuple[tuple[tuple[int, int], ...], ...] = (), **settings: object
) -> FrameChecks:
    return FrameChecks(CheckSettings.model_validate(settings), PrivacyMask(polygons), live=live)


def code(check: FrameChecks, image: np.ndarray) -> str | None:
    fault = check(Frame.now(image, 0)).fault
    return fault.code if fault else None


def codes(check: FrameChecks, images: Iterable[np.ndarray]) -> list[str | None]:
    return [code(check, image) for image in images]


def bars(noise: float = 0.0) -> np.ndarray:
    """An EBU test card."""
    colours = [
        (235, 235, 235),
        (16, 235, 235),
        (235, 235, 16),
        (16, 235, 16),
        (235, 16, 235),
        (16, 16, 235),
        (235, 16, 16),
    ]
    card = np.repeat(np.array(colours, np.float32), 20, axis=0)[None].repeat(HEIGHT, 0)
    return np.clip(card + np.random.default_rng(1).normal(0, noise, card.shape), 0, 255).astype(np.uint8)


def test_a_still_scene_with_sensor_noise_raises_no_alarm_in_ten_thousand_frames() -> None:
    check = checks()
    assert not any(codes(check, (scene(n) for n in range(10_000))))


def test_control_the_same_scene_without_noise_is_frozen() -> None:
    still = SCENE.astype(np.uint8)
    assert codes(checks(), [still] * 60) == [None] * 49 + ["F-FROZEN"] * 11


def test_a_frame_that_differs_ends_the_frozen_state_at_once() -> None:
    still = SCENE.astype(np.uint8)
    found = codes(checks(frozen_frames=3), [still, still, still, scene(1), still, still])
    assert found == [None, None, "F-FROZEN", None, None, None]


def test_recorded_material_may_repeat_frames_unless_told_otherwise() -> None:
    still = SCENE.astype(np.uint8)
    assert not any(codes(checks(live=False), [still] * 200))
    assert codes(checks(live=False, frozen_frames=2), [still] * 2) == [None, "F-FROZEN"]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.zeros((HEIGHT, WIDTH, 3)), "F-DARK"),
        (np.abs(NOISE[:HEIGHT, :WIDTH]), "F-DARK"),  # the lens cap is on: noise alone
        (np.full((HEIGHT, WIDTH, 3), 255), "F-BRIGHT"),
        (np.full((HEIGHT, WIDTH, 3), 118), "F-FLAT"),
        (np.full((HEIGHT, WIDTH, 3), (255, 0, 0)), "F-FLAT"),  # the blue picture of no signal
        (bars(), "F-FLAT"),
        (bars(noise=3), None),
        (scene(0, gain=0.1), None),
        (SCENE, None),
    ],
)
def test_pictures_that_show_nothing_are_told_from_those_that_do(image: np.ndarray, expected: str | None) -> None:
    assert code(checks(), image.astype(np.uint8)) == expected


def test_a_burnt_in_clock_makes_no_black_picture_good() -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    cv2.putText(image, "2026-01-01", (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (255, 255, 255))
    assert code(checks(), image) == "F-DARK"


def test_limits_of_zero_switch_the_tests_off() -> None:
    off = checks(dark=0, bright=255, flat=0, frozen_frames=0)
    blank = [np.full((HEIGHT, WIDTH, 3), level, np.uint8) for level in (0, 0, 255, 118)]
    assert codes(off, [*blank, bars()]) == [None] * 5


def test_what_the_mask_hides_counts_neither_as_dark_nor_as_contrast() -> None:
    polygons = (((0, 0), (WIDTH, 0), (WIDTH, 70), (0, 70)),)
    hide = PrivacyMask(polygons)
    for level, expected in ((118, "F-FLAT"), (255, "F-BRIGHT"), (0, "F-DARK")):
        frame = hide(Frame.now(np.full((HEIGHT, WIDTH, 3), level, np.uint8), 0))
        assert code(checks(polygons=polygons), frame.image) == expected
    assert code(checks(polygons=polygons), hide(Frame.now(scene(0), 0)).image) is None


def stream(check: FrameChecks, times: list[tuple[float, float]]) -> list[str | None]:
    """Frames at (our time in s, the stream's in s)."""
    frames = [Frame(scene(n), n, at, position_ms=1000 * position) for n, (at, position) in enumerate(times)]
    return [fault.code if (fault := check(frame).fault) else None for frame in frames]


def test_a_stream_whose_time_repeats_or_goes_back_is_stale() -> None:
    assert stream(checks(), [(0, 5), (0.1, 5.1), (0.2, 5.1), (0.3, 4.9), (0.4, 5.0)]) == [
        None,
        None,
        "F-STALE",
        "F-STALE",
        None,
    ]


def test_a_stream_that_falls_behind_is_stale_until_it_has_caught_up() -> None:
    behind = [(n / 10, n / 20) for n in range(40)]  # at half speed: 2 s late after 4 s
    assert stream(checks(stale_ms=1000), behind) == [None] * 21 + ["F-STALE"] * 19
    assert stream(checks(stale_ms=1000), [*behind, (4.0, 3.9)])[-1] is None


def test_clocks_that_drift_apart_slowly_are_no_delay() -> None:
    drifting = [(10.0 * n, 10.0 * n * (1 - 1e-3)) for n in range(1000)]  # 10 s in 10,000 s, 0.3 s in any five minutes
    assert not any(stream(checks(stale_ms=1000), drifting))


def test_a_frame_that_no_camera_gives_is_too_large() -> None:
    huge = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (20_000, 20_000, 3))
    assert code(checks(), huge) == "F-TOO-LARGE"


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image)[1].tobytes()


def test_a_jpeg_whose_scan_ends_early_is_damaged_wherever_it_ends() -> None:
    whole = jpeg(scene(0))
    assert decode_picture(whole, "x", 0).fault is None
    for share in (0.2, 0.5, 0.8):
        cut = whole[: int(len(whole) * share)]
        for data in (cut, cut + b"\xff\xd9"):
            fault = decode_picture(data, "x", 0).fault
            assert fault is not None and fault.code == "F-DAMAGED", (share, len(data))


def test_control_the_decoder_itself_takes_a_damaged_jpeg() -> None:
    damaged = damage_scan(jpeg(scene(0)))
    assert decode_picture(damaged, "x", 0, check_damage=False).fault is None


def test_a_grey_table_at_the_bottom_is_no_damage() -> None:
    image = scene(0)
    image[60:] = 128 + (NOISE[60:HEIGHT, :WIDTH] > 1)
    assert filled_rows(image) == 0 and decode_picture(jpeg(image), "x", 0).fault is None
    assert filled_rows(np.full((8, 8, 3), 128, np.uint8)) == 0
