"""Whatever has become of the files in its state folder, a line starts, inspects and publishes; what was damaged is kept aside and said."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_dkm.errors import BrokerError
from edge_dkm.line_report import LineReport
from edge_dkm.outbox import Outbox
from edge_dkm.supervisor import run_line
from tests.broker import Mosquitto, Subscriber, free_port, needs_mosquitto
from tests.faults import small_disk
from tests.faults.station import RealStation, line_settings
from tests.images import write_folder
from tests.waiting import wait_until

pytestmark = [pytest.mark.broker, needs_mosquitto]
PARTS = 6


@dataclass
class Left:
    """What a line left behind that ran without a broker and was then killed. `waiting`: results in its outbox."""

    state: Path
    parts: Path
    model: Path
    waiting: int


class Listener(Subscriber):
    """Tells what is said now from what a broker has kept of another test."""

    def live(self, schema: str) -> list[dict[str, Any]]:
        return [m for _, m, is_retained in list(self.messages) if m.get("schema") == schema and not is_retained]


@dataclass
class Started:
    """What became of a line on a damaged state folder."""

    report: LineReport
    state: Path
    subscriber: Listener

    @property
    def delivered(self) -> int:
        return len(self.subscriber.results())

    @property
    def epochs(self) -> set[str]:
        return {result["epoch"] for result in self.subscriber.results()}

    @property
    def aside(self) -> set[str]:
        return {path.name for path in self.state.iterdir() if ".corrupt-" in path.name}

    def alarms(self) -> set[str]:
        return {m["code"] for m in self.subscriber.live("dkm.alarm/1") if m["active"]}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    started = Mosquitto(tmp_path_factory.mktemp("broker"))
    yield started
    started.kill()


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Left:
    """Results in the database (a first run that ended) and in its WAL (a second one that was killed)."""
    folder = tmp_path_factory.mktemp("left")
    parts = write_folder(folder / "few", per_kind=PARTS) / "disc"
    many = write_folder(folder / "many", per_kind=4 * PARTS) / "disc"
    state, dead = folder / "state", free_port()
    with contextlib.suppress(BrokerError):
        run_line(_settings(tiny_model_path, many, state, dead, delivery="{drain_timeout_s: 0}"))
    camera = f"{{top: {{source: '{parts}', fps: 20, loop: true, policy: every}}}}"
    wal = state / "outbox.db-wal"
    with RealStation(line_settings(tiny_model_path, state, dead, cameras=camera), folder / "log"):
        wait_until(lambda: wal.exists() and wal.stat().st_size > 120_000, timeout_s=60)
    (state / "admin.sock").unlink(missing_ok=True)  # a socket cannot be copied
    (state / "restarts.json").write_text(json.dumps({"version": 1, "restarts": {"cam:top": 2}}))
    return Left(state, parts, tiny_model_path, len(_rows(state, folder / "look")))


def _settings(model: Path, parts: Path, state: Path, port: int, **sections: str) -> Any:
    return line_settings(
        model, state, port, cameras=f"{{top: {{source: '{parts}', pace: max, policy: every}}}}", **sections
    )


def _rows(state: Path, scratch: Path) -> dict[int, bytes]:
    """What SQLite alone finds in a copy of the outbox."""
    shutil.copytree(state, scratch)
    with contextlib.closing(sqlite3.connect(scratch / "outbox.db")) as db:
        return dict(db.execute("SELECT seq, body FROM outbox WHERE cseq IS NOT NULL").fetchall())


Start = Callable[[Callable[[Path], object]], Started]


@pytest.fixture
def start(left: Left, broker: Mosquitto, tmp_path: Path) -> Iterator[Start]:
    """Damages a copy of the state folder and runs the line on it, with a broker."""
    opened: list[Listener] = []

    def run(damage: Callable[[Path], object]) -> Started:
        state = tmp_path / "state"
        shutil.copytree(left.state, state)
        damage(state)
        opened.append(Listener(broker.port))
        report = run_line(_settings(left.model, left.parts, state, broker.port), PARTS)
        assert (report.parts, report.bad, report.unsent) == (PARTS, 0, 0)
        wait_until(lambda: "stopped" in [m["state"] for m in opened[-1].live("dkm.status/1")])
        return Started(report, state, opened[-1])

    yield run
    for subscriber in opened:
        subscriber.close()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(7, len(data), max(1, len(data) // 40)):
        data[at] ^= 0x10
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def make_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "something").touch()


def test_control_an_undamaged_folder_gives_all_that_waited_in_the_same_epoch(start: Start, left: Left) -> None:
    started = start(lambda state: None)
    assert started.delivered == left.waiting + PARTS and left.waiting > 4 * PARTS
    assert [result["cseq"] for result in started.subscriber.results()] == list(range(1, left.waiting + PARTS + 1))
    assert (len(started.epochs), started.aside, started.alarms() - {"M-OFFLINE"}) == (1, set(), set())


@pytest.mark.parametrize("damage", [truncate, flip, fill_with_garbage, make_folder, empty])
def test_a_damaged_outbox_is_kept_aside_with_an_alarm_and_a_new_epoch_begins(
    damage: Callable[[Path], None], start: Start, left: Left, tmp_path: Path
) -> None:
    old = _rows(left.state, tmp_path / "look")
    epoch = {json.loads(body)["epoch"] for body in old.values()}
    started = start(lambda state: damage(state / "outbox.db"))
    assert "outbox.db.corrupt-1" in started.aside and "S-CORRUPT" in started.alarms()
    assert len(started.epochs) == 1 and started.epochs != epoch and started.delivered == PARTS
    with contextlib.closing(sqlite3.connect(started.state / "outbox.db")) as db:  # on the disk, not in memory only
        assert db.execute("SELECT COUNT(*) FROM outbox").fetchone()[0] == PARTS


@pytest.mark.parametrize("damage", [truncate, flip, fill_with_garbage, make_folder, empty])
def test_control_sqlite_alone_fails_on_it_or_reads_other_rows(
    damage: Callable[[Path], None], left: Left, tmp_path: Path
) -> None:
    before = _rows(left.state, tmp_path / "before")
    shutil.copytree(left.state, tmp_path / "state")
    damage(tmp_path / "state" / "outbox.db")
    try:
        after = _rows(tmp_path / "state", tmp_path / "after")
    except (sqlite3.Error, OSError):
        return
    assert after != before


def test_one_flipped_bit_in_a_result_is_declared_and_the_others_are_delivered(
    start: Start, left: Left, tmp_path: Path
) -> None:
    def flip_a_bit(state: Path) -> None:
        data = bytearray((state / "outbox.db").read_bytes())
        data[data.index(b'"distance":') + len(b'"distance":') + 4] ^= 0x01  # another digit: JSON as good as before
        (state / "outbox.db").write_bytes(data)

    started = start(flip_a_bit)
    gap = started.subscriber.of("dkm.gap/1")[0]
    assert (gap["reason"], gap["n"]) == ("row_corrupt", 1)
    numbers = {result["cseq"] for result in started.subscriber.results()}
    assert numbers == set(range(1, left.waiting + PARTS + 1)) - {gap["from"]} and len(started.epochs) == 1
    shutil.copytree(left.state, tmp_path / "control")
    flip_a_bit(tmp_path / "control")
    with contextlib.closing(sqlite3.connect(tmp_path / "control" / "outbox.db")) as db:  # control
        assert db.execute("PRAGMA quick_check").fetchone()[0] == "ok"


@pytest.mark.parametrize("damage", [make_folder, truncate, flip, empty, fill_with_garbage])
def test_results_that_were_only_in_a_damaged_wal_are_declared_or_leave_with_their_epoch(
    damage: Callable[[Path], None], start: Start, left: Left, tmp_path: Path
) -> None:
    old = {json.loads(body)["result_id"] for body in _rows(left.state, tmp_path / "look").values()}
    started = start(lambda state: damage(state / "outbox.db-wal"))
    numbers = [result["cseq"] for result in started.subscriber.results()]
    is_new = started.epochs.isdisjoint(
        json.loads(body)["epoch"] for body in _rows(left.state, tmp_path / "again").values()
    )
    if is_new:
        assert "S-CORRUPT" in started.alarms() and numbers == list(range(1, PARTS + 1))
        return
    declared = {n for gap in started.subscriber.of("dkm.gap/1") for n in range(gap["from"], gap["to"] + 1)}
    # The kill may have come before the last commit had returned: that result was promised to nobody.
    known = sorted({*numbers, *declared})
    assert known == list(range(1, len(known) + 1)) and len(known) >= left.waiting + PARTS - 1
    assert declared.isdisjoint(numbers) and numbers == sorted(numbers)
    assert declared or old <= {result["result_id"] for result in started.subscriber.results()}


@pytest.mark.parametrize(
    ("names", "damage"),
    [
        *[(("restarts.json", "admin.sock"), damage) for damage in (empty, fill_with_garbage, make_folder)],
        *[(("alarms.json",), damage) for damage in (truncate, make_folder)],
        *[((name,), make_folder) for name in ("lock", "outbox.db.ballast", "outbox.db.distrust", "outbox.db.newest")],
    ],
)
def test_other_damaged_files_are_kept_aside_and_said_and_nothing_is_lost(
    names: tuple[str, ...],
    damage: Callable[[Path], None],
    start: Start,
    left: Left,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        started = start(lambda state: [damage(state / name) for name in names])
    assert started.delivered == left.waiting + PARTS and len(started.epochs) == 1
    assert started.aside == {f"{name}.corrupt-1" for name in names}
    said = [record.getMessage() for record in caplog.records if "S-CORRUPT" in record.getMessage()]
    assert all(any(name in line for line in said) for name in names)


@pytest.mark.parametrize("damage", [truncate, flip, empty, fill_with_garbage])
def test_what_stands_in_a_file_without_content_of_its_own_does_not_matter(
    damage: Callable[[Path], None], start: Start, left: Left
) -> None:
    def hurt(state: Path) -> None:
        for name in (
            "outbox.db.ballast",
            "lock",
            "outbox.db-shm",
            "outbox.db-journal",
            "alarms.tmp",
            "restarts.json.new",
        ):
            (state / name).touch()
            damage(state / name)

    started = start(hurt)
    assert started.delivered == left.waiting + PARTS and len(started.epochs) == 1 and started.aside == set()
    assert (started.state / "outbox.db.ballast").stat().st_size == Outbox.ballast_bytes


def test_a_socket_that_a_killed_line_left_is_replaced(start: Start, left: Left) -> None:
    def leave(state: Path) -> None:
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(state / "admin.sock"))

    started = start(leave)
    assert started.delivered == left.waiting + PARTS and started.aside == set()


@pytest.mark.parametrize("name", ["broker", "broker/broker.log"])
def test_an_embedded_broker_starts_whatever_lies_at_its_place(name: str, left: Left, tmp_path: Path) -> None:
    state = tmp_path / "state"
    path = state / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0 no such setting\n")
    mqtt = f"{{host: embedded, port: {free_port()}}}"
    settings = _settings(left.model, left.parts, state, 0, mqtt=mqtt, delivery="{drain_timeout_s: 0}")
    with pytest.raises(BrokerError, match=f"{PARTS} results wait"):  # it runs, but nobody subscribes
        run_line(settings)
    assert "Client edge-dkm-st1 disconnected" in (state / "broker" / "broker.log").read_text()


def _run_in_namespace(prepare: str, left: Left, folder: Path) -> subprocess.CompletedProcess[str]:
    """The real command in a mount namespace of its own, after `prepare`, where $0 is `folder`."""
    line = folder.parent / "line.yaml"
    settings = _settings(left.model, left.parts, folder / "state", free_port(), delivery="{drain_timeout_s: 0}")
    line.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'{prepare} && exec "$@"',
        str(folder),
        sys.executable,
        "-m",
        "edge_dkm",
        "run",
        str(line),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


FULL = 'mount -t tmpfs -o size=64k tmpfs "$0" && mkdir "$0/state" && { cat /dev/zero > "$0/other" 2>/dev/null; true; }'
READ_ONLY = 'mkdir "$0/state" && mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"'


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (FULL, "No space left on device"),
        (READ_ONLY, "Read-only file system"),
        ('touch "$0/state"', "File exists"),
        ('ln -s "$0/nowhere/state" "$0/state"', "File exists"),
    ],
    ids=["full disk", "read-only", "a file", "a link to nowhere"],
)
def test_a_state_folder_that_cannot_be_written_is_exit_7_with_one_clear_line(
    prepare: str, reason: str, left: Left, tmp_path: Path
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not small_disk.is_permitted(folder):
        pytest.skip("this machine does not let a user mount a tmpfs")
    done = _run_in_namespace(prepare, left, folder)
    errors = [line for line in done.stderr.splitlines() if line.startswith("edge-dkm: ")]
    assert (done.returncode, len(errors)) == (7, 1) and "Traceback" not in done.stderr, done.stderr
    assert str(folder / "state") in errors[0] and reason in errors[0]
