"""A start that takes long is a visible state. The real loader runs, held back by an event where a provider would compile for minutes."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edge_dkm import starting, supervisor
from edge_dkm.errors import ModelError
from edge_dkm.inspector import Inspector
from edge_dkm.line_report import LineReport
from edge_dkm.message_schema import json_schema
from edge_dkm.models import Loaded, Tell, load_models
from edge_dkm.mqtt.link import await_connack, open_link, publish, pump
from edge_dkm.outbox import Outbox
from edge_dkm.service.stop_signals import StopWish
from edge_dkm.settings import LineSettings
from edge_dkm.starting import Start, StoppedError
from edge_dkm.supervisor import run_line
from tests.broker import Mosquitto, Subscriber, free_port
from tests.waiting import wait_until

Make = Callable[..., LineSettings]
Subscribe = Callable[..., Subscriber]
pytestmark = pytest.mark.broker
DETAIL = "building the TensorRT engine for part.onnx"


class SlowLoad:
    """`load_models`, which begins when `go` is set."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()

    def __call__(self, settings: LineSettings, tell: Tell) -> dict[str, Inspector]:
        tell("COMPILING", DETAIL)
        self.begun.set()
        self.go.wait(60)
        return load_models(settings, tell)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowLoad]:
    """Loading waits until it is told to go; what is said of it is said every tenth of a second."""
    load = SlowLoad()
    monkeypatch.setattr(supervisor, "load_models", load)
    monkeypatch.setattr(starting, "QUIET_S", 0.1)
    monkeypatch.setattr(starting, "SAY_EVERY_S", 0.1)
    yield load
    load.go.set()


class Running(threading.Thread):
    """`run_line` in a thread, and what came of it."""

    def __init__(self, settings: LineSettings) -> None:
        super().__init__(daemon=True)
        self.settings = settings
        self.report: LineReport | None = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.report = run_line(self.settings)
        except Exception as error:  # noqa: BLE001 (for the test to look at)
            self.error = error


def warming(subscriber: Subscriber) -> list[dict[str, Any]]:
    states = subscriber.of("dkm.state/1")
    return [m["reason"] for m in states if m["state"] == "warming_up" and "reason" in m]


def test_while_an_engine_is_built_the_state_says_so_and_the_line_then_inspects_everything(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, slow: SlowLoad
) -> None:
    subscriber = subscribe(mosquitto.port)
    line = Running(make_line(mosquitto.port))
    wait_until(lambda: len(warming(subscriber)) >= 3)
    assert "online" in [m["state"] for m in subscriber.of("dkm.status/1")]
    assert subscriber.results() == [] and subscriber.of("dkm.info/1") == []
    assert all(r["code"] == "COMPILING" and r["detail"].startswith(f"{DETAIL}, ") for r in warming(subscriber))
    assert warming(subscriber)[-1]["detail"].endswith(" s so far")
    slow.go.set()
    line.join(60)
    assert line.error is None and line.report is not None and line.report.parts == 12
    wait_until(lambda: [m["state"] for m in subscriber.of("dkm.status/1")][-1] == "stopped")
    states = [m["state"] for m in subscriber.of("dkm.state/1")]
    assert states[-1] == "halted" and {"ready", "running"} & set(states)
    assert "warming_up" not in states[[s != "warming_up" for s in states].index(True) :]
    assert [m["state"] for m in subscriber.of("dkm.status/1")] == ["online", "stopped"]  # one connection for it all
    info = subscriber.of("dkm.info/1")[-1]
    assert (
        info["precision"] == "fp32"
        and info["device"].items()
        >= {
            "title": "CPU, onnxruntime",
            "run_here": True,
            "head": "graph",
            "asked": "fp32",
        }.items()
    )
    for message in subscriber.of("dkm.state/1") + subscriber.of("dkm.info/1"):
        jsonschema.Draft202012Validator(json_schema(message["schema"])).validate(message)


def test_control_a_short_load_says_nothing_of_it(mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make) -> None:
    subscriber = subscribe(mosquitto.port)
    run_line(make_line(mosquitto.port))
    wait_until(lambda: "halted" in [m["state"] for m in subscriber.of("dkm.state/1")])
    assert warming(subscriber) == []


