"""A line end to end: a folder of images as the camera, a real broker, a subscriber that checks every message against its schema."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from devices.errors import CameraError
from edge_dkm import supervisor
from edge_dkm.errors import BrokerError, LockedError, ModelError, StorageError, UsageError
from edge_dkm.inspector import Inspector
from edge_dkm.message_schema import json_schema
from edge_dkm.outbox import Intent, Outbox
from edge_dkm.pipeline import Pipeline
from edge_dkm.settings import LineSettings
from edge_dkm.state import StateFolder
from edge_dkm.supervisor import run_line
from tests.broker import Mosquitto, Subscriber, free_port, needs_mosquitto
from tests.images import draw, write_png
from tests.waiting import wait_until

Make = Callable[..., LineSettings]
Subscribe = Callable[..., Subscriber]
pytestmark = pytest.mark.broker


def check_schemas(messages: list[tuple[str, dict[str, Any], bool]]) -> set[str]:
    """Validates every message; returns the schemas seen."""
    seen = set()
    for topic, payload, _ in messages:
        jsonschema.Draft202012Validator(json_schema(payload["schema"])).validate(payload)
        assert payload["station"] == "st1" and topic.startswith("dkm/v1/st1/")
        seen.add(payload["schema"])
    return seen


def test_every_part_arrives_once_in_order_and_every_message_is_valid(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make
) -> None:
    subscriber = subscribe(mosquitto.port)
    report = run_line(make_line(mosquitto.port))
    assert (report.parts, report.bad, report.unsent) == (12, 0, 0)
    wait_until(lambda: "stopped" in [m["state"] for m in subscriber.of("dkm.status/1")])
    results = subscriber.of("dkm.result/1")
    assert [r["cseq"] for r in results] == list(range(1, 13)) and [r["trigger"]["id"] for r in results] == list(
        range(1, 13)
    )
    names = [r["cluster"]["name"] for r in results]
    assert names[0] == names[3] == names[6] and len(set(names)) == 3
    assert check_schemas(subscriber.messages) == {
        "dkm.status/1",
        "dkm.info/1",
        "dkm.state/1",
        "dkm.health/1",
        "dkm.camera/1",
        "dkm.drift/1",
        "dkm.result/1",
    }


def test_status_info_state_health_and_camera_say_what_is_so(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make
) -> None:
    subscriber = subscribe(mosquitto.port)
    run_line(make_line(mosquitto.port))
    wait_until(lambda: "stopped" in [m["state"] for m in subscriber.of("dkm.status/1")])
    info = subscriber.of("dkm.info/1")[-1]
    assert info["providers"] == {"requested": ["CPUExecutionProvider"], "actual": ["CPUExecutionProvider"]}
    assert info["cameras"]["top"] == {"kind": "folder", "w": 32, "h": 32} and [c["id"] for c in info["clusters"]] == [
        0,
        1,
        2,
    ]
    assert info["delivery"] == {"mode": "journal", "order": "strict"} and info["model"]["codebook"] == "base"
    states = [m["state"] for m in subscriber.of("dkm.state/1")]
    assert states[0] in {"warming_up", "ready", "running"} and states[-1] == "halted"
    health = subscriber.of("dkm.health/1")[-1]
    assert health["counters"]["top"] == {"frames": 12, "results": 12, "bad": 0, "dropped": {}} and health["last"] == {
        "top": 12
    }
    assert set(health["stages"]) == {"cam:top", "infer", "commit", "mqtt", "commands"} and health["disk_free_mb"] > 0
    assert "online" in [m["state"] for m in subscriber.of("dkm.camera/1")]
    retained = {payload["schema"] for _, payload, is_retained in subscribe(mosquitto.port).messages if is_retained}
    assert retained <= {"dkm.status/1", "dkm.info/1", "dkm.state/1", "dkm.camera/1"}


def test_results_wait_for_a_broker_that_is_not_there_and_go_out_at_the_next_start(
    start_broker: Callable[..., Mosquitto], subscribe: Subscribe, make_line: Make
) -> None:
    with pytest.raises(BrokerError, match=r"12 results wait in the outbox .* cannot be reached"):
        run_line(make_line(free_port(), delivery="{drain_timeout_s: 0.5}"))
    broker = start_broker()
    subscriber = subscribe(broker.port)
    assert run_line(make_line(broker.port)).unsent == 0
    wait_until(lambda: len(subscriber.results()) == 24)
    assert [r["cseq"] for r in subscriber.of("dkm.result/1")] == list(range(1, 25))  # the first run's come first


def test_max_parts_stops_the_line(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path
) -> None:
    subscriber = subscribe(mosquitto.port)
    settings = make_line(
        mosquitto.port,
        cameras=f"{{top: {{source: '{part_folder}', pace: source, fps: 50, loop: true, policy: every}}}}",
    )
    report = run_line(settings, max_parts=20)
    assert report.parts >= 20 and report.unsent == 0
    wait_until(lambda: len(subscriber.results()) == report.parts)


def test_a_bad_image_is_a_declared_result_and_the_line_goes_on(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path
) -> None:
    (part_folder / "005.png").write_bytes(b"half a file")
    subscriber = subscribe(mosquitto.port)
    report = run_line(make_line(mosquitto.port))
    assert (report.parts, report.bad) == (11, 1)
    wait_until(lambda: len(subscriber.results()) == 12)
    bad = subscriber.results()[5]
    assert (bad["state"], bad["reason"], bad["verdict"], bad["error"]["code"], bad["cseq"]) == (
        "bad_frame",
        "bad_frame",
        "error",
        "F-DECODE",
        6,
    )


def test_verdicts_and_names_of_the_line_file_decide(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make
) -> None:
    subscriber = subscribe(mosquitto.port)
    run_line(make_line(mosquitto.port, verdicts="{default: review, clusters: {cluster-0: reject, 1: pass}}"))
    wait_until(lambda: len(subscriber.results()) == 12)
    by_cluster = {
        r["cluster"]["id"]: (r["verdict"], r["reason"]) for r in subscriber.results() if not r["novelty"]["is_novel"]
    }
    assert (
        by_cluster.items()
        <= {0: ("reject", "cluster_verdict"), 1: ("pass", "cluster_verdict"), 2: ("review", "default")}.items()
        and len(by_cluster) == 3
    )


def test_a_part_that_a_crash_cut_off_ends_in_a_declared_result(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make
) -> None:
    settings = make_line(mosquitto.port)
    with StateFolder(settings.state) as folder:
        outbox = Outbox(folder.outbox, "st1", lambda camera: f"dkm/v1/st1/{camera}/result")
        outbox.intend(
            Intent("0193a5c2-0000-7000-8000-000000000001", "top", "part_present", 41, "2026-11-20T23:44:01.000000Z")
        )
        outbox.close()
    subscriber = subscribe(mosquitto.port)
    run_line(settings)
    wait_until(lambda: len(subscriber.results()) == 13)
    first = subscriber.results()[0]
    assert (first["result_id"], first["state"], first["error"]["code"], first["trigger"]) == (
        "0193a5c2-0000-7000-8000-000000000001",
        "failed",
        "R-RESTART",
        {"kind": "part_present", "id": 41},
    )
    check_schemas(subscriber.messages)


def line_file(settings: LineSettings, path: Path) -> Path:
    path.write_text(json.dumps(settings.model_dump(mode="json", exclude_none=True)))
    return path


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "edge_dkm", "run", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slow(part_folder: Path) -> str:
    return f"{{top: {{source: '{part_folder}', pace: source, fps: 100, loop: true, policy: every}}}}"


def test_nothing_is_lost_when_the_station_is_killed_again_and_again(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path, tmp_path: Path
) -> None:
    subscriber = subscribe(mosquitto.port)
    path = line_file(make_line(mosquitto.port, cameras=slow(part_folder)), tmp_path / "line.yaml")
    for round_ in range(1, 4):
        process = start(path)
        seen = len(subscriber.results())
        wait_until(lambda seen=seen: len(subscriber.results()) >= seen + 40, timeout_s=40)  # type: ignore[misc]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert round_
    last = start(path, "--max-parts", "20")
    _, error = last.communicate(timeout=60)
    assert last.returncode == 0, error
    wait_until(
        lambda: len(subscriber.of("dkm.status/1")) > 0 and subscriber.of("dkm.status/1")[-1]["state"] == "stopped"
    )
    cseqs = [r["cseq"] for r in subscriber.results()]
    assert sorted(cseqs) == list(range(1, len(cseqs) + 1))
    assert [r["cseq"] for r in subscriber.results()] == sorted(cseqs)  # first copies in order
    copies: dict[str, list[dict[str, Any]]] = {}
    for result in subscriber.of("dkm.result/1"):
        copies.setdefault(result["result_id"], []).append(result)
    assert all(copy == group[0] for group in copies.values() for copy in group)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_line_cleanly_with_everything_delivered(
    mosquitto: Mosquitto,
    subscribe: Subscribe,
    make_line: Make,
    part_folder: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    subscriber = subscribe(mosquitto.port)
    process = start(line_file(make_line(mosquitto.port, cameras=slow(part_folder)), tmp_path / "line.yaml"), "--json")
    wait_until(lambda: len(subscriber.results()) >= 10, timeout_s=40)
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 0 and "Traceback" not in error
    report = json.loads(out)
    assert report["unsent"] == 0
    wait_until(
        lambda: subscriber.of("dkm.status/1")[-1]["state"] == "stopped" and len(subscriber.results()) == report["parts"]
    )


def test_a_second_process_on_the_same_state_is_refused_with_the_pid_of_the_first(make_line: Make) -> None:
    settings = make_line(free_port())
    import os

    with StateFolder(settings.state), pytest.raises(LockedError, match=f"held by process {os.getpid()}"):
        run_line(settings)
    with StateFolder(settings.state):
        pass  # free again


def test_a_model_that_fails_its_golden_images_never_starts_the_line(copied_model: Path, make_line: Make) -> None:
    from tests.edge_dkm.test_golden import edited

    edited(copied_model, "novelty_scale", 1.5)
    with pytest.raises(ModelError, match="golden image 0"):
        run_line(make_line(free_port(), model=str(copied_model)))


def test_golden_images_that_are_missing_stop_the_line(copied_model: Path, make_line: Make) -> None:
    copied_model.with_name("part.onnx.golden.npz").unlink()
    with pytest.raises(ModelError, match="copy them from where the model was exported"):
        run_line(make_line(free_port(), model=str(copied_model)))


def test_frames_of_another_size_than_the_training_stop_the_line_unless_allowed(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    for n in range(3):
        write_png(folder / f"{n}.png", draw("disc", np.random.default_rng(n), 48))
    with pytest.raises(
        UsageError, match=r"cameras\.top shows the model 48x48, but it was trained on images of 32x32; .*framing: any"
    ):
        run_line(
            make_line(mosquitto.port, cameras=f"{{top: {{source: '{folder}', policy: every, loop: true, fps: 20}}}}")
        )
    subscribe(mosquitto.port)
    report = run_line(
        make_line(
            mosquitto.port,
            cameras=f"{{top: {{source: '{folder}', pace: max, policy: every, framing: any}}}}",
            state=str(tmp_path / "s2"),
        )
    )
    assert report.parts == 3


def test_two_cameras_run_side_by_side_each_with_its_own_count(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path
) -> None:
    subscriber = subscribe(mosquitto.port)
    report = run_line(
        make_line(
            mosquitto.port,
            cameras=(
                f"{{top: {{source: '{part_folder}', pace: max, policy: every}}, "
                f"side: {{source: '{part_folder}', pace: max, policy: every}}}}"
            ),
        )
    )
    assert report.parts == 24
    wait_until(lambda: len(subscriber.results()) == 24)
    for camera in ("top", "side"):
        assert [r["cseq"] for r in subscriber.results() if r["camera"] == camera] == list(range(1, 13))
    assert sorted(r["seq"] for r in subscriber.of("dkm.result/1")) == list(range(1, 25))  # order is promised per camera


@needs_mosquitto
def test_the_embedded_broker_is_enough_for_a_first_try(
    make_line: Make, subscribe: Subscribe, part_folder: Path
) -> None:
    import threading

    from edge_dkm.watch import watch

    port = free_port()
    settings = make_line(
        port,
        mqtt=f"{{host: embedded, port: {port}}}",
        cameras=f"{{top: {{source: '{part_folder}', pace: source, fps: 20, policy: every}}}}",
    )
    seen: list[str] = []

    def show(topic: str, payload: bytes) -> bool:
        seen.append(topic)
        return sum(t.endswith("/top/result") for t in seen) < 12

    reader = threading.Thread(target=lambda: watch(settings, show, 20.0))
    reader.start()
    assert run_line(settings).unsent == 0
    reader.join(20)
    assert not reader.is_alive() and sum(t == "dkm/v1/st1/top/result" for t in seen) == 12


@needs_mosquitto
def test_watching_an_embedded_broker_ends_with_its_line_and_without_an_error(make_line: Make) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from edge_dkm.watch import watch

    port = free_port()
    settings = make_line(port, mqtt=f"{{host: embedded, port: {port}}}")
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, settings, lambda topic, payload: True, 20.0)
        run_line(settings)
        assert watching.result(30) is None


def test_a_port_that_is_taken_is_said_before_anything_starts(mosquitto: Mosquitto, make_line: Make) -> None:
    with pytest.raises(BrokerError, match=f"port {mosquitto.port} for the embedded broker is taken"):
        run_line(make_line(mosquitto.port, mqtt=f"{{host: embedded, port: {mosquitto.port}}}"))


def slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of a second per inspection."""
    inspect = Inspector.inspect

    def slow_inspect(inspector: Inspector, frame: Any) -> Any:
        threading.Event().wait(0.2)
        return inspect(inspector, frame)

    monkeypatch.setattr(Inspector, "inspect", slow_inspect)


