"""A whole station as a process, with everything around it: commands, alarms, admin, health over HTTP, systemd, reject output."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge_dkm.mqtt.link import await_connack, open_link, publish, pump
from edge_dkm.settings import LineSettings, MqttSettings
from tests.broker import Mosquitto, Subscriber, free_port
from tests.faults.station import RealStation
from tests.plc import Plc
from tests.waiting import wait_until

pytestmark = pytest.mark.broker

Make = Callable[..., LineSettings]
Subscribe = Callable[..., Subscriber]


class Process(RealStation):
    """A running `edge-dkm run`, and what a MES does with it."""

    def __init__(self, settings: LineSettings, folder: Path, variables: dict[str, str]) -> None:
        super().__init__(settings, folder, "", "--log", "json", **variables)
        self._port = settings.mqtt.effective_port

    def ask(self, verb: str, command_id: str, args: dict[str, Any] | None = None, camera: str | None = None) -> None:
        """Publishes a command."""
        mqtt = MqttSettings(host="127.0.0.1", port=self._port)
        link = open_link(mqtt, f"mes-{command_id}-{verb}", clean=True)
        await_connack(link, mqtt)
        topic = f"dkm/v1/st1/{camera}/cmd/{verb}" if camera else f"dkm/v1/st1/cmd/{verb}"
        payload = json.dumps({"schema": "dkm.cmd/1", "id": command_id, "args": args or {}}).encode()
        mid = publish(link, topic, payload, qos=1)
        wait_until(lambda: pump(link, 0.02) or mid not in link.unacknowledged)
        link.client.disconnect()

    def command(self, *words: str) -> dict[str, Any]:
        """What `edge-dkm WORDS LINE --json` prints."""
        done = subprocess.run(
            [sys.executable, "-m", "edge_dkm", *words, str(self.line), "--json"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    @property
    def is_up(self) -> bool:
        """Whether it answers `edge-dkm status`."""
        done = subprocess.run([sys.executable, "-m", "edge_dkm", "status", str(self.line)], capture_output=True)
        return done.returncode == 0

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal, also to one that was stopped, and waits."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts stations; all are ended at the end."""
    running: list[Process] = []

    def start(settings: LineSettings, **variables: str) -> Process:
        running.append(Process(settings, tmp_path / f"station-{len(running)}", variables))
        return running[-1]

    yield start
    for process in running:
        process.close()


def looping(part_folder: Path, **more: str) -> str:
    rest = "".join(f", {key}: {value}" for key, value in more.items())
    return f"{{top: {{source: '{part_folder}', fps: 50, loop: true, policy: every{rest}}}}}"


def reply(subscriber: Subscriber, command_id: str) -> dict[str, Any]:
    wait_until(lambda: any(m.get("id") == command_id for m in subscriber.of("dkm.reply/1")))
    return next(m for m in subscriber.of("dkm.reply/1") if m.get("id") == command_id)


def state(subscriber: Subscriber) -> str:
    return str(subscriber.of("dkm.state/1")[-1]["state"]) if subscriber.of("dkm.state/1") else ""


