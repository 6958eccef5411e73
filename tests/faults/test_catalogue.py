"""Every entry of the catalogue of bad input has its code, its line for the operator and its test; the tests that no other file has."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import resource
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from devices.capture import Capture
from devices.settings import CameraSettings
from devices.sources.picture import decode_picture
from edge_dkm import Inspector
from edge_dkm.cli import main
from edge_dkm.conditions import Conditions
from edge_dkm.errors import ContractError, InspectionError, ModelError, StorageError
from edge_dkm.outbox import Limits, Outbox
from edge_dkm.state import StateFolder
from tests.broker import free_port
from tests.faults import small_disk
from tests.faults.station import line_settings
from tests.outboxes import draft, topic_of
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
HERE, SETTINGS, CAMERAS = "faults/test_catalogue.py", "faults/test_bad_settings.py", "faults/test_cameras.py"
CHECKS, CAPTURE, INSPECTOR = "devices/test_frame_checks.py", "devices/test_capture.py", "edge_dkm/test_inspector.py"
COMMANDS, BROKER, FAKE = "edge_dkm/test_commands.py", "faults/test_broker_catalogue.py", "faults/test_fake_broker.py"
TLS, STATE, BOX, DISK = (
    "edge_dkm/test_tls.py",
    "faults/test_state_files.py",
    "edge_dkm/test_outbox_file.py",
    "faults/test_full_disk.py",
)
NOT_RUN, NOT_BUILT = "not run here", "not built"

MISTAKE = f"{SETTINGS}::test_each_mistake_is_refused_with_its_code_on_one_line_and_check_agrees"
FAILING = f"{CAMERAS}::test_a_failing_camera_is_named_and_heals_while_the_other_misses_nothing"
NO_COMMAND = f"{COMMANDS}::test_what_is_no_command_has_a_code_of_its_own"
NO_MODEL = f"{INSPECTOR}::test_a_file_that_is_no_model_is_called_what_it_is"
PICTURE = f"{CHECKS}::test_pictures_that_show_nothing_are_told_from_those_that_do"
CUT_JPEG = f"{CHECKS}::test_a_jpeg_whose_scan_ends_early_is_damaged_wherever_it_ends"
REFUSAL = f"{BROKER}::test_a_refusal_has_its_code_and_says_what_to_do"
CERTIFICATE = f"{TLS}::test_a_wrong_certificate_ends_the_connection_and_is_called_what_it_is"
FULL = f"{DISK}::test_on_a_full_disk_received_and_declared_are_what_was_produced"
RESTRICTED = f"{STATE}::test_a_state_folder_that_cannot_be_written_is_exit_7_with_one_clear_line"
TOPICS = f"{SETTINGS}::test_no_level_of_a_topic_holds_its_special_characters"
NO_FILE = f"{SETTINGS}::test_a_file_that_is_no_file_is_refused"

# row -> entry -> (codes, tests); a test `not run here` or `not built` stands in the guide in these words.
CATALOGUE: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "Frames": {
        "empty buffer": (
            "F-DECODE",
            ("devices/test_sources.py::test_a_folder_gives_its_images_by_name_and_declares_what_it_cannot_read",),
        ),
        "garbage": (
            "F-DECODE",
            (f"{HERE}::test_what_is_no_usable_picture_is_named", "edge_dkm/test_run.py::test_a_bad_image_is_a_declared_result_and_the_line_goes_on"),
        ),
        "start of a JPEG only": ("F-DAMAGED", (f"{HERE}::test_what_is_no_usable_picture_is_named",)),
        "truncated JPEG": ("F-DAMAGED", (CUT_JPEG, FAILING)),
        "JPEG with a damaged scan": ("F-DAMAGED", (CUT_JPEG, FAILING, f"{CAMERAS}::test_control_without_the_damage_test_half_a_picture_passes")),
        "JPEG with wrong bytes in its middle": ("no code", (f"{HERE}::test_known_limit_wrong_bytes_inside_a_jpeg_mostly_pass",)),
        "wrong size": (
            "F-SHAPE",
            (
                f"{INSPECTOR}::test_a_fixed_size_graph_names_the_size_it_expects",
                "edge_dkm/test_run.py::test_frames_of_another_size_than_the_training_stop_the_line_unless_allowed",
            ),
        ),
        "wrong channels": ("F-SHAPE", (
            f"{INSPECTOR}::test_a_frame_the_graph_cannot_take_says_what_it_is_and_what_was_expected",
            f"{CAPTURE}::test_a_driver_that_gives_grey_pictures_gives_bad_frames",
        )),
        "wrong dtype": ("F-DTYPE", (f"{INSPECTOR}::test_a_frame_the_graph_cannot_take_says_what_it_is_and_what_was_expected",)),
        "16 bits": ("F-DECODE", (f"{HERE}::test_what_is_no_usable_picture_is_named",)),
        "grey as colour, BGR and RGB exchanged": ("no code", (f"{HERE}::test_known_limit_a_grey_file_is_taken_as_colour",)),
        "decompression bomb": ("F-TOO-LARGE", (
            f"{HERE}::test_a_bomb_is_refused_by_its_header_in_the_cameras_process",
            f"{CHECKS}::test_a_frame_that_no_camera_gives_is_too_large",
        )),
        "bomb with short data": ("F-DECODE", (f"{HERE}::test_what_is_no_usable_picture_is_named",)),
        "black": ("F-DARK", (PICTURE, FAILING)),
        "saturated": ("F-BRIGHT", (PICTURE,)),
        "no contrast": ("F-FLAT", (PICTURE,)),
        "colour bars, no-signal card": ("F-FLAT", (PICTURE,)),
        "identical frames": ("F-FROZEN", (FAILING, f"{CHECKS}::test_control_the_same_scene_without_noise_is_frozen")),
        "time repeats or goes back": ("F-STALE", (f"{CHECKS}::test_a_stream_whose_time_repeats_or_goes_back_is_stale",)),
        "too old": ("F-STALE", (f"{CHECKS}::test_a_stream_that_falls_behind_is_stale_until_it_has_caught_up",)),
        "NaN or infinite score": ("R-NONFINITE", (f"{HERE}::test_an_answer_that_is_not_finite_is_no_answer",)),
        "resolution changes": ("C-CHANGED", (FAILING, f"{CAPTURE}::test_frames_that_change_their_size_are_another_camera")),
        "camera swapped, pin_camera": ("no code", (NOT_BUILT,)),
    },
    "Camera": {
        "refused": ("C-REFUSED", (FAILING,)),
        "hang on open": ("C-OPEN-TIMEOUT", (FAILING,)),
        "hang mid-read": ("C-STALL", (FAILING, f"{CAMERAS}::test_a_camera_process_that_dies_or_hangs_is_replaced_and_numbers_go_on")),
        "lost, reset, garbage": ("C-LOST", (FAILING,)),
        "its process crashes": ("C-CRASH", (f"{CAMERAS}::test_a_camera_process_that_dies_or_hangs_is_replaced_and_numbers_go_on",)),
        "auth 401": ("C-AUTH", (FAILING,)),
        "no stream at the address": ("C-OPEN", (f"{HERE}::test_an_address_without_a_stream_is_named_without_its_password",)),
        "no such device": ("C-NODEV", ("devices/test_sources.py::test_a_camera_that_is_not_there_says_what_was_looked_for",)),
        "no such kind": ("C-SPEC", ("devices/test_sources.py::test_a_camera_that_is_not_there_says_what_was_looked_for",)),
        "busy": ("C-OPEN", (NOT_RUN,)),
        "USB drop": ("C-LOST", (NOT_RUN,)),
        "real RTSP": ("C-OPEN", (NOT_RUN,)),
        "GigE packet loss": ("no code", (NOT_BUILT, NOT_RUN)),
        "password masked": ("no code", (
            "devices/test_sources.py::test_passwords_are_masked_in_messages",
            "edge_dkm/test_state_log.py::test_no_password_reaches_the_log",
        )),
        "GPIO": ("no code", (NOT_RUN,)),
    },
    "Config": {
        "unknown key": ("CFG-KEY", (MISTAKE,)),
        "missing key": ("CFG-MISSING", (MISTAKE,)),
        "wrong type": ("CFG-TYPE", (MISTAKE,)),
        "duplicate key": ("CFG-DUPLICATE", (MISTAKE,)),
        "tab": ("CFG-SYNTAX", (MISTAKE, "configs/test_loader.py::test_a_tab_is_named_as_the_cause")),
        "encoding": ("CFG-ENCODING", (MISTAKE,)),
        "missing": ("CFG-FILE", (f"{SETTINGS}::test_a_name_of_no_file_is_refused",)),
        "unreadable": ("CFG-FILE", (f"{SETTINGS}::test_a_file_that_may_not_be_read_is_refused",)),
        "empty": ("CFG-FILE", (MISTAKE,)),
        "1 GB": ("CFG-SIZE", (NO_FILE,)),
        "two cameras of one id": ("CFG-DUPLICATE", (MISTAKE,)),
        "impossible limits": ("CFG-VALUE", (MISTAKE,)),
        "unit": ("CFG-TYPE CFG-KEY", (MISTAKE,)),
        "a number in quotes": ("CFG-TYPE", (f"{HERE}::test_a_number_in_quotes_is_no_number_and_a_wrong_file_changes_nothing",)),
        "host with space or long label": ("CFG-VALUE", (MISTAKE,)),
        "host with NUL": ("CFG-ENCODING", (MISTAKE,)),
        "topic characters": ("CFG-VALUE CFG-ENCODING", (TOPICS, f"{SETTINGS}::test_a_camera_may_not_be_called_what_would_mix_topics")),
        "secret in a readable file": ("CFG-SECRET", (f"{SETTINGS}::test_a_password_that_everybody_may_read_is_a_warning_and_no_error",)),
        "variable not set": ("CFG-ENV", (MISTAKE,)),
        "a start never half-applies": ("CFG-TYPE", (f"{HERE}::test_a_number_in_quotes_is_no_number_and_a_wrong_file_changes_nothing",)),
        "hot reload": ("no code", (NOT_BUILT,)),
        "two processes, one state": ("S-LOCKED", (
            f"{HERE}::test_a_second_line_on_one_state_folder_is_told_who_has_it",
            "edge_dkm/test_run.py::test_a_second_process_on_the_same_state_is_refused_with_the_pid_of_the_first",
        )),
        "one client id twice": ("M-TAKEOVER", (
            f"{FAKE}::test_a_second_station_of_the_name_is_noticed",
            f"{BROKER}::test_two_stations_of_one_name_come_back_once_in_a_pause_and_not_sooner",
        )),
    },
    "Model": {
        "truncated": ("no code", (f"{INSPECTOR}::test_a_truncated_or_edited_model_does_not_load",)),
        "flipped": ("no code", (
            f"{INSPECTOR}::test_a_truncated_or_edited_model_does_not_load",
            f"{INSPECTOR}::test_control_without_its_digest_a_flipped_bit_may_load",
        )),
        "external data": ("no code", (f"{HERE}::test_weights_in_another_file_are_refused_wherever_that_file_lies",)),
        "wrong I/O": ("no code", (f"{INSPECTOR}::test_a_model_whose_outputs_were_changed_is_refused",)),
        "NaN outputs": ("R-NONFINITE", (f"{HERE}::test_an_answer_that_is_not_finite_is_no_answer",)),
        "K mismatch": ("no code", (f"{HERE}::test_a_model_that_names_other_clusters_than_it_has_is_refused",)),
        "opset too new": ("no code", (f"{HERE}::test_an_opset_that_is_too_new_is_named_in_what_the_user_reads",)),
        "empty": ("no code", (NO_MODEL,)),
        "folder": ("no code", (f"{INSPECTOR}::test_a_missing_model_and_a_folder_are_named",)),
        "HTML page": ("no code", (NO_MODEL,)),
        "Git-LFS pointer": ("no code", (NO_MODEL,)),
    },
    "Commands": {
        **{
            entry: (codes, (NO_COMMAND,))
            for entry, codes in {
                "not UTF-8": "CMD-UTF8",
                "not JSON": "CMD-JSON CMD-OBJECT",
                "deep nesting": "CMD-DEPTH",
                "above 16 kB": "CMD-SIZE",
                "duplicate keys": "CMD-DUPLICATE-KEY",
                "unknown verb": "CMD-VERB",
                "missing id": "CMD-ID",
                "expired": "CMD-EXPIRED",
                "future": "CMD-FUTURE",
                "wrong device": "CMD-STATION",
                "int overflow, NaN": "CMD-NUMBER CMD-ARG-VALUE",
                "path in a field": "CMD-ARG-VALUE",
            }.items()
        },
        "wrong device by topic": ("CMD-TOPIC", (f"{COMMANDS}::test_a_topic_of_another_station_is_no_command",)),
        "replayed id": ("CMD-ID-REUSED", (
            f"{COMMANDS}::test_the_same_id_is_answered_again_and_not_done_again",
            f"{COMMANDS}::test_an_id_used_for_another_command_is_told_so",
        )),
        "retained": ("CMD-RETAINED", (f"{COMMANDS}::test_a_retained_command_is_refused_and_says_its_id",)),
        "bounded rate": ("CMD-BUSY", (
            f"{COMMANDS}::test_a_flood_of_garbage_is_counted_and_answered_at_a_bounded_rate",
            f"{COMMANDS}::test_a_slow_command_never_blocks_the_sender_and_too_many_are_told",
        )),
        "no state change": ("no code", ("edge_dkm/test_station.py::test_a_bad_command_is_answered_and_changes_nothing",)),
    },
    "Broker": {
        "v3 only": ("M-V5", (REFUSAL, f"{BROKER}::test_a_broker_of_mqtt_3_alone_is_told_by_its_answer")),
        "max QoS 0": ("M-QOS", (
            f"{BROKER}::test_mosquitto_that_does_not_even_take_our_connect_is_said",
            f"{FAKE}::test_a_broker_that_offers_no_qos_1_is_said_to_be_useless",
        )),
        "no retain": ("no code", (f"{BROKER}::test_mosquitto_that_keeps_no_retained_messages_gets_every_result",)),
        "receive maximum 1": ("no code", (f"{FAKE}::test_the_window_is_what_the_broker_takes",)),
        "packet max 100": ("M-PACKET", (f"{BROKER}::test_a_small_packet_limit_is_reported_and_never_overstepped_on_one_connection",)),
        "server keepalive": ("no code", (f"{BROKER}::test_a_half_open_connection_is_seen_within_seconds_whatever_keepalive_the_broker_sets",)),
        "redirect": ("M-MOVED", (REFUSAL, f"{BROKER}::test_a_broker_that_has_moved_is_quoted_and_not_followed")),
        "0x86, 0x87 at CONNECT": ("M-AUTH", (REFUSAL,)),
        "0x87 at PUBLISH": ("M-DENIED", ("edge_dkm/test_publisher.py::test_a_broker_that_denies_the_topic_keeps_the_rows_and_is_reported",)),
        "nobody subscribes": ("M-NO-CONSUMER", (f"{FAKE}::test_nobody_who_listens_is_no_delivery",)),
        "DNS gone": ("M-DNS", (f"{BROKER}::test_a_host_that_is_not_there_has_its_code",)),
        "nobody listens": ("M-OFFLINE", (f"{BROKER}::test_a_host_that_is_not_there_has_its_code",)),
        "TLS certificate": ("M-TLS-EXPIRED M-TLS-EARLY M-TLS-CA M-TLS-HOST", (CERTIFICATE,)),
        "TLS client": ("M-TLS-CLIENT", (f"{TLS}::test_a_client_certificate_that_the_broker_does_not_trust_is_said",)),
        "TLS to a plain port": ("M-TLS-PLAIN", (f"{TLS}::test_tls_to_a_plain_port_is_an_error_and_never_falls_back",)),
        "plain to a TLS port": ("M-TLS-NEEDED", (f"{TLS}::test_plain_text_to_a_tls_port_says_what_is_missing",)),
    },
    "State": {
        "corrupt": ("S-CORRUPT", (
            f"{STATE}::test_a_damaged_outbox_is_kept_aside_with_an_alarm_and_a_new_epoch_begins",
            f"{STATE}::test_other_damaged_files_are_kept_aside_and_said_and_nothing_is_lost",
        )),
        "one damaged row": ("row_corrupt", (f"{STATE}::test_one_flipped_bit_in_a_result_is_declared_and_the_others_are_delivered",)),
        "locked": ("S-IO", (f"{BOX}::test_a_file_that_another_process_holds_is_not_moved_away",)),
        "read-only DB": ("S-IO", (f"{HERE}::test_an_outbox_of_another_user_is_not_taken_for_a_damaged_one", RESTRICTED)),
        "ENOSPC": ("S-FULL S-DROPPED S-BLOCKED", (
            f"{HERE}::test_what_a_full_outbox_and_a_full_disk_are_called",
            FULL,
            f"{DISK}::test_on_a_full_disk_block_waits_and_drops_nothing",
            RESTRICTED,
        )),
        "EIO": ("S-IO", (f"{BOX}::test_after_an_error_that_leaves_the_disk_in_doubt_it_is_used_no_more_and_checked_at_the_next_start",)),
        "quota": ("S-IO", (f"{HERE}::test_a_limit_of_the_file_size_ends_in_a_clear_line_and_loses_nothing_committed", NOT_RUN)),
        "clock 1970": ("S-CLOCK", (
            f"{HERE}::test_a_clock_that_was_never_set_is_said",
            "faults/test_clock.py::test_a_line_whose_clock_jumps_loses_nothing_and_takes_nothing_for_stuck_or_old",
        )),
        "temporary folder full": ("no code", (f"{HERE}::test_a_full_temporary_folder_stops_nothing",)),
    },
}  # fmt: skip
ENTRIES = [(row, entry, *rest) for row, entries in CATALOGUE.items() for entry, rest in entries.items()]
IDS = [f"{row}: {entry}" for row, entry, *_ in ENTRIES]
CODE = re.compile(r"\b(?:CMD|CFG|[FRCMSOWE])-[A-Z0-9]+(?:-[A-Z0-9]+)*")


@cache
def functions_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@cache
def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def documented() -> set[str]:
    """Codes of contracts.md (section Codes) and mes.md."""
    return set(CODE.findall(page("contracts.md").split("\n## Codes\n", 1)[1] + page("mes.md")))


@pytest.mark.parametrize(("row", "entry", "codes", "tests"), ENTRIES, ids=IDS)
def test_an_entry_has_a_test_that_exists_and_codes_that_are_documented(
    row: str, entry: str, codes: str, tests: tuple[str, ...]
) -> None:
    assert tests != ()
    for name in tests:
        path, _, test = name.partition("::")
        assert test in functions_in(path) if test else path in page("faults.md"), name
    missing = [code for code in CODE.findall(codes) if code not in documented() or f"`{code}`" not in page("faults.md")]
    assert missing == [] and (CODE.search(codes) or codes in page("faults.md").lower())


def test_every_code_of_the_guide_is_a_documented_one() -> None:
    assert set(re.findall(rf"`({CODE.pattern})`", page("faults.md"))) - documented() == set()


def test_every_code_that_the_program_can_give_is_documented() -> None:
    found: dict[str, str] = {}
    for path in (path for top in ("configs", "devices", "edge_dkm") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.match(node.value):
                found.setdefault(CODE.match(node.value)[0], f"{path.name}:{node.lineno}")  # type: ignore[index]
    kinds = {"C-OFFLINE", "C-BAD", "O-OUTPUT"}  # of alarms; the camera's name follows
    assert {code: place for code, place in found.items() if code not in documented() | kinds} == {}
    listed = {code for code in documented() - set(found) if not code.startswith(tuple(kinds))}
    assert listed == set()  # no code is promised that nobody gives


# What had no test of its own elsewhere.


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header says any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind: str, image: np.ndarray) -> bytes:
    return cv2.imencode(kind, image)[1].tobytes()


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (bytes(range(250)) * 4, "F-DECODE", "c1: not an image (1000 bytes)"),
        (b"\xff\xd8", "F-DAMAGED", "ends before its end mark (2 bytes)"),
        (b"\xff\xd8\xff\xd9", "F-DECODE", "not an image (4 bytes)"),
        (encoded(".png", np.full((48, 64, 4), 90, np.uint16)), "F-DECODE", "uint16 pixels, expected 8 bits"),
        (encoded(".tiff", np.full((48, 64, 3), 0.5, np.float32)), "F-DECODE", "float32 pixels"),
        (png(100_000, 100_000, b"x"), "F-TOO-LARGE", "CV_IO_MAX_IMAGE_PIXELS"),
        (png(9_000, 9_000, b"x"), "F-DECODE", "not an image"),
    ],
)
def test_what_is_no_usable_picture_is_named(data: bytes, code: str, text: str) -> None:
    fault = decode_picture(data, "c1", 0).fault
    assert fault is not None and fault.code == code and text in fault.detail


def test_control_the_decoder_alone_makes_8_bits_of_16_without_a_word() -> None:
    deep = encoded(".png", np.full((48, 64, 4), 40_000, np.uint16))
    assert cv2.imdecode(np.frombuffer(deep, np.uint8), cv2.IMREAD_COLOR).dtype == np.uint8


def test_a_bomb_is_refused_by_its_header_in_the_cameras_process(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(12_000, 12_000, b"x"))
    faults = []
    settings = CameraSettings.model_validate({"source": str(tmp_path), "pace": "max"})
    capture = Capture("top", settings, lambda _, shot: faults.append(shot.frame.fault), lambda _: None)
    capture.start()
    assert capture.ended.wait(20)
    capture.join(20)
    assert [fault.code for fault in faults if fault] == ["F-TOO-LARGE"]


def test_known_limit_wrong_bytes_inside_a_jpeg_mostly_pass() -> None:
    """JPEG has no check sum. Should this fail one day, the guide has a line too many."""
    rng = np.random.default_rng(1)
    whole = encoded(".jpg", rng.normal(110, 25, (240, 320, 3)).clip(0, 255).astype(np.uint8))
    middle = len(whole) // 2
    faults = [
        decode_picture(whole[:middle] + rng.bytes(8).replace(b"\xff", b"\0") + whole[middle + 8 :], "c1", 0).fault
        for _ in range(20)
    ]
    assert None in faults


def test_known_limit_a_grey_file_is_taken_as_colour() -> None:
    frame = decode_picture(encoded(".png", np.full((48, 64), 90, np.uint8)), "c1", 0)
    assert frame.fault is None and frame.image.shape == (48, 64, 3)


def test_an_address_without_a_stream_is_named_without_its_password() -> None:
    from tests.faults.mjpeg_camera import MjpegCamera

    with MjpegCamera(account="me:hunter2@") as camera:
        camera.mode = "eof"
        seen = []
        settings = CameraSettings.model_validate({"source": camera.url})
        capture = Capture("top", settings, lambda *_: None, lambda _: seen.append(capture.status()))
        capture.start()
        while not seen:
            capture.join(0.05)
        capture.stop()
        capture.join(20)
    assert seen[0].code == "C-OPEN" and "http://me:***@" in str(seen[0].detail) and "hunter2" not in str(seen[0].detail)


def test_a_number_in_quotes_is_no_number_and_a_wrong_file_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = 'station: st4\nmodel: m.onnx\ncameras: {top: {source: "usb:0"}}\ninfer_timeout_s: "10"\n'
    Path("line.yaml").write_text(text)
    assert main(["run", "line.yaml"]) == 2
    assert "CFG-TYPE line.yaml:4 infer_timeout_s is '10', expected a valid number" in capsys.readouterr().err
    assert os.listdir() == ["line.yaml"]  # no state folder, no socket, no log  # noqa: PTH208


def edited(path: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """The model after a change, with the digest of what it is now: what a mistaken tool leaves."""
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    path.with_name("part.onnx.sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def set_tensor(name: str, value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), value), name))

    return change


@pytest.mark.parametrize(("name", "value"), [("centroids", np.nan), ("novelty_scale", 0.0)])
def test_an_answer_that_is_not_finite_is_no_answer(copied_model: Path, name: str, value: float) -> None:
    with (
        Inspector(edited(copied_model, set_tensor(name, value))) as inspector,
        pytest.raises(InspectionError, match="not a usable answer") as caught,
    ):
        inspector.inspect(np.full((32, 32, 3), 90, np.uint8))
    assert caught.value.code == "R-NONFINITE"


def test_weights_in_another_file_are_refused_wherever_that_file_lies(
    copied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move_out(model: onnx.ModelProto) -> None:
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        copied_model.with_name("weights").write_bytes(bytes(len(tensor.raw_data)))  # others than the digest vouches for
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "weights"

    edited(copied_model, move_out)
    monkeypatch.chdir(copied_model.parent)
    with pytest.raises(ModelError, match="keeps its weights in other files"):
        Inspector(copied_model)


def test_a_model_that_names_other_clusters_than_it_has_is_refused(copied_model: Path) -> None:
    def forget_one(model: onnx.ModelProto) -> None:
        clusters = next(prop for prop in model.metadata_props if prop.key == "dkm.clusters")
        clusters.value = json.dumps(json.loads(clusters.value)[:-1])

    with pytest.raises(ContractError, match=r"lists the clusters \[0, 1\], expected 0 to 2"):
        Inspector(edited(copied_model, forget_one))


def test_an_opset_that_is_too_new_is_named_in_what_the_user_reads(copied_model: Path) -> None:
    def from_the_future(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 99

    with pytest.raises(ModelError, match="cannot be loaded as an ONNX model: .*Opset 99 is under development"):
        Inspector(edited(copied_model, from_the_future))


def in_a_process(program: str, *words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload, no-any-return]


OPEN = """
import sys
from pathlib import Path
from edge_dkm.outbox import Outbox
from tests.outboxes import draft, topic_of
box = Outbox(Path(sys.argv[1]), "st1", topic_of)
for n in range(int(sys.argv[2])):
    box.commit([draft()])
    print(n + 1, flush=True)
