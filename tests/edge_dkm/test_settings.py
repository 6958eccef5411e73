from __future__ import annotations

from pathlib import Path

import pytest

from configs import ConfigError, Sources, load_text, shipped_names
from edge_dkm.settings import LineSettings, load_line

MINIMAL = "station: st4\nmodel: m.onnx\ncameras: {top: {source: 'usb:0'}}\n"


def load(text: str, **environ: str) -> LineSettings:
    return load_text(LineSettings, text, "line.yaml", Sources((), "EDGE_DKM", environ))


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text)
    return caught.value.problems[0]


def test_three_lines_are_a_line() -> None:
    settings = load(MINIMAL)
    assert (settings.device, settings.delivery.mode, settings.mqtt.host, settings.verdicts.novel) == (
        "cpu",
        "journal",
        "embedded",
        "review",
    )
    assert settings.base_topic == "dkm/v1/st4"


def test_isa_95_levels_stand_before_the_station_in_order() -> None:
    assert load(MINIMAL + "uns: {cell: c2, enterprise: acme, line: l4}").base_topic == "acme/l4/c2/dkm/v1/st4"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "delivery: {mode: e2e, order: live_first}", "mode e2e needs order: strict"),
        (
            "station: st4\nmodel: m.onnx\ncameras: {cmd: {source: x}}",
            "cameras.cmd is not a usable name, expected a name other than",
        ),
        (MINIMAL + "mqtt: {host: a..b}", "expected a host name or an IP address"),
        (MINIMAL + "health: {host: 'a b'}", "expected a host name or an IP address"),
        (MINIMAL + "parts: {join: trigger_id}", "line.yaml:4 parts is {join: trigger_id}, it is not built yet"),
        (MINIMAL + "recipes: {A17: a17.onnx}", "it is not built yet"),
        (
            "station: st4\nmodel: m.onnx\ncameras: {top: {source: 'usb:0', trigger: {kind: plc}}}",
            "trigger kind plc is not built yet",
        ),
        (
            "station: a/b\nmodel: m.onnx\ncameras: {top: {source: x}}",
            "line.yaml:1 station is a/b, expected text that should match pattern",
        ),
        ("station: st4\ncameras: {top: {source: x}}", "model is missing: camera top has none of its own"),
        ("station: st4\nmodel: m.onnx\ncameras: {}", "cameras is {}"),
        ("station: st4\nmodel: m.onnx", "cameras is missing, expected at least one camera"),
        ("station: st4\nmodel: m.onnx\ncameras: {to p: {source: x}}", "cameras.to p is not a usable name"),
        (MINIMAL + "mqtt: {host: 'a b'}", "expected a host name or an IP address"),
        (MINIMAL + f"mqtt: {{host: {'x' * 70}.example}}", "expected a host name or an IP address"),
        (MINIMAL + "mqtt: {host: h, tls: {cert: a.pem}}", "expected cert and key together"),
        (MINIMAL + "mqtt: {host: h, prot: 1}", "line.yaml:4 mqtt.prot is not a known setting, did you mean 'port'?"),
        (
            MINIMAL + "verdicts: {clusters: {scratch: rejekt}}",
            "verdicts.clusters.scratch is rejekt, expected 'pass', 'review' or 'reject', did you mean 'reject'?",
        ),
    ],
)
def test_what_cannot_work_or_is_not_built_is_refused_in_one_line(text: str, expected: str) -> None:
    assert expected in problem(text)


def test_a_password_from_the_environment_is_read_as_text() -> None:
    assert load(MINIMAL + "mqtt: {host: h, username: u, password: '${PASS}'}", PASS="0123").mqtt.password == "0123"
    assert load(MINIMAL, EDGE_DKM__MQTT__PORT="1884", EDGE_DKM__STATION="st9").mqtt.effective_port == 1884


def test_ports_follow_from_tls_and_host() -> None:
    assert load(MINIMAL).mqtt.effective_port == 18830
    assert load(MINIMAL + "mqtt: {host: h}").mqtt.effective_port == 1883
    assert load(MINIMAL + "mqtt: {host: h, tls: {}}").mqtt.effective_port == 8883


def test_every_shipped_line_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAM_USER", "u")
    monkeypatch.setenv("CAM_PASS", "p")
    assert {"demo", "conveyor", "example"} <= set(shipped_names("line"))
    for name in shipped_names("line"):
        assert load_line(name).cameras


def test_a_camera_may_bring_its_own_model() -> None:
    settings = load("station: st4\ncameras: {top: {source: 'usb:0', model: a.onnx}}")
    assert settings.cameras["top"].model == "a.onnx"


def test_the_state_folder_is_a_path() -> None:
    assert load(MINIMAL + "state: /var/lib/x").state == Path("/var/lib/x")


def test_a_region_outside_the_roi_is_named_without_a_dump_of_the_camera() -> None:
    camera = "{source: 'usb:0', roi: [160, 55, 160, 160], trigger: {kind: part_present, region: [1, 1, 3, 3]}}"
    assert problem(f"station: st4\nmodel: m.onnx\ncameras:\n  top: {camera}") == (
        "CFG-VALUE line.yaml:4 cameras.top: trigger.region [1, 1, 3, 3] does not lie inside roi [160, 55, 160, 160] (both in frame pixels)"
    )