def test_a_triggered_part_gets_exactly_one_result_with_its_number(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    station = run(make_line(mosquitto.port, cameras=looping(part_folder, trigger="{kind: mqtt}")))
    wait_until(lambda: state(subscriber) == "running")
    for n in range(1, 4):
        station.ask("trigger", f"t{n}", {"part": {"id": f"SN{n}", "product": "A17"}}, camera="top")
        assert reply(subscriber, f"t{n}")["ok"]
    station.ask("trigger", "t2", {"part": {"id": "SN2", "product": "A17"}}, camera="top")  # asked twice
    wait_until(lambda: len([m for m in subscriber.of("dkm.reply/1") if m["id"] == "t2"]) == 2)
    wait_until(lambda: len(subscriber.results()) >= 3)
    station.ask("trigger", "t4", {"part": {"id": "SN4"}}, camera="top")
    wait_until(lambda: len(subscriber.results()) >= 4)
    results = subscriber.results()
    assert [r["part"]["id"] for r in results] == ["SN1", "SN2", "SN3", "SN4"]
    assert all(r["trigger"]["kind"] == "mqtt" and r["state"] == "completed" for r in results)
    assert reply(subscriber, "t1")["detail"] == f"result_id {results[0]['result_id']}"
    station.ask("recipe", "r1", {"name": "B02"})
    assert reply(subscriber, "r1")["code"] == "not_built"


def test_a_triggered_part_that_a_kill_cut_off_ends_in_a_declared_result(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    # One frame in a hundred seconds: the part waits for its frame when the station is killed.
    cameras = looping(part_folder, trigger="{kind: mqtt}", deadline_ms="60000").replace("fps: 50", "fps: 0.01")
    settings = make_line(mosquitto.port, cameras=cameras)
    first = run(settings)
    wait_until(lambda: state(subscriber) == "running")
    first.ask("trigger", "t1", {"part": {"id": "SN1"}}, camera="top")
    assert reply(subscriber, "t1")["ok"]
    first.end(signal.SIGKILL)
    run(settings)
    wait_until(lambda: len(subscriber.results()) == 1)
    result = subscriber.results()[0]
    assert (result["state"], result["error"]["code"], result["part"]["id"]) == ("failed", "R-RESTART", "SN1")


def test_a_triggered_part_without_a_frame_fails_by_its_deadline(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    cameras = looping(part_folder, trigger="{kind: mqtt}", deadline_ms="300").replace("fps: 50", "fps: 0.01")
    station = run(make_line(mosquitto.port, cameras=cameras))
    wait_until(lambda: state(subscriber) == "running")
    station.ask("trigger", "t1", {"part": {"id": "SN1"}}, camera="top")
    wait_until(lambda: len(subscriber.results()) == 1)
    assert subscriber.results()[0]["error"]["code"] == "R-NO-FRAME"


def test_pause_threshold_and_labels_hold_until_changed_and_over_a_restart(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    settings = make_line(mosquitto.port, cameras=looping(part_folder))
    station = run(settings)
    wait_until(lambda: len(subscriber.results()) >= 5)
    station.ask("label", "l1", {"cluster": 0, "name": "zero", "verdict": "reject"})
    station.ask("threshold", "h1", {"value": 1000.0})
    assert reply(subscriber, "l1")["ok"] and reply(subscriber, "h1")["ok"]
    wait_until(lambda: any(r.get("cluster", {}).get("name") == "zero" for r in subscriber.results()))
    found = [r for r in subscriber.results() if r.get("cluster", {}).get("name") == "zero"]
    assert all(r["verdict"] == "reject" for r in found) and subscriber.results()[-1]["novelty"]["threshold"] == 1000.0
    station.ask("pause", "p1", {"reason": "cleaning"})
    wait_until(lambda: state(subscriber) == "halted")
    assert subscriber.of("dkm.state/1")[-1]["reason"] == {"code": "PAUSED", "detail": "cleaning"}
    wait_until(lambda: station.command("outbox", "status")["rows"] == 0)
    paused_at = station.command("outbox", "status")["last"]["top"]
    assert station.end() == 0
    again = run(settings)
    wait_until(
        lambda: (
            subscriber.of("dkm.state/1")[-1].get("reason", {}).get("code") == "PAUSED" and again.process.poll() is None
        )
    )
    wait_until(lambda: again.command("status")["counters"]["top"]["dropped"].get("paused", 0) >= 5)
    assert again.command("outbox", "status")["last"]["top"] == paused_at
    again.ask("resume", "p2")
    wait_until(lambda: len(subscriber.results()) > paused_at + 12)
    assert {r["novelty"]["threshold"] for r in subscriber.results()[-5:]} == {1000.0}
    info = subscriber.of("dkm.info/1")[-1]
    assert info["clusters"][0] | {"n": 0} == {"id": 0, "name": "zero", "verdict": "reject", "n": 0}


def test_a_replay_can_be_asked_for_by_the_mes_and_at_the_station(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    station = run(make_line(mosquitto.port, cameras=looping(part_folder)))
    wait_until(lambda: len(subscriber.results()) >= 12)
    epoch = subscriber.results()[0]["epoch"]
    station.ask("replay", "r1", {"camera": "top", "epoch": epoch, "from": 3, "to": 6})
    assert reply(subscriber, "r1")["ok"]
    wait_until(lambda: [r["cseq"] for r in subscriber.of("dkm.result/1") if r["historical"]] == [3, 4, 5, 6])
    done = station.command("outbox", "replay", "--from", "1", "--to", "2")
    assert (done["sent"], done["missing"]) == (2, 0)
    wait_until(lambda: len([r for r in subscriber.of("dkm.result/1") if r["historical"]]) == 6)
    station.ask("replay", "r2", {"camera": "side", "epoch": epoch, "from": 1, "to": 2})
    assert reply(subscriber, "r2")["code"] == "CMD-CAMERA"


def test_a_bad_command_is_answered_and_changes_nothing(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    station = run(make_line(mosquitto.port, cameras=looping(part_folder)))
    wait_until(lambda: state(subscriber) == "running")
    station.ask("threshold", "bad", {"value": -1})
    answer = reply(subscriber, "bad")
    assert not answer["ok"] and answer["code"].startswith("CMD-")
    before = len(subscriber.results())
    wait_until(lambda: len(subscriber.results()) > before + 5)
    assert {r["novelty"]["threshold"] for r in subscriber.results()} == {1.0}


def test_what_is_wrong_is_an_alarm_until_it_is_over(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    alarms = subscribe(mosquitto.port, "dkm/v1/st1/alarm/#")
    run(make_line(mosquitto.port, cameras=looping(part_folder)))  # nobody reads the results
    wait_until(lambda: [a["code"] for a in alarms.of("dkm.alarm/1") if a["active"]] == ["M-NO-CONSUMER"])
    subscribe(mosquitto.port)
    wait_until(lambda: not alarms.of("dkm.alarm/1")[-1]["active"])
    assert {a["code"] for a in alarms.of("dkm.alarm/1")} == {"M-NO-CONSUMER"}


def test_health_over_http_tells_ready_from_not_ready_and_counts_every_frame(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    port = free_port()
    station = run(make_line(mosquitto.port, cameras=looping(part_folder), health=f"{{port: {port}, metrics: true}}"))
    wait_until(lambda: len(subscriber.results()) >= 5)

    def get(path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    assert get("/healthz")[0] == 200 and get("/readyz")[0] == 200 and get("/else")[0] == 404
    metrics = get("/metrics")[1]
    values = {
        line.split(" ")[0]: float(line.split(" ")[1]) for line in metrics.splitlines() if not line.startswith("#")
    }
    outcomes = sum(values[f'edge_dkm_frames_total{{camera="top",outcome="{o}"}}'] for o in ("result", "bad", "dropped"))
    assert (
        values['edge_dkm_frames_chosen_total{camera="top"}']
        == outcomes + values['edge_dkm_frames_under_way{camera="top"}']
    )
    station.ask("pause", "p1")
    wait_until(lambda: get("/readyz")[0] == 503)
    assert "paused" in get("/readyz")[1] and get("/healthz")[0] == 200


def test_the_service_manager_hears_ready_and_a_regular_sign_of_life_and_nothing_from_a_line_that_hangs(
    mosquitto: Mosquitto,
    subscribe: Subscribe,
    make_line: Make,
    part_folder: Path,
    run: Callable[..., Process],
    tmp_path: Path,
) -> None:
    subscriber = subscribe(mosquitto.port)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        station = run(
            make_line(mosquitto.port, cameras=looping(part_folder)),
            NOTIFY_SOCKET=str(tmp_path / "notify"),
            WATCHDOG_USEC="3000000",
        )
        heard = [manager.recv(1000) for _ in range(4)]
        assert heard[0] == b"READY=1" and heard.count(b"WATCHDOG=1") >= 1
        wait_until(lambda: len(subscriber.results()) >= 3)
        station.process.send_signal(signal.SIGSTOP)
        manager.settimeout(3.5)
        with contextlib.suppress(TimeoutError):  # what was on its way
            while manager.recv(1000):
                pass
        with pytest.raises(TimeoutError):
            manager.recv(1000)
        station.process.send_signal(signal.SIGCONT)
        assert station.end() == 0
        manager.settimeout(5)
        said = []
        with contextlib.suppress(TimeoutError):
            while not said or said[-1] != b"STOPPING=1":
                said.append(manager.recv(1000))
        assert said[-1] == b"STOPPING=1"


def test_the_reject_output_says_ok_only_for_passed_parts_and_ng_when_the_station_ends(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    plc = Plc()
    try:
        output = f"{{kind: modbus, host: 127.0.0.1, port: {plc.port}, coil: 0, hold_ms: 2000}}"
        cameras = looping(part_folder, trigger="{kind: mqtt}", output=output, deadline_ms="2000")
        station = run(make_line(mosquitto.port, cameras=cameras, verdicts="{default: pass, novel: pass}"))
        wait_until(lambda: state(subscriber) == "running")
        assert plc.coil(0) is False
        station.ask("trigger", "t1", {"part": {"id": "SN1"}}, camera="top")
        wait_until(lambda: plc.coil(0) is True)
        mosquitto.kill()  # the output does not need the broker
        assert station.end() == 0
        assert plc.coil(0) is False
    finally:
        plc.close()


def test_a_station_without_a_broker_stops_quickly_and_keeps_everything(
    make_line: Make, part_folder: Path, run: Callable[..., Process], mosquitto: Mosquitto, subscribe: Subscribe
) -> None:
    subscriber = subscribe(mosquitto.port)
    settings = make_line(mosquitto.port, cameras=looping(part_folder))
    station = run(settings)
    wait_until(lambda: len(subscriber.results()) >= 5)
    mosquitto.freeze()
    wait_until(lambda: station.command("outbox", "status")["rows"] >= 20)
    rows = station.command("outbox", "status")["rows"]
    assert station.end() == 0
    mosquitto.thaw()
    later = subscribe(mosquitto.port)  # the first one's own connection may have been given up
    again = run(settings)
    wait_until(lambda: again.is_up)
    wait_until(lambda: again.command("outbox", "status")["rows"] <= 20)
    cseqs = sorted({r["cseq"] for r in [*subscriber.results(), *later.results()]})
    assert cseqs == list(range(1, len(cseqs) + 1)) and len(cseqs) > rows


def test_pictures_of_parts_that_did_not_pass_are_shown_when_asked_for(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    mqtt = MqttSettings(host="127.0.0.1", port=mosquitto.port)
    link = open_link(mqtt, "viewer", clean=True)
    await_connack(link, mqtt)
    link.client.subscribe("dkm/v1/st1/top/image", qos=0)
    subscriber = subscribe(mosquitto.port, "dkm/v1/st1/top/result")
    run(
        make_line(
            mosquitto.port,
            cameras=looping(part_folder),
            image="{when: not_pass, max_px: 20}",
            verdicts="{default: pass, novel: pass, clusters: {'0': review}}",
        )
    )
    wait_until(lambda: pump(link, 0.05) or len(link.messages) >= 4)
    wait_until(lambda: len(subscriber.results()) >= 12)
    picture = cv2.imdecode(np.frombuffer(link.messages[0].payload, np.uint8), cv2.IMREAD_COLOR)
    assert picture is not None and picture.shape == (20, 20, 3)
    verdicts = [r["verdict"] for r in subscriber.results()]
    assert 0 < verdicts.count("review") < len(verdicts)  # and no picture of those that passed
    seen = len(subscriber.results())
    assert len(link.messages) < seen
    link.client.disconnect()


def test_two_cameras_of_one_model_have_their_own_threshold(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, run: Callable[..., Process]
) -> None:
    subscriber = subscribe(mosquitto.port)
    one = looping(part_folder)[1:-1]
    station = run(make_line(mosquitto.port, cameras=f"{{{one}, {one.replace('top:', 'side:', 1)}}}"))
    wait_until(lambda: state(subscriber) == "running")
    station.ask("threshold", "h1", {"value": 7.0, "camera": "top"})
    assert reply(subscriber, "h1")["ok"]
    before = len(subscriber.results())
    wait_until(lambda: len(subscriber.results()) > before + 40)
    last = {r["camera"]: r["novelty"]["threshold"] for r in subscriber.results()}
    assert last == {"top": 7.0, "side": 1.0}