def test_a_disk_that_fails_while_the_line_ends_is_an_error_and_not_a_success(
    mosquitto: Mosquitto, make_line: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, ended = Outbox.commit, Pipeline.finish
    left = iter(range(100))

    def finish(pipeline: Pipeline, *how: Any) -> bool:
        nonlocal left
        left = iter(())  # from here on the disk is full
        return ended(pipeline, *how)

    def failing(outbox: Outbox, drafts: Any) -> Any:
        if next(left, None) is None:
            raise StorageError("disk full")
        return commit(outbox, drafts)

    monkeypatch.setattr(Outbox, "commit", failing)
    monkeypatch.setattr(Pipeline, "finish", finish)
    slow_down(monkeypatch)
    with pytest.raises(StorageError, match="disk full"):
        run_line(make_line(mosquitto.port))


def test_a_film_that_is_not_there_stops_a_line_that_has_a_live_camera_too(
    mosquitto: Mosquitto, make_line: Make
) -> None:
    cameras = "{live: {source: 'synthetic:parts=5', loop: true, framing: any}, film: {source: 'folder:/nowhere'}}"
    with pytest.raises(CameraError, match="C-NODEV folder /nowhere"):
        run_line(make_line(mosquitto.port, cameras=cameras))


def test_a_slow_model_loses_nothing_at_the_end_of_recorded_material(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe(mosquitto.port)
    monkeypatch.setattr(supervisor, "FINISH_S", 0.5)  # less than all take, more than one does
    slow_down(monkeypatch)
    assert run_line(make_line(mosquitto.port)).parts == 12


def test_a_file_name_in_another_encoding_is_a_bad_frame(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, part_folder: Path
) -> None:
    Path(os.fsdecode(os.fsencode(part_folder) + b"/pi\xe8ce.png")).write_bytes(b"half a file")
    subscriber = subscribe(mosquitto.port)
    report = run_line(make_line(mosquitto.port))
    assert (report.parts, report.bad, report.unsent) == (12, 1, 0)
    wait_until(lambda: len(subscriber.results()) == 13)


def test_an_idle_line_says_halted_before_it_says_goodbye(
    mosquitto: Mosquitto, subscribe: Subscribe, make_line: Make, tmp_path: Path
) -> None:
    subscriber = subscribe(mosquitto.port)
    cameras = f"{{top: {{source: 'rtsp://127.0.0.1:{free_port()}/x'}}}}"
    process = start(line_file(make_line(mosquitto.port, cameras=cameras), tmp_path / "line.yaml"))
    wait_until(lambda: "degraded" in [m["state"] for m in subscriber.of("dkm.state/1")], timeout_s=40)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    wait_until(lambda: subscriber.of("dkm.status/1")[-1]["state"] == "stopped")
    assert subscriber.of("dkm.state/1")[-1]["state"] == "halted"


def test_a_broker_with_a_small_window_still_gets_everything(
    start_broker: Callable[..., Mosquitto], subscribe: Subscribe, make_line: Make
) -> None:
    broker = start_broker("allow_anonymous true\nmax_inflight_messages 1\n")
    subscriber = subscribe(broker.port)
    assert run_line(make_line(broker.port)).unsent == 0
    wait_until(lambda: len(subscriber.results()) == 12)


@pytest.mark.parametrize(
    ("camera", "said"),
    [
        ("deadline_ms: 100, output: {hold_ms: 300}", "cameras.top.trigger.kind is free, expected a trigger that"),
        ("trigger: T, output: {hold_ms: 300}", "cameras.top.deadline_ms is null, expected the milliseconds"),
        ("trigger: T, deadline_ms: 100, output: {}", "cameras.top.output.hold_ms is not given, expected less"),
        ("trigger: T, deadline_ms: 100, output: {hold_ms: 300}", None),
    ],
)
def test_an_output_that_may_say_ok_of_the_wrong_part_is_said_at_the_start(
    make_line: Make, part_folder: Path, caplog: pytest.LogCaptureFixture, camera: str, said: str | None
) -> None:
    output = f"output: {{kind: modbus, host: 127.0.0.1, port: {free_port()}, coil: 0, "
    camera = camera.replace("output: {", output).replace("trigger: T", "trigger: {kind: timer, period_ms: 1}")
    settings = make_line(free_port(), cameras=f"{{top: {{source: '{part_folder}', {camera}}}}}", state="none/state")
    supervisor._warn(settings)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * (said is not None)
    assert said is None or f"the output of cameras.top may say OK of the wrong part: {said}" in caplog.text
