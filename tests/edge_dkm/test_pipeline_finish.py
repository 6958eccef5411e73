"""How a line ends: after an error, in a hurry, with a slow model, a full outbox, or recorded material that nobody takes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_dkm import line as line_module
from edge_dkm import pipeline as pipeline_module
from edge_dkm import supervisor as supervisor_module
from edge_dkm.commands.commands import Commands
from edge_dkm.errors import StorageError
from edge_dkm.inspector import Inspector
from edge_dkm.line import Line
from edge_dkm.models import load_models
from edge_dkm.outbox import Intent, Limits, Outbox
from edge_dkm.pipeline import Pipeline
from edge_dkm.settings import LineSettings
from tests.broker import Mosquitto, Subscriber, free_port
from tests.faults.station import RealStation
from tests.plc import Plc
from tests.stations import RunningLine, draft
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Make = Callable[..., LineSettings]
Start = Callable[[LineSettings], RunningLine]
Subscribe = Callable[..., Subscriber]
TRIGGERED = "trigger: {kind: mqtt}, deadline_ms: 20000"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts lines in this process that are in a hurry when they end."""
    monkeypatch.setattr(supervisor_module, "STOP_DRAIN_S", 0.2)
    monkeypatch.setattr(pipeline_module, "HURRIED_PATIENCE_S", 0.5, raising=False)
    monkeypatch.setattr(pipeline_module, "HURRY_S", 0.1, raising=False)
    running: list[RunningLine] = []

    def start(settings: LineSettings) -> RunningLine:
        running.append(RunningLine(settings, monkeypatch))
        return running[-1]

    yield start
    for line in running:
        assert line.end()


@pytest.fixture
def plc() -> Iterator[Plc]:
    machine = Plc()
    yield machine
    machine.close()


def camera(folder: Path, more: str = "", fps: int = 50) -> str:
    return f"{{source: '{folder}', pace: source, fps: {fps}, loop: true, policy: every{', ' + more if more else ''}}}"


