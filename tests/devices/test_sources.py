from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from devices.errors import CameraError
from devices.frame import Cropper, Frame, Pacer
from devices.settings import CameraSettings
from devices.sources import is_live, mask, open_source, source_kind
from devices.sources.live import LiveCapture
from devices.sources.masking import mask_text
from devices.sources.refusal import why_refused
from devices.sources.synthetic import Conveyor, ConveyorOptions
from tests.broker import free_port
from tests.devices.conftest import film
from tests.images import write_png


def camera(source: object, **settings: object) -> CameraSettings:
    return CameraSettings(source=str(source), **{"pace": "max", **settings})  # type: ignore[arg-type]


def test_a_film_gives_its_frames_in_order_and_ends(tmp_path: Path) -> None:
    frames = list(open_source(camera(film(tmp_path / "a.mp4"))))
    assert [frame.index for frame in frames] == list(range(12))
    levels = [float(frame.image.mean()) for frame in frames]
    assert levels == sorted(levels) and abs(levels[0] - 17.5) < 4


def test_a_film_in_a_loop_goes_on_until_it_is_closed(tmp_path: Path) -> None:
    source = open_source(camera(film(tmp_path / "a.mp4"), loop=True))
    seen = []
    for frame in source:
        seen.append(frame.index)
        if len(seen) == 30:
            source.close()
    assert seen == list(range(30))