def test_a_command_during_the_start_is_refused_and_not_kept_for_a_later_part(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, slow: SlowLoad
) -> None:
    subscriber = subscribe(mosquitto.port)
    line = Running(make_line(mosquitto.port))
    wait_until(lambda: len(warming(subscriber)) >= 1)
    link = open_link(line.settings.mqtt, "mes", clean=True)
    await_connack(link, line.settings.mqtt)
    command = {"schema": "dkm.cmd/1", "id": "c1", "args": {}}
    mid = publish(link, "dkm/v1/st1/cmd/pause", json.dumps(command).encode(), qos=1)
    wait_until(lambda: pump(link, 0.02) or mid not in link.unacknowledged)
    link.client.disconnect()
    wait_until(lambda: len(subscriber.of("dkm.reply/1")) == 1)
    reply = subscriber.of("dkm.reply/1")[0]
    assert (reply["id"], reply["ok"], reply["code"]) == ("c1", False, "CMD-BUSY")
    assert DETAIL in reply["detail"] and "new id" in reply["detail"]
    slow.go.set()
    line.join(60)
    assert line.report is not None and line.report.parts == 12  # it was not paused


def test_a_model_that_fails_after_minutes_is_an_announced_error(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, slow: SlowLoad, copied_model: Path
) -> None:
    from tests.edge_dkm.test_golden import edited

    edited(copied_model, "novelty_scale", 1.5)
    subscriber = subscribe(mosquitto.port)
    line = Running(make_line(mosquitto.port, model=str(copied_model)))
    wait_until(lambda: len(warming(subscriber)) >= 1)
    slow.go.set()
    line.join(30)
    assert isinstance(line.error, ModelError) and "golden image 0" in str(line.error)
    wait_until(lambda: [m["state"] for m in subscriber.of("dkm.status/1")][-1] == "stopped")
    last = subscriber.of("dkm.state/1")[-1]
    assert (last["state"], last["reason"]["code"]) == ("error", "E-STOPPED") and "golden image 0" in last["reason"][
        "detail"
    ]