def fill(path: Path, rows: int, intents: int = 0) -> None:
    """An outbox as a kill leaves it: full, with parts that were cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    box = Outbox(path, "st1", lambda name: f"dkm/v1/st1/{name}/result", Limits(policy="block"))
    for n in range(rows):
        box.commit([draft(n)])
    for n in range(intents):
        box.intend(Intent(f"cut-off-{n}", "top", "mqtt", n + 1, "2026-01-01T00:00:00Z"))
    box.close()


def stored(path: Path) -> list[dict[str, Any]]:
    """The results in a closed outbox, in order."""
    database = sqlite3.connect(path)
    try:
        bodies = database.execute("SELECT body FROM outbox WHERE cseq IS NOT NULL ORDER BY seq").fetchall()
    finally:
        database.close()
    return [json.loads(body) for (body,) in bodies]


@pytest.mark.parametrize("cause", ["a film that is lost", "an outbox that fails"])
def test_after_an_error_the_output_says_ng_captures_have_ended_and_what_was_inspected_is_committed(
    make_line: Make, run: Start, part_folder: Path, plc: Plc, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    # An OK that stands until the next part: nothing but the end itself can take it back.
    output = f"output: {{kind: modbus, host: 127.0.0.1, port: {plc.port}, coil: 0, hold_ms: null}}"
    cameras = f"{{top: {camera(part_folder, output)}, side: {camera(part_folder)}}}"
    settings = make_line(free_port(), cameras=cameras, verdicts="{default: pass, novel: pass}")
    running = run(settings)
    line = running.line
    wait_until(lambda: True in plc.values(0) and all(tally.results >= 3 for tally in line.pipeline.tallies.values()))
    if cause == "a film that is lost":
        pid = line.captures["side"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    else:

        def fails(*_: object) -> Any:
            raise StorageError("the outbox cannot be written")

        monkeypatch.setattr(line.outbox, "intend", fails)
        line.pipeline.promise("top", None)
    assert running.has_ended() and running.error is not None
    assert not any(capture.is_alive() for capture in line.captures.values())
    assert plc.coil(0) is False and plc.values(0)[-1] is False
    for tally in line.pipeline.tallies.values():
        assert tally.frames == tally.results + sum(tally.dropped.values())
    assert len(stored(settings.state / "outbox.db")) == line.pipeline.committed > 0


def test_parts_that_were_cut_off_wait_for_a_full_outbox_while_the_line_runs_and_stops(
    make_line: Make, run: Start, part_folder: Path
) -> None:
    settings = make_line(
        free_port(),
        cameras=f"{{top: {camera(part_folder)}}}",
        delivery="{mode: journal, limit: block, max_rows: 50}",
    )
    path = settings.state / "outbox.db"
    fill(path, 50, intents=2)
    running = run(settings)
    wait_until(lambda: running.looks >= 5 and running.line.outbox.is_blocked)
    assert running.is_running and running.line.vitals.healthz()[0]
    assert running.end()
    box = Outbox(path, "st1", lambda name: f"dkm/v1/st1/{name}/result", Limits(policy="block"))
    assert {intent.result_id for intent in box.open_intents()} == {"cut-off-0", "cut-off-1"}  # for the next start
    assert box.status().rows == 50
    box.close()


def test_cut_off_parts_are_declared_once_there_is_room(make_line: Make, run: Start, part_folder: Path) -> None:
    settings = make_line(free_port(), cameras=f"{{top: {camera(part_folder, TRIGGERED)}}}")
    fill(settings.state / "outbox.db", 3, intents=2)
    running = run(settings)
    wait_until(lambda: running.line.outbox.status().rows == 5)
    assert running.end() and running.error is None
    states = [(result["result_id"], result.get("state")) for result in stored(settings.state / "outbox.db")[3:]]
    assert states == [("cut-off-0", "failed"), ("cut-off-1", "failed")]


def test_a_trigger_that_comes_first_thing_gets_exactly_one_result(
    make_line: Make, run: Start, part_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = "dkm/v1/st1/top/cmd/trigger"
    payload = json.dumps({"schema": "dkm.cmd/1", "id": "t1", "args": {"part": {"id": "SN1"}}}).encode()

    def start(commands: Commands) -> None:
        threading.Thread.start(commands)
        commands.submit(topic, payload, False)
        wait_until(lambda: commands._done == 1)  # before anything else of the line goes on

    monkeypatch.setattr(Commands, "start", start, raising=False)
    settings = make_line(free_port(), cameras=f"{{top: {camera(part_folder, TRIGGERED)}}}")
    running = run(settings)
    wait_until(lambda: running.line.pipeline.tallies["top"].results == 1)
    assert running.end() and running.error is None
    results = stored(settings.state / "outbox.db")
    assert [(r["part"]["id"], r["state"], r["cseq"]) for r in results] == [("SN1", "completed", 1)]


SLOW = """
import sys, time
from edge_dkm.cli import main
from edge_dkm.inspector import Inspector
inspect = Inspector.inspect
def slow(inspector, image):
    time.sleep(0.7)
    return inspect(inspector, image)