"""


@pytest.fixture
def waiting(tmp_path: Path) -> Path:
    """An outbox in order, in which five results wait."""
    path = tmp_path / "state" / "outbox.db"
    path.parent.mkdir()
    box = Outbox(path, "st1", topic_of)
    for _ in range(5):
        box.commit([draft()])
    box.close()
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_an_outbox_of_another_user_is_not_taken_for_a_damaged_one(waiting: Path, mode: int) -> None:
    nobody = 65534
    waiting.chmod(mode)
    os.chown(waiting.parent, nobody, nobody)
    pid = os.fork()
    if pid == 0:  # the parents of pytest's folders are root's alone: stay in the folder, give up root
        os.chdir(waiting.parent)
        os.setgroups([])
        os.setegid(nobody)
        os.seteuid(nobody)
        try:
            Outbox(Path("outbox.db"), "st1", topic_of)
        except StorageError as error:
            os._exit(7 if str(error).startswith("S-IO outbox outbox.db may not be") else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    waiting.chmod(0o600)
    box = Outbox(waiting, "st1", topic_of)
    assert (box.status().rows, box.quarantined) == (5, None)
    box.close()


def test_a_limit_of_the_file_size_ends_in_a_clear_line_and_loses_nothing_committed(waiting: Path) -> None:
    """What a quota looks like to SQLite: a write that fails although the disk has room."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = in_a_process(OPEN, waiting, 5000, preexec_fn=limit)
    committed = len(done.stdout.splitlines())
    assert "S-IO outbox" in done.stderr and "is in doubt: start again" in done.stderr and 0 < committed < 5000
    box = Outbox(waiting, "st1", topic_of)
    assert box.status().rows >= 5 + committed and box.quarantined is None
    box.close()