def test_systemd_is_asked_for_more_time_while_it_lasts(
    make_line: Make, slow: SlowLoad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        line = Running(make_line(free_port(), delivery="{drain_timeout_s: 0}"))
        words = [systemd.recv(1000).decode() for _ in range(4)]
        slow.go.set()
        while "READY=1" not in words:
            words.append(systemd.recv(1000).decode())
        line.join(60)
    assert words[1] == f"EXTEND_TIMEOUT_USEC={int(starting.EXTEND_S * 1e6)}" and words[3] == words[1]
    assert words[0].startswith(f"STATUS=warming_up (COMPILING): {DETAIL}")
    assert starting.EXTEND_S > 2 * 5  # several words may be lost before systemd gives up


def line_file(settings: LineSettings, folder: Path) -> Path:
    path = folder / "line.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    return path


PROGRAM = """
import sys, threading
from edge_dkm import starting, supervisor
from edge_dkm.cli import main

def compiles_for_ever(settings, tell):
    tell("COMPILING", "building the TensorRT engine for part.onnx")
    print("loading", file=sys.stderr, flush=True)
    threading.Event().wait()

starting.QUIET_S = 0.1
supervisor.load_models = compiles_for_ever
sys.exit(main(["run", sys.argv[1], "--json"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_a_start_that_would_never_end(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path, number: signal.Signals
) -> None:
    subscriber = subscribe(mosquitto.port)
    path = line_file(make_line(mosquitto.port), tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(warming(subscriber)) >= 1, timeout_s=60)
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in error, error
    assert json.loads(out)["parts"] == 0
    wait_until(lambda: [m["state"] for m in subscriber.of("dkm.status/1")][-1] == "stopped")
    assert subscriber.of("dkm.state/1")[-1]["state"] == "halted"


class HeldBack:
    """A load that waits for `go`."""

    def __init__(self, model: Path) -> None:
        self.go, self.opened = threading.Event(), Inspector(model)

    def __call__(self, tell: Tell) -> Loaded:
        self.go.wait(20)
        return Loaded({"top": self.opened}, {})

    def await_closed(self) -> None:
        self.go.set()
        wait_until(lambda: self.opened._session is None)


def test_a_load_that_nobody_waits_for_any_more_closes_what_it_opened(tiny_model_path: Path) -> None:
    load = HeldBack(tiny_model_path)
    work = starting._Work(load, lambda code, detail: None, lambda: None)
    work.start()
    work.abandon()
    assert load.opened.providers
    load.await_closed()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no more threads")])
def test_what_breaks_the_waiting_leaves_the_load_to_itself_too_and_is_announced(
    make_line: Make, tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """A second signal, or what saying "still loading" raises."""
    load, ended = HeldBack(tiny_model_path), list[str]()
    outbox = Outbox(tmp_path / "outbox.db", "st1", lambda camera: camera)
    start = Start(make_line(free_port()), outbox, own_process=False)

    def fails(self: Start) -> None:
        raise error

    monkeypatch.setattr(starting, "QUIET_S", 0.0)
    monkeypatch.setattr(Start, "_speak_up", fails)
    monkeypatch.setattr(Start, "_end", lambda self, state, code, detail: ended.append(state))
    with pytest.raises(type(error)), start.announced():
        start.load(load)
    load.await_closed()
    outbox.close()
    assert ended == ["halted" if isinstance(error, KeyboardInterrupt) else "error"]


def test_a_signal_before_the_load_is_not_lost(make_line: Make, tiny_model_path: Path, tmp_path: Path) -> None:
    wish, called = StopWish(), list[str]()
    wish.ask()
    wish.call(lambda: called.append("start"))
    wish.call(lambda: called.append("line"))
    assert called == ["start", "line"]
    outbox = Outbox(tmp_path / "outbox.db", "st1", lambda camera: camera)
    start = Start(make_line(free_port()), outbox, own_process=False)
    wish.call(start.stop)
    with pytest.raises(StoppedError):
        start.load(lambda tell: pytest.fail("it was begun"))
    outbox.close()


BETWEEN = """
import os, signal, sys
from edge_dkm import supervisor
from edge_dkm.cli import main

class Interrupted(supervisor.Line):
    def __init__(self, *args):
        super().__init__(*args)
        os.kill(os.getpid(), signal.SIGTERM)

supervisor.Line = Interrupted
sys.exit(main(["run", sys.argv[1], "--json"]))
"""


def test_a_signal_between_load_and_line_ends_it_in_order(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path
) -> None:
    subscriber = subscribe(mosquitto.port)
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN, str(line_file(make_line(mosquitto.port), tmp_path))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and json.loads(done.stdout)["unsent"] == 0, done.stderr
    wait_until(lambda: [m["state"] for m in subscriber.of("dkm.status/1")][-1:] == ["stopped"])
    assert subscriber.of("dkm.state/1")[-1]["state"] == "halted"


LEAVING = """
import sys, threading
from edge_dkm.service.leaving import ends_with, leave_at_end

thread = threading.Thread(target=threading.Event().wait, args=(float(sys.argv[2]),), daemon=True)
thread.start()
leave_at_end(thread)
if sys.argv[2] == "0":
    thread.join()
print("said")
sys.exit(ends_with(int(sys.argv[1])) if sys.argv[1] != "-" else 0)
"""


@pytest.mark.parametrize(
    ("code", "seconds", "expected"), [("0", "600", 0), ("130", "600", 130), ("-", "600", 1), ("5", "0", 5)]
)
def test_a_process_whose_load_is_stuck_leaves_with_the_code_that_it_was_to_have(
    code: str, seconds: str, expected: int
) -> None:
    words = [sys.executable, "-c", LEAVING, code, seconds]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (expected, "said\n"), done.stderr


def test_a_second_signal_during_the_load_ends_with_130(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path
) -> None:
    path = line_file(make_line(mosquitto.port), tmp_path)
    hangs = """
def hangs(*_):
    print("ending", file=sys.stderr, flush=True)
    threading.Event().wait()

starting.Start._end = hangs
"""
    program = PROGRAM.replace("starting.QUIET_S = 0.1", hangs)
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.PIPE, text=True)
    for said in ("loading\n", "ending\n"):
        assert process.stderr is not None and said in iter(process.stderr.readline, "")
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in error, error
