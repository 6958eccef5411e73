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
from tests.faults.catalogue import CATALOGUE
from tests.faults.station import line_settings
from tests.outboxes import draft, topic_of
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
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
