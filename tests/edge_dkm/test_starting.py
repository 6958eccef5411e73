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
from edge_dkm.message import json_schema
from edge_dkm.models import Tell, load_models
from edge_dkm.mqtt.link import await_connack, open_link, publish, pump
from edge_dkm.settings import LineSettings
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
    path = tmp_path / "line.yaml"
    path.write_text(json.dumps(make_line(mosquitto.port).model_dump(mode="json", exclude_none=True)))
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


def test_a_load_that_nobody_waits_for_any_more_closes_what_it_opened(tiny_model_path: Path) -> None:
    go, opened = threading.Event(), Inspector(tiny_model_path)

    def load(tell: Tell) -> dict[str, Inspector]:
        go.wait(20)
        return {"top": opened}

    work = starting._Work(load, lambda code, detail: None, lambda: None)
    work.start()
    work.abandon()
    assert opened.providers
    go.set()
    work.join(20)
    with pytest.raises(Exception, match="is closed"):
        opened.providers  # noqa: B018