def test_a_film_keeps_its_own_pace_unless_told_otherwise(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", frames=10, fps=50)
    started = time.monotonic()
    assert len(list(open_source(camera(path, pace="source")))) == 10
    assert time.monotonic() - started >= 9 / 50  # nine periods lie between ten frames


def test_a_pacer_that_is_stopped_lets_go_at_once() -> None:
    pacer = Pacer(fps=0.01)
    pacer.wait()
    threading.Timer(0.05, pacer.stop).start()
    started = time.monotonic()
    pacer.wait()
    assert time.monotonic() - started < 50


def test_a_folder_gives_its_images_by_name_and_declares_what_it_cannot_read(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_png(tmp_path / f"{name}.png", np.full((8, 8, 3), ord(name), np.uint8))
    (tmp_path / "c.png").write_bytes(b"not an image")
    (tmp_path / "d.png").touch()
    frames = list(open_source(camera(tmp_path)))
    assert [int(f.image[0, 0, 0]) for f in frames[:2]] == [ord("a"), ord("b")]
    assert [f.fault.code for f in frames[2:] if f.fault] == ["F-DECODE", "F-DECODE"]
    assert frames[2].fault is not None and "not an image (12 bytes)" in frames[2].fault.detail


@pytest.mark.parametrize(
    ("source", "code", "text"),
    [
        ("/nowhere/line.mp4", "C-NODEV", "film /nowhere/line.mp4 does not exist"),
        ("folder:/nowhere", "C-NODEV", "folder /nowhere does not exist"),
        ("usb:77", "C-NODEV", "usb:77 is not there"),
        ("gige:1", "C-SPEC", "expected one of usb:0"),
        ("synthetic:partz=3", "C-SPEC", "has the option 'partz'"),
        ("synthetic:parts=0", "C-SPEC", "expected parts >= 1"),
        ("synthetic:parts=x", "C-SPEC", "expected a number"),
    ],
)
def test_a_camera_that_is_not_there_says_what_was_looked_for(source: str, code: str, text: str) -> None:
    with pytest.raises(CameraError, match=text) as caught:
        open_source(camera(source))
    assert caught.value.code == code


def test_an_empty_folder_and_a_file_that_is_no_film_are_named(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="holds no images"):
        open_source(camera(tmp_path))
    (tmp_path / "x.mp4").write_bytes(b"0" * 100)
    with pytest.raises(CameraError, match="no film that OpenCV can open"):
        open_source(camera(tmp_path / "x.mp4"))


@pytest.mark.parametrize(
    ("source", "kind", "live"),
    [
        ("rtsp://u:p@10.0.0.7/ch1", "rtsp", True),
        ("http://cam/mjpeg", "rtsp", True),
        ("usb:0", "usb", True),
        ("synthetic:", "synthetic", False),
        ("file:a.mp4", "file", False),
    ],
)
def test_the_kind_of_a_source_is_read_from_its_address(source: str, kind: str, live: bool) -> None:
    assert source_kind(source)[0] == kind and is_live(source) == live


def test_passwords_are_masked_in_messages() -> None:
    assert mask("rtsp://user:secret@10.0.0.7/ch1") == "rtsp://user:***@10.0.0.7/ch1"
    assert mask("file:a@b.mp4") == "file:a@b.mp4"
    with pytest.raises(CameraError) as caught:
        open_source(camera(f"rtsp://user:secret@127.0.0.1:{free_port()}/x"))
    assert "secret" not in str(caught.value) and caught.value.code == "C-REFUSED"


def test_a_network_camera_gives_frames_and_says_when_it_is_lost(mjpeg_camera: str) -> None:
    seen = 0
    with pytest.raises(CameraError, match="gives no more frames") as caught:
        for frame in open_source(camera(mjpeg_camera)):
            assert frame.image.shape == (48, 64, 3)
            seen += 1
    assert caught.value.code == "C-LOST" and seen >= 5


def test_the_roi_is_cut_out_as_a_copy_and_must_lie_inside() -> None:
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    cut = Cropper((5, 2, 10, 8))(Frame.now(image, 0)).image
    assert np.array_equal(cut, image[2:10, 5:15]) and cut.flags["C_CONTIGUOUS"] and not np.shares_memory(cut, image)
    with pytest.raises(CameraError, match=r"roi 25,0,10,5 reaches to 35,5, but the frames are 30x20"):
        Cropper((25, 0, 10, 5))(Frame.now(image, 0))


def test_the_drawn_conveyor_is_the_same_for_the_same_seed_and_shows_what_was_planned() -> None:
    options = ConveyorOptions(seed=3, parts=40, scratch=0.2, stain=0.2, foreign=0.1)
    first, second, other = Conveyor(options), Conveyor(options), Conveyor(ConveyorOptions(seed=4, parts=40))
    assert first.plan == second.plan and first.plan != other.plan
    assert np.array_equal(first.render(60), second.render(60))
    assert {part.defect for part in first.plan} == {None, "scratch", "stain", "foreign"}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"trigger\.region \[0, 0, 50, 50\] does not lie inside roi \[10, 10, 40, 40\]"
    ):
        CameraSettings.model_validate(
            {"source": "usb:0", "roi": (10, 10, 40, 40), "trigger": {"kind": "part_present", "region": (0, 0, 50, 50)}}
        )
    with pytest.raises(ValueError, match="trigger kind plc is not built yet"):
        CameraSettings.model_validate({"source": "usb:0", "trigger": {"kind": "plc"}})


class FailingDevice:
    """A driver whose next read fails; only one opener at a time, as V4L2 has it."""

    held = 0

    def __init__(self) -> None:
        FailingDevice.held += 1

    def read(self) -> tuple[bool, None]:
        return False, None

    def release(self) -> None:
        FailingDevice.held -= 1


def test_a_live_camera_that_fails_lets_its_device_go_so_that_it_can_be_opened_again() -> None:
    with pytest.raises(CameraError, match="C-LOST unplugged"):
        list(LiveCapture(FailingDevice(), "unplugged"))  # type: ignore[arg-type]
    assert FailingDevice.held == 0


@pytest.mark.parametrize("url", ["rtsp://u:pa/ss@h/ch1", "rtsp://u:12345/6@h/ch1"])
def test_a_password_that_breaks_the_address_is_not_shown_in_pieces(url: str) -> None:
    error = why_refused(url, mask(url))
    assert error.code == "C-SPEC" and "%2F" in str(error)
    assert "pa" not in str(error).split(" is no address")[0].partition("://")[2] and "12345" not in str(error)


@pytest.mark.parametrize("name", ["password", "passphrase", "pas", "pwd", "access_token", "api.key", "secret", "sig"])
def test_a_text_hides_what_an_address_hides_also_where_only_a_piece_of_it_is_left(name: str) -> None:
    shown = f"http://cam/mjpg?user=a&{name}=***&w=640"
    assert mask(shown.replace("***", "hunter2")) == shown
    assert mask_text(f"cannot read '{shown.replace('***', 'hunter2')}'") == f"cannot read '{shown}'"
    assert mask_text(f"GET /mjpg?{name}=hunter2&w=640 failed") == f"GET /mjpg?{name}=***&w=640 failed"


def test_control_the_words_of_a_log_line_are_no_secrets() -> None:
    assert mask_text("S-FULL key=top author=me 12:30") == "S-FULL key=top author=me 12:30"