Inspector.inspect = slow
sys.exit(main(["run", sys.argv[1]]))
"""


def test_sigterm_with_a_slow_model_and_a_full_buffer_ends_in_order(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, tmp_path: Path
) -> None:
    subscriber = subscribe(mosquitto.port)
    settings = make_line(mosquitto.port, cameras=f"{{top: {camera(part_folder)}}}")
    line_file = tmp_path / "line.yaml"
    line_file.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_none=True)))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(line_file)], stdout=log, stderr=log)
    try:
        wait_until(lambda: len(subscriber.results()) >= 2)  # at fifty frames per second sixteen wait by now
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: subscriber.of("dkm.status/1")[-1]["state"] == "stopped")
    assert subscriber.of("dkm.state/1")[-1]["state"] == "halted"
    counters = subscriber.of("dkm.health/1")[-1]["counters"]["top"]
    assert counters["dropped"]["stopped"] >= 5 and counters["results"] == len(subscriber.results())
    assert counters["frames"] == counters["results"] + counters["dropped"]["stopped"]


def test_control_a_line_that_is_in_no_hurry_inspects_all_that_waits(
    make_line: Make, run: Start, part_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect, is_slow = Inspector.inspect, threading.Event()

    def slow(inspector: Inspector, image: Any) -> Any:
        is_slow.wait(0.03)
        return inspect(inspector, image)

    monkeypatch.setattr(Inspector, "inspect", slow)
    settings = make_line(free_port(), delivery="{drain_timeout_s: 0.1}")  # the film ends, nobody asked
    running = run(settings)
    assert running.has_ended()
    tally = running.line.pipeline.tallies["top"]
    assert (tally.frames, tally.results, dict(tally.dropped)) == (12, 12, {})


def test_sigterm_while_recorded_material_waits_for_the_broker_ends_it(make_line: Make, tmp_path: Path) -> None:
    settings = make_line(free_port(), delivery="{drain_timeout_s: 600}")
    with RealStation(settings, tmp_path / "station") as station:
        wait_until(lambda: "waiting up to 600 s for delivery" in station.log())
        assert station.stop(25) == 0
        assert "Traceback" not in station.log()
    assert len(stored(settings.state / "outbox.db")) == 12


def test_a_stop_in_the_moment_in_which_the_wait_begins_is_heard(
    make_line: Make, run: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started, heard = threading.Event(), threading.Event()

    def stop_now(record: logging.LogRecord) -> bool:
        if record.getMessage().startswith("waiting up to 600 s for delivery"):
            started.wait(20)
            running.ask_to_stop()
            heard.set()
        return True

    monkeypatch.setattr(supervisor_module.log, "filters", [stop_now])
    caplog.set_level(logging.INFO)
    running = run(make_line(free_port(), delivery="{drain_timeout_s: 600}"))
    started.set()
    assert running.has_ended() and heard.is_set() and running.error is None


@pytest.fixture
def idle_pipeline(make_line: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    """Not started; two results may wait for the disk, and an announced part has a millisecond."""
    monkeypatch.setattr(pipeline_module, "MAX_UNCOMMITTED", 2)
    settings = make_line(1, cameras=f"{{top: {camera(tmp_path, 'trigger: {kind: mqtt}, deadline_ms: 1')}}}")
    inspector = load_models(settings)["top"]
    box = Outbox(tmp_path / "outbox.db", "st1", lambda name: f"t/{name}/result")
    pipeline = Pipeline("st1", settings.cameras, {"top": inspector}, box, lambda name: f"t/{name}/result", lambda: None)
    yield pipeline
    box.close()
    inspector.close()


def test_announced_parts_that_are_over_time_while_the_disk_is_behind_fail_later_and_none_is_lost(
    idle_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = idle_pipeline
    tokens = [pipeline.promise("top", None) for _ in range(5)]
    wait_until(lambda: all(expires_s < time.monotonic() for _, expires_s in pipeline._promised.values()))
    # The inspecting thread may put a result between a look at the queue and what is put then.
    monkeypatch.setattr(pipeline._results, "full", lambda: False)
    given_up = pipeline.expired()
    assert [token for _, token in given_up] == tokens[:2] and pipeline.expired() == []
    due_s = pipeline.next_expiry_s()
    assert due_s is not None and due_s > 0  # the supervisor waits, and does not go round and round
    pipeline.start()
    wait_until(lambda: given_up.extend(pipeline.expired()) or len(given_up) == 5)  # type: ignore[func-returns-value]
    assert [token for _, token in given_up] == tokens and pipeline.next_expiry_s() is None
    assert pipeline.finish(20) and pipeline.failed is None
    rows = [json.loads(row.body) for row in pipeline.outbox.unsent(0, 100)]
    assert [row["result_id"] for row in rows] == tokens
    assert {row["error"]["code"] for row in rows} == {"R-NO-FRAME"} and pipeline.outbox.open_intents() == []


def test_parts_that_are_left_in_a_hurry_stay_open_for_the_next_start(
    make_line: Make, run: Start, part_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect, never = Inspector.inspect, threading.Event()

    def slow(inspector: Inspector, image: Any) -> Any:
        never.wait(0.2)
        return inspect(inspector, image)

    monkeypatch.setattr(Inspector, "inspect", slow)
    monkeypatch.setattr(line_module, "CLOSE_S", 0.1)
    monkeypatch.setattr(Line, "_take", lambda line, name, shot: line.pipeline.take(name, shot, True))
    settings = make_line(free_port(), cameras=f"{{top: {camera(part_folder)}}}")
    running = run(settings)
    wait_until(lambda: len(running.line.pipeline._buffer) == 16)
    assert running.end() and running.error is None
    left = running.line.pipeline.tallies["top"].dropped["stopped"]
    done = {result["result_id"] for result in stored(settings.state / "outbox.db")}
    box = Outbox(settings.state / "outbox.db", "st1", lambda name: f"t/{name}/result")
    still_open = {intent.result_id for intent in box.open_intents()}
    box.close()
    assert 5 <= left <= len(still_open) and not still_open & done
    assert len(done) == running.line.pipeline.committed