def test_a_second_line_on_one_state_folder_is_told_who_has_it(
    tiny_model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = line_settings(tiny_model_path, tmp_path / "state", free_port())
    (tmp_path / "line.yaml").write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    with StateFolder(tmp_path / "state"):
        assert main(["run", str(tmp_path / "line.yaml")]) == 6
    assert f"S-LOCKED state folder {tmp_path / 'state'} is held by process {os.getpid()}" in capsys.readouterr().err


def test_a_clock_that_was_never_set_is_said() -> None:
    from edge_dkm.conditions import clock_condition

    (said,) = clock_condition(datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC))
    assert said.code == "S-CLOCK" and "1970-01-01T00:00:05.000000Z" in said.detail and said.degrades
    assert list(clock_condition(datetime(2026, 11, 21, tzinfo=UTC))) == []


@pytest.mark.parametrize("policy", ["drop_oldest", "block"])
def test_what_a_full_outbox_and_a_full_disk_are_called(
    tmp_path: Path, policy: Literal["drop_oldest", "block"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_dkm.conditions.MIN_FREE_MB", 10**12)  # more than any disk has
    with StateFolder(tmp_path / "state") as folder:
        box = Outbox(folder.outbox, "st1", topic_of, Limits(max_rows=10, policy=policy))

        def produce() -> None:
            with contextlib.suppress(StorageError):
                for _ in range(15):
                    box.commit([draft()])

        producer = threading.Thread(target=produce)
        producer.start()
        wait_until(lambda: box.is_blocked or not producer.is_alive())
        vitals = SimpleNamespace(outbox_dropped=box.status().dropped)
        line = SimpleNamespace(outbox=box, folder=folder, vitals=vitals)
        said = {found.code: found.detail for found in Conditions(line)._storage()}  # type: ignore[arg-type]
        box.unblock()
        producer.join(20)
        box.close()
    assert set(said) == {"S-FULL", {"block": "S-BLOCKED", "drop_oldest": "S-DROPPED"}[policy]}
    assert f"MB free in {folder.path}" in said["S-FULL"]
    assert policy == "block" or re.search(r"since the start: top \d+ by drop_oldest$", said["S-DROPPED"])


def test_a_full_temporary_folder_stops_nothing(tiny_model_path: Path, image_folder: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    if not small_disk.is_permitted(full):
        pytest.skip("this machine does not let a user mount a tmpfs")
    camera = f"{{top: {{source: '{image_folder / 'disc'}', pace: max, policy: every}}}}"
    settings = line_settings(
        tiny_model_path, tmp_path / "state", free_port(), cameras=camera, delivery="{drain_timeout_s: 0}"
    )
    (tmp_path / "line.yaml").write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    fill = 'mount -t tmpfs -o size=64k tmpfs "$0" && { cat /dev/zero > "$0/other" 2>/dev/null; true; } && exec "$@"'
    command = [sys.executable, "-m", "edge_dkm", "run", str(tmp_path / "line.yaml")]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", fill, str(full), *command],
        env={**os.environ, "TMPDIR": str(full), "SQLITE_TMPDIR": str(full)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5 and "20 results wait" in done.stderr, done.stderr  # nobody listens at the broker's port
